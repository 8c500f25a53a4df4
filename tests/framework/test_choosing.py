"""Which strategy is chosen: 12 sizes of a model on 4 machines, worked out by hand from bytes.

The figures are closed formulas, not plans. P is the bytes of one byte per parameter, in GiB; a GPT of L layers of width
d has P = 12 L d^2 + 50257 d. A rank has one sample of 2,048 tokens.

- Parameters, gradients and Adam's moments are 4 + 4 + 8 = 16 bytes per parameter, in mixed precision, too.
- Activations A are 34 x 2048 x d bytes a layer (Korthikanti et al., 2022, with flash attention), of float32 twice that;
  checkpointed, each layer's input (4,096 d) and one layer's activations. Logits and their gradients: 0.96 GiB.
- Gathered weights are 2 bytes per parameter in mixed precision and 4 in 32-true: all of them where they are kept, else
  those of two layers.
- An update of ddp sends 4 P all-reduced; fsdp2 gathers once where weights are kept and twice where not, and
  reduce-scatters 4 P; replicas also all-reduce their shards of 4 P / 8. Rings: times (n - 1) / n, an all-reduce twice;
  eight ranks share a node's network.

The three smallest are trained in 32-true, the others in mixed precision.
"""

import json
import os
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_models import build_choosing
from rich.console import Console
from stratagem import Fit, configure
from stratagem.framework.command_line import main
from stratagem.framework.planning.account import Account, Peak, Traffic
from stratagem.framework.planning.candidates import choose_among
from stratagem.framework.planning.child import under
from stratagem.framework.planning.choice_shown import choice_shown
from stratagem.framework.planning.choosing import (
    Candidate,
    Choice,
    Figures,
    candidates_for,
    choose,
    cut_candidates,
    figures_of,
)
from stratagem.framework.planning.forked import run_forked
from stratagem.strategies import FSDP2

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py") + ":build"
GIB = 2**30
# Layers and width. P, A and A where it is checkpointed, in GiB:
SIZES = {
    "125M": (12, 768),  # 0.115, 1.20 (float32), 0.17
    "350M": (24, 1024),  # 0.329, 3.19 (float32), 0.32
    "760M": (24, 1536),  # 0.705, 4.78 (float32), 0.48
    "1.3B": (24, 2048),  # 1.22, 3.19, 0.32
    "2.7B": (32, 2560),  # 2.46, 5.31, 0.48
    "6.7B": (32, 4096),  # 6.19, 8.50, 0.77
    "13B": (40, 5120),  # 11.96, 13.28, 1.11
    "30B": (48, 7168),  # 27.90, 22.31, 1.78
    "66B": (64, 9216),  # 61.18, 38.25, 2.85
    "175B": (96, 12288),  # 162.6, 76.5, 5.30
    "405B": (126, 16384),  # 378.8, 133.9, 8.94
    "1T": (128, 25600),  # 938.7, 212.5, 14.2
}
FULL = "125M", "350M", "760M"
# Ranks, nodes, GiB of the device with 10 % free, GiB of the host's memory for a rank with 10 % free.
MACHINES = {
    "1 x 4090": (1, 1, 21.59, 460.8),
    "8 x H100": (8, 1, 71.68, 230.4),
    "2 x 8 A100-40": (16, 2, 36.0, 115.2),
    "8 x 8 H100": (64, 8, 71.68, 230.4),
}
KEPT, OFF = {"reshard_after_forward": False}, {"cpu_offload": True}


def fsdp2(checkpoints: bool = False, **options: Any) -> Candidate:
    return Candidate("fsdp2", options, checkpoints)


