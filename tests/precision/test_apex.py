"""Apex: the error where apex.amp is missing, and the order of calls against a double of it with its signatures.

The double is labelled as one: it stands in for a package that can't be built here. What needs the real one runs where
it is.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from stratagem.precision import ApexO1, ApexO2, get_precision
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch import Tensor, nn
from torch.optim import Optimizer

# As NVIDIA/apex had them in apex/amp/frontend.py, handle.py, _amp_state.py and _initialize.py before their removal.
SIGNATURES = {
    "initialize": "(models, optimizers=None, enabled=True, opt_level='O1', cast_model_type=None, "
    "patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None, loss_scale=None, "
    "cast_model_outputs=None, num_losses=1, verbosity=1, min_loss_scale=None, max_loss_scale=16777216.0)",
    "scale_loss": "(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False)",
    "master_params": "(optimizer)",
    "state_dict": "(destination=None)",
    "load_state_dict": "(state_dict)",
}


class AmpDouble(ModuleType):
    """A test double of apex.amp: notes the calls; scales, unscales and skips as apex.amp does, without casting.

    With O2 the optimizer steps copies of the parameters, which its step writes back.
    """

    def __init__(self) -> None:
        super().__init__("apex.amp")
        self.calls: list[Any] = []
        self.scale, self.unskipped = 1024.0, 0
        self.overflows: set[int] = set()
        self.windows = 0

    @property
    def initialize(self) -> Any:
        def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
                       patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None, loss_scale=None,
                       cast_model_outputs=None, num_losses=1, verbosity=1, min_loss_scale=None,
                       max_loss_scale=2.0**24):  # fmt: skip
            self.calls.append(("initialize", type(models).__name__, opt_level))
            assert not isinstance(models, nn.parallel.DistributedDataParallel)
            if opt_level == "O2":
                give_masters(optimizers)
            else:  # apex.amp switches its casts off around the step, by a plain function
                step = optimizers.step
                optimizers.step = lambda *args, **kwargs: step(*args, **kwargs)
            return models, optimizers

        return initialize

    @property
    def scale_loss(self) -> Any:
        @contextmanager
        def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
            self.calls.append(("scale_loss", delay_unscale))
            yield loss.float() * self.scale
            if not delay_unscale:
                self.unscale(optimizers)

        return scale_loss

    def unscale(self, optimizer: Any) -> None:
        self.windows += 1
        for model, master in getattr(optimizer, "pairs", [(p, p) for g in optimizer.param_groups for p in g["params"]]):
            master.grad = model.grad / self.scale
        if self.windows not in self.overflows:
            self.unskipped += 1
            return
        self.scale, self.unskipped = self.scale / 2, 0
        step = optimizer.step

        def skip_step(closure: Any = None) -> None:
            self.calls.append("skip")
            optimizer.step = step

        optimizer.step = skip_step

    @property
    def master_params(self) -> Any:
        def master_params(optimizer):
            self.calls.append("master_params")
            yield from (p for group in optimizer.param_groups for p in group["params"])

        return master_params

    @property
    def state_dict(self) -> Any:
        return lambda destination=None: {"loss_scaler0": {"loss_scale": self.scale, "unskipped": self.unskipped}}

    @property
    def load_state_dict(self) -> Any:
        def load_state_dict(state_dict):
            self.scale = state_dict["loss_scaler0"]["loss_scale"]
            self.unskipped = state_dict["loss_scaler0"]["unskipped"]

        return load_state_dict


def give_masters(optimizer: Any) -> None:
    """As apex.amp's O2 does, when the optimizer is first used."""

    class Stash:
        all_fp16_params: list[Tensor] = []
        all_fp32_from_fp16_params: list[Tensor] = []

    def lazy_init() -> None:
        if hasattr(optimizer, "pairs"):
            return
        optimizer.pairs = []
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                master = parameter.detach().clone().requires_grad_()
                group["params"][i] = master
                optimizer.pairs.append((parameter, master))
        stash.all_fp16_params, stash.all_fp32_from_fp16_params = map(list, zip(*optimizer.pairs, strict=True))
        step = optimizer.step

        def new_step(self: Any) -> None:
            step()
            for parameter, master in optimizer.pairs:
                parameter.data.copy_(master)

        optimizer.step = new_step.__get__(optimizer)

    optimizer._amp_stash = stash = Stash()
    optimizer._amp_lazy_init = lazy_init


@pytest.fixture
def amp(monkeypatch: pytest.MonkeyPatch) -> Iterator[AmpDouble]:
    """The double, where apex.amp would be imported from."""
    apex, double = ModuleType("apex"), AmpDouble()
    apex.amp = double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", double)
    for kind in (ApexO1, ApexO2):
        monkeypatch.setattr(kind, "set_up", lambda self, device, max_over_ranks: None)  # the double needs no GPU
    yield double


class Adam(Regressor):
    def configure_optimizer(self, args: Any) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate)


def test_the_double_has_the_signatures(amp: AmpDouble) -> None:
    assert {name: str(inspect.signature(getattr(amp, name))) for name in SIGNATURES} == SIGNATURES


