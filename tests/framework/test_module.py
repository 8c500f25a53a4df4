"""TrainModule: how forward is called, what is counted, wrapped models, default optimizers and schedules."""

import dataclasses
import gc
import itertools
import json
import math
import weakref
from collections import OrderedDict, UserDict, namedtuple
from fractions import Fraction
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw
from stratagem import Fit, FitArguments, TrainModule
from stratagem.framework.calling import forward_call
from stratagem.framework.measures.averages import Averages
from stratagem.framework.measures.exact_sums import ExactSum
from stratagem.framework.objective import Objective
from stratagem.framework.optim.optimizers import decay_groups
from stratagem.framework.optim.schedulers import make_scheduler
from stratagem.strategies import Strategy
from stratagem.strategies.batches import Pinnable, map_batch
from stratagem.strategies.devices import move_to
from tiny import MakeFit, Regressor, collate, parameters_of, regression_rows
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Labelled:
    x: Tensor
    labels: Tensor


class Named(NamedTuple):
    x: Tensor
    labels: Tensor


@dataclasses.dataclass
class Fields:
    x: Tensor
    inner: Any
    made: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.made += 1


class Graph:
    """An object of some library, which moves itself in place, as torch_geometric's do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> "Graph":
        self.x = self.x.to(device)
        return self

    def pin_memory(self) -> "Graph":
        return Graph(self.x + 100)


# How forward is called.


def call(forward: Any, batch: Any) -> Any:
    """What ``forward`` receives of a batch."""

    class Module(nn.Module):
        pass

    Module.forward = forward
    module = Module()
    return forward_call(module)(module, batch)


def test_a_mapping_gives_forward_what_it_names() -> None:
    batch = {"x": 1, "y": 2, "z": 3}
    assert call(lambda self, x: (x,), batch) == (1,)
    assert call(lambda self, z, x: (z, x), batch) == (3, 1)
    assert call(lambda self, x, other=7: (x, other), batch) == (1, 7)
    assert call(lambda self, x, y=7: (x, y), batch) == (1, 2)
    assert call(lambda self, x, *, z: (x, z), batch) == (1, 3)
    assert call(lambda self, x, **rest: (x, rest), batch) == (1, {"y": 2, "z": 3})
    assert call(lambda self, **everything: everything, batch) == batch


def test_a_tuple_gives_forward_its_entries_by_position() -> None:
    batch = (1, 2, 3)
    assert call(lambda self, x: (x,), batch) == (1,)
    assert call(lambda self, x, y: (x, y), batch) == (1, 2)
    assert call(lambda self, x, *rest: (x, rest), batch) == (1, (2, 3))
    assert call(lambda self, a, b, c, d=4: (a, b, c, d), batch) == (1, 2, 3, 4)


def test_anything_else_is_given_whole() -> None:
    assert call(lambda self, x: (x,), "text") == ("text",)
    assert call(lambda self, x: (x,), 5) == (5,)
    assert call(lambda self, x: (x,), [1, 2, 3]) == ([1, 2, 3],)
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert call(lambda self, x, y=None: (x, y), packed) == (packed, None)


def test_move_to_keeps_the_containers() -> None:
    Point = namedtuple("Point", ["x", "name"])
    batch = {"a": [torch.ones(1), "b"], "c": Point(torch.zeros(2), "d"), "e": (torch.ones(1), None)}
    moved = move_to(batch, torch.device("meta"))
    assert moved["a"][0].device.type == moved["c"].x.device.type == moved["e"][0].device.type == "meta"
    assert isinstance(moved["c"], Point)
    assert (moved["a"][1], moved["c"].name, moved["e"][1]) == ("b", "d", None)
    assert (type(moved["a"]), type(moved["e"])) == (list, tuple)


@attrs.frozen
class Attributes:
    x: Tensor
    name: str


def test_move_to_moves_dataclasses_attrs_and_objects_and_changes_none_of_them() -> None:
    graph, x = Graph(torch.ones(2)), torch.ones(2)
    encoding = UserDict(ids=x, inner=[x])
    batch = {
        "fields": Fields(x, {"deep": (x, [Labelled(x, x)])}),
        "attributes": Attributes(x, "name"),
        "graph": graph,
        "encoding": encoding,
        "ordered": OrderedDict(a=x),
        "named": Named(x, x),
    }
    moved = move_to(batch, torch.device("meta"))
    assert {name: type(value) for name, value in moved.items()} == {name: type(v) for name, v in batch.items()}
    found = [moved["fields"].x, *moved["fields"].inner["deep"][:1], moved["fields"].inner["deep"][1][0].labels]
    found += [moved["attributes"].x, moved["graph"].x, moved["encoding"]["ids"], moved["encoding"]["inner"][0]]
    found += [moved["ordered"]["a"], *moved["named"]]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert moved["fields"].made == 1 and moved["attributes"].name == "name"
    assert graph.x is not moved["graph"].x and graph.x.device.type == "cpu"
    assert encoding["ids"] is x and batch["fields"].x is x


def test_a_packed_sequence_moves_by_its_own_method() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    seen: list[Any] = []
    map_batch(lambda value: seen.append(value) or value, {"sequence": packed})  # type: ignore[func-returns-value]
    assert seen == [packed]  # whose batch_sizes stay on the host whatever the device
    assert move_to(packed, torch.device("cpu")).data.equal(packed.data)


def test_a_batch_of_any_shape_pins_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 10)  # a GPU's drivers lock pages
    batch = Pinnable(Fields(torch.ones(1), {"graph": Graph(torch.ones(1)), "list": [torch.ones(1)]}))
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(pinned) is Fields
    assert (pinned.x.item(), pinned.inner["graph"].x.item(), pinned.inner["list"][0].item()) == (11, 101, 11)


def test_a_list_that_fits_in_two_ways_is_refused_with_both_readings() -> None:
    def images_and_targets(self: Any, images: Any, targets: Any = None) -> Any:
        return images, targets

    with pytest.raises(ValueError, match=r"list of 2, .* in two ways: whole as images, or entry by entry as 2 inputs"):
        call(images_and_targets, [1, 2])
    with pytest.raises(ValueError, match="whole as x, or entry by entry as 5"):
        call(lambda self, x, *rest: x, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=r"needs 2 inputs \(x, y\), but the batch is a list of 2, which is one input"):
        call(lambda self, x, y: x, [1, 2])
    assert call(images_and_targets, ([1, 2],)) == ([1, 2], None)
    assert call(images_and_targets, (1, 2)) == (1, 2)


def test_a_list_longer_than_forward_says_how_the_shorter_last_one_is_meant() -> None:
    class Module(nn.Module):
        def forward(self, images: Any, targets: Any = None) -> Any:
            return images, targets

    module = Module()
    forward = forward_call(module)
    assert forward(module, [1, 2, 3]) == ([1, 2, 3], None)
    assert forward(module, [1, 2]) == ([1, 2], None)


# What is counted.


def test_a_list_of_tensors_that_may_be_columns_or_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"may hold 2 samples or 4\. Have collate_fn return a tuple if they are 4"):
        Regressor().count_items([torch.ones(4, 3), torch.ones(4, 1)])


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"labels": torch.tensor([[1, -100], [-100, 2]])}, 2),
        ({"labels": torch.full((2, 3), -100)}, 0),
        ({"labels": torch.tensor([0.5, -100.0, 1.5])}, 3),  # a regression's targets aren't padding
        ({"labels": torch.tensor(4)}, 1),
        ({"x": torch.ones(5, 2), "y": torch.ones(5)}, 5),
        ({"name": "text", "x": torch.ones(5, 2)}, 5),
        (torch.ones(6, 2), 6),
        ((torch.ones(4, 2), torch.ones(4)), 4),
        ([torch.ones(4, 2)], 1),  # a list is one of samples
        ([{"x": torch.ones(4)}, {"x": torch.ones(5)}], 2),
        ([torch.ones(3, 8, 8), torch.ones(3, 8, 8)], 2),
        ([torch.ones(4, 2), torch.ones(4)], 4),  # but for columns
        ({"inner": {"x": torch.ones(5, 2)}}, 5),
        (Labelled(torch.ones(3, 2), torch.tensor([1, -100, 2])), 2),
        (Named(torch.ones(3, 2), torch.tensor([1, -100, -100])), 1),
        (Fields(torch.ones(3, 2), {"y": torch.ones(3)}), 3),
    ],
)
def test_items_of_a_batch(batch: Any, count: int) -> None:
    assert Regressor().count_items(batch) == count


@pytest.mark.parametrize("batch", [torch.tensor(1.0), {"name": "text"}, "text", 5, [], Graph(torch.ones(3))])
def test_batches_that_cant_be_counted(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"Can't tell how many items.*Write count_items"):
        Regressor().count_items(batch)


def test_counting_of_ones_own_weighs_the_micro_batches(make_fit: MakeFit) -> None:
    class ByWeight(Regressor):
        """Items are the sum of "weight"; the loss is the weighted mean."""

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            errors = (outputs - batch["y"]).square()[:, 0]
            return (errors * batch["weight"]).sum() / batch["weight"].sum()

        def count_items(self, batch: dict[str, Tensor]) -> int:
            return int(batch["weight"].sum())

    rows = [{**row, "weight": torch.tensor(i + 1)} for i, row in enumerate(regression_rows(4))]
    module = ByWeight()
    batch = collate(rows)
    errors = (module(batch["x"]) - batch["y"]).square()[:, 0]
    expected = (errors * batch["weight"]).sum() / (1 + 2 + 3 + 4)
    [gradient] = torch.autograd.grad(expected, [module.head.weight])
    before = parameters_of(module)
    fit = make_fit(module, rows, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1)
    assert fit.train().training_loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(
        module.head.weight.detach(), before["head.weight"] - 0.1 * gradient, rtol=1e-6, atol=1e-7
    )
    assert fit.state.items_seen == 10


# Finding the loss.


def test_the_loss_of_a_model_that_computes_its_own() -> None:
    module, loss = TrainModule(), torch.tensor(2.0)
    assert module.loss({"loss": loss, "logits": torch.ones(3)}, None) is loss
    assert module.loss((loss, torch.ones(3)), None) is loss
    with pytest.raises(ValueError, match="defines no loss"):
        module.loss((torch.ones(3),), None)


def test_num_items_is_asked_for_by_name_alone() -> None:
    def named(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any: ...
    def by_keyword(outputs: Any, labels: Any, *, num_items_in_batch: Any = None) -> Any: ...
    def anything(outputs: Any, labels: Any, **options: Any) -> Any: ...

    takes = [Objective(Regressor(), loss).takes_num_items for loss in (named, by_keyword, anything, None)]
    assert takes == [True, True, False, False]


# Wrapped models.


class PlainModel(nn.Module):
    """As transformers' models: given labels, its outputs hold a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.net(x)
        return {"logits": outputs} if y is None else {"loss": (outputs - y).square().mean(), "logits": outputs}

    def greet(self) -> str:
        return "hello"


