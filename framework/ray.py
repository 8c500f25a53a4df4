"""Training on Ray: Ray Train starts the ranks and replaces those that are lost, and a Fit trains in each of them.

The ranks are Ray's, with its process group. Each log of the run is reported to Ray, and each checkpoint once it is
whole; workers that Ray starts again go on from the newest one, on as many as there are.
"""

import inspect
import os
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..strategies.launch import RUN
from .arguments import FitArguments
from .callbacks import Callback
from .state import Control, TrainState


def fit_on_ray(build: Callable[..., Any], scaling_config: Any = None, run_config: Any = None) -> Any:
    """Train a Fit on Ray's workers, by Ray Train's TorchTrainer (the extra ``ray``).

    Args:
        build: makes the Fit, in each worker, with the same arguments in all. Where it takes an argument, that is the
            run's directory in Ray's storage, which should be the Fit's ``output_dir``: Ray is then told of checkpoints
            where they lie. Otherwise the Fit has an ``output_dir`` that all workers share, and Ray's storage is given a
            copy of each checkpoint (hard links, where both are on one file system).
        scaling_config: ``ray.train.ScalingConfig``: how many workers, and what each has; ``num_workers=(1, 8)`` goes on
            with fewer when some are lost, and with the same samples in an update. None means one worker.
        run_config: ``ray.train.RunConfig``: the run's name, its storage, and with
            ``failure_config=FailureConfig(max_failures=...)`` how often lost workers are replaced.

    Returns:
        ``ray.train.Result``: the last checkpoint, the metrics that were logged before it or at the run's end, and as
        ``return_value`` what ``fit.train`` returned on rank 0, as a mapping.

    Raises:
        ImportError: Ray isn't installed.
        ValueError: two would remove checkpoints from one directory.
        ray.train.TrainingFailedError: the run failed more often than it may.

    Example:
        ``fit_on_ray(lambda directory: Fit(module(), data, strategy="ddp", output_dir=directory),
        ScalingConfig(num_workers=8, use_gpu=True), RunConfig(storage_path="/shared/runs", name="first"))``
    """
    try:
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ImportError("fit_on_ray needs Ray Train: pip install 'stratagem[ray]'") from error
    takes_directory = bool(inspect.signature(build).parameters)
    retention: Any = getattr(run_config, "checkpoint_config", None)
    if takes_directory and getattr(retention, "num_to_keep", None) is not None:
        raise ValueError(
            f"CheckpointConfig(num_to_keep={retention.num_to_keep}) has Ray remove checkpoints from the directory of a "
            "Fit that resumes from them. Write Fit(save_total_limit=...) instead."
        )

    name = f"ray-{uuid.uuid4().hex}"

    def train() -> Any:
        return train_in_worker(build, takes_directory, name)

    # The ranks' hosts exchange a message an update, so there is a backend for tensors on CPUs, too.
    on_gpus = bool(getattr(scaling_config, "use_gpu", False))
    backend = TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    trainer = TorchTrainer(train, torch_config=backend, scaling_config=scaling_config, run_config=run_config)
    return trainer.fit()


def train_in_worker(build: Callable[..., Any], takes_directory: bool, name: str) -> dict[str, Any]:
    """Make the Fit in a worker of Ray's and train it, from its newest checkpoint on.

    Args:
        build, takes_directory: see ``fit_on_ray``.
        name: of the run in all of its attempts, by which an update keeps its samples on another number of workers.

    Returns:
        The TrainOutput as a mapping.
    """
    import ray.train

    os.environ[RUN] = name
    storage = ray.train.get_context().get_storage()
    is_local = storage.storage_filesystem.type_name == "local"
    if takes_directory and not is_local:
        raise ValueError(
            f"build takes the run's directory in Ray's storage, which is no directory here: {storage}. Have build take "
            "nothing, and give its Fit an output_dir that all workers share; its checkpoints are then uploaded."
        )
    # Ray trains in a thread of the worker, and handles the process's signals itself.
    warnings.filterwarnings("ignore", message=r"fit\.train\(\) runs in thread")
    directory = Path(storage.experiment_fs_path)
    report = Report(directory if is_local else None, lies_there=takes_directory)
    with build(str(directory)) if takes_directory else build() as fit:
        fit.add_callback(report)
        reported = ray.train.get_checkpoint()
        is_there = any(Path(fit.args.output_dir).glob("checkpoint-*"))
        if reported is None or is_there or takes_directory:
            output = fit.train(resume_from_checkpoint=True)
        else:  # the output_dir was lost with its machine, and Ray has a copy
            with reported.as_directory() as path:
                output = fit.train(resume_from_checkpoint=path)
    return {"global_step": output.global_step, "training_loss": output.training_loss, **output.metrics}


class Report(Callback):
    """Reports to Ray what was logged and saved after an update, on all ranks at the same moments, as Ray wants it.

    Ray takes one report in two seconds without waiting, so an update makes one at most. It keeps metrics beside
    checkpoints alone: a checkpoint is reported with all that was logged before it, and the last one once more at the
    end, with what the whole run comes to.

    Args:
        directory: of the run in Ray's storage; None where that is no directory.
        lies_there: whether checkpoints are written there.
    """

    def __init__(self, directory: Path | None, lies_there: bool) -> None:
        self.directory, self.lies_there = directory, lies_there
        self.logged: dict[str, Any] = {}
        self.is_due = False  # the same on all ranks
        self.published: deque[Path] = deque(maxlen=1)  # the newest, until it is reported
        self.last: Path | None = None  # that was reported

    def checkpoint_published(self, path: Path) -> None:
        """Note a checkpoint that is whole. Called on rank 0, with ``async_save`` in another thread."""
        self.published.append(path)

    def on_log(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        logs: dict[str, float],
        **context: Any,
    ) -> None:
        """Note a log."""
        self.logged |= {**logs, "step": state.global_step, "epoch": state.epoch}
        self.is_due = True

    def on_save(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Note that there is a checkpoint; one that is written in the background is reported when it is whole."""
        self.is_due = True

    def on_step_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Report what came after the update before."""
        if self.is_due:
            self.report()

    def on_train_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Report the last checkpoint with the metrics of the end."""
        if not self.published and self.last is not None:
            self.published.append(self.last)
        self.report()

    def report(self) -> None:
        """Report what was logged so far, and the newest checkpoint that wasn't reported yet. Waits for all ranks."""
        import ray.train

        self.is_due = False
        if not self.published:
            ray.train.report(dict(self.logged))
            return
        self.last = path = self.published.pop()
        checkpoint = ray.train.Checkpoint.from_directory(str(path))
        if self.lies_there:
            mode = ray.train.CheckpointUploadMode.NO_UPLOAD
            ray.train.report(dict(self.logged), checkpoint, checkpoint_upload_mode=mode)
        elif self.directory is not None:
            ray.train.report(dict(self.logged), checkpoint, checkpoint_upload_fn=self.link)
        else:
            ray.train.report(dict(self.logged), checkpoint)

    def link(self, checkpoint: Any, name: str) -> Any:
        """Put a checkpoint's files into Ray's storage under a name.

        Returns:
            Ray's checkpoint there.
        """
        import ray.train

        assert self.directory is not None
        target = self.directory / name
        shutil.copytree(checkpoint.path, target, copy_function=link_or_copy)
        return ray.train.Checkpoint.from_directory(str(target))


def link_or_copy(source: str, target: str) -> None:
    """Make a file appear in a second place: nobody writes into a checkpoint, so one file will do for both."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
