"""The ranges of the arguments that are numbers or words, and the arguments that have no effect without another."""

from typing import Any

from . import durations
from .argument_fields import ArgumentFields

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_skipped_updates",
    "save_best_limit",
)
AT_LEAST_ONE_OR_NONE = (
    "save_total_limit",
    "dataloader_prefetch_factor",
    "torch_empty_cache_steps",
    "eval_accumulation_steps",
)
NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "eval_delay",
    "dataloader_num_workers",
    "seed",
)
ABOVE_ZERO_OR_NONE = ("hang_timeout", "neftune_noise_alpha", "spike_updates")
PREEMPTION_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
ONE_OF = {
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "nonfinite_updates": ("skip", "raise"),
    "debug": ("", "underflow_overflow", "ranks_agree"),
    "other_checkpoints": ("set_aside", "refuse"),
    "on_hang": ("end", "report"),
    "resume_with": ("checkpoint", "arguments"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
WITHOUT_EFFECT: tuple[tuple[str, Any, str], ...] = (  # (argument, its value that asks for nothing, what it needs)
    ("gradient_checkpointing_kwargs", {}, "gradient_checkpointing"),
    ("torch_compile_mode", "default", "torch_compile"),
    ("torch_compile_backend", None, "torch_compile"),
)
NEED_WORKERS: tuple[tuple[str, Any], ...] = (
    ("dataloader_prefetch_factor", None),
    ("dataloader_persistent_workers", False),
)


def names_in(written: str) -> list[str]:
    """The names in a list with commas: "SIGTERM,SIGUSR1"."""
    return [name.strip() for name in written.split(",") if name.strip()]


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every field whose value is out of its range."""
    found: list[tuple[str, str]] = []

    def require(name: str, holds: bool, why: str) -> None:
        if not holds:
            found.append((name, why))

    unknown_home = args.output_dir.startswith("~")
    require("output_dir", not unknown_home, "this user's home isn't known; write the path, or './~...' for a name")
    require("max_steps", args.max_steps == -1 or args.max_steps > 0, "give a number of updates, or -1 for epochs")
    require("num_train_epochs", args.num_train_epochs > 0, "must be above 0")
    why_not = durations.problem(args.max_time)
    require("max_time", why_not is None, why_not or "")
    for name in AT_LEAST_ONE:
        require(name, getattr(args, name) >= 1, "must be at least 1")
    for name in AT_LEAST_ONE_OR_NONE:
        value = getattr(args, name)
        require(name, value is None or value >= 1, "must be at least 1, or None")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        require(name, value is None or value >= 0, "must not be negative")
    for name in BELOW_ONE:
        require(name, 0 <= getattr(args, name) < 1, "must be in [0, 1)")
    for name, known in ONE_OF.items():
        require(name, getattr(args, name) in known, f"must be one of {', '.join(map(repr, known))}")
    require("past_index", args.past_index >= -1, "is the place of an output, or -1 for none")
    pieces = args.contrastive_chunks
    require("contrastive_chunks", pieces is None or pieces >= 2, "must be 2 or more pieces; None computes it whole")
    require(
        "past_index",
        args.past_index < 0 or pieces is None,
        f"hands an output on to the next batch, and contrastive_chunks={pieces!r} cuts batches; leave one of them out",
    )
    for name in ABOVE_ZERO_OR_NONE:
        value = getattr(args, name)
        require(name, value is None or value > 0, "must be above 0, or None")
    require("preemption_grace", args.preemption_grace > 0, "must be above 0")
    unknown = [name for name in names_in(args.preemption_signals) if name not in PREEMPTION_SIGNALS]
    takes = f"takes {', '.join(PREEMPTION_SIGNALS)}, with commas between them; Ctrl-C is always caught"
    require("preemption_signals", not unknown, takes)
    saves = args.save_strategy != "no"
    require("requeue", saves or not args.requeue, "would run the job from the beginning with save_strategy='no'")
    require(
        "spike_updates",
        args.spike_updates is None or bool(args.max_grad_norm),
        f"goes by the gradients' norm, which max_grad_norm={args.max_grad_norm!r} leaves out; set max_grad_norm (a "
        "large one clips nothing)",
    )
    for name, nothing, needed in WITHOUT_EFFECT:
        require(name, getattr(args, name) == nothing or getattr(args, needed), f"has no effect without {needed}=True")
    for name, nothing in NEED_WORKERS:
        has_effect = getattr(args, name) == nothing or args.dataloader_num_workers > 0
        require(name, has_effect, "has no effect without workers; set dataloader_num_workers")
    require(
        "torch_compile_mode",
        args.torch_compile_mode == "default" or args.torch_compile_backend in (None, "inductor"),
        f"is a mode of the backend 'inductor', and torch_compile_backend={args.torch_compile_backend!r}; leave one of "
        "them out",
    )
    if args.torch_compile and args.torch_compile_backend is not None:
        from torch._dynamo import list_backends  # importing it takes two seconds

        backends = list_backends(exclude_tags=())
        is_there = args.torch_compile_backend in backends
        require("torch_compile_backend", is_there, f"must be one of {', '.join(backends)}")
    groups = args.train_sampling_strategy == "group_by_length"
    require(
        "train_sampling_strategy",
        args.shuffle or not groups,
        "draws a new order of groups each epoch, and shuffle=False asks for none; leave one of them out",
    )
    require(
        "length_column_name",
        groups or args.length_column_name == "length",
        "has no effect without train_sampling_strategy='group_by_length'",
    )
    return found
