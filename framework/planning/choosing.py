"""Choosing a strategy: a closed list of candidates, the figures of each, and the order in which they count.

Nothing is played here: who has figures (``figures_of`` makes them of an account, a test writes them down) gets the same
choice from them, on every rank and at every time.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .account import BETWEEN_NODES, Account
from .recording import FORWARD, RECOMPUTED

OUT_OF_MEMORY = "ran out of memory in its first updates, though it was planned with"
ALIKE = 1.01  # what differs by less is alike: shards are padded
ORDER = (
    "They are ordered by: fits with the margin free; fewest bytes over the slowest link (to the host, between nodes, "
    "in a node); fewest operations to compute activations again; simplest."
)


@dataclass(frozen=True)
class Candidate:
    """A way to run, in words that a user could have written.

    Attributes:
        strategy: its name.
        options: of the strategy, where they aren't its defaults.
        gradient_checkpointing: whether activations are computed again in backward.
        gradient_accumulation_steps: micro-batches of an update, where ranks share each of them, so that an update has
            as many samples as otherwise; 0 where it has those that were asked for.
    """

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 0

    @property
    def offloads(self) -> bool:
        """Whether parameters, gradients and optimizer state lie in the host's memory."""
        return bool(self.options.get("cpu_offload"))

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of FitArguments that are chosen with it."""
        chosen = {name: getattr(self, name) for name in ("gradient_checkpointing", "gradient_accumulation_steps")}
        return {name: value for name, value in chosen.items() if value}

    @property
    def words(self) -> list[str]:
        """The words of a command line.

        Example:
            >>> " ".join(Candidate("fsdp2", {"reshard_after_forward": False}).words)
            '--strategy fsdp2 --strategy.reshard_after_forward false'
        """
        found = ["--strategy", self.strategy]
        for name, value in self.options.items():
            found += [f"--strategy.{name}", str(value).lower()]
        for name, value in self.changes.items():
            found += [f"--{name}", str(value).lower()]
        return found

    @property
    def python(self) -> str:
        """The arguments of Fit.

        Example:
            >>> Candidate("fsdp2", {"replicas": 2}, True).python
            'strategy=FSDP2(replicas=2), gradient_checkpointing=True'
        """
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        strategy = f"{self.strategy.upper()}({options})" if options else f'"{self.strategy}"'
        return ", ".join([f"strategy={strategy}", *(f"{name}={value}" for name, value in self.changes.items())])

    @property
    def title(self) -> str:
        """What tables call it."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        named = f"{self.strategy}({options})" if options else self.strategy
        return named + (" + gradient checkpointing" if self.gradient_checkpointing else "")


def candidates_for(world_size: int, nodes: int, checkpoints: bool = False) -> list[Candidate]:
    """List the candidates of a world, the simplest first.

    Args:
        world_size, nodes: of the run.
        checkpoints: whether the run computes activations again in any case.
    """
    kept, hybrid, offload = {"reshard_after_forward": False}, {"replicas": nodes}, {"cpu_offload": True}
    sharded: list[dict[str, Any]] = [kept, {}]
    if 1 < nodes < world_size:
        sharded += [{**hybrid, **kept}, hybrid]
    whole = Candidate("ddp") if world_size > 1 else Candidate("single")
    ways = [whole, *(Candidate("fsdp2", options) for options in sharded if world_size > 1)]
    ways += [Candidate("fsdp2", {**options, **offload}) for options in sharded]
    again = (True,) if checkpoints else (False, True)
    return [Candidate(way.strategy, way.options, each) for way in ways for each in again]


def cut_candidates(per_node: int, cuts: Sequence[str], accumulation: int, checkpoints: bool = False) -> list[Candidate]:
    """List the candidates that cut layers, or sequences, over the ranks of a node, the simplest first.

    Args:
        per_node: ranks on a node.
        cuts: what the module says how to cut: "tensor_parallel", "context_parallel".
        accumulation: micro-batches of an update where none is shared; 0 where their number changes.
        checkpoints: whether the run computes activations again in any case.
    """
    if per_node == 1 or not accumulation:
        return []
    again = (True,) if checkpoints else (False, True)
    return [Candidate("fsdp2", {cut: per_node}, each, accumulation * per_node) for cut in cuts for each in again]


@dataclass(frozen=True)
class Figures:
    """What a candidate comes to, on the rank that holds most and in an update.

    Attributes:
        candidate: whose figures they are.
        need: bytes of the device at the peak; of what is held alone, where no update could be played.
        held: bytes of the device that it holds between updates.
        on_host: bytes that it keeps in the host's memory.
        to_host, between_nodes, in_node: bytes that a rank sends in an update over the link to the host, over its share
            of the network, and to others of its node.
        recomputed: FLOPs of activations that are computed again.
        is_static: whether no update could be played.
        is_bound: whether ``need`` and ``recomputed`` are bounds, since another one's account had to do.
        problem: why it can't run at all.
    """

    candidate: Candidate
    need: int = 0
    held: int = 0
    on_host: int = 0
    to_host: float = 0.0
    between_nodes: float = 0.0
    in_node: float = 0.0
    recomputed: int = 0
    is_static: bool = False
    is_bound: bool = False
    problem: str = ""

    def may_need_less(self, other: "Figures") -> bool:
        """Whether it may fit where another one didn't, whatever its plan says."""
        return (self.held if self.is_bound else self.need) < other.need

    def lack(self, room: int, host_room: int | None) -> tuple[str, int] | None:
        """What it doesn't fit into, and the bytes that it would need there."""
        if self.need > room:
            return "does not fit into the device", self.need
        if host_room is not None and self.on_host > host_room:
            return "does not fit into the host's memory", self.on_host
        return None


