"""The training loop: epochs, updates, micro-batches, and every event between them."""

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from .fields import accumulation, cadence
from .measures import best
from .objective import Count
from .optim.schedulers import waits_for_metric
from .printing import say
from .rounds import Rounds
from .run.run import Run
from .steps import Steps
from .watch.endings import EvaluationInterrupted, interruption

if TYPE_CHECKING:
    from .run.program import UpdateProgram


def train(steps: Steps, run: Run, program: "UpdateProgram | None" = None) -> None:
    """Train until max_steps, the last epoch, or a callback's wish.

    The order of everything that happens::

        on_train_begin
        evaluate                             with eval_on_start
        for each epoch:
            on_epoch_begin
            for each update:
                get_batch_samples            the update's micro-batches, and its items over all ranks
                on_step_begin
                for each micro-batch:
                    training_step            forward, loss, weight, backward
                    on_substep_end           (not after the last)
                prepare gradients, clip      unscale; the norm is kept on the device
                on_pre_optimizer_step
                optimizer step               left out where gradients aren't finite, or a spike
                on_optimizer_step
                schedule, zero gradients     the schedule stays where a step was left out
                on_step_end
                log      -> on_log           each if its flag is set; an evaluation is logged too
                evaluate -> on_evaluate
                save     -> on_save
            on_epoch_end
            log, evaluate, save              each if its flag is set
        wait for the checkpoint under way    with async_save
        log the run's totals -> on_log
        on_train_end

    Nothing in here waits for the device: losses and norms are read when a log is due. Of a module that is trained in
    turns, what is between on_step_begin and on_step_end is a round (``rounds.py``).

    Args:
        steps: the verbs, which a subclass of Fit may do otherwise.
        run: begun.
        program: with torch_compile="update", makes the updates that it can, from the first forward to the end of the
            update; without on_substep_end and on_pre_optimizer_step.
    """
    args, state, control, strategy = run.args, run.state, run.control, run.strategy
    placement, rescue, emit, stepping, model = run.placement, run.rescue, steps.emit, run.stepping, strategy.model
    assert placement is not None
    rounds = None if run.turns is None else Rounds(steps, run, run.turns)
    waiting = run.pace if strategy.forward_waits else None
    trainable = [p for p in strategy.named_parameters().values() if p.requires_grad]

    steps.begin_counters()
    control.begin_training(is_finished=state.global_step >= state.max_steps)  # finished: a run that was resumed
    model.train()
    placement.mode.train()
    emit("on_train_begin")
    run.check_callbacks()
    if args.eval_on_start and state.global_step == 0:
        evaluate(steps, run)
    if state.evaluation_is_due:  # a signal came before it was made
        state.set_evaluation_due(False)
        control.should_evaluate = True
        log_evaluate_save(steps, run)
    for epoch in range(run.epoch_index, 0 if control.should_training_stop else state.num_train_epochs):
        control.should_epoch_stop = False
        if rescue is not None:
            rescue.note_position()
        run.begin_epoch(epoch)
        micro_batches_per_update = accumulation.micro_batches_at(vars(args), epoch)
        batches = steps.batches(run.stream, epoch)
        run.restore_random_state()
        steps.objective.forget_past()
        emit("on_epoch_begin")
        while not (control.should_epoch_stop or control.should_training_stop):
            if rescue is not None:
                rescue.note_position()
            micro_batches, num_items = steps.get_batch_samples(batches, micro_batches_per_update, strategy.device)
            if not micro_batches:
                control.should_epoch_stop = True
                break
            control.should_log = control.should_evaluate = control.should_save = False
            emit("on_step_begin")
            if rescue is not None:
                rescue.begin_update()
            if (program is not None and program.update(micro_batches)) or (
                rounds is not None and rounds.update(micro_batches, num_items, batches, micro_batches_per_update)
            ):
                end_update(steps, run)
                continue

            update_loss: Tensor | None = None
            for index, inputs in enumerate(micro_batches, start=1):
                last = index == len(micro_batches)
                if waiting is not None:
                    waiting.begin_forward()
                with steps.accumulate(last):
                    loss = steps.training_step(model, inputs, num_items)
                update_loss = loss if update_loss is None else update_loss + loss
                if not last:
                    emit("on_substep_end")
            assert update_loss is not None

            stepping.clip(trainable)
            emit("on_pre_optimizer_step")
            if placement.closure is not None:
                compute_again = partial(compute_update, steps, run, micro_batches, num_items)
                placement.closure.begin_update(update_loss, compute_again)
            stepping.step(update_loss)
            emit("on_optimizer_step")
            stepping.settle_known_schedule()
            for parameter in trainable:
                parameter.grad = None
            strategy.flush()

            run.end_update(update_loss)
            end_update(steps, run)

        if control.should_epoch_stop:
            run.begin_next_epoch()
        end_epoch(steps, run)
        if control.should_training_stop:
            break
    end_training(steps, run)
    emit("on_train_end")


