"""Planning candidates: they are played, in copies of this process, and their figures are made of the accounts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..configuration.options import make_strategy
from .account import Account
from .asking import PlanningError
from .choosing import Candidate, Choice, Figures, candidates_for, choose, cut_candidates, figures_of, with_checkpointing
from .forked import run_forked

Play = Callable[[Candidate], Mapping[str, Any]]
"""Plays a candidate, and returns its "account" and the module's "cuts", or the "problem" that it has."""


def choose_among(
    play: Play,
    world_size: int,
    nodes: int,
    room: int,
    host_room: int | None = None,
    checkpoints: bool = False,
    offloads: bool = True,
    accumulation: int = 0,
) -> Choice:
    """Plan the candidates of a world, and choose.

    The first rank is played, whose shards are the largest. A candidate that computes activations again is played where
    it doesn't fit otherwise, and one that offloads not at all: its figures follow from the account of the same one
    without. Where nothing fits into the device, those that cut layers or sequences are candidates, too, as far as the
    module says how.

    Args:
        play: see ``Play``.
        world_size, nodes: of the run.
        room, host_room: see ``choose``.
        checkpoints: whether the run computes activations again in any case.
        offloads: whether the host's memory is another one than the device's.
        accumulation: micro-batches of an update; 0 where their number changes, so that no ranks may share them.

    Raises:
        PlanningError: a copy ended without an answer; the message has the end of what it printed.
    """
    candidates = candidates_for(world_size, nodes, checkpoints)
    candidates = [each for each in candidates if offloads or not each.offloads]
    accounts = Accounts(play, world_size, nodes)

    def lacks(candidate: Candidate) -> bool:
        figures = accounts.figures(candidate)
        return not figures.problem and figures.lack(room, host_room) is not None

    def play_all(some: Sequence[Candidate]) -> None:
        first = [each for each in some if each.gradient_checkpointing == checkpoints]
        accounts.add(first)
        accounts.add(each for each in some if each not in first and lacks(without_checkpointing(each)))

    in_device = [each for each in candidates if not each.offloads]
    play_all(in_device)
    if all(lacks(each) or accounts.figures(each).problem for each in in_device):
        cut = cut_candidates(world_size // nodes, accounts.cuts, accumulation, checkpoints)
        candidates = [*in_device, *cut, *(each for each in candidates if each.offloads)]
        play_all(cut)
        play_all([each for each in candidates if each.offloads])
    return choose([accounts.figures(each) for each in candidates], room, host_room)


class Accounts:
    """The accounts of what was played.

    Args:
        play: see ``Play``.
        world_size, nodes: of the run.
    """

    def __init__(self, play: Play, world_size: int, nodes: int) -> None:
        self.play = play
        self.whole = "ddp" if world_size > 1 else "single"
        self.environment = {
            "RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world_size // nodes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
        }
        self.answers: dict[str, Mapping[str, Any]] = {}

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Play candidates, without offloading; none twice."""
        new = {each.title: each for each in map(in_device, candidates) if each.title not in self.answers}
        ends = run_forked([partial(self.play, each) for each in new.values()], self.environment)
        for title, ended in zip(new, ends, strict=True):
            if ended.answer is None:
                raise PlanningError(
                    ended.status, f"{title} could not be played (status {ended.status}):\n{ended.printed}"
                )
            self.answers[title] = ended.answer

    @property
    def cuts(self) -> Sequence[str]:
        """What the module says how to cut, as far as it could be played whole."""
        played = (self.answers.get(Candidate(self.whole, {}, again).title, {}) for again in (False, True))
        return next((answer["cuts"] for answer in played if "cuts" in answer), ())

    def figures(self, candidate: Candidate) -> Figures:
        """Make a candidate's figures of what was played so far: of its own account, else of the nearest one's. What
        wasn't played comes after what fits in any case.
        """
        plain = without_checkpointing(candidate)
        for near in (
            candidate,
            plain,
            Candidate(self.whole, {}, candidate.gradient_checkpointing),
            Candidate(self.whole),
        ):
            answer = self.answers.get(in_device(near).title)
            if answer is None:
                continue
            if "problem" in answer:
                return Figures(candidate, problem=" ".join(str(answer["problem"]).split()))
            account = Account.from_dict(answer["account"])
            if near.gradient_checkpointing == candidate.gradient_checkpointing:
                return figures_of(candidate, account)
            return with_checkpointing(figures_of(plain, account), account)
        raise AssertionError(f"{candidate.title} and what is like it weren't played.")


def strategy_of(candidate: Candidate) -> Strategy:
    """Make a candidate's strategy, as a user would who names it."""
    return make_strategy(candidate.strategy, candidate.options)


def arguments_of(candidate: Candidate, asked: FitArguments, before: Candidate | None = None) -> dict[str, Any]:
    """The fields of FitArguments that change with a candidate.

    Args:
        candidate: that is taken.
        asked: the arguments of the run, before anything was chosen of them.
        before: the candidate that was taken so far.
    """
    return {**({} if before is None else {name: getattr(asked, name) for name in before.changes}), **candidate.changes}


def in_device(candidate: Candidate) -> Candidate:
    """The candidate without offloading."""
    options = {name: value for name, value in candidate.options.items() if name != "cpu_offload"}
    return replace(candidate, options=options)


def without_checkpointing(candidate: Candidate) -> Candidate:
    """The candidate that computes no activations again."""
    return replace(candidate, gradient_checkpointing=False)
