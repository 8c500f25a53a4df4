"""The training loop: epochs, updates, micro-batches, and every event between them."""

from typing import TYPE_CHECKING

from torch import Tensor

from . import flags

if TYPE_CHECKING:
    from .fit import Fit


def run(fit: "Fit") -> None:
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
                optimizer step               skipped where scaled gradients overflowed
                on_optimizer_step
                schedule, zero gradients     the schedule stays where a step was skipped
                on_step_end
                log      -> on_log           each if its flag is set; an evaluation is logged too
                evaluate -> on_evaluate
                save     -> on_save
            on_epoch_end
            log, evaluate, save              each if its flag is set
        wait for the checkpoint under way    with async_save
        log the run's totals -> on_log
        on_train_end

    Nothing in here waits for the device: losses and norms are read when a log is due.
    """
    args, state, control, strategy = fit.args, fit.state, fit.control, fit.strategy
    model, micro_batches_per_update = strategy.model, args.gradient_accumulation_steps
    trainable = [p for p in strategy.named_parameters().values() if p.requires_grad]
    emit, rescue = fit.emit, fit.rescue

    control.should_training_stop = state.global_step >= state.max_steps  # a finished run, resumed
    model.train()
    fit.optimizer_mode.train()
    emit("on_train_begin")
    fit.callbacks.check_states()
    if args.eval_on_start and state.global_step == 0:
        fit.evaluate(ignore_keys=fit.ignore_keys_for_eval)
    for epoch in range(fit.epoch_index, 0 if control.should_training_stop else state.num_train_epochs):
        fit.epoch_index = epoch
        control.should_epoch_stop = False
        rescue.stand(fit)
        batches = fit.batches(fit.stream, epoch)
        fit.exchange.data.begin_epoch()
        fit.restore_random_state()
        fit.objective.past = None
        emit("on_epoch_begin")
        while not (control.should_epoch_stop or control.should_training_stop):
            rescue.stand(fit)
            micro_batches, num_items = fit.get_batch_samples(batches, micro_batches_per_update, strategy.device)
            if not micro_batches:
                control.should_epoch_stop = True
                break
            control.should_log = control.should_evaluate = control.should_save = False
            emit("on_step_begin")

            rescue.begin_update()
            update_loss: Tensor | None = None
            for left, inputs in zip(range(len(micro_batches) - 1, -1, -1), micro_batches, strict=True):
                with strategy.accumulate(last=left == 0):
                    loss = fit.training_step(model, inputs, num_items)
                update_loss = loss if update_loss is None else update_loss + loss
                if left:
                    emit("on_substep_end")

            strategy.prepare_gradients()
            fit.grad_norm = strategy.clip_grad_norm(trainable, args.max_grad_norm) if args.max_grad_norm else None
            emit("on_pre_optimizer_step")
            fit.settle_schedule()  # of the update before, where loss scaling has only now told whether it stepped
            state.learning_rate = fit.optimizer.param_groups[0]["lr"]
            assert update_loss is not None
            if fit.closure is not None:
                fit.closure.begin_update(micro_batches, num_items, update_loss)
            strategy.step()
            fit.schedule_is_due = True
            emit("on_optimizer_step")
            if strategy.precision.skip_is_known():
                fit.settle_schedule()
            for parameter in trainable:
                parameter.grad = None
            strategy.execute()

            fit.averages.end_update(update_loss)
            state.global_step += 1
            state.epoch = epoch + fit.stream.fraction()
            rescue.end_update()
            flags.end_update(fit)

        if control.should_epoch_stop:
            fit.begin_next_epoch()
        flags.end_epoch(fit)
        if control.should_training_stop:
            break
    fit.end_training()
    emit("on_train_end")
