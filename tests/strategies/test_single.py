"""The Single strategy and the base class that it is: one process, degree 1 of everything."""

import pytest
import torch
from stratagem.precision import Full
from stratagem.strategies import FSDP2, STRATEGIES, Single, TensorParallel, get_strategy
from stratagem.strategies.base import Strategy, default_device
from stratagem.strategies.matrix import MATRIX
from tiny import Dropping, MakeFit, Regressor, parameters_of, regression_rows
from torch import nn


@pytest.fixture
def placed() -> Single:
    """A Single strategy with a module and an optimizer, on the CPU."""
    strategy = Single(device="cpu")
    strategy.set_up(Full())
    strategy.place(Dropping(), lambda module: torch.optim.AdamW(module.parameters(), lr=0.1))
    return strategy


def test_its_place_among_ranks(placed: Single) -> None:
    assert (placed.rank, placed.world_size, placed.data_rank, placed.data_size) == (0, 1, 0, 1)
    assert (placed.tensor_parallel_size, placed.context_parallel_size) == (1, 1)
    assert placed.is_main
    assert placed.gather("value") == ["value"]
    assert placed.broadcast("value") == "value"
    tensor = torch.tensor(3.0)
    placed.max_over_ranks(tensor)
    assert placed.sum_over_data_ranks(tensor).item() == 3.0
    placed.barrier()


def test_the_model_is_the_module_itself_on_the_device(placed: Single) -> None:
    assert placed.model is placed.module
    assert {p.device.type for p in placed.module.parameters()} == {"cpu"}


def test_states_are_by_name(placed: Single) -> None:
    x = torch.randn(4, 3)
    placed.backward(placed.model(x).sum())
    placed.prepare_gradients()
    placed.step()
    assert set(placed.model_state()) == set(placed.module.state_dict())
    # A tied weight is one parameter, under its first name.
    names = dict(placed.module.named_parameters())
    assert "third.weight" not in names
    state = placed.optimizer_state()
    assert set(state) == set(names)
    assert state["head.bias"]["step"] == 1
    assert dict(placed.full_state()).keys() == placed.module.state_dict().keys()


def test_optimizer_state_goes_back_to_its_parameters(placed: Single) -> None:
    placed.backward(placed.model(torch.randn(4, 3)).sum())
    placed.step()
    saved = {name: {k: v.clone() for k, v in entries.items()} for name, entries in placed.optimizer_state().items()}
    assert placed.optimizer is not None
    placed.optimizer.state.clear()
    assert placed.optimizer_state() == {}
    placed.load_optimizer_state(saved)
    torch.testing.assert_close(placed.optimizer_state(), saved, rtol=0, atol=0)


def test_clipping_gives_the_norm_before_it(placed: Single) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = placed.clip_grad_norm([parameter], 1.0)
    assert norm.item() == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_without_an_optimizer_there_is_none() -> None:
    strategy = Single(device="cpu")
    strategy.set_up(Full())
    strategy.place(Regressor(), None)
    assert strategy.optimizer is None


def test_a_precision_is_refused_without_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATRIX, "32-true", {"single": "a reason. Use precision='64-true'."})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"precision='32-true' under strategy='single': a reason"):
        Single(device="cpu").set_up(Full())


def test_the_device() -> None:
    strategy = Single()
    strategy.set_up(Full())
    assert strategy.device == default_device()
    assert repr(Single(device="cpu")) == "Single(device='cpu')"
    assert repr(Single()) == "Single()"


def test_names() -> None:
    assert type(get_strategy("single")) is Single
    instance = Single()
    assert get_strategy(instance) is instance
    assert Single.name == "single"
    assert "single" in STRATEGIES
    assert issubclass(Single, Strategy)
    with pytest.raises(ValueError, match=r"Unknown strategy 'singl'\. Did you mean 'single'\?"):
        get_strategy("singl")


def test_a_strategy_by_name_or_instance_is_the_same_run(make_fit: MakeFit) -> None:
    initial = parameters_of(Regressor())
    ends = []
    for strategy in ("single", Single(), Single(device="cpu")):
        module = Regressor()
        module.load_state_dict(initial)
        make_fit(module, regression_rows(8), strategy=strategy, max_steps=3).train()
        ends.append(parameters_of(module))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=0)


def test_what_was_released_is_held_no_longer(placed: Single) -> None:
    module = placed.module
    placed.release(module)
    assert placed.optimizer is None
    for name in ("module", "model"):
        with pytest.raises(AssertionError, match="no module is placed"):
            getattr(placed, name)
    placed.place(module, None)
    assert placed.model is placed.module is module


def test_loss_parallelism_without_cut_logits_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"loss_parallel=True.*no effect without tensor_parallel=2"):
        FSDP2(loss_parallel=True)
    assert FSDP2(loss_parallel=True, tensor_parallel=2).splits_classes
    assert TensorParallel(loss_parallel=True).splits_classes  # over all ranks, however many there are
