"""Models that are made without memory: parameters on the meta device, buffers for real, weights in files or nowhere."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...strategies.materialize import parameters_on_meta
from .adapters import make_adapters
from .directory import find_directory, read_config, stored_tensors
from .weights import Weights, find_weights

QUANTIZED_LAYERS = ("bitsandbytes", "torchao", "gptqmodel", "awq", "hqq", "optimum")
WHOLE = "Load it by from_pretrained, and give that model to TrainModule.wrap."


def model_of(path: str | PathLike[str], dtype: torch.dtype | None) -> nn.Module:
    """Make the model that a directory's config.json describes, as from_pretrained would, but without its weights.

    Args:
        path: see find_directory.
        dtype: of the parameters; None takes the configuration's, else that of the first floating-point tensor.

    Raises:
        ValueError: it isn't a transformers model, or its weights are quantized.
    """
    directory = find_directory(path)
    saved = read_config(directory)
    if not saved.get("architectures"):
        raise ValueError(
            f'{directory} has no config.json that names a class of transformers in "architectures". Write '
            "TrainModule.wrap(lambda: Model(...), weights=directory)."
        )
    check_quantized(saved.get("quantization_config"), str(directory))
    import transformers

    name = saved["architectures"][0]
    kind: Any = getattr(transformers, name, None)
    if kind is None or "auto_map" in saved:
        raise ValueError(
            f"{directory} is a {name}, whose code isn't transformers' own. Make it yourself: TrainModule.wrap(lambda: "
            "AutoModelForCausalLM.from_config(config, trust_remote_code=True), weights=directory)."
        )
    config = kind.config_class.from_pretrained(directory, local_files_only=True)
    if dtype is None and config.dtype is None:
        kinds = [tensor.dtype for tensor in stored_tensors(directory).values()]
        dtype = next((each for each in kinds if each.is_floating_point), torch.float32)
    model: Any = without_memory(lambda: kind._from_config(config, dtype=dtype or config.dtype))
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """Call a function that makes a model, with parameters on the meta device. Adapters of peft are made for real.

    Raises:
        TypeError: it returns something else.
        ValueError: it loads weights, which would be lost, or makes quantized layers.
    """
    with parameters_on_meta(set()):
        model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"TrainModule.wrap takes a module, a model's directory, or a function that returns a module. Received a "
            f"function that returned: {model!r:.200}"
        )
    if any("_weight_conversions" in vars(layer) for layer in model.modules()):
        raise ValueError(
            "The function given to TrainModule.wrap calls from_pretrained, and what it loads would be lost: parameters "
            "have no memory before they are placed. Write from_config(config), and give the directory as weights=."
        )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    check_quantized(config, f"the function's {type(model).__name__}")
    for name, layer in model.named_modules():
        if type(layer).__module__.partition(".")[0] in QUANTIZED_LAYERS:
            check_quantized(f"{type(layer).__name__} {name}", f"the function's {type(model).__name__}")
    make_adapters(model)
    return model


def check_quantized(found: object, where: str) -> None:
    """Refuse weights in fewer bits, which can't be read by parts: their numbers and scales belong together.

    Raises:
        ValueError: something was found.
    """
    if found:
        raise ValueError(f"{where} is quantized ({found!r:.200}), and parts of such weights can't be read. {WHOLE}")


def weights_of(model: nn.Module, path: str | PathLike[str], new_layers: Sequence[str]) -> Weights:
    """Find the weights of a model that was made without memory in a directory, and fill its buffers.

    Raises:
        ValueError: there are none, or they aren't this model's.
    """
    directory: Path = find_directory(path)
    check_quantized(read_config(directory).get("quantization_config"), str(directory))
    with torch.no_grad():
        return find_weights(model, directory, new_layers)