SINGLE, DDP = Candidate("single"), Candidate("ddp")
EXPECTED: list[tuple[str, str, Candidate | None]] = [
    # On one 4090 nothing is sent, so what fits without offloading comes first, and then without checkpointing.
    ("1 x 4090", "125M", SINGLE),  # 16 P = 1.8, A 1.2: 4.0
    ("1 x 4090", "350M", SINGLE),  # 5.3 + 3.2 + 1.0 = 9.4
    ("1 x 4090", "760M", SINGLE),  # 11.3 + 4.8 + 1.0 = 17.0
    ("1 x 4090", "1.3B", Candidate("single", {}, True)),  # 19.5 + 3.2 + 1.0 = 23.7 is too much; checkpointed 20.8
    (
        "1 x 4090",
        "2.7B",
        fsdp2(**KEPT, **OFF),
    ),  # 16 P = 39; kept: 2 P = 4.9 + 5.3 + 1.0 = 11.2, 8 P to and from the host
    # Kept: 12.4 + 8.5 + 1.0 = 21.84, too much by little; checkpointed 14.1 with 8 P, which comes before 12 P.
    ("1 x 4090", "6.7B", fsdp2(True, **KEPT, **OFF)),
    ("1 x 4090", "13B", fsdp2(**OFF)),  # kept: 2 P = 23.9; two layers: 1.2 + 13.3 + 1.0 = 15.4, 191 on the host
    ("1 x 4090", "30B", fsdp2(True, **OFF)),  # 2.3 + 22.3 + 1.0 = 25.6; checkpointed 5.0, 446 on the host
    ("1 x 4090", "66B", None),  # 16 P = 979 on the host
    ("1 x 4090", "175B", None),
    ("1 x 4090", "405B", None),
    ("1 x 4090", "1T", None),
    # In one node of eight: in 32-true ddp and kept shards both send 8 P, and ddp is simpler; in mixed precision kept
    # shards send 6 P, ddp 8 P. Kept: 16 P / 8 + 2 P = 4 P.
    ("8 x H100", "125M", DDP),
    ("8 x H100", "350M", DDP),
    ("8 x H100", "760M", DDP),  # 17.0
    ("8 x H100", "1.3B", fsdp2(**KEPT)),  # 4.9 + 3.2 + 1.0 = 9.0
    ("8 x H100", "2.7B", fsdp2(**KEPT)),  # 9.9 + 5.3 + 1.0 = 16.1
    ("8 x H100", "6.7B", fsdp2(**KEPT)),  # 24.8 + 8.5 + 1.0 = 34.2; ddp's 16 P = 99 wouldn't fit either
    ("8 x H100", "13B", fsdp2(**KEPT)),  # 47.8 + 13.3 + 1.0 = 62.1
    ("8 x H100", "30B", fsdp2(True)),  # 4 P = 112; 2 P = 55.8 + 2.3 + 22.3 + 1.0 = 81.4; checkpointed 60.8
    ("8 x H100", "66B", fsdp2(**OFF)),  # 2 P = 122; offloaded: 3.8 + 38.3 + 1.0 = 43.0, 122 on the host
    ("8 x H100", "175B", None),  # 16 P / 8 = 325 on the host
    ("8 x H100", "405B", None),
    ("8 x H100", "1T", None),
    # On two nodes replicas send P / 2 between them; kept shards over all ranks 0.70 P (0.94 P in 32-true), ddp 0.94 P.
    # Kept in a replica: 4 P, in 32-true 2 P + 4 P.
    ("2 x 8 A100-40", "125M", fsdp2(replicas=2, **KEPT)),
    ("2 x 8 A100-40", "350M", fsdp2(replicas=2, **KEPT)),
    ("2 x 8 A100-40", "760M", fsdp2(replicas=2, **KEPT)),  # 4.2 + 4.8 + 1.0 = 10.0
    ("2 x 8 A100-40", "1.3B", fsdp2(replicas=2, **KEPT)),
    ("2 x 8 A100-40", "2.7B", fsdp2(replicas=2, **KEPT)),  # 16.1
    ("2 x 8 A100-40", "6.7B", fsdp2(replicas=2, **KEPT)),  # 34.2
    # Kept 47.8; 2 P = 23.9 + 1.2 + 13.3 + 1.0 = 39.3; checkpointed 27.2. Shards over all ranks fit without
    # checkpointing (27.4), and send 0.94 P.
    ("2 x 8 A100-40", "13B", fsdp2(True, replicas=2)),
    ("2 x 8 A100-40", "30B", fsdp2(True)),  # in a replica 2 P = 55.8; over all P = 27.9 + 2.3 + 1.8 + 1.0 = 32.9
    # P = 61.2; offloaded and checkpointed 3.8 + 2.8 + 1.0 = 7.6, on the host P = 61.2; a replica's 122 don't fit there.
    ("2 x 8 A100-40", "66B", fsdp2(True, **OFF)),
    ("2 x 8 A100-40", "175B", None),  # 162.6 on the host
    ("2 x 8 A100-40", "405B", None),
    ("2 x 8 A100-40", "1T", None),
    # On eight nodes replicas send 7/8 P between them; kept shards over all ranks 0.74 P in mixed precision and 0.98 P
    # in 32-true. Kept over all: 16 P / 64 + 2 P = 2.25 P.
    ("8 x 8 H100", "125M", fsdp2(replicas=8, **KEPT)),
    ("8 x 8 H100", "350M", fsdp2(replicas=8, **KEPT)),
    ("8 x 8 H100", "760M", fsdp2(replicas=8, **KEPT)),
    ("8 x 8 H100", "1.3B", fsdp2(**KEPT)),
    ("8 x 8 H100", "2.7B", fsdp2(**KEPT)),
    ("8 x 8 H100", "6.7B", fsdp2(**KEPT)),  # 13.9 + 8.5 + 1.0 = 23.4
    ("8 x 8 H100", "13B", fsdp2(**KEPT)),  # 26.9 + 13.3 + 1.0 = 41.1
    ("8 x 8 H100", "30B", fsdp2(True, **KEPT)),  # 62.8 + 22.3 + 1.0 = 86; checkpointed 65.5, and 0.74 P
    ("8 x 8 H100", "66B", fsdp2()),  # 2.25 P = 138; 15.3 + 3.8 + 38.3 + 1.0 = 58.3
    ("8 x 8 H100", "175B", fsdp2(True)),  # 40.7 + 6.8 + 76.5 = 124; checkpointed 53.7
    ("8 x 8 H100", "405B", fsdp2(True, **OFF)),  # 94.7; offloaded 12.0 + 8.9 + 1.0 = 21.9, 94.7 on the host
    ("8 x 8 H100", "1T", None),  # 234.7 on the host, which has 230.4
]


