"""FSDP2 sums the gradients that a backward left on each rank, and takes it that those are the same ones on all ranks.

A parameter that only some ranks' backward reached (an expert that no token of a rank came to, a branch by the batch)
makes torch's messages differ in size, or adds one parameter's gradient to another's without an error. Here the ranks'
sets are compared wherever a rank's own changes, by the store; where every backward reaches all, nothing is asked.

The names with an underscore are torch's own, of 2.9 to 2.13.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .gathering import parameter_groups

SECONDS = 60.0  # that ranks which find a change wait for the others to find the same

AllSay = Callable[[str, float], bool]


class UsedParameters:
    """Stops a run whose ranks have gradients of different parameters, before they are summed.

    Args:
        unit: sharded by ``fully_shard``; all groups of parameters that it gathers itself are watched.
        names: of all parameters of the module, by the layer and the name in it.
        all_say: whether every rank comes within some seconds and says the same.
    """

    def __init__(self, unit: nn.Module, names: Mapping[tuple[int, str], str], all_say: AllSay) -> None:
        self.all_say = all_say
        for group in parameter_groups(unit):
            places = [parameter._module_info for parameter in group.fsdp_params]
            self.watch(group, [names[id(place.module), place.param_name] for place in places])

    def watch(self, group: Any, names: list[str]) -> None:
        """Look at a group's gradients before each sum of them."""
        reduce = group.post_backward
        agreed = [True] * len(names)

        def reduce_agreed(*arguments: Any) -> None:
            nonlocal agreed
            if group.reduce_grads:
                found = [has_gradient(parameter) for parameter in group.fsdp_params]
                if found != agreed:
                    self.agree(names, found)
                    agreed = found
            reduce(*arguments)

        group.post_backward = reduce_agreed

    def agree(self, names: list[str], found: list[bool]) -> None:
        """Go on if all ranks find gradients of the same parameters.

        Raises:
            ValueError: names the parameters without a gradient on this rank.
        """
        if self.all_say(repr([names, found]), SECONDS):
            return
        missing = [name for name, has in zip(names, found, strict=True) if not has]
        what = f"did not reach {', '.join(missing)}" if missing else f"reached all of {', '.join(names)}"
        raise ValueError(
            f"strategy='fsdp2': this rank's backward {what}. Another rank's reached others, so that their gradients "
            "can't be summed. Write strategy=FSDP2(find_unused_parameters=True): what a rank has no gradient of takes "
            "part with zeros then."
        )


def has_gradient(parameter: Any) -> bool:
    """Whether a parameter has a gradient to sum; one that takes none counts as if it had."""
    if not parameter.sharded_param.requires_grad:
        return True
    if parameter.unsharded_accumulated_grad is not None:
        return True
    whole = getattr(parameter, "_unsharded_param", None)
    return whole is not None and whole.grad is not None
