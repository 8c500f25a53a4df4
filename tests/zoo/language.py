"""Language models of transformers, of x-transformers, and one around packed sequences."""

from typing import Any

from family import (
    CLASSES,
    HEADS,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Family,
    class_rows,
    text_rows,
    token_class_rows,
    translation_rows,
    wrapped,
)
from stratagem import TrainModule
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def of_transformers(model: str, config: str, **sizes: Any) -> Any:
    """Makes a model of transformers, by the names of its class and its configuration's."""

    def make() -> Any:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return wrapped(make)


def decoder(name: str, **options: Any) -> Family:
    """A decoder of transformers under its usual names."""
    traits = {key: options.pop(key) for key in ("tp", "compiles", "by_nature") if key in options}
    make = of_transformers(f"{name}ForCausalLM", f"{name}Config", **{**GROUPED, **options})
    return Family(make, text_rows, packages=("transformers",), **traits)


class PackedTagger(TrainModule):
    """An LSTM over packed sequences: rows of many lengths without padding in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        lengths = (labels >= 0).sum(dim=1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(input_ids), lengths, True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=LENGTH)
        return self.head(states)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


class XTransformer(TrainModule):
    """A decoder of x-transformers, whose layers are lists of lists of layers."""

    def __init__(self) -> None:
        super().__init__()
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=8)
        self.net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
DEEPSEEK = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}
BERT = {**SIZES, **QUIET, "pad_token_id": 0}

PACKAGES = ("transformers",)
FAMILIES: dict[str, Family] = {
    "Llama": decoder("Llama", tp=True, compiles=True),
    "Mistral": decoder("Mistral", tp=True),
    "Qwen3": decoder("Qwen3", tp=True, head_dim=8),
    "Gemma3": Family(
        of_transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=8),
        text_rows,
        packages=PACKAGES,
        tp=True,
    ),
    "Mixtral": decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Mixtral with a router's loss": decoder(
        "Mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        by_nature={"ranks": "the router's loss is no mean over items: it is made of each micro-batch's own shares"},
    ),
    "Qwen3-MoE": decoder("Qwen3Moe", num_experts=4, head_dim=8, **EXPERTS),
    "DeepSeek-V3": decoder("DeepseekV3", **DEEPSEEK, **EXPERTS),
    "GPT-2": Family(of_transformers("GPT2LMHeadModel", "GPT2Config", **GPT2), text_rows, packages=PACKAGES),
    "Mamba": Family(of_transformers("MambaForCausalLM", "MambaConfig", **MAMBA), text_rows, packages=PACKAGES),
    "T5": Family(
        of_transformers("T5ForConditionalGeneration", "T5Config", **T5),
        translation_rows,
        packages=PACKAGES,
        adam_epsilon=1e-6,
    ),
    "BART": Family(
        of_transformers("BartForConditionalGeneration", "BartConfig", **ENCODER_DECODER),
        translation_rows,
        packages=PACKAGES,
    ),
    "BERT, masked": Family(of_transformers("BertForMaskedLM", "BertConfig", **BERT), text_rows, packages=PACKAGES),
    "BERT, classes": Family(
        of_transformers("BertForSequenceClassification", "BertConfig", **BERT, num_labels=CLASSES),
        class_rows,
        packages=PACKAGES,
    ),
    "BERT, tokens": Family(
        of_transformers("BertForTokenClassification", "BertConfig", **BERT, num_labels=CLASSES),
        token_class_rows,
        packages=PACKAGES,
    ),
    "x-transformers": Family(XTransformer, text_rows, packages=("x_transformers",)),
    "LSTM, packed": Family(PackedTagger, text_rows, blocks=False),
}
