"""Small transformers and peft models with random weights, and rows for them: ``from language_models import llama``.

transformers and peft take seconds to import, so they are imported where a model is made.
"""

from typing import Any

import torch
from stratagem import TrainModule
from stratagem.framework.module import IGNORED_LABEL
from torch import Tensor, nn

VOCABULARY, LENGTH, CLASSES = 64, 8, 3
SIZES = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def llama(width: int = 32, **options: Any) -> Any:
    """A decoder with grouped key and value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**SIZES, "hidden_size": width, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def tied_llama() -> Any:
    """The same, with one weight for embedding and head."""
    return llama(tie_word_embeddings=True)


def bert_options() -> dict[str, Any]:
    """Without dropout, so that runs can be compared."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {**SIZES, **quiet, "hidden_size": 32, "max_position_embeddings": 32}


def masked_bert() -> Any:
    """An encoder that predicts tokens; its head is tied to its embedding."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**bert_options()))


def classifying_bert() -> Any:
    """An encoder that predicts one class a row."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**bert_options(), num_labels=CLASSES))


def with_adapters(model: nn.Module, dropout: float = 0.0, rank: int = 4) -> Any:
    """A peft model: LoRA beside the query and value projections of a Llama."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def with_soft_prompt(model: nn.Module) -> Any:
    """A peft model: three trained embeddings stand before each row."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def quantized(model: nn.Module, storage: torch.dtype = torch.uint8) -> nn.Module:
    """The model with bitsandbytes' nf4 weights in all its linear layers but the head. On the CPU bitsandbytes is wrong
    for layers whose inputs aren't whole blocks of 64.
    """
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            sizes = layer.in_features, layer.out_features
            packed = Linear4bit(*sizes, bias=False, quant_type="nf4", quant_storage=storage)
            packed.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed.requires_grad_(False))
    return model.to("cpu")  # which packs them


MODELS = {
    "llama": llama,
    "tied llama": tied_llama,
    "masked bert": masked_bert,
    "classifying bert": classifying_bert,
    "lora": lambda: with_adapters(llama()),
    "soft prompt": lambda: with_soft_prompt(llama()),
    "qlora": lambda: with_adapters(quantized(llama(64))),
    "qlora in float32": lambda: with_adapters(quantized(llama(64), torch.float32)),
    "qlora in bfloat16": lambda: with_adapters(quantized(llama(64), torch.bfloat16)),
}


def make(kind: str, seed: int = 0) -> TrainModule:
    """A wrapped model of MODELS; the same weights for the same seed."""
    torch.manual_seed(seed)
    return TrainModule.wrap(MODELS[kind](), causal=False if kind == "soft prompt" else None)


def text_rows(count: int, kind: str = "llama") -> list[dict[str, Tensor]]:
    """Rows of "input_ids", "attention_mask" and "labels". Row i ends in i % (LENGTH + 1) positions of padding: some
    have no label at all, some only the first, which a causal model doesn't predict.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels, mask = tokens.clone(), torch.ones(LENGTH, dtype=torch.long)
        begin = LENGTH - i % (LENGTH + 1)
        labels[begin:], mask[max(begin, 1) :] = IGNORED_LABEL, 0
        target = tokens[0] % CLASSES if kind == "classifying bert" else labels
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": target})
    return rows
