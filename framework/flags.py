"""Acting on flags: after each update and each epoch, what the arguments make due and callbacks ask for is done."""

from typing import TYPE_CHECKING

from . import best, cadence
from .schedulers import waits_for_metric

if TYPE_CHECKING:
    from .fit import Fit


def end_update(fit: "Fit") -> None:
    """Tell callbacks that an update is over, and act on the flags."""
    cadence.after_update(fit.args, fit.state, fit.control)
    if fit.strategy.world_size == 1:
        if fit.writer is not None and fit.writer.has_failed():
            fit.writer.finish()
        fit.emit("on_step_end")
    else:
        due = fit.control.flags()
        fit.emit("on_step_end")
        fit.exchange.agree(due)
    log_evaluate_save(fit)


def end_epoch(fit: "Fit") -> None:
    """Tell callbacks that an epoch is over, and act on the flags."""
    cadence.after_epoch(fit.args, fit.state, fit.control)
    fit.emit("on_epoch_end")
    agree_at_once(fit)
    log_evaluate_save(fit)


def agree_at_once(fit: "Fit") -> None:
    """A flag that is up on one rank is up on all. A collective, so only where logs and the like are due anyway."""
    if fit.strategy.world_size > 1:
        fit.control.set(fit.strategy.sum_on_host(fit.control.flags()))


def log_evaluate_save(fit: "Fit") -> None:
    """Do what the flags ask for, in this order."""
    control = fit.control
    if not (control.should_log or control.should_evaluate or control.should_save):
        return
    if control.should_log:
        control.should_log = False
        fit.log_training()
    if control.should_evaluate:
        control.should_evaluate = False
        metrics = fit.evaluate(ignore_keys=fit.ignore_keys_for_eval)
        improved = best.note_evaluation(fit.args, fit.state, metrics)
        control.should_save |= improved and fit.args.save_strategy == cadence.BEST
        if waits_for_metric(fit.scheduler):
            fit.scheduler.step(best.chosen_metric(fit.args, metrics))  # type: ignore[arg-type]
    if control.should_save:
        control.should_save = False
        fit.save_checkpoint()
    agree_at_once(fit)
