"""Every option of a run, under the field's names, checked together when they are made."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, get_args

from ..precision.registry import did_you_mean
from .cadence import CADENCES, STEPS, in_updates, is_number_or_fraction
from .lomo import argument_problems
from .optimizers import OPTIMIZERS, UPDATING_IN_BACKWARD
from .schedulers import PLATEAU, SCHEDULERS, WITHOUT_WARMUP, scheduler_problem


@dataclass(frozen=True)
class FitArguments:
    """Options of a training run.

    The names are those of transformers' TrainingArguments wherever the same thing exists there. "Update" means one
    optimizer step; "step" in a name means update too.

    Args:
        output_dir: where checkpoints and logs go; made when something is first written.
        max_steps: updates to train for; -1 trains for ``num_train_epochs``. Overrides the epochs.
        num_train_epochs: passes over the training data; may be a fraction.
        per_device_train_batch_size: samples per micro-batch on each data-parallel rank.
        per_device_eval_batch_size: the same in evaluation and prediction.
        gradient_accumulation_steps: micro-batches per update.
        auto_find_batch_size: where a run is out of memory, begin it again with half of ``per_device_train_batch_size``
            (or less) and more ``gradient_accumulation_steps``, so that an update's samples stay the same; see
            ``framework/batch_size.py``. Takes host memory for a copy of the module.
        learning_rate: the schedule's peak.
        weight_decay: decay of weights; norms and biases are never decayed.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's constants (Loshchilov and Hutter, 2019).
        optim: the optimizer: adamw, adam, sgd, adafactor, rmsprop, adagrad, muon, lomo, adalomo; from packages of their
            own: lion, adamw_8bit, schedule_free_adamw (which wants a constant schedule).
        optim_args: the optimizer's own options, by name.
        lr_scheduler_type: shape of the schedule: linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial,
            constant, constant_with_warmup, inverse_sqrt, warmup_stable_decay or reduce_lr_on_plateau.
        lr_scheduler_kwargs: the schedule's own options, by name.
        warmup_steps: updates over which the learning rate rises from 0 to its peak.
        warmup_ratio: the same as a fraction of the run.
        max_grad_norm: gradients are scaled down to this 2-norm; 0 switches clipping off (and the norm's log).
        logging_strategy: "no", "steps" or "epoch".
        logging_steps: updates between logs; below 1, a fraction of the run, rounded up to whole updates.
        logging_first_step: also log after the first update.
        eval_strategy: "no", "steps" or "epoch".
        eval_steps: updates between evaluations, or a fraction of the run; None means ``logging_steps``.
        eval_on_start: evaluate before the first update.
        metric_for_best_model: the evaluation's metric that tells which checkpoint is best, and that a
            reduce_lr_on_plateau schedule waits for, with or without "eval_"; None means "loss".
        greater_is_better: whether more of it is better; None means yes, unless its name ends in "loss".
        load_best_model_at_end: end with the weights of the best checkpoint. Rotation keeps that one.
        save_strategy: "no", "steps" or "epoch".
        save_steps: updates between checkpoints, or a fraction of the run.
        save_total_limit: checkpoints kept; None keeps all. The newest whole one always stays.
        save_only_trainable: checkpoints and exports hold trainable parameters and buffers, without the frozen ones (the
            base model under a peft model's adapters); those a resumed run takes from the module as you built it.
        async_save: write checkpoints in the background; training stops only for the copy to host memory. A write that
            fails ends training after the next update.
        seed: of the model's randomness and the order of the data.
        data_seed: of the order of the data alone; None means ``seed``.
        shuffle: draw a new order of the training data each epoch.
        dataloader_num_workers: worker processes that load data; 0 loads in the training process.
        dataloader_pin_memory: load into page-locked memory, for faster copies to a GPU.
        dataloader_drop_last: leave out the last micro-batch of an epoch where it is short.
        dataloader_prefetch_factor: micro-batches each worker loads ahead; None means 2.
        dataloader_persistent_workers: keep worker processes, and the dataset copies in them, between epochs.
        label_smoothing_factor: replaces the module's loss by cross entropy against the batch's "labels", which give
            this much of their weight to all classes alike (Szegedy et al., 2016).
        past_index: this entry of the outputs is handed to the next batch as ``mems``; -1 hands on nothing.
        neftune_noise_alpha: noise on input embeddings in training, see NEFTune; the paper uses 5 to 15.
        gradient_checkpointing: recompute blocks in backward instead of keeping what they computed.
        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint.
        torch_compile: compile the blocks (``shard_units()``, else the whole module); the first log says how long the
            first update took, compilation included.
        torch_compile_mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
        torch_empty_cache_steps: updates between emptyings of the accelerator's cache; None never does.
        include_num_input_tokens_seen: count input tokens: "no", "all", or "non_padding" (by the attention mask, else
            the module's ``pad_token_id``).
        include_tokens_per_second: log tokens per second; counts them as "all" where they aren't counted otherwise.
        logging_nan_inf_filter: leave losses that aren't finite out of logged means, and log how many they were.
        ignore_data_skip: a resumed run begins its epoch anew instead of where it stood.
        resume_with: whose options of the optimizer (learning rate, weight decay, betas, ...) a resumed run goes on with
            where its own are others: the "checkpoint"'s, or those of the run's "arguments"; moments, counters and the
            data's position are the checkpoint's either way.
        debug: "underflow_overflow" ends training at the first layer that computes an inf or NaN.
        progress: show a progress display on the main process.

    Raises:
        ValueError: a value is out of its range, or two contradict each other; all of them are listed.

    Example:
        >>> FitArguments(max_steps=100, learning_rate=3e-4).replace(seed=1).seed
        1
    """

    output_dir: str = "output"

    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    auto_find_batch_size: bool = False

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim: str = "adamw"
    optim_args: dict = field(default_factory=dict)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict = field(default_factory=dict)
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_grad_norm: float = 1.0

    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_on_start: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_only_trainable: bool = False
    async_save: bool = False

    seed: int = 42
    data_seed: int | None = None
    shuffle: bool = True
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_drop_last: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_persistent_workers: bool = False

    label_smoothing_factor: float = 0.0
    past_index: int = -1
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict = field(default_factory=dict)
    torch_compile: bool = False
    torch_compile_mode: str = "default"
    torch_empty_cache_steps: int | None = None
    include_num_input_tokens_seen: str = "no"
    include_tokens_per_second: bool = False
    logging_nan_inf_filter: bool = True
    ignore_data_skip: bool = False
    resume_with: str = "checkpoint"
    debug: str = ""

    progress: bool = True

    def __post_init__(self) -> None:
        problems = [f"{name}={getattr(self, name)!r}: {why}" for name, why in self._problems()]
        if problems:
            raise ValueError("These arguments can't work:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[tuple[str, str]]:
        """(field, why it can't work and what to write instead), for every field that can't."""
        found: list[tuple[str, str]] = []

        def require(name: str, holds: bool, why: str) -> None:
            if not holds:
                found.append((name, why))

        for declared in dataclasses.fields(self):
            value, kind = getattr(self, declared.name), declared.type
            allowed = get_args(kind) or (kind,)
            fits = isinstance(value, allowed) or (isinstance(value, int) and float in allowed)
            if isinstance(value, bool):  # an int to Python, and a mistake where a number is asked for
                fits = bool in allowed
            if not fits:
                wanted = kind.__name__ if isinstance(kind, type) else kind
                found.append((declared.name, f"must be {wanted}, not {type(value).__name__}"))
        if found:
            return found

        require("max_steps", self.max_steps == -1 or self.max_steps > 0, "give a number of updates, or -1 for epochs")
        require("num_train_epochs", self.num_train_epochs > 0, "must be above 0")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            require(name, getattr(self, name) >= 1, "must be at least 1")
        uncounted = [name for name in STEPS if not is_number_or_fraction(getattr(self, name))]
        for name in uncounted:
            require(name, False, "must be a number of updates, at least 1, or a fraction of the run between 0 and 1")
        for name in ("save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps"):
            value = getattr(self, name)
            require(name, value is None or value >= 1, "must be at least 1, or None")
        for name in (
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "dataloader_num_workers",
            "seed",
        ):
            require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            require(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            require(name, getattr(self, name) in CADENCES, f"must be one of {', '.join(map(repr, CADENCES))}")
        require(
            "lr_scheduler_type", self.lr_scheduler_type in SCHEDULERS, did_you_mean(self.lr_scheduler_type, SCHEDULERS)
        )
        if self.lr_scheduler_type in SCHEDULERS:
            problem = scheduler_problem(self.lr_scheduler_type, self.lr_scheduler_kwargs)
            require("lr_scheduler_kwargs", problem is None, str(problem))
        require("label_smoothing_factor", 0 <= self.label_smoothing_factor < 1, "must be in [0, 1)")
        require("past_index", self.past_index >= -1, "is the place of an output, or -1 for none")
        require(
            "neftune_noise_alpha", self.neftune_noise_alpha is None or self.neftune_noise_alpha > 0, "must be above 0"
        )
        for name, depends in (("gradient_checkpointing_kwargs", "gradient_checkpointing"),):
            require(name, not getattr(self, name) or getattr(self, depends), f"has no effect without {depends}=True")
        require(
            "torch_compile_mode",
            self.torch_compile or self.torch_compile_mode == "default",
            "has no effect without torch_compile=True",
        )
        for name, known in (
            ("include_num_input_tokens_seen", ("no", "all", "non_padding")),
            ("debug", ("", "underflow_overflow")),
            ("resume_with", ("checkpoint", "arguments")),
            ("torch_compile_mode", ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
        ):
            require(name, getattr(self, name) in known, f"must be one of {', '.join(map(repr, known))}")
        require("optim", self.optim in OPTIMIZERS, did_you_mean(self.optim, OPTIMIZERS))
        if self.optim in UPDATING_IN_BACKWARD:
            found += argument_problems(self.max_grad_norm, self.gradient_accumulation_steps)
            require(
                "auto_find_batch_size",
                not self.auto_find_batch_size,
                f"accumulates what a smaller batch leaves out, and optim={self.optim!r} can't accumulate; find "
                "per_device_train_batch_size by hand",
            )
        require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "is a fraction of the run, from 0 to 1")
        require(
            "warmup_ratio",
            not (self.warmup_ratio and self.warmup_steps),
            f"says the same as warmup_steps={self.warmup_steps}; give one of them",
        )
        warms_up = self.lr_scheduler_type not in WITHOUT_WARMUP
        for name in ("warmup_steps", "warmup_ratio"):
            require(
                name,
                warms_up or not getattr(self, name),
                f"has no effect with lr_scheduler_type={self.lr_scheduler_type!r}; constant_with_warmup has one",
            )
        waits = self.lr_scheduler_type == PLATEAU
        require(
            "lr_scheduler_type",
            not waits or self.eval_strategy != "no",
            "steps on an evaluation's metric; set eval_strategy to 'steps' or 'epoch'",
        )
        require(
            "load_best_model_at_end",
            not self.load_best_model_at_end or self.eval_strategy != "no",
            "needs evaluations to tell which is best; set eval_strategy to 'steps' or 'epoch'",
        )
        require(
            "load_best_model_at_end",
            not self.load_best_model_at_end or self.save_strategy != "no",
            "needs checkpoints to load from; set save_strategy as eval_strategy",
        )
        if self.load_best_model_at_end and not uncounted and "no" not in (self.save_strategy, self.eval_strategy):
            evaluated, saved = self._spacing()
            matches = self.save_strategy == self.eval_strategy and (min(evaluated, saved) < 1 or saved % evaluated == 0)
            require(
                "save_strategy",
                matches,
                "with load_best_model_at_end each checkpoint needs an evaluation of its own: save as evaluation goes "
                f"(eval_strategy={self.eval_strategy!r}), every multiple of {evaluated} updates; here every {saved}",
            )
        require(
            "greater_is_better",
            self.greater_is_better is None or self.metric_for_best_model is not None,
            "has no effect without metric_for_best_model",
        )
        require(
            "warmup_steps",
            self.max_steps == -1 or self.warmup_steps <= self.max_steps,
            f"is longer than the run (max_steps={self.max_steps}): the learning rate would never reach its peak",
        )
        decay = self.lr_scheduler_kwargs.get("num_decay_steps")
        warmup = self.warmup_steps or math.ceil(self.max_steps * self.warmup_ratio)
        require(
            "lr_scheduler_kwargs",
            self.max_steps == -1 or type(decay) is not int or warmup + decay <= self.max_steps,
            f"{warmup} updates of warm-up and {decay} of decay are more than the run's {self.max_steps}; give fewer",
        )
        require(
            "eval_steps",
            self.eval_steps is None or self.eval_strategy == "steps",
            f"has no effect with eval_strategy={self.eval_strategy!r}; write eval_strategy='steps'",
        )
        require(
            "dataloader_prefetch_factor",
            self.dataloader_prefetch_factor is None or self.dataloader_num_workers > 0,
            "has no effect without workers; set dataloader_num_workers",
        )
        require(
            "dataloader_persistent_workers",
            not self.dataloader_persistent_workers or self.dataloader_num_workers > 0,
            "has no effect without workers; set dataloader_num_workers",
        )
        return found

    def _spacing(self) -> tuple[float, float]:
        """What lies between two evaluations and between two checkpoints: updates, or still a fraction of the run where
        its length isn't known yet. Fit asks again when it is.
        """
        steps = self.eval_every or 1, self.save_steps
        if self.max_steps < 1:
            return steps
        return in_updates(steps[0], self.max_steps), in_updates(steps[1], self.max_steps)

    @property
    def best_metric(self) -> str:
        """The full name of the metric that tells which evaluation is best."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def more_is_better(self) -> bool:
        """Whether more of the best metric is better."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def eval_every(self) -> float | None:
        """Updates between evaluations, or a fraction of the run; None where they don't go by updates."""
        return (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else None

    def replace(self, **changes: Any) -> "FitArguments":
        """A copy with some fields changed.

        Raises:
            TypeError: a name that isn't a field; the message suggests the nearest.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise TypeError(f"Fit has no argument {name!r}. {did_you_mean(name, known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)