def figures_by_hand(candidate: Candidate, size: str, ranks: int, nodes: int) -> Figures:
    """The formulas above."""
    layers, width = SIZES[size]
    weights, number = 12 * layers * width**2 + 50257 * width, 4 if size in FULL else 2
    options, again = candidate.options, candidate.gradient_checkpointing
    activations = (layers * 4096 + 34 * 2048 if again else layers * 34 * 2048) * width * number // 2
    activations += 10 * 2048 * 50257
    recomputed = 2 * weights * 2048 * again
    if candidate.strategy == "single":
        return Figures(candidate, 16 * weights + activations, recomputed=recomputed)
    sent = {"all": 0.0, "replicas": 0.0}
    if candidate.strategy == "ddp":
        gathered, shards, replicas, sent["all"] = 0, 1, 1, 8 * weights * (ranks - 1) / ranks
    else:
        is_kept = options.get("reshard_after_forward") is False
        replicas = options.get("replicas", 1)
        shards = ranks // replicas
        gathered = number * weights if is_kept else 2 * 12 * width**2 * number
        sent["all"] = ((1 if is_kept else 2) * number + 4) * weights * (shards - 1) / shards
        sent["replicas"] = 2 * 4 * weights / shards * (replicas - 1) / replicas
    state, one_node = 16 * weights // shards, nodes == 1 or replicas > 1
    figures = Figures(
        candidate,
        state + gathered + activations,
        between_nodes=sent["replicas"] if one_node else sent["all"] / 8,
        in_node=sent["all"],
        recomputed=recomputed,
    )
    if not candidate.offloads:
        return figures
    reads = 1 if options.get("reshard_after_forward") is False else 2
    return replace(figures, need=gathered + activations, on_host=state, to_host=(4 * reads + 4) * weights / shards)


