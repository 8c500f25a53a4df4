"""Training on XLA devices: the losses of one device, and one program an update."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from language_models import make, text_rows
from stratagem import Callback, TrainModule
from stratagem.strategies.xla import XLASPMD
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_xla.debug import metrics
from training import VOCABULARY, WIDTH, Block, Tagger, curves, make_fit, token_rows, train

MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "data x fsdp": {"data": 2, "fsdp": 2},
    "fsdp x tensor": {"fsdp": 2, "tensor": 2},
    "tensor": {"tensor": 4},
}
meshes = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)


def share(mesh: dict[str, int], samples: int) -> int:
    """Samples for each device that has its own, of a micro-batch of ``samples``."""
    return samples * mesh.get("tensor", 1) // 4


def on_mesh(mesh: dict[str, int]) -> dict[str, Any]:
    return {"strategy": "xla", "options": {"mesh": mesh}}


def programs() -> int:
    """Programs executed or compiled for execution so far in this process."""
    return sum(int(metrics.counter_value(name) or 0) for name in ("CachedCompile", "UncachedCompile"))


class Watch(Callback):
    """Programs and compilations at the end of each update."""

    def __init__(self) -> None:
        self.programs: list[int] = []
        self.compiled: list[int] = []

    def on_train_begin(self, *context: Any, **_: Any) -> None:
        self.note()

    def on_step_end(self, *context: Any, **_: Any) -> None:
        self.note()

    def note(self) -> None:
        self.programs.append(programs())
        self.compiled.append(int(metrics.counter_value("UncachedCompile") or 0))


# The loss curve.


@meshes
def test_losses_over_50_updates_are_those_of_one_device(mesh: dict[str, int]) -> None:
    """Padded labels, accumulation, a short last batch, clipping, three parameter groups, a tied and a frozen weight."""
    arguments = {"max_steps": 50, "gradient_accumulation_steps": 2}
    expected = train(per_device_train_batch_size=16, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the short last batch is another program
        found = train(per_device_train_batch_size=share(mesh, 16), **arguments, **on_mesh(mesh))
    assert found["epoch"] == expected["epoch"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


class Summed(Tagger):
    """Divides by the global count itself."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        flat = outputs.flatten(0, 1), batch["labels"].flatten()
        return nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def test_a_loss_that_divides_by_the_global_count() -> None:
    arguments: dict[str, Any] = {"max_steps": 6, "gradient_accumulation_steps": 3, "data": token_rows(192)}
    expected = train(per_device_train_batch_size=16, **arguments)
    found = train(per_device_train_batch_size=4, module=Summed, **arguments, **on_mesh({"fsdp": 4}))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# Programs.


@pytest.mark.parametrize("mesh", [MESHES["fsdp"], MESHES["fsdp x tensor"]], ids=str)
def test_an_update_is_one_program_and_none_is_compiled_after_the_second(mesh: dict[str, int]) -> None:
    """Micro-batches with other weights, logs each 7 updates, a schedule, and a first beta whose power is soon so small
    that Adam's correction by 1 - beta^t is 1.
    """
    watch = Watch()
    torch.manual_seed(0)
    fit = make_fit(
        Adam(),
        token_rows(192),
        callbacks=[watch],
        max_steps=50,
        logging_steps=7,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=share(mesh, 16),
        adam_beta1=0.1,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        **on_mesh(mesh),
    )
    fit.train()
    assert [after - before for before, after in itertools.pairwise(watch.programs)] == [1] * 50
    assert watch.compiled[2] - watch.compiled[0] == 2
    assert watch.compiled[-1] == watch.compiled[2]
    assert fit.strategy.recompilations == 0  # type: ignore[attr-defined]


def test_a_second_run_with_other_arguments() -> None:
    """The optimizer begins anew, with the options of another one that was made for the trial."""
    watch = Watch()
    arguments: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, **on_mesh({"fsdp": 4})}
    fit = make_fit(Adam(), token_rows(192), callbacks=[watch], **arguments)
    fit.train()
    fit.train(trial={"learning_rate": 0.02})
    counts = watch.programs[7:]
    assert [after - before for before, after in itertools.pairwise(counts)] == [1] * 6
    assert watch.compiled[7] == watch.compiled[-1]  # both programs are those of the first run


class Adam(Tagger):
    """With the optimizer that the arguments name."""

    configure_optimizer = TrainModule.configure_optimizer


