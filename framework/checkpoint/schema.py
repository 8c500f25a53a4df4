"""The schema of state.json and manifest.json: their fields are read once and checked, and errors name the field.

Format 3 has a table of all tensors beside it (tensors.json), keeps the logs in a file beside state.json, which has its
length, and sums in the place of the losses that aren't logged yet. It says in ``data.order`` which of two orders a
shuffled dataset is in: "drawn", as where the field is absent, or "computed". Format 2 lists each tensor of the
checkpoint in state.json, and describes the data. Format 1 did neither.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import UNSET, Meta, Struct, UnsetType

from ..state import TrainState
from .directory import HISTORY, MANIFEST, READ_FORMATS, CheckpointError, read_json
from .schema_of_updates import Count, Positive, Transaction, TurnsOfRun

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Listed(Struct, forbid_unknown_fields=True):
    """A file in the manifest; of a safetensors file also the hash of its header, where tensors.json has a copy."""

    bytes: Count
    sha256: Digest
    header: Digest | UnsetType = UNSET


class Manifest(Struct):
    """The content of manifest.json."""

    format: int
    files: dict[str, Listed]


class TensorEntry(Struct):
    """A tensor, with its whole shape."""

    shape: list[Count]
    dtype: str


class FrozenEntry(TensorEntry):
    """A tensor that the checkpoint leaves out, with the sum over its bits."""

    sum: int


class Group(Struct):
    """A group of the optimizer's parameters."""

    names: list[str]
    options: dict[str, Any]


class AveragesOfFormat2(Struct):
    """The values of updates that aren't logged yet."""

    settled: dict[str, list[float]]
    counts_settled: Annotated[list[Count], Meta(min_length=2, max_length=2)]


class Sums(Struct):
    """The sum of values: numbers that make it up, how many values there were, and those that weren't finite."""

    parts: list[float]
    count: Count
    nonfinite: tuple[Count, float]


class Averages(Struct):
    """Running means that aren't logged yet."""

    sums: dict[str, Sums]
    counts_settled: Annotated[list[Count], Meta(min_length=2, max_length=2)]


class Logs(Struct):
    """How much of log_history.jsonl is the checkpoint's."""

    entries: Count
    bytes: Count
    sha256: Digest


class DataOfFormat1(Struct, kw_only=True):
    """The position in the data."""

    epoch: Count
    position: Count
    global_micro_batch: Positive
    generators: list[str] | UnsetType | None = UNSET


class Data(DataOfFormat1, kw_only=True):
    """The position in the data, and what the order of samples follows from."""

    kind: str
    seed: Count
    shuffle: bool
    batch_size: Positive
    workers: Count
    length: Count | None
    fingerprint: str | None
    order: Literal["computed", "drawn"] | UnsetType = UNSET
    group_size: Count | UnsetType = UNSET
    sharing_workers: Count | UnsetType = UNSET
    ranks: Positive | UnsetType = UNSET


class Ancestor(Struct):
    """A run that this one goes on from, and its last update that belongs to the line."""

    id: str
    until: Count


class Run(Struct):
    """The line of the run that saved the checkpoint."""

    id: str
    ancestors: list[Ancestor]


# Fields that TrainState got later may be missing. These were there from the beginning.
PROGRESS = (
    "global_step", "max_steps", "epoch", "num_train_epochs", "learning_rate", "items_seen", "num_input_tokens_seen",
    "skipped_updates", "train_loss_sum", "train_loss_count", "best_metric", "best_global_step", "log_history",
)  # fmt: skip
COUNTS: Mapping[Any, Any] = {int: Count, int | None: Count | None}
# The fields of a TrainState, whose counts aren't negative.
KINDS = {field.name: COUNTS.get(field.type, field.type) for field in fields(TrainState)}
ProgressOfFormat2 = msgspec.defstruct(
    "ProgressOfFormat2",
    [(name, kind) if name in PROGRESS else (name, kind | UnsetType, UNSET) for name, kind in KINDS.items()],
    kw_only=True,
)
Progress = msgspec.defstruct(
    "Progress", [(name, kind) for name, kind in KINDS.items() if name != "log_history"], kw_only=True
)


