"""Adapters of peft over a base whose weights come from a file: they are made for real, the base on the meta device."""

from typing import Any

import torch
from torch import nn

PLAIN = (True, False, "gaussian")
"""LoRA's initial values that don't follow from the base's weights."""
WHOLE = "Load the base whole, by from_pretrained, put the adapters on it and give that to TrainModule.wrap."


def file_names(root: nn.Module, name: str) -> str:
    """What a tensor is called in a file of the base alone, without the layers that peft puts around it.

    Args:
        root: a peft model, or any other.
        name: of a parameter or buffer of ``root``.
    """
    adapters = getattr(root, "peft_config", None)
    if not adapters:
        return name
    parts = name.removeprefix("base_model.model.").split(".")
    kept = []
    for number, part in enumerate(parts):
        copied = number > 0 and parts[number - 1] == "modules_to_save" and part in adapters
        if part not in ("base_layer", "original_module", "modules_to_save") and not copied:
            kept.append(part)
    return ".".join(kept)


@torch.no_grad()
def make_adapters(root: Any) -> None:
    """Give the adapters of a model that was made without memory theirs, and initial values.

    Raises:
        ValueError: names adapters whose initial values need the base's weights, or aren't known here.
    """
    configs = getattr(root, "peft_config", None)
    if not configs:
        return
    from peft import PeftType
    from peft.tuners.lora import LoraLayer

    for name, config in configs.items():
        if config.peft_type != PeftType.LORA:
            raise ValueError(
                f"The adapter {name!r} is of peft's type {config.peft_type.value}, and over weights from a file only "
                f"LoRA's are made. {WHOLE}"
            )
        initial = config.init_lora_weights
        if config.use_dora or not any(initial is plain or initial == plain for plain in PLAIN):
            how = "use_dora=True" if config.use_dora else f"init_lora_weights={initial!r}"
            raise ValueError(
                f"The adapter {name!r} has {how}: its initial values follow from the base's weights, which aren't read "
                f"yet. {WHOLE}"
            )
    for layer in root.modules():
        if isinstance(layer, LoraLayer):
            for part in layer.adapter_layer_names:
                give_memory(getattr(layer, part))
            for name, config in configs.items():
                layer.reset_lora_parameters(name, config.init_lora_weights)


def give_memory(part: nn.Module) -> None:
    """Give parameters memory, and no values yet."""
    for layer in part.modules():
        for key, parameter in layer._parameters.items():
            if parameter is not None and parameter.is_meta:
                memory = torch.empty_like(parameter, device="cpu")
                layer._parameters[key] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