def test_a_batch_of_another_shape_is_compiled_with_a_warning() -> None:
    """72 rows are 4 batches of 16 and one of 8."""
    fit = make_fit(Tagger(), token_rows(72), max_steps=10, per_device_train_batch_size=4, **on_mesh({"fsdp": 4}))
    with pytest.warns(
        UserWarning, match=r"Update 5 had to be compiled, as 1 so far.*dataloader_drop_last=True"
    ) as told:
        fit.train()
    assert (
        len([warning for warning in told if "had to be compiled" in str(warning.message)]) == 1
    )  # update 10 is no news
    assert fit.strategy.recompilations == 1  # type: ignore[attr-defined]


# What the loop promises.


def test_evaluation_counts_every_sample_and_predictions_keep_their_order() -> None:
    """45 rows are 16, 16 and 13, which 4 devices don't divide."""
    rows = token_rows(45)
    torch.manual_seed(3)
    expected = make_fit(Tagger(), None, rows, per_device_eval_batch_size=16)
    torch.manual_seed(3)
    found = make_fit(Tagger(), None, rows, per_device_eval_batch_size=4, **on_mesh({"fsdp": 4}))
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-6)
    torch.testing.assert_close(found.predict(rows).predictions, expected.predict(rows).predictions)


def test_an_evaluation_is_a_program_a_batch() -> None:
    fit = make_fit(Tagger(), None, token_rows(64), per_device_eval_batch_size=4, **on_mesh({"fsdp": 4}))
    fit.evaluate()
    before = programs()
    fit.evaluate()
    assert programs() - before == 4


class Broken(Dataset):
    """Fails at one of its rows."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index == 30:
            raise OSError("row 30 can't be read")
        return self.rows[index]


def test_a_failure_in_the_data_is_raised() -> None:
    fit = make_fit(
        Tagger(), Broken(token_rows(48)), shuffle=False, per_device_train_batch_size=4, **on_mesh({"fsdp": 4})
    )
    with pytest.raises(OSError, match="row 30 can't be read"):
        fit.train()
    assert fit.state.global_step == 1


def test_bf16_mixed() -> None:
    """Products in bfloat16, parameters in float32; losses within what 8 bits leave."""
    dtypes = []
    watching = nn.Linear.forward

    def watched(layer: nn.Linear, x: Tensor) -> Tensor:
        output = watching(layer, x)
        dtypes.append((output.dtype, layer.weight.dtype))
        return output

    arguments = {"max_steps": 20, "data": token_rows(192)}
    expected = train(per_device_train_batch_size=16, **arguments)
    nn.Linear.forward = watched  # type: ignore[method-assign]
    try:
        found = train(per_device_train_batch_size=4, precision="bf16-mixed", **arguments, **on_mesh({"fsdp": 4}))
    finally:
        nn.Linear.forward = watching  # type: ignore[method-assign]
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert found["loss"] != pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_each_precision_that_the_table_lets_through_learns(precision: str) -> None:
    losses = train(
        per_device_train_batch_size=4,
        precision=precision,
        data=token_rows(192),
        learning_rate=0.05,
        **on_mesh({"fsdp": 2, "tensor": 2}),
    )["loss"]
    assert losses[-1] < 0.8 * losses[0]


class Counted(Tagger):
    """Counts how often its first block is computed."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        forward = self.blocks[0].up.forward

        def counted(x: Tensor) -> Tensor:
            Counted.calls += 1
            return forward(x)

        self.blocks[0].up.forward = counted


def test_gradient_checkpointing_computes_blocks_again_for_the_same_losses() -> None:
    arguments: dict[str, Any] = {"max_steps": 5, "data": token_rows(192), "module": Counted}
    arguments |= {"per_device_train_batch_size": 4, **on_mesh({"fsdp": 4})}
    plain, calls = train(**arguments), Counted.calls
    Counted.calls = 0
    found = train(gradient_checkpointing=True, **arguments)
    assert (calls, Counted.calls) == (5, 10)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_the_other_way_of_recomputing_is_refused() -> None:
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    fit = make_fit(Tagger(), token_rows(32), **kwargs, **on_mesh({"fsdp": 4}))
    with pytest.raises(ValueError, match=r"'use_reentrant': False.*Leave it out"):
        fit.train()