def figures_of(candidate: Candidate, account: Account) -> Figures:
    """Make a candidate's figures of its account, or of the account of the same candidate without offloading.

    Args:
        candidate: to be judged.
        account: of the rank that holds most.
    """
    peak = account.peak
    between = sum(row.sent / row.neighbours for row in account.traffic if row.link == BETWEEN_NODES)
    inside = sum(row.sent for row in account.traffic if row.neighbours > 1)
    recomputed = account.flops.get(RECOMPUTED, 0)
    common: dict[str, Any] = {
        "between_nodes": between, "in_node": inside, "recomputed": recomputed, "is_static": peak is None,
    }  # fmt: skip
    if not candidate.offloads:
        return Figures(candidate, account.held if peak is None else peak.bytes, account.held, **common)
    parameters = account.parameters + account.frozen_parameters
    read = 1 if candidate.options.get("reshard_after_forward") is False else 2
    return Figures(
        candidate,
        account.buffers if peak is None else peak.beside,
        account.buffers,
        on_host=account.held - account.buffers,
        to_host=parameters * read * account.accumulation + account.gradients,
        **common,
    )


def with_checkpointing(figures: Figures, account: Account) -> Figures:
    """The figures, at most, of a candidate that fits if it also computed its activations again; nobody plays it."""
    candidate = replace(figures.candidate, gradient_checkpointing=True)
    return Figures(
        **{**vars(figures), "candidate": candidate, "recomputed": account.flops.get(FORWARD, 0), "is_bound": True}
    )


@dataclass(frozen=True)
class Verdict:
    """What was decided of a candidate: one sentence, and one number.

    Attributes:
        figures: of the candidate.
        fits: with the margin free.
        sentence: why it is taken or not.
        number: that the sentence is about; None where it has none.
        unit: "bytes", "FLOPs" or "s".
    """

    figures: Figures
    fits: bool
    sentence: str
    number: float | None
    unit: str = "bytes"