class StateOfFormat1(Struct, kw_only=True):
    """The content of state.json in format 1."""

    strategy: str
    precision: str
    world_size: Positive
    data_size: Positive
    arguments: dict[str, Any]
    averages: AveragesOfFormat2
    progress: ProgressOfFormat2  # type: ignore[valid-type]
    data: DataOfFormat1
    scheduler: dict[str, Any]
    loss_scaling: dict[str, Any]
    callbacks: dict[str, Any]
    tied: dict[str, str]
    parameter_groups: list[Group]
    optimizer_numbers: dict[str, Any]
    frozen: dict[str, FrozenEntry] = {}
    run: Run | UnsetType = UNSET
    transaction: Transaction | UnsetType = UNSET


class StateOfFormat2(StateOfFormat1, kw_only=True):
    """The content of state.json in format 2."""

    torch: str
    data: Data
    model: dict[str, TensorEntry]
    optimizer: dict[str, TensorEntry]
    callback_tensors: dict[str, TensorEntry]
    names: list[str] | UnsetType = UNSET
    turns: TurnsOfRun | UnsetType = UNSET


class State(StateOfFormat2, kw_only=True):
    """The content of state.json in format 3."""

    averages: Averages  # type: ignore[assignment]
    progress: Progress  # type: ignore[valid-type]
    log_history: Logs
    choice: dict[str, Any] | UnsetType = UNSET


SCHEMAS: Mapping[int, type[StateOfFormat1]] = {1: StateOfFormat1, 2: StateOfFormat2, 3: State}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint at ``path``.

    Raises:
        CheckpointError: the manifest can't be read, has a format that this version doesn't know, or names files outside
            of the checkpoint.
    """
    return check_manifest(read_json(path / MANIFEST), path / MANIFEST)


def check_manifest(content: Any, name: Path | str) -> dict[str, Any]:
    """Check the content of a manifest, and return it.

    Raises:
        CheckpointError: the message names the field that is wrong.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(content, dict) and type(found) is int and found not in READ_FORMATS:
        raise CheckpointError(
            f"{name} has format {found!r}; this version of stratagem reads formats "
            f"{READ_FORMATS[0]} to {READ_FORMATS[-1]}."
        )
    manifest: dict[str, Any] = convert(content, Manifest, name)
    for file in manifest["files"]:
        place = PurePosixPath(file)
        if place.is_absolute() or "\\" in file or "\0" in file or str(place) != file or ".." in place.parts:
            raise CheckpointError(f"{name}: files names {file!r}, which isn't a file inside of the checkpoint.")
    return manifest


