"""A table of a module's layers: what each is, how large, what goes in and out, and what a forward costs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import random_state
from ..measures.parameters import Layer, layers_of
from ..module import TrainModule
from .numbers import format_count
from .sample import NoSample, one_sample
from .tracing import NotTraceable, Traced, built, is_whole, size_in_bytes, trace

COLUMNS = 160  # of the table, at most


@dataclass(frozen=True)
class Summary:
    """The layers of a module, as a table that ``print`` and notebooks show.

    Attributes:
        layers: all of them, the module itself first, whatever the table shows.
        traced: what each layer did in a forward, by its name; empty where none could be computed.
        note: why none could be computed, or what it was computed on.
        bytes: that parameters and buffers take; None where this rank has a part of them.
        depth: layers that are deeper are counted in those above them, and not shown.

    Example:
        >>> summary = fit.summary(depth=1)
        >>> summary.layers[0].trainable, summary.flops
        (21, 32)
    """

    layers: tuple[Layer, ...]
    traced: dict[str, Traced]
    note: str
    bytes: int | None
    depth: int

    @property
    def flops(self) -> int | None:
        """Floating-point operations of the forward; None where none could be computed."""
        return self.traced[""].flops if "" in self.traced else None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        columns = ["layer", "type", "input", "output"] if self.traced else ["layer", "type"]
        for name in columns:
            table.add_column(name, overflow="fold")
        for name in ("parameters", "trainable", *(["FLOPs"] if self.traced else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows():
            table.add_row(*(Text(cell) for cell in row))
        console = Console(width=COLUMNS, color_system=None, force_jupyter=False, force_terminal=False)
        with console.capture() as drawn:
            console.print(table)
        lines = [line.rstrip() for line in drawn.get().splitlines()]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:], rule, *self.totals()])

    __repr__ = __str__

    def rows(self) -> Iterator[list[str]]:
        """The cells of the table, a row for each layer that is shown. Alike neighbours in a list share one."""
        for node in tree_of(self.layers).shown(self, self.depth):
            layer, did = node.layer, self.traced.get(node.layer.name)
            total = layer.trainable + layer.frozen
            cells = ["  " * layer.depth + node.label, layer.kind]
            if self.traced:
                cells += [format_shapes(did.inputs), format_shapes(did.outputs)] if did else ["", ""]
            cells += [format_count(total) if total else "", f"{100 * layer.trainable / total:.3g} %" if total else ""]
            if self.traced:
                flops = node.flops(self.traced)
                cells.append(format_operations(flops) if flops else "")
            yield cells

    def totals(self) -> Iterator[str]:
        """The lines under the table."""
        whole = self.layers[0]
        total = whole.trainable + whole.frozen
        size = "" if self.bytes is None else f"; {self.bytes / 2**20:,.1f} MiB with buffers"
        trainable, frozen = format_count(whole.trainable), format_count(whole.frozen)
        yield f"{format_count(total)} parameters: {trainable} trainable, {frozen} frozen{size}"
        if self.flops is not None:
            yield f"{format_operations(self.flops)}FLOPs in a forward of {self.note}"
        elif self.note:
            yield f"No shapes and FLOPs: {self.note}."


@dataclass
class Node:
    """A layer and those below it.

    Attributes:
        layer: itself.
        label: its name in the table.
        below: the layers right below it.
    """

    layer: Layer
    label: str
    below: list["Node"] = field(default_factory=list)

    def shown(self, summary: Summary, depth: int) -> Iterator["Node"]:
        """This layer, and those below it down to a depth, where neighbours of a list that are alike are one."""
        yield self
        if self.layer.depth >= depth:
            return
        place = 0
        while place < len(self.below):
            first, look = self.below[place], self.below[place].look(summary)
            end = place + 1
            while end < len(self.below) and first.label.isdigit() and self.below[end].look(summary) == look:
                end += 1
            if end - place > 1:
                last = self.below[end - 1].label
                first = Node(first.layer, f"{first.label} to {last}, each", first.below)
            yield from first.shown(summary, depth)
            place = end

    def look(self, summary: Summary) -> tuple[Any, ...]:
        """What the table says of this layer and those below it, but for names."""
        layer = self.layer
        did = summary.traced.get(layer.name)
        below = tuple(node.look(summary) for node in self.below)
        return layer.kind, layer.trainable, layer.frozen, did, below

    def flops(self, traced: dict[str, Traced]) -> int:
        """The operations of this layer; of one that isn't called itself, those of the layers below it."""
        did = traced.get(self.layer.name)
        return sum(node.flops(traced) for node in self.below) if did is None else did.flops


def summarize(fit: Any, depth: int, batch: Any) -> Summary:
    """Describe a Fit's module; see ``Fit.summary``."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"depth counts layers that are inside of one another: 0, 1, 2, ... Received: {depth!r}")
    module: TrainModule = fit.module
    traced: dict[str, Traced] = {}
    states = random_state.capture()
    try:
        if not fit.placed and type(module).build is not TrainModule.build:
            module = built(module)
        layers = fit.placement.layers if fit.placed else layers_of(module)
        note = "the batch that was given"
        if batch is None:
            data = fit.eval_data if fit.train_data is None else fit.train_data
            batch, note = one_sample(data, fit.args.dataloader_num_workers, fit.data_collator), "one sample"
        traced = trace(module, layers, batch)
    except (NoSample, NotTraceable) as error:
        note = str(error)
    finally:
        random_state.restore(states)
    size = size_in_bytes(module) if is_whole(module, layers) else None
    return Summary(layers, traced, note, size, depth)


def tree_of(layers: tuple[Layer, ...]) -> Node:
    """Layers as a tree. They come in the order of ``named_modules``: each after the one it is inside of."""
    root = Node(layers[0], layers[0].kind)
    nodes = {"": root}
    for layer in layers[1:]:
        above, _, name = layer.name.rpartition(".")
        nodes[layer.name] = Node(layer, name)
        nodes[above].below.append(nodes[layer.name])
    return root


def format_shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    """Write the shapes of some tensors, the first three where there are more."""
    told = [f"[{', '.join(map(str, shape))}]" for shape in shapes[:3]]
    return " ".join([*told, "..."] if len(shapes) > 3 else told)


def format_operations(number: int) -> str:
    """Write a number of operations with three digits.

    Example:
        >>> format_operations(2891776)
        '2.89 M'
    """
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "
