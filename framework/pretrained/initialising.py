"""Initial values of layers that no file holds, by the rules of the transformers model that they are in."""

from typing import Any

from torch import nn


def initialise_by_model(root: nn.Module, layer: nn.Module) -> bool:
    """Fill a layer's parameters as transformers does, which asks the model around a layer, and then once more for each
    layer around it: GPT-2's attention has a rule for the projection inside of it.

    Args:
        root: the module that is trained.
        layer: it has memory; the other layers are left alone.

    Returns:
        Whether there is a transformers model around the layer.
    """
    name = next(name for name, each in root.named_modules() if each is layer)
    around = [root]
    for part in name.split(".") if name else ():
        around.append(getattr(around[-1], part))
    models = [index for index, each in enumerate(around) if hasattr(each, "_init_weights")]
    if not models:
        return False
    from transformers.initialization import guard_torch_init_functions

    own = set(map(id, layer.parameters(recurse=False)))
    for tensor in (*root.parameters(), *root.buffers()):
        if id(tensor) not in own:
            mark(tensor)
    with guard_torch_init_functions():
        for index in range(len(around) - 1, models[0] - 1, -1):
            model: Any = around[max(each for each in models if each <= index)]
            model._init_weights(around[index])
    return True


def mark(tensor: Any) -> None:
    """Have transformers' initial values leave a tensor alone."""
    tensor._is_hf_initialized = True
