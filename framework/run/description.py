"""What a run is in a few numbers, for a strategy whose own configuration says some of it again."""

from ...strategies.base import RunDescription
from ..arguments import FitArguments
from ..module import TrainModule
from ..optim.schedulers import warmup_updates


def describe_run(module: TrainModule, args: FitArguments) -> RunDescription:
    """Describe the run of a module whose length is settled."""
    kind = type(module)
    return RunDescription(
        micro_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm or 0.0,
        optimizer=args.optim if kind.configure_optimizer is TrainModule.configure_optimizer else None,
        learning_rate=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        schedule=args.lr_scheduler_type if kind.configure_scheduler is TrainModule.configure_scheduler else None,
        warmup_steps=warmup_updates(args, args.max_steps),
        total_steps=args.max_steps,
        compiles_blocks=args.torch_compile is True,
        compiles_checkpointed_blocks=args.torch_compile is True and args.gradient_checkpointing,
    )
