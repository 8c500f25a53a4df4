"""The fields of FitArguments and their documentation, without the rules, which are written against these fields."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .argument_types import Options
from .known_names import KnownNames

Arguments = TypeVar("Arguments", bound="ArgumentFields")


@dataclass(frozen=True)
class ArgumentFields(KnownNames):
    """Options of a training run.

    The names are those of transformers' TrainingArguments wherever the same thing exists there, and its
    HfArgumentParser makes a command line of them. "Update" means one optimizer step; "step" in a name means update too.

    Args:
        output_dir: where checkpoints and logs go; made when something is first written. "~" is your home.
        run_name: what the run is called in its logs and on the display; None leaves it without a name.
        max_steps: updates to train for; -1 trains for ``num_train_epochs``. Overrides the epochs.
        num_train_epochs: passes over the training data; may be a fraction.
        max_time: training ends, saved and evaluated, before it has lasted so long: "HH:MM:SS", "DD:HH:MM:SS", seconds,
            or a timedelta. It counts from the beginning of ``train``, and adds up over resumes. See docs/trying.md.
        fast_dev_run: try the run: so many updates, and so many batches in each evaluation (True is 1), then stop. All
            is as in the real run, but for checkpoints, loggers and what else is written to ``output_dir``: there is
            none.
        limit_train_batches: an epoch ends after so many updates; a float up to 1.0 is a fraction of them, rounded down.
            With an order that is drawn anew each epoch, each has other samples.
        limit_eval_batches: an evaluation ends after so many batches of ``per_device_eval_batch_size`` samples, on
            however many ranks; a float up to 1.0 is a fraction of them, rounded down. ``predict`` has no limit.
        overfit_batches: every epoch is the first so many updates of the data, in the data's order, and evaluations are
            of their samples, too, in place of ``eval_data``; a float up to 1.0 is a fraction of an epoch.
        per_device_train_batch_size: samples per micro-batch on each data-parallel rank.
        per_device_eval_batch_size: the same in evaluation and prediction.
        gradient_accumulation_steps: micro-batches per update.
        gradient_accumulation_schedule: the same from an epoch on: {4: 2, 8: 1}; epochs count from 0. Also as JSON, or
            as "4=2,8=1".
        auto_find_batch_size: where a run is out of memory, begin it again with half of ``per_device_train_batch_size``
            (or less) and more ``gradient_accumulation_steps``, so that an update's samples stay the same; see
            ``framework/run/batch_size.py``. Takes host memory for a copy of the module.
        learning_rate: the schedule's peak.
        weight_decay: decay of weights; norms and biases are never decayed.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's constants (Loshchilov and Hutter, 2019).
        optim: the optimizer: adamw, adam, sgd, adafactor, rmsprop, adagrad, muon, lomo, adalomo; from packages of their
            own: lion, stable_adamw, grokadamw, schedule_free_adamw, _radam and _sgd (which want a constant schedule),
            adamw_8bit and others of bitsandbytes, galore_adamw, apollo_adamw; or a class or function of parameters, lr
            and options, itself or as "package.module.name".
        optim_args: the optimizer's own options, by name; also as JSON, or as "name=value,name=value".
        optim_target_modules: the linear layers whose gradients GaLore and APOLLO project: parts of their names, one
            regular expression of the whole name, or "all-linear".
        lr_scheduler_type: shape of the schedule: linear, cosine, cosine_with_restarts, cosine_with_min_lr,
            cosine_warmup_with_min_lr, polynomial, constant, constant_with_warmup, inverse_sqrt, warmup_stable_decay,
            reduce_lr_on_plateau or greedy.
        lr_scheduler_kwargs: the schedule's own options, by name.
        warmup_steps: updates over which the learning rate rises from 0 to its peak; below 1, a fraction of the run,
            rounded up to whole updates.
        warmup_ratio: the same, as a fraction of the run alone.
        max_grad_norm: gradients are scaled down to this 2-norm; 0 or None switches clipping off (and the norm's log).
        nonfinite_updates: what becomes of an update whose gradients aren't all finite: "skip" leaves it out, weights,
            moments and schedule as they are, and says at the next log which samples it was made of; "raise" ends the
            run there.
        spike_updates: also leave out an update whose gradient norm is more than so many standard deviations above its
            running mean, once 50 are known; the mean is that of the last 100 or so (docs/loop.md). None looks at none.
        max_skipped_updates: after so many updates in a row that were left out, the run ends with an error that says how
            it began.
        logging_strategy: "no", "steps" or "epoch".
        logging_steps: updates between logs; below 1, a fraction of the run, rounded up to whole updates.
        logging_first_step: also log after the first update.
        eval_strategy: "no", "steps" or "epoch".
        eval_steps: updates between evaluations, or a fraction of the run; None means ``logging_steps``.
        eval_delay: updates, or epochs with eval_strategy="epoch", before which nothing is evaluated.
        eval_accumulation_steps: batches of predictions that stay on the device before they are moved to the host
            together; None moves each at once.
        eval_on_start: evaluate before the first update.
        metric_for_best_model: the evaluation's metric that tells which checkpoint is best, and that a
            reduce_lr_on_plateau schedule waits for, with or without "eval_"; None means "loss".
        greater_is_better: whether more of it is better; None means yes, unless its name ends in "loss".
        load_best_model_at_end: end with the weights of the best checkpoint. Rotation keeps that one.
        save_strategy: "no", "steps", "epoch", or "best" after each evaluation that is the best so far (or among the
            ``save_best_limit`` best).
        save_steps: updates between checkpoints, or a fraction of the run.
        save_total_limit: checkpoints of the run kept; None keeps all. The newest whole one, those of the best
            evaluations (``save_best_limit``) and those with a name (``fit.save_checkpoint(name=)``) always stay.
        save_best_limit: how many checkpoints rotation leaves because their evaluations are the best so far, by
            ``metric_for_best_model``; with save_strategy="best", an evaluation among so many best is saved.
        other_checkpoints: what becomes of checkpoints in ``output_dir`` that the run doesn't go on from: "set_aside"
            renames them to ``checkpoint-<update>.set-aside``, "refuse" ends the run before it begins.
        save_only_trainable: checkpoints and exports hold trainable parameters and buffers, without the frozen ones (the
            base model under a peft model's adapters); those a resumed run takes from the module as you built it.
        async_save: write checkpoints in the background; training stops only for the copy to host memory. A write that
            fails ends training after the next update.
        save_on_exception: where a callback, the data or an evaluation raises between two updates, save the run as it
            stands as a checkpoint before the exception goes on. They write together: all ranks have to fail for it.
        preemption_signals: signals that ask the run to end, beside Ctrl-C, with commas between them: SIGTERM, SIGUSR1,
            SIGUSR2, SIGHUP. All ranks then save at the same update and end, with status 143; see docs/faults.md.
        preemption_grace: seconds from a signal to the end of the process, saved or not. Less than the scheduler waits.
        hang_timeout: seconds without progress, of any rank, after which the run is said to hang, and which rank waits
            for which. None takes 20 times the longest update, at least a minute. It is ten times as long in the first
            update, in compilation, and while the run begins, saves or ends.
        on_hang: what then becomes of the run: "end" (status 75; without hang_timeout, and where all ranks answer, only
            after ten times as long, and never where there is one rank), or "report" alone.
        requeue: in a job of SLURM's, once a signal has interrupted the run (status 143) and it is saved, rank 0 has
            scontrol put the job back into the queue. See docs/clusters.md.
        seed: of the model's randomness and the order of the data.
        data_seed: of the order of the data alone; None means ``seed``.
        shuffle: draw a new order of the training data each epoch.
        full_determinism: compute the same bits in every run on the same machine: torch's deterministic algorithms, from
            the beginning of training to its end. Some are slower, by a tenth up to several times, and an operation that
            has none ends training with torch's error. ``deterministic=True`` is the same.
        train_sampling_strategy: "random"; "sequential", which is shuffle=False; or "group_by_length", which puts
            samples of about the same length together, in an order that is new each epoch.
        length_column_name: where "group_by_length" finds lengths: an attribute or a column of the data, or an entry of
            each sample; where there is none, the length of a sample's "input_ids" is taken.
        dataloader_num_workers: worker processes that load data; 0 loads in the training process.
        dataloader_pin_memory: load into page-locked memory, for faster copies to a GPU.
        dataloader_drop_last: leave out the last micro-batch of an epoch where it is short.
        dataloader_prefetch_factor: micro-batches each worker loads ahead; None means 2.
        dataloader_persistent_workers: keep worker processes, and the dataset copies in them, between epochs, which
            saves their start where epochs are short. A dataset's ``set_epoch`` is called in them too; what else changes
            it doesn't reach them, and what it remembers stays. The workers of an iterable start anew all the same.
        label_smoothing_factor: replaces the module's loss by cross entropy against the batch's "labels", which give
            this much of their weight to all classes alike (Szegedy et al., 2016).
        pad_index: fills up the outputs and labels of shorter batches, where those of an evaluation or prediction are
            joined and differ in length; False where they are bools.
        past_index: this entry of the outputs is handed to the next batch as ``mems``; -1 hands on nothing.
        contrastive_chunks: compute the embeddings of a micro-batch in so many pieces, with the loss and the gradients
            of the whole and the activations of one piece in memory, for one forward more (GradCache: Gao et al., 2021);
            None computes it whole. See docs/losses_over_ranks.md.
        neftune_noise_alpha: noise on input embeddings in training, see NEFTune; the paper uses 5 to 15.
        gradient_checkpointing: recompute blocks in backward instead of keeping what they computed.
        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint.
        torch_compile: compile the blocks (``shard_units()``, else the whole module); the first log says how long the
            first update took, compilation included. "update" makes each update one program, from forward to the
            optimizer's step, on one device; see docs/one_program.md.
        torch_compile_backend: what compiles: one of torch._dynamo.list_backends(); None means "inductor".
        torch_compile_mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
        tf32: in training, multiply float32 matrices in TF32 (10 bits of mantissa) on NVIDIA GPUs since Ampere; False
            forbids it, None leaves torch's setting.
        torch_empty_cache_steps: updates between emptyings of the accelerator's cache; None never does.
        include_num_input_tokens_seen: count input tokens: "no", "all", or "non_padding" (by the attention mask, else
            the module's ``pad_token_id``).
        include_tokens_per_second: log tokens per second; counts them as "all" where they aren't counted otherwise.
        logging_nan_inf_filter: leave losses that aren't finite out of logged means, and log how many they were.
        ignore_data_skip: a resumed run begins its epoch anew instead of where it stood.
        resume_with: whose options of the optimizer (learning rate, weight decay, betas, ...) a resumed run goes on with
            where its own are others: the "checkpoint"'s, or those of the run's "arguments"; moments, counters and the
            data's position are the checkpoint's either way.
        debug: "underflow_overflow" ends training at the first layer that computes an inf or NaN; "ranks_agree" compares
            what several ranks hold alike at each log, and not after the first update alone.
        progress: show a progress display on the main process.
        report: keep what the run is and was in ``output_dir``: run.json, and report.html with its curves, which a
            browser shows. See docs/record.md.

    Raises:
        ValueError: a value is out of its range, or two contradict each other; all of them are listed.

    Example:
        >>> FitArguments(max_steps=100, learning_rate=3e-4).replace(seed=1).seed
        1
    """

    output_dir: str = "output"
    run_name: str | None = None

    max_steps: int = -1
    num_train_epochs: float = 3.0
    max_time: None | str | float = None  # noqa: RUF036 (HfArgumentParser reads the second type)
    fast_dev_run: int = 0
    limit_train_batches: None | str | int | float = None  # noqa: RUF036 (the same; the text becomes a number)
    limit_eval_batches: None | str | int | float = None  # noqa: RUF036
    overfit_batches: None | str | int | float = None  # noqa: RUF036
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_accumulation_schedule: Options = field(default_factory=dict)
    auto_find_batch_size: bool = False

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim: str = "adamw"
    optim_args: Options = field(default_factory=dict)
    optim_target_modules: None | str | list[str] = None  # noqa: RUF036 (HfArgumentParser reads the second type)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Options = field(default_factory=dict)
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    nonfinite_updates: str = "skip"
    spike_updates: float | None = None
    max_skipped_updates: int = 50

    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    eval_accumulation_steps: int | None = None
    eval_on_start: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_best_limit: int = 1
    other_checkpoints: str = "set_aside"
    save_only_trainable: bool = False
    async_save: bool = False
    save_on_exception: bool = False

    preemption_signals: str = "SIGTERM"
    preemption_grace: float = 25.0
    hang_timeout: float | None = None
    on_hang: str = "end"
    requeue: bool = False

    seed: int = 42
    data_seed: int | None = None
    shuffle: bool = True
    full_determinism: bool = False
    train_sampling_strategy: str = "random"
    length_column_name: str = "length"
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_drop_last: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_persistent_workers: bool = False

    label_smoothing_factor: float = 0.0
    pad_index: int = -100
    past_index: int = -1
    contrastive_chunks: int | None = None
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Options = field(default_factory=dict)
    torch_compile: bool | str = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str = "default"
    tf32: bool | None = None
    torch_empty_cache_steps: int | None = None
    include_num_input_tokens_seen: str = "no"
    include_tokens_per_second: bool = False
    logging_nan_inf_filter: bool = True
    ignore_data_skip: bool = False
    resume_with: str = "checkpoint"
    debug: str = ""

    progress: bool = True
    report: bool = True

    @property
    def best_metric(self) -> str:
        """The full name of the metric that tells which evaluation is best, as "eval_loss"."""
        name = self.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def more_is_better(self) -> bool:
        """Whether a higher value of ``best_metric`` is better."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def eval_every(self) -> float | None:
        """Updates between evaluations, or a fraction of the run; None where they don't go by updates."""
        return (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else None

    def replace(self: Arguments, **changes: Any) -> Arguments:
        """Return a copy with some fields changed.

        Raises:
            TypeError: a name isn't that of a field; the message says what to write instead, or suggests a name.
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self)