class Noisy(Tagger):
    """With dropout in its blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.down = nn.Sequential(block.down, nn.Dropout(0.3))  # type: ignore[assignment]

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down.0": "rowwise"}


def test_runs_repeat_and_resume_bitwise(tmp_path: Path) -> None:
    """Dropout draws on the devices; the checkpoint holds where its generator stood."""
    arguments: dict[str, Any] = {"module": Noisy, "max_steps": 12, "data": token_rows(160), **on_mesh({"fsdp": 4})}
    arguments["per_device_train_batch_size"] = 4
    saving = {"save_strategy": "steps", "save_steps": 5, "output_dir": str(tmp_path)}
    whole = train(**arguments, **saving)
    assert train(**arguments)["loss"] == whole["loss"]
    assert train(seed=1, **arguments)["loss"] != whole["loss"]
    resumed = train(**arguments, resume=tmp_path / "checkpoint-5", output_dir=str(tmp_path / "again"))
    assert resumed["loss"] == whole["loss"]


def test_a_resumed_model_lies_as_before(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4, "output_dir": str(tmp_path), **on_mesh({"fsdp": 4})}
    fit = make_fit(Tagger(), token_rows(160), max_steps=2, save_strategy="steps", save_steps=2, **arguments)
    fit.train()
    before = lying(fit)
    assert before["blocks.0.up.weight"] == before["blocks.0.up.weight/exp_avg"] == "{devices=[4,1]0,1,2,3}"
    again = make_fit(Tagger(), token_rows(160), max_steps=3, **arguments)
    again.train(resume_from_checkpoint=True)
    assert lying(again) == before


def test_a_trained_module_computes_on_the_host_again() -> None:
    fit = make_fit(Tagger(), token_rows(32), max_steps=1, per_device_train_batch_size=4, **on_mesh({"fsdp": 4}))
    fit.train()
    tokens = torch.stack([row["tokens"] for row in token_rows(4)])
    predicted = fit.predict(token_rows(4)).predictions
    torch.testing.assert_close(fit.module.cpu()(tokens), predicted)


def lying(fit: Any) -> dict[str, str]:
    """How each parameter, and each entry of its optimizer state, lies on the mesh."""
    found = {name: sharding(tensor) for name, tensor in fit.module.state_dict().items()}
    for name, parameter in fit.strategy.named_parameters().items():
        for key, value in fit.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = sharding(value)
    return found


# What lies where.


def sharding(tensor: Tensor) -> str:
    import torch_xla

    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def test_parameters_and_moments_lie_as_the_mesh_and_the_plan_say() -> None:
    fit = make_fit(
        Tagger(), token_rows(192), max_steps=3, per_device_train_batch_size=4, **on_mesh({"fsdp": 2, "tensor": 2})
    )
    fit.train()
    names = fit.strategy.named_parameters()
    up, down = names["blocks.0.up.weight"], names["blocks.0.down.weight"]
    # (24, 6) and (6, 24), outputs or inputs over "tensor", the other over "fsdp"; devices are numbered along "tensor".
    assert sharding(up) == "{devices=[2,2]0,2,1,3}"
    assert sharding(down) == "{devices=[2,2]0,1,2,3}"
    for parameter in names.values():
        if parameter.requires_grad:
            assert sharding(fit.optimizer.state[parameter]["exp_avg"]) == sharding(parameter)
    assert fit.module.head.weight is fit.module.embed.weight


def test_a_late_layer_and_a_second_train(tmp_path: Path) -> None:
    """build() makes layers on the meta device; they are filled with the values that other strategies give them."""

    class Late(Tagger):
        def build(self) -> None:
            self.extra = Block(WIDTH, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.extra(self.mix(self.embed(tokens)) + self.position[self.order])
            return self.head(self.blocks[1](self.blocks[0](x)))

        def init_weights(self, layer: nn.Module) -> None:
            layer.reset_parameters()  # type: ignore[operator]

    arguments: dict[str, Any] = {"module": Late, "max_steps": 4, "data": token_rows(64)}
    expected = train(per_device_train_batch_size=16, **arguments)
    torch.manual_seed(0)
    fit = make_fit(Late(), arguments["data"], max_steps=4, per_device_train_batch_size=4, **on_mesh({"fsdp": 4}))
    fit.train()
    assert curves(fit)["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        ({"fsdp": 2}, r"can't arrange 4 devices as fsdp=2 \(a product of 2\).*mesh=\{'fsdp': 4\}"),
        ({"fsdp": 4, "tensor": 2}, r"as fsdp=4 x tensor=2 \(a product of 8\)"),
        ({"model": 4}, r"'model' is no axis.*Known: data, fsdp, tensor"),
        ({"fsdp": 0}, r"at least 1. Received: 'fsdp': 0"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_fit(Tagger(), token_rows(16), **on_mesh(mesh))


REFUSED = ["16-mixed", "16-true", "bf16-true"]  # float8 needs torchao, which needs a newer torch


@pytest.mark.parametrize("precision", REFUSED, ids=str)
def test_a_precision_that_does_not_work(precision: Any) -> None:
    with pytest.raises(ValueError, match=r"precision='.*' under strategy='xla'.*Use precision='bf16-mixed'"):
        make_fit(Tagger(), token_rows(16), precision=precision, strategy="xla")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"torch_compile": True}, "torch_compile=True: has no effect under strategy='xla'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: doesn't work under strategy='xla'"),
        ({"optim_args": {"fused": True}}, "no fused kernels for XLA.*leave fused=True out"),
        ({"optim": "adamw_8bit"}, "bitsandbytes has no XLA kernels"),
        ({"optim": "adafactor"}, "Adafactor reads numbers from the device"),
    ],
)
def test_arguments_that_do_not_work(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_fit(Adam(), token_rows(16), strategy="xla", **arguments)


def test_a_plan_is_asked_for_where_layers_are_cut() -> None:
    fit = make_fit(Planless(), token_rows(16), **on_mesh({"tensor": 4}))
    with pytest.raises(ValueError, match="Tensor parallelism needs to know how Planless is cut"):
        fit.train()


class Planless(Tagger):
    def tensor_parallel_plan(self) -> dict[str, str]:
        return {}


def test_the_default_mesh() -> None:
    strategy = XLASPMD()
    assert make_fit(Tagger(), token_rows(16), strategy="xla").strategy.devices_per_rank == 4
    assert repr(strategy) == "XLASPMD()"


# Models and metrics of others.


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("tied llama", {"fsdp": 4}), ("tied llama", {"fsdp": 2, "tensor": 2}), ("masked bert", {"fsdp": 4})],
    ids=str,
)
def test_models_of_transformers(kind: str, mesh: dict[str, int]) -> None:
    """Rows of unequal length, recomputed blocks, tied weights, and the plan that is ready for a Llama."""
    curves_found = []
    for batch_size, where in ((8, {}), (share(mesh, 8), on_mesh(mesh))):
        arguments: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": batch_size, "optim": "adamw"}
        if where:
            arguments["gradient_checkpointing"] = True
        curves_found.append(curves(trained(make_fit(make(kind), text_rows(24, kind), **arguments, **where))))
    assert curves_found[1]["loss"] == pytest.approx(curves_found[0]["loss"], rel=2e-5)


def trained(fit: Any) -> Any:
    fit.train()
    return fit


class Scored(Tagger):
    """With a metric of torchmetrics."""

    def metrics(self) -> dict[str, Any]:
        return {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)
        }

    def metric_inputs(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs.flatten(0, 1), batch["labels"].flatten()


def test_metrics() -> None:
    rows, scores = token_rows(40), []
    for arguments in ({"per_device_eval_batch_size": 16}, {"per_device_eval_batch_size": 4, **on_mesh({"fsdp": 4})}):
        torch.manual_seed(5)
        scores.append(make_fit(Scored(), None, rows, **arguments).evaluate())
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


# Updates that aren't made.


class Gained(Adam):
    """Multiplies the features by the sample's own factor."""

    def forward(self, tokens: Tensor, gain: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) * gain[:, None, None] + self.position[self.order]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("bad", [1, 3])
@pytest.mark.parametrize("mesh", [MESHES["fsdp"], MESHES["fsdp x tensor"]], ids=str)
def test_an_update_that_is_not_finite_is_left_out_by_the_program(
    mesh: dict[str, int], bad: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "gain": torch.tensor(1.0)} for row in token_rows(160)]
    rows[16 * bad - 1]["gain"] = torch.tensor(torch.nan)
    arguments: dict[str, Any] = {
        "data": rows, "module": Gained, "max_steps": 10, "shuffle": False, "precision": precision,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    expected = train(per_device_train_batch_size=16, **arguments)
    assert expected["skipped_updates"][-1] == 1
    watch = Watch()
    found = train(per_device_train_batch_size=share(mesh, 16), callbacks=[watch], **arguments, **on_mesh(mesh))
    nearly = 1e-5 if precision == "32-true" else 0.02
    assert found["loss"] == pytest.approx(expected["loss"], rel=nearly, nan_ok=True)
    assert found["learning_rate"] == expected["learning_rate"]
    assert found["skipped_updates"][-1] == 1
    assert capsys.readouterr().err.count(f"Update {bad} was not made, as its gradients' norm is nan") == 2
    assert watch.compiled[-1] == watch.compiled[2]