@dataclass(frozen=True)
class Choice:
    """A choice among candidates.

    Attributes:
        verdicts: of all of them, in their order; the first is of the chosen one, where one fits.
        room: bytes of the device that it may need.
        host_room: bytes of the host's memory that a rank may need; None where that isn't known.
    """

    verdicts: Sequence[Verdict]
    room: int
    host_room: int | None = None

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that comes first; None where none fits."""
        first = self.verdicts[0]
        return first.figures.candidate if first.fits else None

    @property
    def words(self) -> str:
        """The words of a command line that would have named what is chosen; "" where nothing fits."""
        return "" if self.chosen is None else " ".join(self.chosen.words)

    @property
    def kept(self) -> list[Candidate]:
        """The candidates that fit, in their order."""
        return [each.figures.candidate for each in self.verdicts if each.fits]

    def is_bound(self, candidate: Candidate) -> bool:
        """Whether nobody played the candidate, so that it may turn out not to work with the module."""
        return any(each.figures.is_bound for each in self.verdicts if each.figures.candidate == candidate)

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts of those that ran out of memory all the same."""
        return [each for each in self.verdicts if each.sentence == OUT_OF_MEMORY]

    @property
    def planned(self) -> dict[str, Any]:
        """What it follows from, whatever became of the candidates since: the room, and all figures."""
        figures = {each.figures.candidate.title: each.figures for each in self.verdicts}
        return {"room": self.room, "host_room": self.host_room, "figures": figures}

    def led_by(self, candidate: Candidate) -> "Choice":
        """The choice with another candidate before all others."""
        return replace(self, verdicts=sorted(self.verdicts, key=lambda each: each.figures.candidate != candidate))

    def after_failure(self, proven: Container[str] = ()) -> "Choice":
        """The choice that is left where what was chosen ran out of memory: the next one that may need less, if any.

        Args:
            proven: titles of candidates that ran, whatever they need.
        """
        first, *others = self.verdicts
        rest, hopeless = list[Verdict](), list[Verdict]()
        for each in others:
            is_proven = each.figures.candidate.title in proven
            if each.fits and not (is_proven or each.figures.may_need_less(first.figures)):
                why = "would need no less than what ran out of memory"
                hopeless.append(Verdict(each.figures, False, why, each.figures.need))
            else:
                rest.append(each)
        if rest and rest[0].fits:
            taken = "is the next one that fits, and may need less"
            rest[0] = replace(rest[0], sentence=taken, number=rest[0].figures.need, unit="bytes")
        failed = Verdict(first.figures, False, OUT_OF_MEMORY, first.figures.need)
        kept = [each for each in rest if each.fits]
        return replace(self, verdicts=[*kept, failed, *hopeless, *(each for each in rest if not each.fits)])

    def after_refusal(self, why: str) -> "Choice":
        """The choice that is left where what was chosen can't run: nobody had played it, since others came before."""
        first, *others = self.verdicts
        kept = [each for each in others if each.fits]
        refused = Verdict(first.figures, False, why, None)
        return replace(self, verdicts=[*kept, *(each for each in others if not each.fits), refused])

    def measured(self, seconds: Mapping[str, float]) -> "Choice":
        """The choice by what an update has taken: the fastest candidate is taken, and the first one of those alike.

        Args:
            seconds: an update's, by the titles of candidates that fit.
        """
        timed = [each for each in self.verdicts if each.figures.candidate.title in seconds]
        timed.sort(key=lambda each: seconds[each.figures.candidate.title])  # stable: the order stays of those alike
        said = []
        for place, each in enumerate(timed):
            why = "was measured: an update takes" if place else f"is the fastest of {len(timed)} that were measured, at"
            said.append(replace(each, sentence=why, number=seconds[each.figures.candidate.title], unit="s"))
        return replace(self, verdicts=[*said, *(each for each in self.verdicts if each not in timed)])

    @property
    def is_static(self) -> bool:
        """Whether it goes by what is held alone, since no update could be played."""
        return any(each.figures.is_static for each in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """The choice in JSON types."""
        chosen = self.chosen
        return {
            "chosen": None if chosen is None else {"words": chosen.words, "python": chosen.python, **asdict(chosen)},
            "room": self.room,
            "host_room": self.host_room,
            "candidates": [asdict(each) for each in self.verdicts],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        """The choice that ``to_dict`` wrote."""
        verdicts = []
        for each in values["candidates"]:
            figures = {**each["figures"], "candidate": Candidate(**each["figures"]["candidate"])}
            verdicts.append(Verdict(**{**each, "figures": Figures(**figures)}))
        return cls(verdicts, values["room"], values["host_room"])


# In their order: the figure, what is said of another candidate that has more of it, and of the one that has least.
CRITERIA = (
    ("to_host", "sends more to and from the host's memory", "sends least to and from the host's memory", "bytes"),
    ("between_nodes", "sends more between nodes", "sends least between nodes", "bytes"),
    ("in_node", "sends more in a node", "sends least in a node", "bytes"),
    ("recomputed", "would compute activations again for nothing", "recomputes least", "FLOPs"),
)


def choose(figures: Sequence[Figures], room: int, host_room: int | None = None) -> Choice:
    """Put candidates into their order, and say of each why it stands there.

    Args:
        figures: of the candidates, the simplest first.
        room: bytes of the device, without the margin.
        host_room: bytes of the host's memory for a rank, without the margin; None where that isn't known.
    """
    fitting = [each for each in figures if not each.problem and each.lack(room, host_room) is None]
    others = [each for each in figures if not each.problem and each not in fitting]
    ordered: list[Figures] = []
    while left := [each for each in fitting if each not in ordered]:
        ordered.append(first_of(left)[0])
    verdicts = []
    for place, each in enumerate(ordered):
        if place:
            verdicts.append(reason_against(each, ordered[0]))
        else:
            verdicts.append(Verdict(each, True, reason_for(fitting), each.need))
    for each in sorted(others, key=lambda one: one.need):  # sorting is stable: of alike ones the simplest is first
        lack = each.lack(room, host_room)
        assert lack is not None
        verdicts.append(Verdict(each, False, *lack))
    verdicts += [Verdict(each, False, each.problem, None) for each in figures if each.problem]
    return Choice(verdicts, room, host_room)


def first_of(figures: Sequence[Figures]) -> tuple[Figures, str]:
    """The first in the order of candidates that all fit, and the criterion that decided; "" where simplicity did."""
    left = list(figures)
    for name, _, _, _ in CRITERIA:
        least = min(getattr(each, name) for each in left)
        left = [each for each in left if getattr(each, name) <= least * ALIKE]
        if len(left) == 1:
            return left[0], name
    return left[0], ""


def reason_for(fitting: Sequence[Figures]) -> str:
    """Say why the first of the candidates that fit is taken."""
    if len(fitting) == 1:
        return "is the only one that fits"
    decided = first_of(fitting)[1]
    said = next((best for name, _, best, _ in CRITERIA if name == decided), "is the simplest of those that send least")
    return f"fits, and {said}"


def reason_against(figures: Figures, chosen: Figures) -> Verdict:
    """Say why a candidate that fits isn't taken: the first criterion by which it falls behind."""
    for name, worse, _, unit in CRITERIA:
        if getattr(figures, name) > getattr(chosen, name) * ALIKE:
            return Verdict(figures, True, worse, getattr(figures, name), unit)
    return Verdict(figures, True, "is less simple, and needs", figures.need)
