"""When a log, an evaluation and a checkpoint are due, as the arguments say; the same on every rank."""

from .arguments import FitArguments
from .state import Control, TrainState


def after_update(args: FitArguments, state: TrainState, control: Control) -> None:
    """Raise the flags that are due after an update: by steps, and at the end of the run."""
    step = state.global_step
    if args.logging_strategy == "steps" and (step % args.logging_steps == 0 or (step == 1 and args.logging_first_step)):
        control.should_log = True
    if args.eval_strategy == "steps" and step % (args.eval_every or 1) == 0:
        control.should_evaluate = True
    if args.save_strategy == "steps" and step % args.save_steps == 0:
        control.should_save = True
    if step >= state.max_steps:
        control.should_training_stop = True
        control.should_log |= args.logging_strategy == "steps"
        control.should_save |= args.save_strategy == "steps"


def after_epoch(args: FitArguments, control: Control) -> None:
    """Raise the flags that are due after an epoch."""
    control.should_log |= args.logging_strategy == "epoch"
    control.should_evaluate |= args.eval_strategy == "epoch"
    control.should_save |= args.save_strategy == "epoch"