@pytest.mark.parametrize("word", ["apex-O1", "apex-O2"])
def test_without_apex(word: str) -> None:
    if "apex" in sys.modules:
        pytest.skip("apex is installed")
    with pytest.raises(
        ValueError, match=rf"'{word}' needs apex\.amp.*25\.05 is the last tag.*'16-mixed' does the same"
    ):
        get_precision(word)


def test_only_on_cuda(monkeypatch: pytest.MonkeyPatch, make_fit: MakeFit) -> None:
    apex, double = ModuleType("apex"), AmpDouble()
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", double)
    from stratagem.strategies import Single

    with pytest.raises(ValueError, match=r"runs on CUDA GPUs, and this run's device is cpu"):
        make_fit(Regressor(), strategy=Single(device="cpu"), precision="apex-O1")


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "dp"])
def test_refused_where_weights_are_cut(amp: AmpDouble, make_fit: MakeFit, strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"'apex-O1' under strategy=.{strategy}..*strategy='ddp'.*'16-mixed'"):
        make_fit(Regressor(), strategy=strategy, precision="apex-O1")


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_order_of_calls(amp: AmpDouble, make_fit: MakeFit, strategy: str, level: str) -> None:
    rows = regression_rows(12)
    accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    module = Regressor()
    plain = Regressor()
    plain.load_state_dict(module.state_dict())
    fit = make_fit(
        module, rows, strategy=strategy, precision=f"apex-{level}", max_grad_norm=0.1, **accumulating
    )  # fmt: skip
    fit.train()
    window = [("scale_loss", True), ("scale_loss", True), ("scale_loss", False), "master_params"]
    assert amp.calls == [("initialize", "Regressor", level), *window, *window]
    # Gradients were unscaled once and clipped where the optimizer reads them: the weights are those of a plain run.
    make_fit(plain, rows, max_grad_norm=0.1, **accumulating).train()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(module.state_dict()[name], tensor, rtol=1e-5, atol=1e-7), name


def test_a_skip_is_seen_by_the_scale(amp: AmpDouble, make_fit: MakeFit) -> None:
    amp.overflows = {2}
    scheduling = {"lr_scheduler_type": "linear", "max_steps": 4, "logging_steps": 1}
    fit = make_fit(Regressor(), regression_rows(8), precision="apex-O1", per_device_train_batch_size=2, **scheduling)
    fit.train()
    logs = [log for log in fit.state.log_history if "loss" in log]
    assert fit.state.skipped_updates == 1
    assert amp.calls.count("skip") == 1
    assert [log["loss_scale"] for log in logs] == [1024, 512, 512, 512]
    assert [log["learning_rate"] for log in logs] == pytest.approx([0.1, 0.075, 0.075, 0.05])


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_resuming(amp: AmpDouble, make_fit: MakeFit, level: str) -> None:
    """The scale, the moments and (O2) the masters come back: the rest of the run is as if it had not stopped."""
    rows, whole = regression_rows(16), Adam()
    start = parameters_of(whole)
    arguments = {"precision": f"apex-{level}", "per_device_train_batch_size": 2, "save_strategy": "steps"}
    amp.overflows = {1}
    make_fit(whole, rows, max_steps=6, save_steps=3, **arguments).train()
    amp.windows, amp.scale, amp.overflows = 0, 1024.0, set()
    resumed = Adam()
    fit = make_fit(resumed, rows, max_steps=6, save_steps=3, **arguments)
    checkpoint = f"{fit.args.output_dir}/checkpoint-3"
    fit.train(resume_from_checkpoint=checkpoint)
    assert amp.scale == 512.0
    assert not all(torch.equal(start[name], tensor) for name, tensor in resumed.state_dict().items())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_runs_one_after_another(amp: AmpDouble, make_fit: MakeFit, level: str) -> None:
    """Each run begins with its own options, no moments and the first scale, though with O2 the optimizer's parameters
    are copies of the module's.
    """
    fit = make_fit(Adam(), regression_rows(8), precision=f"apex-{level}", max_steps=2, learning_rate=1e-2)
    amp.overflows = {1}
    fit.train()
    for trial, rate in (({"learning_rate": 1e-3}, 1e-3), (None, 1e-2)):
        amp.windows, amp.scale, amp.overflows = 0, 64.0, set()
        fit.train(trial=trial)
        logs = [log for log in fit.state.log_history if "loss" in log]
        assert [log["learning_rate"] for log in logs] == [rate]
        assert [log["loss_scale"] for log in logs] == [1024.0]
        assert [group["lr"] for group in fit.optimizer.param_groups] == [rate]
        assert {state["step"].item() for state in fit.optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_real_one(make_fit: MakeFit, level: str) -> None:
    amp = pytest.importorskip("apex.amp", reason="apex.amp ended with apex 25.05")
    if not torch.cuda.is_available():
        pytest.skip("apex.amp runs on CUDA")
    for name, signature in SIGNATURES.items():
        assert str(inspect.signature(getattr(amp, name))) == signature
    fit = make_fit(Adam(), regression_rows(64), precision=f"apex-{level}", max_steps=20, logging_steps=1)
    fit.train()
    losses = [log["loss"] for log in fit.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
