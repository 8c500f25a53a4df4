"""The random state of a rank as JSON: the generators of Python, numpy, and torch on the host and its accelerator."""

import base64
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_worker(seed: int) -> None:
    """Seed what a process that loads data can draw from, to the same numbers as ``seed_everything``, for each batch."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if reaches_devices():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would note this call's stack for a device that never comes, which takes 128 us
        torch.default_generator.manual_seed(seed)


@functools.cache
def reaches_devices() -> bool:
    """Whether ``torch.manual_seed`` seeds more than the host in this process: not without an accelerator, nor in one
    that was forked from a process that uses CUDA.
    """
    return not torch.cuda._is_in_bad_fork() and torch.accelerator.is_available()


def combine_seeds(*numbers: int) -> int:
    """Return a seed that follows from several numbers, none of them negative: another one where any of them differs."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def capture() -> dict[str, Any]:
    """Return the state of every generator of this process, as JSON types."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = encode(torch.cuda.get_rng_state())
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator to a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode(state["cuda"]))


class Moment:
    """The state of every generator of this process at the moment when it is made, to draw the same numbers again. It
    doesn't wait for the device.

    Args:
        device: whose generator is kept beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.python, self.numpy, self.torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.generators: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.of_device = None if self.generators is None else self.generators.get_rng_state()

    def restore(self) -> None:
        """Set every generator to what it was."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.generators is not None:
            self.generators.set_rng_state(self.of_device)


def problem(state: Any) -> str | None:
    """Return why ``restore`` can't take a state that was read from a file, or None where it can. Unchecked, numpy would
    read beyond its memory at a position that isn't in it.
    """
    try:
        version, words, gauss = state["python"]
        random.Random().setstate((version, tuple(words), gauss))
        if not (gauss is None or isinstance(gauss, float)):
            return f"python's gauss is {gauss!r:.40}"
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return f"python: {error!r}"
    try:
        name, keys, position, has_gauss, cached = state["numpy"]
        whole = [position, has_gauss, *keys]
        if any(type(number) is not int for number in whole) or not all(0 <= number < 2**32 for number in whole):
            return "numpy: its words, position and flag are whole numbers below 2^32"
        if name != "MT19937" or len(keys) != 624 or position > 624 or has_gauss > 1 or type(cached) is not float:
            return f"numpy: {len(keys)} words of {name!r:.40} at {position}, {has_gauss}, {cached!r:.40}"
    except (KeyError, TypeError, ValueError) as error:
        return f"numpy: {error!r}"
    if not isinstance(state.get("torch"), str):
        return "torch: it is no text"
    return generator_problem(state["torch"]) or cuda_problem(state.get("cuda"))


def generator_problem(text: str) -> str | None:
    """Return why a generator of torch on the host can't take an encoded state, or None where it can."""
    try:
        torch.Generator().set_state(decode(text))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"torch: {error}"
    return None


def cuda_problem(text: Any) -> str | None:
    """Return why the generator of CUDA can't take an encoded state, or None where it can, or where there is no CUDA."""
    if text is None or not torch.cuda.is_available():
        return None
    try:
        torch.Generator("cuda").set_state(decode(text))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"cuda: {error}"
    return None


class OwnRandomState:
    """Random numbers for one purpose: what is drawn from the global generators of Python, numpy and torch inside
    ``entered`` follows from the seed alone, and changes nothing outside.

    Args:
        seed: the seed of all three generators.

    Example:
        >>> own = OwnRandomState(seed=0)
        >>> with own.entered():
        ...     sample = random.random()  # the same number each time, whatever was drawn outside
    """

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed).getstate()
        self.numpy: Any = numpy.random.MT19937(numpy.random.SeedSequence(seed))
        self.torch = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Entered with this object's states in the global generators; afterwards, the states outside are restored."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        outside = random.getstate(), numpy.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
        random.setstate(self.python)
        # The generator object itself is exchanged, since copying its state takes a hundred times as long.
        numpy.random.set_bit_generator(self.numpy)  # type: ignore[attr-defined]
        torch.set_rng_state(self.torch)
        self.python, self.numpy, self.torch = outside


def encode(state: torch.Tensor) -> str:
    """Encode the bytes of a uint8 tensor as text."""
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> torch.Tensor:
    """Decode the uint8 tensor that ``encode`` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