def check_listing(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the files in the directory of a checkpoint with those that its manifest lists, and with those it must
    list.

    Raises:
        CheckpointError: a file isn't listed, or a file that must be there is missing.
    """
    listed = manifest["files"]
    unlisted = [
        name
        for file in sorted(path.rglob("*"))
        for name in [file.relative_to(path).as_posix()]
        # Hidden files, which systems leave behind (.DS_Store, .nfs0123), are never read.
        # Its length and hash grow; state.json says how much of it is the checkpoint's.
        if name not in (MANIFEST, HISTORY)
        and name not in listed
        and not (file.is_dir() and not file.is_symlink())
        and (not file.name.startswith(".") or file.suffix == ".safetensors")
    ]
    if unlisted:
        raise CheckpointError(
            f"{path} holds files that its {MANIFEST} doesn't list: {', '.join(unlisted[:10])}"
            f"{f' and {len(unlisted) - 10} more' if len(unlisted) > 10 else ''}. They are another checkpoint's, or "
            "came there since: remove them, or copy the checkpoint again into an empty directory."
        )
    if "state.json" not in listed:
        raise CheckpointError(f"{path / MANIFEST}: files lacks state.json.")
    state = read_state(path, manifest)
    required = [f"random-{rank:05d}.json" for rank in range(state["world_size"])]
    missing = [name for name in required if name not in listed]
    if missing:
        raise CheckpointError(
            f"{path / MANIFEST}: files lacks {', '.join(missing[:10])}, and state.json says that {state['world_size']} "
            "ranks saved."
        )
    for folder, key in (("model", "model"), ("optimizer", "optimizer"), ("callbacks", "callback_tensors")):
        # Format 1 doesn't list the tensors, but every model has some.
        wanted = state.get(key, folder == "model")
        if wanted and not any(name.startswith(f"{folder}/") and name.endswith(".safetensors") for name in listed):
            raise CheckpointError(f"{path / MANIFEST}: files lacks the shards of {folder}/, which state.json tells of.")


def read_state(path: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read and check state.json, the JSON part of a checkpoint.

    Raises:
        CheckpointError: the message names the file, the field, and what was found there.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    file = path / "state.json"
    state: dict[str, Any] = convert(read_json(file), SCHEMAS[manifest["format"]], file)
    check_numbers(state, file)
    return state


def check_numbers(state: Mapping[str, Any], file: Path) -> None:
    """Check what types can't say: that numbers fit together, and are finite where they are computed with.

    Raises:
        CheckpointError: the message names the field.
    """

    def require(holds: bool, field: str, why: str) -> None:
        if not holds:
            raise CheckpointError(f"{file}: {field} is {format_value(value_at(state, field))}: {why}.")

    world, data = state["world_size"], state["data_size"]
    require(world <= 2**20, "world_size", "no run has as many ranks")
    require(world % data == 0, "data_size", f"it doesn't divide world_size, {world}")
    accumulation = state["arguments"].get("gradient_accumulation_steps")
    require(type(accumulation) is int and accumulation > 0, "arguments.gradient_accumulation_steps", "it is a count")
    schedule = state["arguments"].get("gradient_accumulation_schedule", {})  # earlier versions had none
    require(
        isinstance(schedule, dict)
        and all(epoch.isdecimal() and type(steps) is int and steps > 0 for epoch, steps in schedule.items()),
        "arguments.gradient_accumulation_schedule",
        "it holds counts by epoch",
    )
    for name, value in state["progress"].items():
        # Metrics may be infinite. A best metric of NaN is possible: the first evaluation may have given it.
        finite = name == "best_metric" or not isinstance(value, float) or math.isfinite(value)
        require(finite, f"progress.{name}", "it isn't finite")
    require(state["progress"]["epoch"] >= 0.0, "progress.epoch", "it is negative")
    skipped = state["progress"]["skipped_updates"]
    require(skipped <= state["progress"]["global_step"], "progress.skipped_updates", "more than there were updates")
    of_turns = state.get("turns", {}).get("steppings", {})
    places = [("", state.get("transaction", {}), skipped)]
    places += [(f"turns.steppings.{turn}.", saved["transaction"], saved["skipped"]) for turn, saved in of_turns.items()]
    for place, transaction, were_skipped in places:
        in_a_row = transaction.get("in_a_row", 0)
        require(in_a_row <= were_skipped, f"{place}transaction.in_a_row", "more than were skipped")
        for name, value in (transaction.get("spikes") or {}).items():
            require(math.isfinite(value), f"{place}transaction.spikes.{name}", "it isn't finite")
    for turn, saved in of_turns.items():
        fits = saved["skipped_rounds"] <= min(saved["skipped"], skipped)
        require(fits, f"turns.steppings.{turn}.skipped_rounds", "more than were skipped")
    for name, sums in state["averages"].get("sums", {}).items():
        require(all(map(math.isfinite, sums["parts"])), f"averages.sums.{name}.parts", "one isn't finite")
    names = [name for group in state["parameter_groups"] for name in group["names"]]
    require(len(set(names)) == len(names), "parameter_groups", "a parameter is in it twice")
    for field in ("frozen", "model", "optimizer", "callback_tensors"):
        for name, entry in state.get(field, {}).items():
            if dtype_named(entry["dtype"]) is None:
                raise CheckpointError(f"{file}: {field}[{name!r}].dtype is {entry['dtype']!r}: torch has none.")


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype named "torch.float32" or "float32", or None where there is none of that name."""
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def convert(content: Any, schema: type[Struct], name: Path | str) -> Any:
    """Check JSON types against a schema, and return them without fields that the schema doesn't have.

    Raises:
        CheckpointError: the message names the field, and what was found there.
    """
    try:
        return msgspec.to_builtins(msgspec.convert(content, schema))
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        field = place.strip("`").removeprefix("$").removeprefix(".")
        value = value_at(content, field)
        found = "" if value is NOTHING else f" is {format_value(value)}"
        raise CheckpointError(f"{name} was altered: {field or 'its content'}{found}: {why}.") from error
    except (OverflowError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name} was altered: {error}.") from error


NOTHING = object()


def value_at(content: Any, field: str) -> Any:
    """Return the value at a path such as "progress.log_history[0]", or NOTHING where the path leads to no one value."""
    for part in re.findall(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]", field):
        try:
            content = content[int(part[1:-1])] if re.fullmatch(r"\[\d+\]", part) else content[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return NOTHING
    return content


def format_value(value: Any) -> str:
    """Write a value as JSON that isn't too long for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= 60 else text[:57] + "..."
