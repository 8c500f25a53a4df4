"""What can't work together is refused when the Fit is made, all of it in one error, each with what to write instead."""

from typing import Any

import pytest
import torch
from stratagem import FitArguments, TrainModule
from stratagem.framework.combinations import UNSUITED, check_combination, check_optimizer
from stratagem.framework.fields.compilation import NEEDED_FOR_UPDATE
from stratagem.precision import Full
from stratagem.strategies import Single
from stratagem.strategies.dp import DP
from stratagem.strategies.fsdp1 import FSDP1
from stratagem.strategies.fsdp2 import FSDP2
from stratagem.strategies.xla import XLASPMD
from tiny import MakeFit, Regressor, Tagger, regression_rows, token_rows
from torch import Tensor, nn


class Plain(Regressor):
    """The optimizer that the arguments name."""

    configure_optimizer = TrainModule.configure_optimizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch': needs something to evaluate on.*Pass eval_data="),
        ({"eval_on_start": True}, "eval_on_start=True: needs something to evaluate on.*Pass eval_data="),
        ({"debug": "underflow_overflow", "strategy": "dp"}, "strategy='dp' runs copies of it. Use strategy='ddp'"),
        ({"past_index": 0}, r"past_index=0: hands an output on as 'mems', which Plain\.forward doesn't take\. Write"),
        (
            {"label_smoothing_factor": 0.1, "compute_loss_func": lambda outputs, labels: outputs.mean()},
            "label_smoothing_factor=0.1: has no effect with compute_loss_func.*Smooth in there",
        ),
        (
            {"label_smoothing_factor": 0.1, "strategy": FSDP2(tensor_parallel=2, loss_parallel=True)},
            "label_smoothing_factor=0.1: sums over all classes.*loss_parallel=True.*Leave one of them out",
        ),
        ({"optim": "adafactor", "strategy": "fsdp2"}, "optim='adafactor': doesn't work under strategy='fsdp2'.*adamw"),
        ({"optim": "muon", "strategy": "fsdp1"}, "optim='muon': doesn't work under strategy='fsdp1'.*'fsdp2'"),
    ],
)
def test_what_is_refused(make_fit: MakeFit, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_fit(Plain(), regression_rows(4), **arguments)


def test_all_of_it_in_one_error(make_fit: MakeFit) -> None:
    asked = {"eval_strategy": "steps", "eval_on_start": True, "past_index": 2, "optim": "adafactor"}
    with pytest.raises(ValueError, match="can't work together") as caught:
        make_fit(Plain(), regression_rows(4), strategy="fsdp1", **asked)
    lines = str(caught.value).splitlines()[1:]
    assert [line.partition("=")[0].strip() for line in lines] == list(asked)


def test_what_works_is_not_refused(make_fit: MakeFit) -> None:
    rows = regression_rows(4)
    make_fit(Plain(), rows, rows, eval_strategy="epoch", eval_on_start=True, debug="underflow_overflow")
    make_fit(Plain(), rows, optim="adafactor")
    make_fit(Regressor(), rows, strategy="dp", optim="muon")
    make_fit(Plain(), rows, label_smoothing_factor=0.1)

    class Remembering(Plain):
        def forward(self, x: Tensor, **memory: Any) -> Tensor:
            return super().forward(x)

    make_fit(Remembering(), rows, past_index=0)


@pytest.mark.parametrize(
    ("make", "strategy", "says"),
    [
        (torch.optim.Rprop, FSDP2(), "Rprop doesn't work under strategy='fsdp2'"),
        (torch.optim.Adafactor, FSDP1(), "Adafactor doesn't work under strategy='fsdp1'"),
        (lambda p: torch.optim.SGD(p, fused=True), FSDP2(), "leave fused=True out"),
        (lambda p: torch.optim.Adagrad(p, fused=True), FSDP2(), "leave fused=True out"),
    ],
)
def test_an_optimizer_of_the_modules_own_is_looked_at_too(make: Any, strategy: Any, says: str) -> None:
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=says):
        check_optimizer(optimizer, strategy, FitArguments())
    assert check_optimizer(optimizer, DP(), FitArguments()) is optimizer


def test_a_strategy_says_which_optimizers_it_cant_step() -> None:
    class Picky(Single):
        def optimizer_problem(self, optimizer: torch.optim.Optimizer) -> str | None:
            return "its engine knows Adam alone. Use optim='adam'" if isinstance(optimizer, torch.optim.SGD) else None

    strategy, parameters = Picky(), [nn.Parameter(torch.ones(2, 2))]
    strategy.set_up(Full())
    with pytest.raises(ValueError, match=r"^SGD doesn't work under strategy='single': its engine.*optim='adam'\.$"):
        check_optimizer(torch.optim.SGD(parameters), strategy, FitArguments())
    adam = torch.optim.Adam(parameters)
    assert check_optimizer(adam, strategy, FitArguments()) is adam


def test_a_precision_says_which_arguments_it_cant_do() -> None:
    class Rough(Full):
        refused_arguments = {"torch_compile": "would round twice. Leave it out."}

    compiled = FitArguments(torch_compile=True, eval_strategy="epoch")
    with pytest.raises(ValueError) as refusal:
        check_combination(compiled, Single(), Plain(), None, None, Rough())
    assert "\n  torch_compile=True in precision='32-true': would round twice. Leave it out." in str(refusal.value)
    assert "\n  eval_strategy='epoch': needs something to evaluate on" in str(refusal.value)


def test_refusals_are_about_forms_that_there_are() -> None:
    assert {form for _, form in UNSUITED} == {FSDP1.parameter_form, FSDP2.parameter_form, XLASPMD.parameter_form}


def test_label_smoothing_without_labels_lists_the_keys(make_fit: MakeFit) -> None:
    fit = make_fit(Plain(), regression_rows(4), max_steps=1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="smooths the batch's 'labels', and the batch has the keys x, y"):
        fit.train()


def test_past_index_needs_mappings(make_fit: MakeFit) -> None:
    class Pair(Tagger):
        def forward(self, tokens: Tensor, mems: Any = None) -> Any:  # type: ignore[override]
            return super().forward(tokens), tokens.sum()

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return outputs[0].mean()

    rows = [(row["tokens"], row["labels"]) for row in token_rows(4)]
    fit = make_fit(Pair(), rows, max_steps=2, per_device_train_batch_size=2, past_index=1)
    with pytest.raises(ValueError, match="past_index=1 adds 'mems' to a mapping batch, and the batch is a tuple"):
        fit.train()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("warmup_stable_decay", {"num_decay_steps": 0}, "num_decay_steps is a whole number of at least 1"),
        ("warmup_stable_decay", {"num_decay_steps": "4"}, "num_decay_steps is a whole number of at least 1"),
        ("cosine_with_restarts", {"num_cycles": 0.5}, "num_cycles is a whole number of at least 1"),
        ("polynomial", {"power": "2"}, "power is a number, not str"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 8},
            "3 updates of warm-up and 8 of decay are more",
        ),
    ],
)
def test_options_of_schedules(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitArguments(lr_scheduler_type=name, lr_scheduler_kwargs=options, max_steps=10, warmup_ratio=0.25)


def test_an_update_as_one_program_needs_a_newer_torch(make_fit: MakeFit) -> None:
    if torch.__version__ >= NEEDED_FOR_UPDATE:
        make_fit(Regressor(), regression_rows(8), torch_compile="update")
        return
    with pytest.raises(ValueError, match=r"torch_compile='update': needs torch 2.13, and this is torch"):
        make_fit(Regressor(), regression_rows(8), torch_compile="update")
