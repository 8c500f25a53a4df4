"""auto_find_batch_size: after out-of-memory a run is, to the bit, what the smaller batch would have given."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.run.batch_size import with_smaller_batch
from stratagem.framework.run.out_of_memory import is_out_of_memory
from stratagem.precision import FP16Mixed
from tiny import Dropping, MakeFit, NoisyRows, RowStream, regression_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

ROWS = 50
RUN: dict[str, Any] = {"shuffle": True, "max_steps": 7, "logging_steps": 1, "max_grad_norm": 0.5}


class Hungry(Dropping):
    """Runs out of memory where a batch has more samples than ``limit``, in the given forward and after."""

    def __init__(self, limit: int, from_call: int = 1) -> None:
        super().__init__()
        self.limit, self.from_call = limit, from_call
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        if self.calls >= self.from_call and len(x) > self.limit:
            raise torch.OutOfMemoryError(f"tried to allocate {len(x)} samples")
        return super().forward(x)


class Counting(Callback):
    """A state that a failed attempt would leave behind, and the events that were heard."""

    def __init__(self) -> None:
        self.steps = 0
        self.events: list[str] = []

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.events.append("init end")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("train begin")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.events.append("train end")

    def on_exception(self, *_: Any, **__: Any) -> None:
        self.events.append("exception")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def losses(fit: Fit) -> list[float]:
    """The loss of each update."""
    return [log["loss"] for log in fit.state.log_history if "loss" in log]


def assert_same(found: Fit, asked: Fit) -> None:
    """Two runs gave the same numbers, weights, buffers and optimizer states."""
    assert losses(found) == losses(asked)
    left, right = found.module.state_dict(), asked.module.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    one, other = (fit.optimizer.state_dict()["state"] for fit in (found, asked))
    assert one.keys() == other.keys()
    for index, entries in other.items():
        assert all(torch.equal(torch.as_tensor(one[index][key]), torch.as_tensor(entries[key])) for key in entries)


@pytest.mark.parametrize(
    ("asked", "at_most", "gives"),
    [((16, 1), 8, (8, 2)), ((6, 1), 3, (3, 2)), ((10, 1), 5, (5, 2)), ((5, 3), 2, (1, 15)), ((9, 2), 4, (3, 6))],
)
def test_the_global_batch_stays(asked: tuple[int, int], at_most: int, gives: tuple[int, int]) -> None:
    args = FitArguments(per_device_train_batch_size=asked[0], gradient_accumulation_steps=asked[1])
    found = with_smaller_batch(args, at_most)
    assert found is not None
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == gives
    assert with_smaller_batch(args, 0) is None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA out of memory."), True),  # of an extension that raises no class of its own
        (ValueError("out of memory, said the user's own code"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("from_call", [1, 3])  # in the first update, and after two that changed everything
def test_the_run_is_the_one_of_the_smaller_batch(make_fit: MakeFit, from_call: int) -> None:
    rows = NoisyRows(ROWS)
    torch.manual_seed(5)
    module = Hungry(limit=4, from_call=from_call)
    torch.manual_seed(5)
    other = Hungry(limit=99)
    counting = Counting()
    found = make_fit(
        module,
        rows,
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        callbacks=[counting],
        precision=FP16Mixed(growth_interval=1),
        **RUN,
    )
    first_layer = module.first
    found.train()
    asked = make_fit(
        other,
        rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        precision=FP16Mixed(growth_interval=1),
        **RUN,
    )
    asked.train()

    assert_same(found, asked)
    assert found.strategy.precision.log_values() == asked.strategy.precision.log_values()
    assert found.args.per_device_train_batch_size == found.state.train_batch_size == 4
    assert found.args.gradient_accumulation_steps == 4
    assert found.get_total_train_batch_size(found.args) == 16
    assert found.module is module
    assert module.first is first_layer
    assert module.calls == other.calls  # an attribute
    assert torch.equal(module.seen, other.seen)  # a buffer that checkpoints leave out
    assert counting.steps == 7
    begun = ["train begin", "exception"] * 2  # 16, 8
    assert counting.events == ["init end", *begun, "train begin", "train end"]
    sizes = [log for log in found.state.log_history if "per_device_train_batch_size" in log]
    assert [(log["per_device_train_batch_size"], log["gradient_accumulation_steps"]) for log in sizes] == [(4, 4)]


def test_a_module_of_module_init_begins_again_as_well(make_fit: MakeFit) -> None:
    options = {"train_data": NoisyRows(ROWS), **RUN}
    found = make_fit(
        None,
        module_init=lambda trial: Hungry(limit=4),
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        **options,
    )
    found.train()
    asked = make_fit(
        None,
        module_init=lambda trial: Hungry(limit=99),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        **options,
    )
    asked.train()
    assert_same(found, asked)
    assert found.state.train_batch_size == 4


class HungryLater(Dropping):
    """Runs out of memory after some more forwards of more than 4 samples."""

    forwards_left = 1000  # of the class: the module's own attributes are those it had before it was first placed

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            type(self).forwards_left -= 1
            if self.forwards_left < 0:
                raise torch.OutOfMemoryError("tried to allocate too much")
        return super().forward(x)


def test_a_second_run_begins_from_the_weights_of_the_first(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    for auto, batch in ((True, 8), (False, 4)):
        torch.manual_seed(5)
        monkeypatch.setattr(HungryLater, "forwards_left", 1000)
        fit = make_fit(HungryLater(), NoisyRows(ROWS), auto_find_batch_size=auto, **RUN)
        fit.train()
        monkeypatch.setattr(HungryLater, "forwards_left", 3)
        fit.train(trial={"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "seed": 3})
        fits.append(fit)
    found, asked = fits
    assert found.args.per_device_train_batch_size == 4
    assert_same(found, asked)
    first_losses = losses(found)
    found.train()  # begins with what was found
    assert found.state.train_batch_size == 4
    assert losses(found) != first_losses


def test_a_resumed_run_begins_with_the_size_that_was_found(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "save_strategy": "steps", "save_steps": 3, "auto_find_batch_size": True}
    torch.manual_seed(5)
    whole = make_fit(Hungry(limit=4), NoisyRows(ROWS), per_device_train_batch_size=16, **options)
    whole.train()
    module = Hungry(limit=4)
    resumed = make_fit(module, NoisyRows(ROWS), per_device_train_batch_size=16, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-3")
    assert module.calls == 1 + 3 * 4  # 2 samples to the epoch's end, 3 updates more, and no forward that failed
    assert_same(resumed, whole)
    assert sum("per_device_train_batch_size" in log for log in resumed.state.log_history) == 1

    other = make_fit(Hungry(limit=4), NoisyRows(ROWS), per_device_train_batch_size=6, **options)
    other.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-3")
    assert (other.args.per_device_train_batch_size, other.args.gradient_accumulation_steps) == (3, 2)


def test_out_of_memory_in_a_resumed_run_goes_back_to_its_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "save_strategy": "steps", "save_steps": 3}
    torch.manual_seed(5)
    make_fit(Hungry(limit=99), NoisyRows(ROWS), per_device_train_batch_size=16, **options).train()
    path = tmp_path / "output" / "checkpoint-3"
    found = make_fit(
        Hungry(limit=8, from_call=3), NoisyRows(ROWS), per_device_train_batch_size=16, auto_find_batch_size=True, **RUN
    )
    found.train(resume_from_checkpoint=path)
    asked = make_fit(
        Hungry(limit=99), NoisyRows(ROWS), per_device_train_batch_size=8, gradient_accumulation_steps=2, **RUN
    )
    asked.train(resume_from_checkpoint=path)
    assert found.state.train_batch_size == 8
    assert_same(found, asked)


def test_the_order_of_an_iterable_dataset_is_drawn_anew(make_fit: MakeFit) -> None:
    fits = []
    for options in (
        {"per_device_train_batch_size": 8, "auto_find_batch_size": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):
        torch.manual_seed(5)
        fit = make_fit(Hungry(limit=4, from_call=3), RowStream(regression_rows(ROWS), shuffle=True), **RUN, **options)
        fit.train()
        fits.append(fit)
    assert_same(*fits)


def test_a_plain_loader_is_made_anew_and_any_other_refused(make_fit: MakeFit) -> None:
    rows = regression_rows(ROWS)
    fits = []
    for data, options in (
        (DataLoader(rows, batch_size=12, shuffle=True), {"auto_find_batch_size": True}),
        (rows, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}),
    ):
        torch.manual_seed(5)
        fits.append(make_fit(Hungry(limit=4), data, **RUN, **options))
        fits[-1].train()
    assert fits[0].state.train_batch_size == 3
    assert_same(*fits)
    own = DataLoader(rows, batch_size=12, sampler=RandomSampler(rows, replacement=True))
    with pytest.raises(ValueError, match="auto_find_batch_size=True makes smaller batches, but train_data"):
        make_fit(Hungry(limit=4), own, auto_find_batch_size=True)


def test_at_one_it_gives_up_with_the_figures(make_fit: MakeFit) -> None:
    fit = make_fit(Hungry(limit=0), NoisyRows(ROWS), per_device_train_batch_size=2, auto_find_batch_size=True, **RUN)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit.train()
    said = str(caught.value)
    assert "even with per_device_train_batch_size=1" in said
    assert "tried to allocate 1 samples" in said
    resident = float(said.partition("cpu resident ")[2].partition(" GiB")[0])
    assert 0.05 < resident < 50
    assert "cpu peak" in said
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_any_other_error_ends_the_run(make_fit: MakeFit) -> None:
    class Wrong(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the user's mistake")

    module = Wrong(limit=99)
    fit = make_fit(module, NoisyRows(ROWS), auto_find_batch_size=True, **RUN)
    with pytest.raises(RuntimeError, match="the user's mistake") as caught:
        fit.train()
    assert any(entry.name == "forward" for entry in caught.traceback)


def test_nothing_of_a_failed_attempt_stays_in_memory(make_fit: MakeFit) -> None:
    failed: list[weakref.ref] = []
    looked, errors = [], []

    class Remembering(Callback):
        def on_exception(self, *_: Any, **context: Any) -> None:
            errors.append(context["exception"])

    class Keeping(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            activation = self.first(x)
            if len(x) > 4:
                failed.extend(weakref.ref(tensor) for tensor in (x, activation, *self.parameters()))
            else:
                looked.append([ref() for ref in failed if ref() is not None])
            return super().forward(x)

        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            looked.append([ref() for ref in failed if ref() is not None])  # where the new attempt is being placed
            return super().configure_optimizer(args)

    fit = make_fit(
        Keeping(limit=4),
        NoisyRows(ROWS),
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        callbacks=[Remembering()],
        **RUN,
    )
    fit.train()
    assert len(failed) == 2 + 9
    assert len(errors) == 1
    assert looked[:3] == [[], [], []]


def test_what_refers_to_the_module_still_does(make_fit: MakeFit) -> None:
    class Knowing(Hungry):
        def __init__(self) -> None:
            super().__init__(limit=4)
            self.known = [self, self.head]
            self.bound = self.head.forward
            self.lstm = nn.LSTM(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert self.known[0] is self
            assert self.known[1] is self.head is self.bound.__self__
            return super().forward(self.lstm(x)[0])

    module = Knowing()
    head = module.head
    make_fit(module, NoisyRows(ROWS), per_device_train_batch_size=8, auto_find_batch_size=True, **RUN).train()
    assert module.head is head


def test_a_module_that_cannot_be_copied_is_refused(make_fit: MakeFit) -> None:
    module = Hungry(limit=4)
    module.result = module.head.weight * 2  # carries a gradient
    fit = make_fit(module, NoisyRows(ROWS), auto_find_batch_size=True, **RUN)
    with pytest.raises(TypeError, match=r"keeps a copy of the module .* Hungry can't be copied"):
        fit.train()


REAL = """
import resource, sys
import torch
from stratagem import Fit, TrainModule