def test_a_wrapped_model_is_itself_and_trains(make_fit: MakeFit) -> None:
    model = PlainModel()
    wrapped = TrainModule.wrap(model)
    assert wrapped is model
    assert isinstance(model, TrainModule) and isinstance(model, PlainModel)
    assert list(dict(model.named_parameters())) == ["net.weight", "net.bias"]
    assert model.greet() == "hello"
    assert type(model).__name__ == "PlainModel"
    fit = make_fit(wrapped, regression_rows(8), max_steps=30, per_device_train_batch_size=8)
    first = fit.evaluate(regression_rows(8))["eval_loss"]
    fit.train()
    assert fit.evaluate(regression_rows(8))["eval_loss"] < first


def test_wrapping_a_train_module_gives_it_back() -> None:
    module = Regressor()
    assert TrainModule.wrap(module) is module


def test_a_model_with_methods_of_these_names_is_not_wrapped() -> None:
    class Clashing(PlainModel):
        def loss(self) -> str:
            return "of another meaning"

    with pytest.raises(TypeError, match=r"can't wrap Clashing: it has loss of its own"):
        TrainModule.wrap(Clashing())


# Optimizers and schedules.


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def test_norms_and_biases_are_not_decayed() -> None:
    module = Mixture()
    names = {id(p): name for name, p in module.named_parameters()}
    groups = [([names[id(p)] for p in group["params"]], group["weight_decay"]) for group in decay_groups(module, 0.1)]
    assert groups == [(["weight", "linear.weight"], 0.1), (["linear.bias", "norm.weight", "norm.bias"], 0.0)]


