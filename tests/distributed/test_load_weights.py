"""``fit.load_weights`` on real ranks: under every placement the run goes on from the values in the file."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Average, convert
from torch import Tensor
from training import Tagger, make_fit, share_of_16, token_rows, train

PLACEMENTS: list[Any] = [
    (2, "fsdp2", {}, "32-true"),
    *(
        pytest.param(*placement, marks=pytest.mark.slow)
        for placement in (
            (2, "ddp", {}, "32-true"),
            (2, "fsdp1", {}, "32-true"),
            (2, "fsdp2", {}, "bf16-true"),
            (2, "fsdp1", {}, "bf16-true"),
            (2, "tp", {}, "32-true"),
            (4, "fsdp2", {"tensor_parallel": 2}, "32-true"),
            (2, "deepspeed_stage_1", {}, "32-true"),
            (2, "deepspeed_stage_3", {}, "32-true"),
        )
    ),
]
FORMATS = ("safetensors", "torch", "dcp")


def values() -> dict[str, Tensor]:
    """Weights that no run here begins with; those that two names share are there once."""
    torch.manual_seed(77)
    state = {name: tensor.detach().clone() for name, tensor in Tagger().state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name != "head.weight"}


def load_and_train(paths: dict[str, str], directory: str, **arguments: Any) -> dict[str, Any]:
    """Load each file after the other, with training between; what the first update from the last one gives."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    average = Average(decay=0.5)
    fit = make_fit(Tagger(), token_rows(48), callbacks=[average], max_steps=3, **arguments)
    results: dict[str, Any] = {"read": {}}
    for name, path in paths.items():
        preadv, count = os.preadv, 0

        def counted(file: int, into: Any, offset: int, read: Any = preadv) -> int:
            nonlocal count
            count += len(into[0])
            return read(file, into, offset)

        fit.place()
        os.preadv = counted
        try:
            assert fit.load_weights(path) == ([], [])
        finally:
            os.preadv = preadv
        results["read"][name] = count
        fit.export(Path(directory) / f"{name}.safetensors")
        fit.train()
        results.setdefault("losses", []).append([log["loss"] for log in fit.state.log_history if "loss" in log])
    fit.export(Path(directory) / "average.safetensors", weights=average)
    return results


@pytest.mark.parametrize(("world", "strategy", "options", "precision"), PLACEMENTS, ids=str)
def test_a_run_begins_with_the_weights(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any], precision: str
) -> None:
    expected = values()
    torch.save(expected, tmp_path / "given.pt")
    paths = {}
    for to in FORMATS:
        convert(tmp_path / "given.pt", tmp_path / f"given {to}", to)
        paths[to] = str(tmp_path / f"given {to}")
    job = {"paths": paths, "directory": str(tmp_path), "strategy": strategy, "options": options, "precision": precision}
    results = ranks[world].run(load_and_train, **job)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for to in FORMATS:
        found = load_file(tmp_path / f"{to}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(found[name], rounded), (to, name)
    # Moments, counters and averages begin anew each time, whatever was trained between.
    first, *others = results[0]["losses"]
    assert all(other == first for other in others)
    if strategy == "fsdp2" and not options:
        whole = (tmp_path / "given safetensors").stat().st_size
        assert all(result["read"]["safetensors"] < 0.75 * whole for result in results)


def save_sharded(directory: str) -> None:
    """DCP's own writer, from FSDP2's shards on each rank, with an optimizer's state beside."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(int(os.environ.get("RANK", "0")))
    fit = make_fit(Tagger(), token_rows(48), max_steps=2, strategy="fsdp2")
    fit.train()
    model, optimizer = get_state_dict(fit.module, fit.optimizer)
    dcp.save({"model": model, "optim": optimizer}, checkpoint_id=directory)
    fit.export(Path(directory) / "whole.safetensors")


def load_there(path: str, target: str, **arguments: Any) -> None:
    fit = make_fit(Tagger(), token_rows(48), **arguments)
    fit.load_weights(path)
    fit.export(target)


@pytest.mark.slow
def test_a_directory_that_fsdp2_wrote_on_two_ranks(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    directory = tmp_path / "dcp"
    ranks[2].run(save_sharded, directory=str(directory))
    assert len(list(directory.glob("*.distcp"))) == 2
    expected = load_file(directory / "whole.safetensors")
    done = convert(directory, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert {"embed.weight", "head.weight"} <= found.keys()
    assert any(name.startswith("optim.") for name in done.left_out)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for strategy in ("fsdp2", "tp"):
        target = tmp_path / f"{strategy}.safetensors"
        ranks[2].run(load_there, path=str(directory), target=str(target), strategy=strategy)
        for name, tensor in load_file(target).items():
            assert torch.equal(tensor, expected[name]), (strategy, name)


def refuse(path: str, **arguments: Any) -> tuple[str, bool]:
    """What a rank is told, and whether its weights are what they were."""
    fit = make_fit(Tagger(), token_rows(48), **arguments)
    fit.place()
    before = [parameter.to_local().clone() for parameter in fit.module.parameters()]  # type: ignore[attr-defined]
    with pytest.raises(ValueError) as error:
        fit.load_weights(path)
    after = [parameter.to_local() for parameter in fit.module.parameters()]  # type: ignore[attr-defined]
    return str(error.value), all(map(torch.equal, before, after))


def test_all_ranks_refuse_alike(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    state = values()
    state["embed.weight"] = state["embed.weight"][:-1]
    state["extra"] = state.pop("mix.bias")
    torch.save(state, tmp_path / "w.pt")
    for said, unchanged in ranks[2].run(refuse, path=str(tmp_path / "w.pt"), strategy="fsdp2"):
        assert unchanged
        assert (
            "the file lacks mix.bias; the module has no extra; embed.weight has the shape (11, 6) in the module and"
            in said
        )


@pytest.mark.slow
def test_a_checkpoint_gives_the_next_loss_of_its_run(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    """Under each strategy, the first loss from the weights of a checkpoint is the one that one process has."""
    size = {"per_device_train_batch_size": 16}
    train(max_steps=2, output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=2, **size)
    job = {"paths": {"checkpoint": str(tmp_path / "run" / "checkpoint-2")}, "directory": str(tmp_path)}
    alone = load_and_train(**job, strategy="single", **size)["losses"][0]
    fresh = train(max_steps=1, data=token_rows(48), **size)["loss"][0]
    assert abs(alone[0] - fresh) > 1e-3
    for strategy in ("ddp", "fsdp2", "tp"):
        size["per_device_train_batch_size"] = share_of_16(strategy, 2, {})
        found = ranks[2].run(load_and_train, **job, strategy=strategy, **size)[0]["losses"][0]
        assert found == pytest.approx(alone, rel=1e-4)
