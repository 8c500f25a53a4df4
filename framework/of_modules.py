"""What a Fit has for its module, and the module's own methods reach, without holding it."""

from typing import Generic, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

Thing = TypeVar("Thing")


class OfModules(Generic[Thing]):
    """One thing for each module, as long as a Fit has it.

    The module doesn't hold it: modules are copied and pickled. A strong reference in here would keep it, and with it a
    strategy and its process groups, for ever.
    """

    def __init__(self) -> None:
        self.things: WeakKeyDictionary[nn.Module, ReferenceType[Thing]] = WeakKeyDictionary()

    def keep(self, module: nn.Module, thing: Thing) -> Thing:
        """Have ``get`` find the thing as long as somebody else keeps it, and return it."""
        self.things[module] = ref(thing)
        return thing

    def get(self, module: nn.Module) -> Thing | None:
        """Return the module's thing; None where no Fit has one. torch.compile can look inside."""
        found = self.things.get(module)
        return None if found is None else found()


def check_no_replica(module: nn.Module, what: str) -> None:
    """Refuse what a copy of the module that ``strategy="dp"`` has made for a device asks for.

    Raises:
        ValueError: it is such a copy.
    """
    if getattr(module, "_is_replica", False):
        raise ValueError(
            f"{what} in forward: strategy='dp' runs forward on copies of the module, which no run knows. Write it in "
            "loss, or use strategy='ddp'."
        )
