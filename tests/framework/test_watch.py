"""The parts of the watch: when nothing moves for too long, where a rank is, and the sentence about all of them."""

import ast
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stratagem import Callback
from stratagem.framework.watch import whereabouts
from stratagem.framework.watch.hang_report import ranks, sentence
from stratagem.framework.watch.pulse import Pulse
from stratagem.framework.watch.watch import Watch, WatchWarning
from stratagem.framework.watch.whereabouts import PHASES, Whereabouts, find, frame_of
from tiny import MakeFit, Regressor, regression_rows

ROOT = Path(__file__).parents[2]


@given(st.lists(st.tuples(st.floats(0.5, 9.0), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_the_longest_update_is_that_of_a_plain_count(steps: Sequence[tuple[float, int, int]]) -> None:
    pulse = Pulse(None)
    pulse.start(0.0, (7, 0))
    now, counters, moved, gaps, updates = 0.0, (7, 0), 0.0, [0.0], 0
    for seconds, more_updates, more_batches in steps:
        now += seconds
        counters = (counters[0] + more_updates, counters[1] + more_batches)
        pulse.look(now, counters)
        if more_updates or more_batches:
            if updates:  # the first update may compile, and is left out
                gaps.append((now - moved) / (more_updates + more_batches))
            moved, updates = now, updates + more_updates
        assert pulse.without_progress(now) == pytest.approx(now - moved)
    assert pulse.longest == pytest.approx(max(gaps))
    usual = max(60.0, 20.0 * max(gaps))
    assert pulse.limit(is_long=False) == pytest.approx(usual * (1 if updates >= 2 else 10))
    assert pulse.limit(is_long=True) == pytest.approx(usual * 10)


def test_a_process_that_was_stopped_itself_is_no_hang() -> None:
    pulse = Pulse(5.0)
    pulse.start(0.0, (0, 0))
    for second in range(1, 4):
        pulse.look(float(second), (second, 0))
    pulse.look(1000.0, (3, 0))  # Ctrl-Z, and fg a quarter of an hour later
    assert pulse.without_progress(1001.0) < 5.0


def test_phases_name_functions_that_exist() -> None:
    for file, function in [*PHASES, whereabouts.OUTERMOST]:
        tree = ast.parse((ROOT / file).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree)), file
    assert set(whereabouts.LONG) <= set(PHASES.values())


def test_where_a_rank_is_names_the_line_of_the_program(make_fit: MakeFit) -> None:
    found: list[Whereabouts] = []
    trains_in = threading.get_ident()

    class Look(Regressor):
        def forward(self, x: Any) -> Any:
            other = threading.Thread(target=lambda: found.append(find(frame_of(trains_in), 0, 3, 1.5)))
            other.start()
            other.join()
            return super().forward(x)

    make_fit(Look(), regression_rows(4), max_steps=1).train()
    assert found[0].phase == "your forward" and found[0].function == "forward"
    name, _, line = found[0].place.partition(":")
    assert name == "test_watch.py"
    assert Path(__file__).read_text().splitlines()[int(line) - 1].strip() in ("other.start()", "other.join()")
    assert Whereabouts.from_words(found[0].to_words()) == found[0]


def report(rank: int, **facts: Any) -> Whereabouts:
    return Whereabouts(**{"rank": rank, "host": "abc"[rank % 3], "update": 311, "phase": "", "place": "",
                             "function": "", "seconds": 62.0, **facts})  # fmt: skip


REDUCING = {"phase": "backward", "waits": True, "collective": "all_reduce number 7 of group default_pg", "number": 7}


def test_the_sentence_names_who_is_waited_for() -> None:
    busy = report(1, phase="your forward", place="train.py:41", function="forward")
    reports = {1: busy, **{rank: report(rank, **REDUCING) for rank in (0, 2, 3)}}
    assert sentence(reports, dict.fromkeys(range(4), "h")) == (
        "rank 1 (host b) has been in your forward, train.py:41 in forward for 62 s; "
        "ranks 0, 2, 3 wait for it in the all_reduce of backward, in update 311."
    )


def test_the_sentence_names_who_doesnt_answer() -> None:
    said = sentence({rank: report(rank, **REDUCING) for rank in (0, 2)}, {0: "a", 1: "b", 2: "c"})
    assert said.startswith("rank 1 (host b) doesn't answer: stopped, dead, or cut off; ranks 0, 2 wait for it in")


def test_the_sentence_tells_different_collectives_apart() -> None:
    saving = report(0, phase="saving a checkpoint", place="train.py:9", function="on_step_end", waits=True,
                    collective="allgather number 8 of group default_pg", number=8)  # fmt: skip
    said = sentence({0: saving, 1: report(1, **REDUCING), 2: report(2, **REDUCING)}, dict.fromkeys(range(3), "h"))
    assert "rank 0 in saving a checkpoint, train.py:9 in on_step_end (allgather)" in said
    assert "ranks 1, 2 in backward (all_reduce)" in said


def test_the_sentence_names_who_is_behind() -> None:
    reports = {0: report(0, **REDUCING), 1: report(1, **{**REDUCING, "number": 5})}
    assert "rank 1 is behind" in sentence(reports, {0: "a", 1: "b"})
    assert "same collective" in sentence({0: report(0, **REDUCING), 1: report(1, **REDUCING)}, {0: "a", 1: "b"})


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_are_named_each_once(which: set[int]) -> None:
    said = ranks(which).removeprefix("ranks ").removeprefix("rank ")
    named: list[int] = []
    for part in said.split(", "):
        first, _, last = part.partition(" to ")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(which)


@pytest.mark.slow
def test_a_grace_below_an_update_and_a_save_is_said(make_fit: MakeFit) -> None:
    class Slow(Callback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            time.sleep(1.2)

    fit = make_fit(Regressor(), regression_rows(8), callbacks=[Slow()], max_steps=4, preemption_grace=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.train()
    said = [str(one.message) for one in caught if one.category is WatchWarning]
    assert len(said) == 1 and said[0].startswith("preemption_grace=0.5 s is less than an update (1.")


@given(st.lists(st.sampled_from([0, 130, 143]), min_size=1, max_size=300))
def test_a_wish_of_any_rank_is_heard_in_the_sum(wishes: list[int]) -> None:
    total = sum(Watch.words(SimpleNamespace(wish=wish)) for wish in wishes)  # type: ignore[arg-type]
    assert Watch.told(total) == (143 if 143 in wishes else 130 if 130 in wishes else 0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("preemption_signals", "SIGKILL"),
        ("preemption_signals", "TERM"),
        ("preemption_grace", 0.0),
        ("hang_timeout", 0.0),
        ("on_hang", "stop"),
    ],
)
def test_arguments_out_of_their_range_are_refused(make_fit: MakeFit, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        make_fit(Regressor(), regression_rows(8), **{argument: value})


def test_a_run_leaves_no_thread_and_no_handler(make_fit: MakeFit) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), threading.active_count()
    make_fit(Regressor(), regression_rows(8), max_steps=2).train()
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), threading.active_count())
    assert signal.set_wakeup_fd(-1) == -1