@pytest.mark.parametrize(
    ("machine", "size", "expected"), EXPECTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_choice_for_a_size_on_a_machine(machine: str, size: str, expected: Candidate | None) -> None:
    ranks, nodes, room, host_room = MACHINES[machine]
    figures = [figures_by_hand(each, size, ranks, nodes) for each in candidates_for(ranks, nodes)]
    choice = choose(figures, int(room * GIB), int(host_room * GIB))
    assert choice.chosen == expected
    assert [each.figures.candidate for each in choice.verdicts].count(expected) == (expected is not None)
    assert len(choice.verdicts) == len(figures)
    assert all(each.sentence and each.number is not None for each in choice.verdicts)


# What only a cut of layers or sequences makes fit, on 8 x 8 H100: layers, width, tokens of a sample.
CUT = [
    # P = 77 GiB, a layer 18.8. Two gathered layers are 75 GiB in mixed precision: no sharding fits, offloaded or not.
    # With layers cut by 8: 16 P / 64 = 19.2, gathered 9.4, A = 10.6 (counted whole), logits 1.0: 40.2.
    pytest.param(4, 40960, 2048, Candidate("fsdp2", {"tensor_parallel": 8}, False, 16), id="wide"),
    # A is 34 GiB a layer; checkpointed 64 + 34, and logits 123 more, which cut layers leave whole, too. With sequences
    # cut by 8: 1.5 + 0.8 + 27.6 = 29.9; without checkpointing 153.6.
    pytest.param(32, 4096, 262144, Candidate("fsdp2", {"context_parallel": 8}, True, 16), id="long"),
]


def figures_of_cut(candidate: Candidate, layers: int, width: int, tokens: int) -> Figures:
    """The formulas above for 64 ranks, eight on a node. What is sent decides nothing here, and is left out."""
    options, again = candidate.options, candidate.gradient_checkpointing
    features, positions = options.get("tensor_parallel", 1), options.get("context_parallel", 1)
    weights = 12 * layers * width**2 + 50257 * width
    activations = (layers * 2 * tokens + 34 * tokens if again else layers * 34 * tokens) * width
    activations = (activations + 10 * tokens * 50257) // positions
    is_kept = options.get("reshard_after_forward") is False
    gathered = 2 * weights if is_kept else 2 * 12 * width**2 * 2 // features
    shards = 64 // options.get("replicas", 1)
    if candidate.strategy == "ddp":
        gathered, shards = 0, 1
    state, recomputed = 16 * weights // shards, 2 * weights * tokens * again
    if candidate.offloads:
        return Figures(candidate, gathered + activations, on_host=state, to_host=1.0, recomputed=recomputed)
    return Figures(candidate, state + gathered + activations, recomputed=recomputed)


@pytest.mark.parametrize(("layers", "width", "tokens", "expected"), CUT)
def test_the_choice_where_only_cut_layers_or_sequences_fit(
    layers: int, width: int, tokens: int, expected: Candidate
) -> None:
    cut = cut_candidates(8, ["tensor_parallel", "context_parallel"], 2)
    assert [each.title for each in cut] == [
        "fsdp2(tensor_parallel=8)",
        "fsdp2(tensor_parallel=8) + gradient checkpointing",
        "fsdp2(context_parallel=8)",
        "fsdp2(context_parallel=8) + gradient checkpointing",
    ]
    figures = [figures_of_cut(each, layers, width, tokens) for each in (*candidates_for(64, 8), *cut)]
    choice = choose(figures, int(71.68 * GIB), int(230.4 * GIB))
    assert choice.chosen == expected
    assert all(each.options.get("tensor_parallel", each.options.get("context_parallel")) for each in choice.kept)


@pytest.mark.parametrize(
    ("room", "cuts", "accumulation", "expected"),
    [
        (300, ["tensor_parallel"], 2, Candidate("fsdp2", {"tensor_parallel": 8}, False, 16)),
        (600, ["tensor_parallel"], 2, DDP),  # what is whole fits
        (300, [], 2, None),  # the module doesn't say how
        (300, ["tensor_parallel"], 0, None),  # the number of micro-batches changes
    ],
    ids=["cut", "fits whole", "says nothing", "schedule"],
)
def test_layers_are_cut_where_nothing_else_fits_and_the_module_says_how(
    room: int, cuts: list[str], accumulation: int, expected: Candidate | None
) -> None:
    def play(candidate: Candidate) -> dict[str, Any]:
        need = 200 if "tensor_parallel" in candidate.options else 500
        return {"account": Account(0, peak=Peak(need, {}, "backward", "", 0)).to_dict(), "cuts": cuts}

    choice = choose_among(play, 8, 1, room, offloads=False, accumulation=accumulation)
    listed = [each.figures.candidate.title for each in choice.verdicts]
    assert choice.chosen == expected
    assert any("tensor_parallel" in each for each in listed) == bool(expected and expected.options)
    if expected is not None and expected.options:
        assert choice.words == "--strategy fsdp2 --strategy.tensor_parallel 8 --gradient_accumulation_steps 16"
        assert expected.python == "strategy=FSDP2(tensor_parallel=8), gradient_accumulation_steps=16"


def test_all_sizes_on_all_machines_have_an_expected_choice() -> None:
    assert {(machine, size) for machine, size, _ in EXPECTED} == {(m, s) for m in MACHINES for s in SIZES}


def test_what_cannot_run_is_said_and_comes_last() -> None:
    ddp, sharded = Candidate("ddp"), Candidate("fsdp2")
    choice = choose([Figures(ddp, problem="ddp can't"), Figures(sharded, 8)], 10)
    assert choice.chosen == sharded
    assert [each.sentence for each in choice.verdicts] == ["is the only one that fits", "ddp can't"]
    assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice


def test_the_fastest_that_was_measured_is_taken_and_what_failed_is_followed_by_what_may_need_less() -> None:
    kept = Figures(fsdp2(**KEPT), 8, 4, in_node=2.0)
    choice = choose([Figures(DDP, 9, 7, in_node=1.0), kept, Figures(fsdp2(True), 9, 8, in_node=3.0)], 10)
    measured = choice.measured({"ddp": 0.5, kept.candidate.title: 0.25})
    assert [each.number for each in measured.verdicts] == [0.25, 0.5, 3.0] and measured.chosen == kept.candidate
    assert choice.measured({"ddp": 0.5, kept.candidate.title: 0.5}).chosen == DDP
    left = choice.after_failure()
    assert left.kept == [kept.candidate] and [each.number for each in left.failed] == [9]
    assert left.after_failure().chosen is None and left.planned == choice.planned


def test_a_table_has_the_columns_that_a_candidate_has_something_in() -> None:
    kept = Figures(Candidate("fsdp2", {"reshard_after_forward": False}), 10 * GIB, in_node=2 * GIB)
    console = Console(width=140, file=StringIO())
    console.print(choice_shown(choose([kept], 12 * GIB), "a choice"))
    _, _, heading, _, row, *_ = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert heading.replace("┃", "").split() == ["candidate", "peak", "in", "a", "node"]
    assert "fsdp2(reshard_after_forward=False)" in row


def test_shards_padding_decides_nothing() -> None:
    figures = [Figures(Candidate("ddp"), 5, in_node=1000.0), Figures(Candidate("fsdp2"), 4, in_node=996.0)]
    assert choose(figures, 10).chosen == Candidate("ddp")
    assert choose([figures[0], replace(figures[1], in_node=980.0)], 10).chosen == Candidate("fsdp2")


def test_figures_follow_from_an_account() -> None:
    shards = Traffic("all_gather", "shard", 16, "between nodes", 8, 2, 1600)
    replicas = Traffic("all_reduce", "replicate", 2, "between nodes", 1, 1, 100)
    peak = Peak(900, {}, "backward", "", 50, beside=70)
    account = Account(
        0, 100, 20, 100, 200, 30, accumulation=3, peak=peak, traffic=(shards, replicas),
        flops={"forward": 7, "recomputed": 5},
    )  # fmt: skip
    found = figures_of(Candidate("fsdp2"), account)
    assert (found.need, found.on_host, found.recomputed) == (900, 0, 5)
    assert (found.between_nodes, found.in_node) == (1500 / 8 + 100, 1500)
    # Weights are read for forward and backward of three micro-batches, and gradients written once.
    found = figures_of(Candidate("fsdp2", {"cpu_offload": True}), account)
    assert (found.need, found.on_host, found.to_host) == (70, 420, 120 * 2 * 3 + 100)
    static = figures_of(Candidate("ddp"), replace(account, peak=None))
    assert static.is_static and static.need == 450


def test_a_copy_of_the_process_that_fails_says_so() -> None:
    def fails() -> dict[str, Any]:
        print("what it printed")
        raise RuntimeError("no account")

    def is_killed() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    works = [lambda: {"rank": os.environ["RANK"], "seed": torch.initial_seed()}, fails, is_killed]
    good, failed, killed = run_forked(works, {"RANK": "7"})
    assert good.answer == {"rank": "7", "seed": torch.initial_seed()}
    assert failed.answer is None and "what it printed" in failed.printed and "no account" in failed.printed
    assert killed.answer is None and killed.status == -signal.SIGKILL


@pytest.mark.slow
def test_a_module_that_cannot_be_played_is_placed_by_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build_choosing()
    with pytest.warns(UserWarning, match="no update of this module could be played"):
        fit = Fit(**made, strategy="auto", loggers=(), output_dir=str(tmp_path))
    assert fit.strategy.name == "single"
    printed = capsys.readouterr().out
    assert 'Fit(..., strategy="single")' in printed and "decide, and then simplicity" in printed


@pytest.mark.slow
def test_the_command_prints_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", GPT, "--build.layers", "1", "--build.width", "16", "--auto", "--world", "2"]
    assert main([*words, "--device", "24GiB,1e12,1e12", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["chosen"]["words"] == ["--strategy", "ddp"]
    assert len(found["candidates"]) == len(candidates_for(2, 1))
    words[words.index("--auto")] = "--strategy=auto"
    assert main([*words, "--device", "24GiB,1e12,1e12", "--json"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "own",
    [
        {"strategy": FSDP2(replicas=2, cpu_offload=True)},
        {"strategy": "fsdp2", "strategy.replicas": 2, "strategy.cpu_offload": True},
    ],
    ids=["object", "words"],
)
def test_options_of_the_programs_own_strategy_are_no_candidates(own: dict[str, Any]) -> None:
    run = configure(lambda: None, None, own, ["--learning_rate", "0.5"])
    assert run.section("strategy")["replicas"] == 2
    played = under(run, fsdp2(True, **KEPT))
    assert (played.values["strategy"], played.section("strategy")) == ("fsdp2", KEPT)
    assert played.values["gradient_checkpointing"] and played.values["learning_rate"] == 0.5
    played = under(run, DDP)
    assert (played.values["strategy"], played.section("strategy")) == ("ddp", {})
    assert not played.values["gradient_checkpointing"]


def of_candidate(candidate: Candidate) -> dict[str, Any]:
    """An account that lacks 100 of its bytes where activations are computed again; ddp can't run."""
    if candidate.strategy == "ddp":
        return {"problem": "ddp\n can't"}
    need = 400 if candidate.options else 300
    peak = Peak(need - 100 * candidate.gradient_checkpointing, {}, "backward", "", 0)
    flops = {"forward": 9, "recomputed": 9 * candidate.gradient_checkpointing}
    return {"account": Account(0, flops=flops, peak=peak).to_dict()}


@pytest.mark.parametrize(
    ("room", "expected", "bounds"),
    [
        (400, Candidate("fsdp2", KEPT), 2),  # what fits is played without checkpointing alone
        (300, Candidate("fsdp2"), 1),  # as much is sent, so that recomputing decides
        (200, Candidate("fsdp2", {}, True), 0),
    ],
)
def test_what_is_played_with_checkpointing_is_what_does_not_fit_without(
    room: int, expected: Candidate, bounds: int
) -> None:
    choice = choose_among(of_candidate, 2, 1, room, offloads=False)
    assert choice.chosen == expected
    assert sum(each.figures.is_bound for each in choice.verdicts) == bounds
    assert [each.sentence for each in choice.verdicts if each.figures.problem] == ["ddp can't"] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--auto", "--strategy", "ddp"], "leave out --strategy"), (["--host-memory", "1GiB"], "without --auto")],
)
def test_words_without_effect_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", GPT, *words])
    assert said in capsys.readouterr().err