def test_the_default_optimizer_is_adamw_as_written_by_hand(make_fit: MakeFit) -> None:
    class WithAdamW(Regressor):
        configure_optimizer = TrainModule.configure_optimizer

    module = WithAdamW()
    rows = regression_rows(4)
    batch = collate(rows)
    beta1, beta2, epsilon, rate, decay = 0.8, 0.95, 1e-6, 0.05, 0.2
    values = {name: value.double() for name, value in parameters_of(module).items()}
    moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in values.items()}
    reference = Regressor().double()
    for step in (1, 2, 3):
        reference.load_state_dict(values)
        loss = (reference(batch["x"].double()) - batch["y"].double()).square().mean()
        gradients = dict(zip(values, torch.autograd.grad(loss, list(reference.parameters())), strict=True))
        for name, gradient in gradients.items():
            first, second = moments[name]
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            moments[name] = first, second
            shrunk = values[name] * (1 - rate * (0.0 if name.endswith("bias") else decay))
            direction = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + epsilon)
            values[name] = shrunk - rate * direction
    make_fit(
        module,
        rows,
        learning_rate=rate,
        weight_decay=decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=epsilon,
        max_steps=3,
    ).train()
    found = {name: value.double() for name, value in parameters_of(module).items()}
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0] * 7),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, *[0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]]),
    ],
)
def test_schedules_over_six_updates_with_two_of_warmup(name: str, expected: list[float]) -> None:
    warmup = 0 if name == "constant" else 2
    args = FitArguments(lr_scheduler_type=name, warmup_steps=warmup, max_steps=6, learning_rate=3.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3.0)
    scheduler = make_scheduler(optimizer, args, 6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([3.0 * factor for factor in expected], abs=1e-12)


# Averages.


def averages() -> Averages:
    return Averages(Strategy())


def test_averages_keep_each_updates_values() -> None:
    held = averages()
    for k in range(2 * Averages.FOLD + 3):
        held.add_share("extra", torch.tensor(1.0))
        held.add_share("extra", torch.tensor(float(k)))
        held.end_update(torch.tensor(float(k)))
    values = held.take()[0]
    count = 2 * Averages.FOLD + 3
    assert (values["loss"].total, values["loss"].count) == (sum(range(count)), count)
    assert (values["extra"].total, values["extra"].count) == (sum(range(count)) + count, count)
    assert held.take()[0] == {}


def test_averages_survive_being_saved() -> None:
    first, second = averages(), averages()
    for held in (first, second):
        held.end_update(torch.tensor(1 / 3))
    second.load_state_dict(first.state_dict())
    second.end_update(torch.tensor(2.0))
    (taken,), (of_first,) = second.take()[0].values(), first.take()[0].values()
    assert (taken.total, taken.count) == (float(torch.tensor(1 / 3)) + 2.0, 2)
    assert (of_first.total, of_first.count) == (float(torch.tensor(1 / 3)), 1)


def test_the_mean_leaves_out_what_isnt_finite() -> None:
    assert ExactSum([1.0, math.nan, 3.0, math.inf]).mean() == 2.0
    assert ExactSum([1.0, -math.inf]).mean(only_finite=False) == -math.inf
    assert math.isnan(ExactSum([math.nan]).mean())
    assert math.isnan(ExactSum([]).mean())
    # Summed exactly: in another order, plain addition gives 0.0 here.
    assert ExactSum([1e16, 1.0, -1e16]).mean() == 1 / 3


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    draw.lists(draw.floats(-1e300, 1e300) | draw.floats(width=32), max_size=60),
    draw.lists(draw.integers(0, 60), max_size=4),
)
def test_a_sum_that_was_saved_on_its_way_is_that_of_all_values(values: list[float], cuts: list[int]) -> None:
    """Exactly rounded, as fractions give it, whatever was saved and loaded in between."""
    found = ExactSum()
    places = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for begin, end in itertools.pairwise(places):
        found.extend(values[begin:end])
        saved = json.loads(json.dumps(found.state_dict()))
        assert len(saved["parts"]) <= 40
        found = ExactSum.from_state(saved)
    finite = [value for value in values if math.isfinite(value)]
    assert found.total == float(sum(map(Fraction, finite))) and found.count == len(finite)
    assert found.nonfinite == len(values) - len(finite)


def test_a_loss_that_isnt_finite_once_does_not_spoil_the_log(make_fit: MakeFit) -> None:
    class Once(TrainModule):
        """Losses 1, inf, 1 whatever the data; nothing moves."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.weight * (math.inf if self.calls == 2 else 1.0)

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs

        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-30)

    fit = make_fit(Once(), regression_rows(4), max_steps=2, logging_steps=2)
    assert fit.train().training_loss == 1.0
    assert fit.state.log_history[0]["loss"] == 1.0


def test_a_fit_that_is_dropped_leaves_its_module_to_the_garbage_collector() -> None:
    module = Regressor()
    fit = Fit(module, regression_rows(8), max_steps=1, save_strategy="no", progress=False, loggers=(), report=False)
    gone = weakref.ref(module), weakref.ref(fit.strategy)
    del fit, module
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