class Wide(TrainModule):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(8, 200_000)
        self.head = torch.nn.Linear(200_000, 1)
    def forward(self, x):
        return self.head(torch.relu(self.one(x)))
    def loss(self, outputs, batch):
        return outputs.square().mean()

torch.manual_seed(0)
torch.set_num_threads(1)
data = [{"x": torch.randn(8)} for _ in range(512)]
fit = Fit(Wide(), data, strategy="single", auto_find_batch_size=True, max_steps=2, per_device_train_batch_size=512,
          output_dir=sys.argv[1], save_strategy="no", logging_steps=1, progress=False)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
# 512 x 200,000 float32 are 390 MiB: one tensor of that size fits, the several that a forward and backward need don't.
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.RLIM_INFINITY))
fit.train()
size, steps = fit.args.per_device_train_batch_size, fit.args.gradient_accumulation_steps
assert size * steps == 512 and fit.state.global_step == 2
print(size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the address space, as Linux does")
def test_a_real_out_of_memory(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) in (32, 64, 128)
    assert "DefaultCPUAllocator: can't allocate memory" in ran.stderr
    assert "beginning again with 256, and gradient_accumulation_steps=2" in ran.stderr
    assert f'"per_device_train_batch_size": {int(ran.stdout)}' in (tmp_path / "log.jsonl").read_text()
