"""``fit.load_weights`` on one device: names, shapes, strictness, and what follows the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Average, Callback, TrainModule
from tiny import Dropping, MakeFit, Regressor, logs_of, masters, parameters_of, regression_rows


def saved(path: Path, seed: int = 5, **changes: Any) -> dict[str, torch.Tensor]:
    """Write another Regressor's weights; ``changes`` replace them, or leave them out where they are None."""
    torch.manual_seed(seed)
    state = {**Regressor().state_dict(), **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save(state, path)
    return state


def test_training_begins_with_the_weights(make_fit: MakeFit, tmp_path: Path) -> None:
    expected = saved(tmp_path / "w.pt")
    by_hand = Regressor()
    by_hand.load_state_dict(expected)
    fit, other = (
        make_fit(Regressor(), regression_rows(16), max_steps=3),
        make_fit(by_hand, regression_rows(16), max_steps=3),
    )
    for _ in range(2):  # before train, and between two
        assert fit.load_weights(tmp_path / "w.pt") == ([], [])
        for name, tensor in parameters_of(fit.module).items():
            assert torch.equal(tensor, expected[name])
        fit.train()
        losses = [log["loss"] for log in logs_of(fit) if "loss" in log]
        assert losses == losses[:3]
        if not other.state.global_step:
            other.train()
        assert losses == [log["loss"] for log in logs_of(other) if "loss" in log]


def test_counters_and_moments_stay(make_fit: MakeFit, tmp_path: Path) -> None:
    saved(tmp_path / "w.pt")
    fit = make_fit(Dropping(), regression_rows(16), max_steps=3)
    fit.train()
    torch.save(Dropping().state_dict(), tmp_path / "d.pt")
    moments = [entries["exp_avg"].clone() for entries in fit.optimizer.state.values()]
    fit.load_weights(tmp_path / "d.pt")
    assert fit.state.global_step == 3
    assert all(map(torch.equal, moments, [entries["exp_avg"] for entries in fit.optimizer.state.values()]))


def test_what_doesnt_fit_is_one_error_or_is_returned(make_fit: MakeFit, tmp_path: Path) -> None:
    expected = saved(tmp_path / "w.pt", **{"head.bias": None, "other": torch.ones(2), "more": torch.ones(2)})
    fit = make_fit(Regressor(), regression_rows(16), max_steps=3)
    fit.place()
    before = parameters_of(fit.module)
    with pytest.raises(
        ValueError, match=r"w.pt doesn't fit the module: the file lacks head.bias; the module has no other, more"
    ):
        fit.load_weights(tmp_path / "w.pt")
    assert all(map(torch.equal, before.values(), parameters_of(fit.module).values()))
    found = fit.load_weights(tmp_path / "w.pt", strict=False)
    assert found == (["head.bias"], ["other", "more"])
    assert found.missing_keys == ["head.bias"]
    assert torch.equal(fit.module.head.bias, before["head.bias"])
    assert torch.equal(fit.module.head.weight, expected["head.weight"])
    saved(tmp_path / "w.pt", **{"head.weight": torch.ones(2, 4), "hidden.bias": torch.ones(4, dtype=torch.int64)})
    with pytest.raises(
        ValueError, match=r"hidden.bias is of torch.float32 in the module and of torch.int64.*head.weight has"
    ):
        fit.load_weights(tmp_path / "w.pt", strict=False)


def test_a_prefix_is_recognized(make_fit: MakeFit, tmp_path: Path) -> None:
    expected = {f"net.model.{name}": tensor for name, tensor in saved(tmp_path / "w.pt").items()}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": expected, "epoch": 1}, tmp_path / "l.ckpt")
    fit = make_fit(Regressor(), regression_rows(16), max_steps=3)
    with pytest.raises(ValueError, match=r'differ by a prefix: write rename=\["net.model.\*=\*"\]'):
        fit.load_weights(tmp_path / "l.ckpt")
    assert fit.load_weights(tmp_path / "l.ckpt", rename=["net.model.*=*"]) == ([], [])
    assert torch.equal(fit.module.head.weight, expected["net.model.head.weight"])

    class Around(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Regressor()

    with pytest.raises(ValueError, match=r'write rename=\["\*=inner.\*"\]'):
        make_fit(Around()).load_weights(tmp_path / "w.pt")
    assert make_fit(Around()).load_weights(tmp_path / "w.pt", rename=["*=inner.*"]) == ([], [])


def test_tied_weights_under_either_name(make_fit: MakeFit, tmp_path: Path) -> None:
    state = Dropping().state_dict()
    fit = make_fit(Dropping())
    for left_out in ("second.weight", "third.weight"):
        torch.save({name: tensor for name, tensor in state.items() if name != left_out}, tmp_path / "w.pt")
        assert fit.load_weights(tmp_path / "w.pt") == ([], [])
        assert torch.equal(fit.module.third.weight, state["second.weight"])
        assert fit.module.third.weight is fit.module.second.weight
    torch.save({**state, "third.weight": state["third.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds second\.weight and third\.weight with different numbers"):
        fit.load_weights(tmp_path / "w.pt")


class Saved(Callback):
    """Loads other weights in the middle of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        if state.global_step == 2:
            fit.load_weights(self.path)


@masters
def test_master_weights_and_averages_follow(make_fit: MakeFit, tmp_path: Path) -> None:
    expected = saved(tmp_path / "w.pt")
    average = Average(decay=0.5)
    options: dict[str, Any] = {
        "precision": "bf16-true",
        "max_steps": 2,
        "callbacks": [average, Saved(tmp_path / "w.pt")],
    }
    fit = make_fit(Regressor(), regression_rows(16), **options, save_strategy="steps", save_steps=1)
    fit.train()
    for name, parameter in fit.module.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16())
        assert torch.equal(fit.optimizer.state[parameter]["master_weight"], expected[name])
    other = make_fit(Regressor(), regression_rows(16))
    other.load_weights(tmp_path / "output" / "checkpoint-2")  # which holds the masters
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters_of(other.module).items())
    fit = make_fit(Regressor(), regression_rows(16), max_steps=1, learning_rate=0.0, callbacks=[average])
    fit.load_weights(tmp_path / "w.pt")
    fit.train()
    fit.export(tmp_path / "average.safetensors", weights=average)
    other.load_weights(tmp_path / "average.safetensors")
    for name, tensor in parameters_of(other.module).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6)


@masters
def test_the_best_weights_are_their_masters_too(make_fit: MakeFit, tmp_path: Path) -> None:
    """What is saved after load_best_model_at_end is what was loaded, in 16-bit formats too."""
    rows = regression_rows(16)
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fit = make_fit(
        Regressor(),
        rows,
        rows,
        precision="bf16-true",
        max_steps=4,
        learning_rate=3.0,
        load_best_model_at_end=True,
        **options,
    )
    fit.train()
    best = fit.state.best_global_step
    assert best < 4
    loaded = [make_fit(Regressor(), rows) for _ in range(2)]
    loaded[0].load_weights(tmp_path / "output" / f"checkpoint-{best}")
    loaded[1].load_weights(fit.save_checkpoint())
    assert all(map(torch.equal, *(parameters_of(each.module).values() for each in loaded)))


def test_a_module_of_module_init_warns(make_fit: MakeFit, tmp_path: Path) -> None:
    saved(tmp_path / "w.pt")
    fit = make_fit(None, regression_rows(16), module_init=lambda trial: Regressor())
    with pytest.warns(UserWarning, match="module_init makes a fresh one"):
        fit.load_weights(tmp_path / "w.pt")


@pytest.mark.slow
def test_names_of_the_past_that_transformers_knows(make_fit: MakeFit, tmp_path: Path) -> None:
    """Directories that save_pretrained wrote, of models whose files have other names than their layers."""
    from pretrained_models import MODELS

    for family in ("vit", "qwen3-moe", "gpt2"):
        torch.manual_seed(3)
        model = MODELS[family]()
        model.save_pretrained(tmp_path / family, max_shard_size="30KB")
        expected = dict(model.state_dict())
        torch.manual_seed(4)
        fit = make_fit(TrainModule.wrap(MODELS[family]()))
        assert fit.load_weights(tmp_path / family) == ([], [])
        for name, tensor in parameters_of(fit.module).items():
            assert torch.equal(tensor, expected[name]), (family, name)


class Frozen(Regressor):
    """Trains its head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


def test_frozen_weights_that_a_checkpoint_is_without(make_fit: MakeFit, tmp_path: Path) -> None:
    first = Frozen()
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_trainable": True}
    fit = make_fit(first, regression_rows(16), **options)
    fit.train()
    path = tmp_path / "output" / "checkpoint-2"
    other = Frozen()
    with pytest.raises(ValueError, match=r"this module's frozen ones have other values: hidden\.weight"):
        make_fit(other).load_weights(path)
    other.hidden.load_state_dict(first.hidden.state_dict())
    assert make_fit(other).load_weights(path) == ([], [])
    assert all(map(torch.equal, parameters_of(other).values(), parameters_of(first).values()))
