"""FitArguments: what can't work is refused where it is written, all of it at once, with what to write instead."""

import dataclasses
import json
from typing import Any

import pytest
from stratagem import Fit, FitArguments
from tiny import MakeFit, Regressor, regression_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1: must be at least 1"),
        ({"max_steps": 0}, "max_steps=0: give a number of updates, or -1 for epochs"),
        ({"max_steps": -2}, "max_steps=-2: give a number of updates"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0: must be above 0"),
        ({"logging_steps": 0}, "logging_steps=0: must be a number of updates, at least 1, or a fraction"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0: must be a number of updates, at least 1"),
        ({"save_steps": 1.5}, "save_steps=1.5: must be a number of updates, at least 1, or a fraction of the run"),
        ({"logging_steps": float("nan")}, "logging_steps=nan: must be a number of updates"),
        ({"save_steps": float("inf"), "max_steps": 9}, "save_steps=inf: must be a number of updates"),
        ({"save_total_limit": 0}, "save_total_limit=0: must be at least 1, or None"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1: must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps=-1: must not be negative"),
        ({"adam_beta1": 1.0}, r"adam_beta1=1.0: must be in [0, 1)"),
        ({"logging_strategy": "step"}, "logging_strategy='step': must be one of 'no', 'steps', 'epoch'"),
        ({"eval_strategy": "epochs"}, "eval_strategy='epochs': must be one of"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin': Did you mean 'cosine'?"),
        ({"max_steps": 10, "warmup_steps": 11}, "warmup_steps=11: is longer than the run (max_steps=10)"),
        ({"eval_steps": 10}, "eval_steps=10: has no effect with eval_strategy='no'; write eval_strategy='steps'"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor=2: has no effect without workers"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True: has no effect without workers"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3': must be float, not str"),
        ({"max_steps": 10.0}, "max_steps=10.0: must be int, not float"),
        ({"max_steps": True}, "max_steps=True: must be int, not bool"),
        ({"shuffle": 1}, "shuffle=1: must be bool, not int"),
        ({"output_dir": None}, "output_dir=None: must be str, not NoneType"),
        ({"save_total_limit": "3"}, "save_total_limit='3': must be int | None, not str"),
    ],
)
def test_a_value_that_cant_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="These arguments can't work") as caught:
        FitArguments(**arguments)
    assert message in str(caught.value)


def test_several_are_reported_together(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="can't work") as caught:
        make_fit(
            Regressor(),
            regression_rows(4),
            gradient_accumulation_steps=0,
            lr_scheduler_type="linea",
            save_steps=-5,
            adam_beta2=2.0,
        )
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split("=")[0].strip() for line in lines) == [
        "adam_beta2",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "save_steps",
    ]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("learning_rte", "Did you mean 'learning_rate'?"),
        ("grad_accumulation_steps", "Did you mean 'gradient_accumulation_steps'"),
        ("train_epochs", "Did you mean 'num_train_epochs'"),
        ("bf16", "Write precision='bf16-mixed'"),
        ("report_to", "Fit's loggers="),
        ("lr", "Write learning_rate."),
        ("collate_fn", "Write Fit(data_collator=...)"),
        ("processing_class", "What pads is Fit(data_collator=DataCollatorWithPadding(tokenizer))"),
        ("accelerator", "leave it out"),
        ("max_epochs", "Write num_train_epochs"),
        ("max_duration", "Write num_train_epochs"),
        ("epochs", "Write num_train_epochs"),
        ("zzyzx", "None of its"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_and_not_all(name: str, nearest: str) -> None:
    for refuse in (
        lambda: FitArguments().replace(**{name: 1}),
        lambda: Fit(Regressor(), regression_rows(2), **{name: 1}),
    ):
        with pytest.raises(TypeError, match=f"no argument '{name}'") as caught:
            refuse()
        assert nearest in str(caught.value) and len(str(caught.value)) < 220
        assert "torch_empty_cache_steps" not in str(caught.value)


def test_whole_numbers_are_good_where_fractions_are() -> None:
    assert FitArguments(num_train_epochs=2, learning_rate=1, max_grad_norm=0).num_train_epochs == 2


def test_keyword_arguments_override_the_given_ones(make_fit: MakeFit) -> None:
    given = FitArguments(seed=7, learning_rate=0.5, max_steps=3)
    fit = Fit(Regressor(), args=given, learning_rate=0.25, progress=False)
    assert (fit.args.seed, fit.args.learning_rate, fit.args.max_steps) == (7, 0.25, 3)
    assert given.learning_rate == 0.5


def test_arguments_are_frozen_and_json() -> None:
    args = FitArguments(max_steps=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.max_steps = 6  # type: ignore[misc]
    assert FitArguments(**json.loads(json.dumps(args.to_dict()))) == args


def test_a_warmup_longer_than_the_epochs_is_refused_at_construction(make_fit: MakeFit) -> None:
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
    make_fit(Regressor(), regression_rows(6), warmup_steps=6, **options)
    with pytest.raises(ValueError, match=r"warmup_steps=7: is longer than the run \(max_steps=6\)"):
        make_fit(Regressor(), regression_rows(6), warmup_steps=7, **options)
