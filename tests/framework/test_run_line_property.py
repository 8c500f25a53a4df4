"""Any sequence of beginning, resuming, going back and damage, against a model that knows nothing of ids or files.

The model is told what the user did, and says where each run must begin and what must be left: nothing foreign is
resumed from or removed, and of the run's own line only what its limit asks for.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as draw
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import CheckpointError
from tiny import Regressor, regression_rows

ROWS = regression_rows(4)


@dataclass(eq=False)
class Saved:
    """A checkpoint, as the model knows it: which call of train saved it, for which run, after which update."""

    call: int
    run: int
    update: int
    damaged: bool = False


@dataclass
class Model:
    """What must be in the directory.

    Attributes:
        named: update to the checkpoint that has its name.
        aside: those that have lost it.
        parents: run to the checkpoints that it and its ancestors began with, the nearest last.
        last: the run that worked there last.
    """

    named: dict[int, Saved] = field(default_factory=dict)
    aside: list[Saved] = field(default_factory=list)
    parents: list[list[Saved]] = field(default_factory=list)
    last: int | None = None
    calls: int = 0

    def is_of(self, saved: Saved, run: int) -> bool:
        """Whether a run has been through that checkpoint, or through later ones of the run that saved it."""
        return saved.run == run or any(
            saved.run == parent.run and saved.update <= parent.update for parent in self.parents[run]
        )

    def line(self, run: int) -> list[Saved]:
        return [saved for _, saved in sorted(self.named.items()) if self.is_of(saved, run)]

    def candidates(self) -> list[Saved]:
        """What True may take, the best last."""
        if self.last is None:
            return []
        line = self.line(self.last)
        for first in self.parents[self.last][-1:]:
            if first in self.aside:  # a run that began with one that was set aside
                older = [saved for saved in line if saved.update < first.update]
                return [*older, first, *line[len(older) :]]
        return line

    def new_run(self, parent: Saved | None) -> int:
        self.parents.append([] if parent is None else [*self.parents[parent.run], parent])
        return len(self.parents) - 1

    def claim(self, run: int) -> None:
        self.last = run
        for update, saved in list(self.named.items()):
            if not self.is_of(saved, run):
                self.aside.append(self.named.pop(update))

    def train(self, run: int, start: int, updates: int, limit: int | None) -> None:
        for update in range(start + 1, start + updates + 1):
            self.named[update] = Saved(self.calls, run, update)
            line = self.line(run)
            for old in line[: max(0, len(line) - limit)] if limit is not None else []:
                if old.update != update:
                    del self.named[old.update]

    def resume(self, rename: bool) -> tuple[int, int]:
        """The run that True goes on with, and where it begins.

        Raises:
            CheckpointError: none is whole.
        """
        candidates = self.candidates()
        whole = [saved for saved in candidates if not saved.damaged]
        if not candidates:
            return self.new_run(None), 0
        if not whole:
            raise CheckpointError
        if rename:
            for passed_over in candidates[candidates.index(whole[-1]) + 1 :]:
                if passed_over in self.named.values():
                    self.aside.append(self.named.pop(passed_over.update))
        assert self.last is not None
        return self.last, whole[-1].update

    def go_to(self, saved: Saved) -> tuple[int, int]:
        """The same for a path."""
        if saved.damaged:
            raise CheckpointError
        if self.last is not None and self.line(self.last)[-1:] == [saved]:
            return self.last, saved.update
        return self.new_run(saved), saved.update


class Stamp(Callback):
    """Puts the number of the call of train into each checkpoint, and notes where that call began."""

    def __init__(self, call: int) -> None:
        self.call = call
        self.began: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.began = state.global_step

    def state_dict(self) -> dict[str, int]:
        return {"call": self.call}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Directory:
    """The real thing beside its model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = Model()

    def found(self) -> Iterator[tuple[Path, int, int]]:
        """Whatever is called a checkpoint: (path, the call that saved it, its update)."""
        for path in sorted(self.path.glob("checkpoint-*")):
            state = json.loads((path / "state.json").read_text())
            [stamp] = [each["call"] for each in flat(state["callbacks"]) if "call" in each]
            yield path, stamp, state["progress"]["global_step"]

    def path_of(self, saved: Saved) -> Path:
        [path] = [p for p, call, update in self.found() if (call, update) == (saved.call, saved.update)]
        return path

    def train(self, resume: Any, start: int, updates: int, **options: Any) -> int | None:
        """Where the run began; None where it was refused."""
        torch.manual_seed(0)
        stamp = Stamp(self.model.calls)
        given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, **options}
        fit = Fit(
            Regressor(), ROWS, output_dir=str(self.path), max_steps=start + updates, progress=False, loggers=(),
            per_device_train_batch_size=4, callbacks=[stamp], num_train_epochs=100, **given,
        )  # fmt: skip
        try:
            fit.train(resume_from_checkpoint=resume)
        except CheckpointError:
            return None
        return stamp.began

    def check(self) -> None:
        """Names and contents are the model's."""
        named = {(path.name, call, update) for path, call, update in self.found() if path.name.count(".") == 0}
        assert named == {(f"checkpoint-{n}", saved.call, saved.update) for n, saved in self.model.named.items()}
        aside = sorted((call, update) for path, call, update in self.found() if "." in path.name)
        assert aside == sorted((saved.call, saved.update) for saved in self.model.aside)


def flat(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a JSON value."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from flat(each)


def do(directory: Directory, action: str, which: int, updates: int, limit: int | None) -> None:
    """One step of the sequence, in the model and for real."""
    model = directory.model
    every = [*model.named.values(), *model.aside]
    if action == "damage":
        candidates = model.candidates()
        if candidates and not candidates[-1].damaged:
            damage(directory.path_of(candidates[-1]))
            candidates[-1].damaged = True
        return
    model.calls += 1
    resume: Any = {"begin": None, "resume": True, "read": True}.get(action)
    chosen = every[which % len(every)] if action == "go to" and every else None
    if chosen is not None:
        resume = directory.path_of(chosen)
    try:
        if action in ("resume", "read"):
            run, start = model.resume(rename=action == "resume")
        elif chosen is not None:
            run, start = model.go_to(chosen)
        else:
            run, start = model.new_run(None), 0
    except CheckpointError:
        assert directory.train(resume, 100, 1) is None
        return
    if action == "read":
        assert directory.train(resume, start, updates, save_strategy="no") == start
        return
    model.claim(run)
    assert directory.train(resume, start, updates, save_total_limit=limit) == start
    model.train(run, start, updates, limit)


def damage(checkpoint: Path) -> None:
    shard = next((checkpoint / "model").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


ACTIONS = draw.tuples(
    draw.sampled_from(["begin", "resume", "resume", "go to", "go to", "damage", "read"]),
    draw.integers(0, 11),
    draw.integers(1, 3),
    draw.sampled_from([None, 1, 2, 3]),
)


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # to make a failure smaller takes minutes
)
@given(draw.lists(ACTIONS, min_size=2, max_size=9))
def test_any_sequence_of_runs_leaves_what_the_model_says(sequence: list[tuple[str, int, int, int | None]]) -> None:
    place = Path(tempfile.mkdtemp(prefix="line-"))
    try:
        directory = Directory(place)
        for action in sequence:
            do(directory, *action)
            directory.check()
    finally:
        shutil.rmtree(place)
