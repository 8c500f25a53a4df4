"""Models of images, speech and graphs: of transformers, diffusers and torch_geometric."""

from typing import Any

import torch
from family import (
    CLASSES,
    HEADS,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Family,
    generator,
    image_rows,
    padded_labels,
)
from language import ENCODER_DECODER, GROUPED, PACKAGES, QUIET, SIZES, of_transformers
from stratagem import TrainModule
from torch import Tensor, nn

VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 8,
}


class ContrastiveCLIP(TrainModule):
    """CLIP with a loss over the pairs within a row's own candidates, so that it is a mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        text = {**SIZES, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
        vision = {**VISION, "projection_dim": 16}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        found = self.clip(input_ids=input_ids, pixel_values=pixel_values)
        similarity = (found.text_embeds * found.image_embeds).sum(dim=-1)
        return similarity * self.clip.logit_scale.exp()

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, batch["match"])


def paired_rows(count: int) -> list[dict[str, Tensor]]:
    """Text and image, and whether they belong together."""
    draw = generator()
    tokens = torch.randint(4, VOCABULARY, (count, LENGTH), generator=draw)
    images = torch.randn(count, 3, 16, 16, generator=draw)
    tokens[:, -1] = 2
    return [
        {"input_ids": text, "pixel_values": image, "match": (text[0] % 2).float()}
        for text, image in zip(tokens, images, strict=True)
    ]


def speech_rows(count: int) -> list[dict[str, Tensor]]:
    """A spectrogram and the tokens that are spoken."""
    draw, rows = generator(), []
    for row in range(count):
        tokens = torch.randint(4, VOCABULARY, (6,), generator=draw)
        features = torch.randn(8, 32, generator=draw)
        rows.append({"input_features": features, "labels": padded_labels(tokens, row)})
    return rows


def wave_rows(count: int) -> list[dict[str, Tensor]]:
    """A wave and the letters that are spoken."""
    draw = generator()
    waves = torch.randn(count, 400, generator=draw)
    return [{"input_values": wave, "labels": torch.randint(1, 8, (3,), generator=draw)} for wave in waves]


def illustrated_rows(count: int) -> list[dict[str, Tensor]]:
    """Text that begins with the places of an image's patches."""
    draw, rows = generator(), []
    for row in range(count):
        tokens = torch.cat([torch.full((4,), 3), torch.randint(4, VOCABULARY, (LENGTH - 4,), generator=draw)])
        labels = padded_labels(tokens, row % 5)
        labels[:4] = -100
        pixels = torch.randn(3, 16, 16, generator=draw)
        rows.append({"input_ids": tokens, "pixel_values": pixels, "labels": labels})
    return rows


def detection_rows(count: int) -> list[dict[str, Any]]:
    """An image and the boxes in it: as many as happens."""
    draw, rows = generator(), []
    for row in range(count):
        number = 1 + row % 3
        boxes = torch.rand(number, 4, generator=draw) * 0.4 + 0.1
        classes = torch.randint(CLASSES, (number,), generator=draw)
        rows.append({"pixel_values": torch.randn(3, 16, 16, generator=draw), "boxes": boxes, "classes": classes})
    return rows


def collate_detection(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Images stacked, boxes as a list of mappings."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [{"class_labels": sample["classes"], "boxes": sample["boxes"]} for sample in samples],
    }


class Denoiser(TrainModule):
    """Predicts the noise in an image with a model of diffusers."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["noise"])


class UNet(Denoiser):
    """diffusers' UNet2DModel."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.net(sample, timestep).sample


class DiT(Denoiser):
    """diffusers' DiTTransformer2DModel, whose blocks are used from outside: their first norm embeds the time."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            num_layers=LAYERS,
            norm_num_groups=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
        for layer in self.net.modules():
            if type(layer).__name__ == "LabelEmbedding":
                layer.dropout_prob = 0.0

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return self.net(sample, timestep=timestep, class_labels=label).sample


def noise_rows(count: int) -> list[dict[str, Tensor]]:
    """Noisy images, their time and their noise."""
    draw = generator()
    noise = torch.randn(count, 3, 8, 8, generator=draw)
    image = torch.randn(count, 3, 8, 8, generator=draw)
    return [
        {
            "sample": image[row] + noise[row],
            "timestep": torch.tensor(row % 10),
            "label": torch.tensor(row % 3),
            "noise": noise[row],
        }
        for row in range(count)
    ]


class GraphClassifier(TrainModule):
    """Two graph convolutions of torch_geometric over a batch of graphs."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(4, 8), GCNConv(8, CLASSES)

    def forward(self, graphs: Any) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.first(graphs.x, graphs.edge_index).relu()
        return global_mean_pool(self.second(x, graphs.edge_index), graphs.batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch.y)

    def count_items(self, batch: Any) -> int:
        return batch.num_graphs


def graph_rows(count: int) -> list[Any]:
    """Rings of three to seven nodes."""
    from torch_geometric.data import Data

    draw, rows = generator(), []
    for row in range(count):
        nodes = 3 + row % 5
        ring = torch.arange(nodes)
        edges = torch.stack([ring, ring.roll(1)])
        x = torch.randn(nodes, 4, generator=draw)
        rows.append(Data(x=x, edge_index=edges, y=torch.tensor([row % CLASSES])))
    return rows


def collate_graphs(samples: list[Any]) -> Any:
    """One big graph of many, as torch_geometric's loader makes it."""
    from torch_geometric.data import Batch

    return Batch.from_data_list(samples)


WHISPER = {
    **ENCODER_DECODER,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
WAV2VEC2 = {
    "vocab_size": 8,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}


def llava() -> Any:
    """A language model that is shown the patches of an image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**GROUPED),
            image_token_id=3,
            vision_feature_layer=-1,
        )
    )


BATCH_STATISTICS = {"ranks": "statistics of a rank's own part of the batch: BatchNorm's nature; see sync_batchnorm"}
FAMILIES: dict[str, Family] = {
    "ViT": Family(
        of_transformers("ViTForImageClassification", "ViTConfig", **VISION, **QUIET, num_labels=CLASSES),
        image_rows,
        packages=PACKAGES,
        compiles=True,
    ),
    "ResNet (BatchNorm)": Family(
        of_transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_labels=CLASSES,
            layer_type="basic",
        ),
        lambda count: image_rows(count, 32),
        packages=PACKAGES,
        blocks=False,
        by_nature=BATCH_STATISTICS,
        samples=44,
    ),
    "CLIP": Family(ContrastiveCLIP, paired_rows, packages=PACKAGES),
    "Llava": Family(
        lambda: TrainModule.wrap(llava(), causal=True),
        illustrated_rows,
        packages=PACKAGES,
        tp=True,
        # The norm after the tower's last layer has no part in what is taken from the layer.
        refused={"ddp": "find_unused_parameters=True"},
    ),
    "Whisper": Family(
        of_transformers("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), speech_rows, packages=PACKAGES
    ),
    "wav2vec2 (CTC)": Family(
        of_transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAV2VEC2), wave_rows, packages=PACKAGES, tolerance=3e-4
    ),
    "YOLOS (list of mappings)": Family(
        of_transformers(
            "YolosForObjectDetection",
            "YolosConfig",
            **{**VISION, "image_size": [16, 16]},
            **QUIET,
            num_detection_tokens=5,
            num_labels=CLASSES,
        ),
        detection_rows,
        collate=collate_detection,
        packages=(*PACKAGES, "scipy"),
        by_nature={"ranks": "its loss is a mean over the boxes of a micro-batch, which it counts itself"},
    ),
    "diffusers UNet": Family(UNet, noise_rows, packages=("diffusers",), blocks=False),
    "diffusers DiT": Family(
        DiT,
        noise_rows,
        packages=("diffusers",),
        refused=dict.fromkeys(("fsdp1", "fsdp2"), "write shard_units(self) on DiT"),
    ),
    "torch_geometric GCN": Family(
        GraphClassifier, graph_rows, collate=collate_graphs, packages=("torch_geometric",), blocks=False
    ),
}
