"""The loss scaler: overflow found in any gradient, agreed over ranks, and the private torch methods it stands on."""

import inspect

import pytest
import torch
from stratagem.precision.scaler import RankAwareGradScaler
from torch.amp import GradScaler

CPU = torch.device("cpu")


def scaler_and_gradients(
    *gradients: torch.Tensor, elsewhere: float = 0.0
) -> tuple[RankAwareGradScaler, torch.optim.SGD]:
    """A scaler of 8 and an optimizer over parameters of 1 with these gradients; another rank found ``elsewhere``."""

    def max_over_ranks(flag: torch.Tensor) -> None:
        flag.clamp_(min=elsewhere)

    parameters = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.ones_like(gradient, dtype=torch.float32))
        parameter.grad = gradient
        parameters.append(parameter)
    scaler = RankAwareGradScaler(CPU, max_over_ranks, init_scale=8.0, growth_interval=2)
    return scaler, torch.optim.SGD(parameters, lr=1.0)


def values(optimizer: torch.optim.SGD) -> list[list[float]]:
    return [parameter.tolist() for parameter in optimizer.param_groups[0]["params"]]


def test_gradients_are_unscaled_and_the_step_is_taken() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([8.0, 16.0]), torch.tensor([4.0]))
    scaler.unscale_(optimizer)
    assert [p.grad.tolist() for p in optimizer.param_groups[0]["params"]] == [[1.0, 2.0], [0.5]]
    scaler.step(optimizer)
    scaler.update()
    assert values(optimizer) == [[0.0, -1.0], [0.5]]
    assert not scaler.step_was_skipped()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1])
def test_an_overflow_anywhere_skips_the_step_and_halves_the_scale(bad: float, place: int) -> None:
    gradients = [torch.tensor([8.0, 16.0]), torch.tensor([4.0])]
    gradients[place][-1] = bad
    scaler, optimizer = scaler_and_gradients(*gradients)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert values(optimizer) == [[1.0, 1.0], [1.0]]
    assert scaler.step_was_skipped()
    assert scaler.get_scale() == 4.0


def test_a_first_step_that_overflows_leaves_no_momentum_without_values() -> None:
    """torch's fused SGD makes its momentum in its first step, and gives it no values where that step is refused."""
    scaler, plain = scaler_and_gradients(torch.tensor([float("inf")]))
    optimizer = torch.optim.SGD(plain.param_groups[0]["params"], lr=1.0, momentum=0.9, fused=True)
    for gradient in (None, 8.0):
        if gradient is not None:
            optimizer.param_groups[0]["params"][0].grad = torch.tensor([gradient])
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if gradient is None:
            assert not optimizer.state and scaler.step_was_skipped() and scaler.get_scale() == 4.0
    assert [entries["momentum_buffer"].tolist() for entries in optimizer.state.values()] == [[2.0]]
    assert values(optimizer) == [[-1.0]]


def test_another_ranks_overflow_skips_the_step_here() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([8.0]), elsewhere=1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert values(optimizer) == [[1.0]]
    assert scaler.step_was_skipped()
    assert scaler.get_scale() == 4.0


def test_a_rank_without_gradients_takes_part() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([8.0]), elsewhere=1.0)
    optimizer.zero_grad()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.step_was_skipped()


def test_the_last_update_is_the_one_that_is_asked_about() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([float("inf")]))
    assert not scaler.step_was_skipped()
    for gradient, skipped in ((float("inf"), True), (8.0, False), (float("nan"), True)):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([gradient])
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.step_was_skipped() == skipped


def test_gradients_of_float16_parameters_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.grad = torch.ones(2, dtype=torch.float16)
    scaler = RankAwareGradScaler(CPU, lambda flag: None)
    with pytest.raises(ValueError, match="needs float32 gradients, but found float16 ones"):
        scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))


def test_sparse_gradients_are_looked_into() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    scaler = RankAwareGradScaler(CPU, lambda flag: None, init_scale=8.0)
    before = table.weight.detach().clone()
    scaler.scale(table(torch.tensor([1, 3])).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    expected = before.clone()
    expected[[1, 3]] -= 1.0
    torch.testing.assert_close(table.weight.detach(), expected)


def test_the_state_is_there_before_the_first_backward_and_loads_into_live_tensors() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([8.0]))
    state = scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (8.0, 0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    state = scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (8.0, 1)
    other, _ = scaler_and_gradients(torch.tensor([8.0]))
    other.load_state_dict({**state, "scale": 2.0})
    assert other.get_scale() == 2.0
    assert other.state_dict()["_growth_tracker"] == 1


def test_an_update_that_broke_off_is_forgotten_by_loading() -> None:
    scaler, optimizer = scaler_and_gradients(torch.tensor([8.0]))
    state = scaler.state_dict()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.load_state_dict(state)
    scaler.unscale_(optimizer)


def test_torchs_private_methods_are_as_they_are_overridden_here() -> None:
    # RankAwareGradScaler replaces or calls these: a torch that changes them must fail here, not in a run.
    assert list(inspect.signature(GradScaler._unscale_grads_).parameters) == [
        "self",
        "optimizer",
        "inv_scale",
        "found_inf",
        "allow_fp16",
    ]
    assert list(inspect.signature(GradScaler._lazy_init_scale_growth_tracker).parameters) == ["self", "dev"]
    assert list(inspect.signature(GradScaler._check_scale_growth_tracker).parameters) == ["self", "funcname"]
    source = inspect.getsource(GradScaler.unscale_)
    assert "self._unscale_grads_(" in source
    assert hasattr(GradScaler("cpu"), "_per_optimizer_states")
