"""Nothing hangs and nothing is lost: what becomes of all ranks where one of them meets an accident."""

import signal
from pathlib import Path
from typing import Any

import pytest
from mortal_ranks import STRUCK, End, run_mortal
from safetensors.torch import load_file
from stratagem.framework.callbacks import Callback
from stratagem.strategies.statuses import ANOTHER_FAILED, HUNG, INTERRUPTED, PREEMPTED
from stratagem.testing import faults
from training import Tagger, make_fit, token_rows

pytestmark = pytest.mark.slow
STRATEGIES = ["ddp", "fsdp2", "tp", "deepspeed_stage_2"]
UPDATES = 8


class Note(Callback):
    """Tells the test when the accident comes: at the beginning of its update."""

    def __init__(self, path: Path, update: int) -> None:
        self.path, self.update = path, update

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            self.path.touch()


def fit_and_train(
    directory: Path,
    fault: str | None = None,
    fault_arguments: tuple[Any, ...] = (),
    where: dict[str, Any] | None = None,
    resume: bool = False,
    evaluates: bool = False,
    **arguments: Any,
) -> None:
    """Train, with an accident on some rank; leave the weights in "end.safetensors" where training ends."""
    callbacks: list[Callback] = []
    if fault is not None:
        assert where is not None
        strikes = getattr(faults, fault)(*fault_arguments, **where)
        first = where["update"] if isinstance(where["update"], int) else min(where["update"])
        callbacks = [Note(directory / STRUCK, first), strikes]
    options: dict[str, Any] = {
        "max_steps": UPDATES,
        "save_strategy": "steps",
        "save_steps": 100,
        "output_dir": str(directory / "output"),
        **({"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}),
        **arguments,
    }
    eval_data = token_rows(60) if evaluates else None
    fit = make_fit(Tagger(), token_rows(), eval_data, callbacks=callbacks, **options)
    fit.train(resume_from_checkpoint=resume)
    fit.export(directory / "end.safetensors")


def undisturbed(directory: Path, **options: Any) -> Path:
    """The weights of a run without an accident."""
    ends = run_mortal(fit_and_train, 2, directory, **options)
    assert [end.status for end in ends] == [0, 0], said(ends)
    return directory / "end.safetensors"


def same_bits(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def statuses(ends: list[End]) -> list[int]:
    return [end.status for end in ends]


def said(ends: list[End]) -> str:
    return "\n".join(f"{end.status} after {end.seconds:.1f} s: {end.printed}" for end in ends)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_rank_saves_all_at_one_update_and_the_resume_is_exact(strategy: str, tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path / "run", strategy=strategy, fault="SignalSelf", fault_arguments=(signal.SIGTERM,),
        where={"rank": 1, "update": 3, "phase": "forward"},
    )  # fmt: skip
    assert statuses(ends) == [PREEMPTED, PREEMPTED], said(ends)
    saved = sorted((tmp_path / "run" / "output").glob("checkpoint-*"))
    # The wish goes out before the next update, which is still made.
    assert [path.name for path in saved] == ["checkpoint-4"]
    assert "SIGTERM" in ends[1].printed and "checkpoint-4" in ends[0].printed
    assert "Traceback" not in said(ends)
    ends = run_mortal(fit_and_train, 2, tmp_path / "run", strategy=strategy, resume=True)
    assert statuses(ends) == [0, 0], said(ends)
    assert same_bits(tmp_path / "run" / "end.safetensors", undisturbed(tmp_path / "whole", strategy=strategy))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_in_an_evaluation_ends_it_and_the_resume_makes_it(strategy: str, tmp_path: Path) -> None:
    options = {"strategy": strategy, "evaluates": True}
    ends = run_mortal(
        fit_and_train, 2, tmp_path / "run", **options, fault="SignalSelf", fault_arguments=(signal.SIGINT,),
        where={"rank": 1, "update": 4, "phase": "evaluate"}, per_device_eval_batch_size=2, loggers=("jsonl",),
    )  # fmt: skip
    assert statuses(ends) == [INTERRUPTED, INTERRUPTED], said(ends)
    assert (tmp_path / "run" / "output" / "checkpoint-4").exists(), said(ends)
    logs = tmp_path / "run" / "output" / "log.jsonl"
    assert logs.read_text().count("eval_loss") == 1  # that of update 2
    ends = run_mortal(fit_and_train, 2, tmp_path / "run", **options, resume=True, loggers=("jsonl",))
    assert statuses(ends) == [0, 0], said(ends)
    assert logs.read_text().count("eval_loss") == 4
    assert same_bits(tmp_path / "run" / "end.safetensors", undisturbed(tmp_path / "whole", **options))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named_first(strategy: str, victim: int, tmp_path: Path) -> None:
    where = {"rank": victim, "update": 3, "phase": "backward"}
    ends = run_mortal(fit_and_train, 2, tmp_path, strategy=strategy, fault="Kill", where=where)
    survivor = ends[1 - victim]
    assert ends[victim].status == -signal.SIGKILL
    assert survivor.status == ANOTHER_FAILED, said(ends)
    assert survivor.seconds < 10.0
    # torch's own warnings may come before.
    assert f"Failed first: rank {victim} (host" in survivor.printed, said(ends)
    assert "Traceback" not in survivor.printed and "gloo" not in survivor.printed, said(ends)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_failure_of_one_rank_is_the_only_traceback(strategy: str, tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, strategy=strategy, fault="Raise", fault_arguments=(ValueError("the accident"),),
        where={"rank": 1, "update": 3, "phase": "forward"},
    )  # fmt: skip
    assert statuses(ends) == [ANOTHER_FAILED, 1], said(ends)
    assert max(end.seconds for end in ends) < 10.0
    assert "ValueError: the accident" in ends[1].printed and "Traceback" not in ends[0].printed, said(ends)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(strategy: str, victim: int, tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, seconds=25.0, strategy=strategy, fault="Stop", hang_timeout=4.0,
        where={"rank": victim, "update": 5, "phase": "forward"},
    )  # fmt: skip
    survivor = ends[1 - victim]
    assert survivor.status == HUNG, said(ends)
    assert survivor.seconds < 20.0
    assert f"ank {victim} " in survivor.printed, said(ends)


def test_a_hanging_rank_is_named_with_its_place(tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 3, tmp_path, seconds=25.0, strategy="ddp", fault="Delay", fault_arguments=(60.0,),
        hang_timeout=4.0, where={"rank": 1, "update": 5, "phase": "forward"},
    )  # fmt: skip
    assert statuses(ends) == [HUNG, HUNG, HUNG], said(ends)
    (sentence,) = [line for line in said(ends).splitlines() if "No update for" in line] or [said(ends)]
    assert "Rank 1 (host " in sentence and "has been in your forward, training.py:" in sentence
    assert "ranks 0, 2 wait for it in" in sentence and "update 5" in sentence
    files = sorted(path.name for path in (tmp_path / "output" / "hang").iterdir())
    assert files == [f"update-5-rank-{rank}.txt" for rank in range(3)]
    assert "in forward" in (tmp_path / "output" / "hang" / files[1]).read_text()


def test_a_rank_without_data_is_waited_for_in_the_message(tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, seconds=25.0, strategy="ddp", fault="Delay", fault_arguments=(60.0,),
        hang_timeout=4.0, where={"rank": 1, "update": 5, "phase": "data"},
    )  # fmt: skip
    assert statuses(ends) == [HUNG, HUNG], said(ends)
    (sentence,) = [line for line in said(ends).splitlines() if "No update for" in line] or [said(ends)]
    assert "Rank 1 (host " in sentence and "has been in" in sentence
    assert "; rank 0 waits for it in the message of the exchange before the update, in update 5." in sentence


@pytest.mark.parametrize("what", ["save", "evaluate", "export"])
def test_ranks_in_different_collectives_are_told_apart(what: str, tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, seconds=25.0, strategy="ddp", fault="MismatchedCollective", fault_arguments=(what,),
        hang_timeout=4.0, where={"rank": 0, "update": 5, "phase": "end"}, evaluates=what == "evaluate",
    )  # fmt: skip
    assert HUNG in statuses(ends), said(ends)
    (sentence,) = [line for line in said(ends).splitlines() if "No update for" in line]
    phase = {"save": "saving a checkpoint", "evaluate": "an evaluation", "export": "exporting weights"}[what]
    assert "different collectives" in sentence and f"rank 0 in {phase}" in sentence
    assert "; rank 1 in logging" in sentence, sentence
    # The stacks are of when the rank was asked, also where another one's end has freed it meanwhile.
    (found,) = (tmp_path / "output" / "hang").glob("*-rank-1.txt")
    assert "all_reduce" in found.read_text().partition("Thread MainThread")[2]


def test_a_report_alone_lets_the_run_go_on(tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, strategy="ddp", fault="Delay", fault_arguments=(9.0,), hang_timeout=3.0,
        on_hang="report", where={"rank": 1, "update": 5, "phase": "forward"},
    )  # fmt: skip
    assert statuses(ends) == [0, 0], said(ends)
    assert "has been in your forward" in said(ends)


def test_a_hang_timeout_below_an_update_is_refused(tmp_path: Path) -> None:
    ends = run_mortal(
        fit_and_train, 2, tmp_path, strategy="ddp", fault="Delay", fault_arguments=(2.5,), hang_timeout=1.5,
        where={"rank": None, "update": range(1, 9), "phase": "forward"},
    )  # fmt: skip
    assert 1 in statuses(ends) and set(statuses(ends)) <= {1, ANOTHER_FAILED}, said(ends)
    assert "hang_timeout=1.5 is below the" in said(ends)