def compute_update(steps: Steps, run: Run, micro_batches: list[Any], num_items: Count | None) -> Tensor:
    """Compute an update's loss and gradients once more, at the weights as they are now.

    Returns:
        The mean loss over the update's items, 0-dim.
    """
    strategy, total = run.strategy, None
    strategy.weights_have_changed()
    run.optimizer.zero_grad()
    with run.averages.paused():  # the update's items were counted once
        for index, inputs in enumerate(micro_batches, start=1):
            with steps.accumulate(index == len(micro_batches)):
                loss = steps.training_step(strategy.model, inputs, num_items)
            total = loss if total is None else total + loss
    strategy.prepare_gradients()
    assert total is not None
    return total


def end_training(steps: Steps, run: Run) -> None:
    """Settle the schedule, set the weights to use, wait until every checkpoint is on the disk, and log the totals."""
    placement = steps.placement
    run.report_updates()
    run.end_if_it_must()
    run.strategy.settle()
    placement.mode.eval()
    steps.saver.close()
    flops_per_token = steps.module.flops_per_token(placement.parameters.total)
    steps.log(run.finish(flops_per_token, steps.memory))


def end_interrupted(steps: Steps, run: Run, status: int) -> NoReturn:
    """Save the run, which a signal asked to end, and end it. An evaluation that is due is made when it is resumed.

    Raises:
        Interrupted: always.
    """
    control, state = run.control, run.state
    if control.should_log:
        steps.log_training()
    state.set_evaluation_due(control.should_evaluate)
    path = None
    if run.args.save_strategy != "no":
        path = steps.save_checkpoint()
        steps.saver.finish()
    ended = interruption(status, state.global_step, path)
    if run.strategy.is_main:
        say(f"The run was {ended}.", sys.stderr)
    raise ended


def evaluate(steps: Steps, run: Run) -> dict[str, float]:
    """Evaluate, unless a signal comes meanwhile, which ends the run."""
    try:
        with run.watch.breaks_evaluations():
            return steps.evaluate_in_training()
    except EvaluationInterrupted as interrupted:
        control = run.control
        control.should_evaluate = True
        end_interrupted(steps, run, interrupted.status)


# Acting on flags: what the arguments make due and callbacks ask for is done.


def end_update(steps: Steps, run: Run) -> None:
    """Tell callbacks that an update is over, and act on the flags."""
    steps.follow_counters()
    several = run.strategy.world_size > 1
    early = run.control.flags() if several else []  # raised by this rank's callbacks alone, in the update
    if any(early):
        run.control.set([0] * len(early))
    cadence.after_update(run.args, run.state, run.control)
    if not several:
        steps.saver.raise_failure()
        steps.emit("on_step_end")
        status = run.watch.wish
    else:
        due = run.control.flags()
        if any(early):
            run.control.set([int(now or before) for now, before in zip(due, early, strict=True)])
        steps.emit("on_step_end")
        run.exchange.agree(due)
        if run.pace is not None:
            run.pace.end_update()
        status = run.exchange.interruption
    if run.watch.problem is not None:
        raise ValueError(run.watch.problem)
    if status:
        end_interrupted(steps, run, status)
    log_evaluate_save(steps, run)


def end_epoch(steps: Steps, run: Run) -> None:
    """Tell callbacks that an epoch is over, and act on the flags."""
    cadence.after_epoch(run.args, run.state, run.control)
    steps.emit("on_epoch_end")
    agree_at_once(run)
    log_evaluate_save(steps, run)


def agree_at_once(run: Run) -> None:
    """Raise each flag on all ranks that is up on one. A collective, so only where logs and the like are due anyway."""
    if run.strategy.world_size > 1:
        run.control.set(run.strategy.sum_on_host(run.control.flags()))


def log_evaluate_save(steps: Steps, run: Run) -> None:
    """Do what the flags ask for, in this order."""
    control = run.control
    if not (control.should_log or control.should_evaluate or control.should_save):
        return
    if control.should_log:
        control.should_log = False
        steps.log_training()
    if control.should_evaluate:
        control.should_evaluate = False
        metrics = evaluate(steps, run)
        improved = best.note_evaluation(run.args, run.state, metrics)
        control.should_save |= improved and run.args.save_strategy == cadence.BEST
        for scheduler in run.schedules.values():
            if waits_for_metric(scheduler):
                scheduler.step(best.chosen_metric(run.args, metrics))  # type: ignore[arg-type]
    if control.should_save:
        control.should_save = False
        if not run.args.fast_dev_run:  # a callback may ask for it
            steps.save_checkpoint()
            steps.loggers.tell_of_checkpoints()
    agree_at_once(run)
