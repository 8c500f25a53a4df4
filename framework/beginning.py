"""Where a run begins: the module placed, its length told, every counter at its start or where a checkpoint left it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..strategies.base import Strategy
from . import batch_size, cadence, checkpoint, fresh, random_state, resuming
from .arguments import FitArguments
from .averages import Averages
from .closure import closure_for
from .combinations import check_optimizer
from .configured import configured_optimizer, configured_scheduler
from .optimizer_mode import OptimizerMode
from .preparation import prepare_module
from .run_description import describe_run
from .run_length import RunLength, length_of_resumed

if TYPE_CHECKING:
    from .fit import Fit


def begin(fit: "Fit", path: Path | None) -> None:
    """Place the module and set every counter to where the run begins, or continues from the checkpoint at ``path``."""
    saved = None if path is None else checkpoint.read_state(path)
    fit.args = without_length(fit)  # a resume may have set another
    resolve_length(fit)
    if path is not None and saved is not None:
        resuming.compare(fit, path, saved)
    fit.place()
    fit.state.__init__()  # type: ignore[misc]
    fit.epoch_index, fit.schedule_is_due = 0, False
    fit.averages = Averages(fit.strategy)
    reset_optimizer(fit)
    if saved is not None:
        resolve_resumed_length(fit, saved)
    has_evaluations = fit.eval_data is not None and fit.args.eval_strategy != "no"
    fit.scheduler = configured_scheduler(fit.module, fit.optimizer, fit.args, has_evaluations)
    if path is None or saved is None:
        fit.random_to_restore = None
        fit.stream.load_state_dict({"position": 0})
        random_state.seed_everything(fit.args.seed + fit.strategy.data_rank)
        fit.strategy.seed(fit.args.seed)
    else:
        fit.random_to_restore = checkpoint.restore(fit, path, saved)
        if fit.args.ignore_data_skip:
            fit.stream.load_state_dict({"position": 0})
    fit.state.num_train_epochs, fit.state.max_steps = fit.num_train_epochs, fit.args.max_steps
    if fit.state.global_step >= fit.state.max_steps:  # finished: no epoch follows, which would do it
        fit.restore_random_state()
    fit.earlier_samples = -fit.stream.samples  # so that the sum of the two is what this run handed out
    fit.state.train_batch_size = batch_size.found(fit)


def place(fit: "Fit") -> None:
    """Give the module to the strategy, which prepares it and makes its optimizer on the way."""
    trains = fit.train_data is not None
    if fit.args.auto_find_batch_size and fit.unplaced is None:
        fit.unplaced = fresh.Unplaced(fit.module)

    def prepare(module: nn.Module) -> None:  # when all layers are there
        fit.parameter_count = sum(parameter.numel() for parameter in module.parameters())
        prepare_module(fit.module, fit.args, fit.strategy)

    def configure_optimizer(module: nn.Module) -> Optimizer:  # when the parameters are final
        optimizer = configured_optimizer(fit.module, fit.args)
        fit.initial_state = copied(optimizer.state)
        return optimizer

    if trains:
        fit.strategy.expect(describe_run(fit))
    random_state.seed_everything(fit.args.seed)  # late layers draw the same initial values on every rank
    fit.strategy.place(fit.module, configure_optimizer if trains else None, prepare)
    fit.placed = True
    fit.optimizer_mode = OptimizerMode(fit.strategy.optimizer, fit.strategy.weights_have_changed)
    if trains:
        check_optimizer(fit.optimizer, fit.strategy, fit.args)
        fit.closure = closure_for(fit)
        fit.initial_options = options_by_parameter(fit.optimizer, fit.strategy)
        fit.initial_scaling = fit.strategy.precision.state_dict()


def reset_optimizer(fit: "Fit") -> None:
    """The optimizer as it was made: no moments, no gradients, its first learning rates and loss scale. A second
    ``train`` begins here too.
    """
    fit.optimizer_mode.eval()
    fit.optimizer.state.clear()
    fit.optimizer.state.update(copied(fit.initial_state))
    fit.optimizer.zero_grad()
    for group in fit.optimizer.param_groups:
        if group["params"]:
            group.update(fit.initial_options[id(group["params"][0])])
        group.pop("initial_lr", None)  # the last run's schedule left it
    fit.strategy.precision.load_state_dict(fit.initial_scaling)


def copied(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """An optimizer's state with tensors of its own."""
    return {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}
        for parameter, entries in state.items()
    }


def options_by_parameter(optimizer: Optimizer, strategy: Strategy) -> dict[int, dict[str, Any]]:
    """The options of each parameter's group, by the id of what the strategy's optimizer steps for that parameter: a
    precision may have put a copy in its place, and a strategy may have cut the groups further.

    Args:
        optimizer: the strategy's, or another over the same module.
        strategy: where the module was placed.
    """
    parameters = strategy.named_parameters()
    stepped = {id(parameters[name]): id(copy) for name, copy in strategy.stepped_parameters().items()}
    return {
        stepped.get(id(parameter), id(parameter)): {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def resolve_length(fit: "Fit") -> None:
    """Turn epochs, and fractions of the run, into updates: ``args.max_steps`` is its length from here on."""
    total = fit.get_total_train_batch_size(fit.args)
    values = fit.set_initial_training_values(fit.args, fit.stream, total)
    fit.num_train_epochs, max_steps = values[0], values[-1]
    fit.args = cadence.resolve(fit.args, max_steps)


def resolve_resumed_length(fit: "Fit", saved: Mapping[str, Any]) -> None:
    """The same for a run that goes on from a checkpoint, where its global batch was another."""
    data, total = saved["data"], fit.get_total_train_batch_size(fit.args)
    if data["global_micro_batch"] * saved["arguments"]["gradient_accumulation_steps"] == total:
        return
    fit.stream.load_state_dict({"position": 0} if fit.args.ignore_data_skip else data)
    done = (saved["progress"]["global_step"], data["epoch"], fit.stream.fraction())
    args = without_length(fit)
    length = RunLength(*fit.set_initial_training_values(args, fit.stream, total))
    fit.num_train_epochs, max_steps = length_of_resumed(args, length, total, done)
    fit.args = cadence.resolve(args, max_steps)


def without_length(fit: "Fit") -> FitArguments:
    """The arguments as this run was given them, before epochs and fractions became updates, with the batch size that
    was found.
    """
    return fit.running.replace(
        per_device_train_batch_size=fit.args.per_device_train_batch_size,
        gradient_accumulation_steps=fit.args.gradient_accumulation_steps,
    )
