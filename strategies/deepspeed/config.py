"""A DeepSpeed config: every "auto" filled from the run, everything that contradicts the run or can't work found.

DeepSpeed itself fills no "auto" (a stage of "auto" becomes 0 without a word) and passes over keys that it doesn't know.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...precision.names import did_you_mean
from ..base import RunDescription

AUTO = "auto"
DEFAULT_STAGE = 2
NEVER = 2**31  # an interval for steps_per_print that no run reaches

TAKEN = {
    "activation_checkpointing", "aio", "bf16", "comms_logger", "communication_data_type", "data_types",
    "disable_allgather", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "memory_breakdown", "optimizer", "prescale_gradients", "scheduler", "steps_per_print",
    "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
OURS_INSTEAD: Mapping[str, str] = {
    "amp": "apex isn't used; write precision='bf16-mixed' in Fit",
    "autotuning": "write auto_find_batch_size=True in Fit",
    "checkpoint": "checkpoints are stratagem's own, for every strategy alike",
    "compile": "write torch_compile=True in Fit",
    "csv_monitor": "Fit(loggers=...) writes the logs",
    "curriculum_learning": "it has no effect on data that DeepSpeed doesn't load; order the data yourself",
    "data_efficiency": "it has no effect on data that DeepSpeed doesn't load; order the data yourself",
    "elasticity": "Fit(max_restarts=...) goes on after a failure, on any number of ranks",
    "managed_gradient_accumulation": "write gradient_accumulation_steps in Fit",
    "pipeline": "pipeline parallelism isn't supported",
    "sequence_parallel_size": "write strategy=FSDP2(context_parallel=...)",
    "sparse_gradients": "gradients are dense here; leave it out",
    "tensor_parallel": "write strategy=FSDP2(tensor_parallel=...), or 'tp'",
    "tensorboard": "Fit(loggers=['tensorboard']) writes the logs",
    "wandb": "Fit(loggers=...) writes the logs",
}
ZERO_REFUSED: Mapping[str, str] = {
    "cpu_offload": "DeepSpeed has renamed it: write offload_optimizer: {device: cpu}",
    "cpu_offload_param": "DeepSpeed has renamed it: write offload_param: {device: cpu}",
    "mics_shard_size": "its shards are untested with our checkpoints; write strategy=FSDP2(replicas=...)",
    "zenflow": "its second optimizer's state is in no checkpoint; leave it out",
    "zero_hpz_partition_size": "its second copy of the shards is untested with our checkpoints; leave it out",
    "zero_quantized_gradients": "it rounds gradients, untested here; leave it out",
    "zero_quantized_weights": "it rounds weights, untested here; leave it out",
    "zero_quantized_nontrainable_weights": "it rounds weights, untested here; leave it out",
    "elastic_checkpoint": "checkpoints are stratagem's own; leave it out",
    "load_from_fp32_weights": "checkpoints are stratagem's own; leave it out",
}
# DeepSpeed's own defaults, where an "auto" asks for no more than that.
ZERO_AUTO: Mapping[str, Any] = {
    "allgather_bucket_size": 500_000_000,
    "contiguous_gradients": True,
    "overlap_comm": False,
    "reduce_bucket_size": 500_000_000,
    "reduce_scatter": True,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "sub_group_size": 1_000_000_000,
}
SCHEDULES: Mapping[str, str] = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}


@dataclass(frozen=True)
class Filling:
    """What an "auto" becomes, and what else a value is compared with.

    Attributes:
        value: the run's.
        source: where it comes from, in the words of Fit's arguments.
    """

    value: Any
    source: str


def read(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read a config from a file or a mapping, into a mapping of its own.

    Raises:
        ValueError: there is no such file, or it holds no JSON mapping.
        TypeError: neither a path nor a mapping.
    """
    if config is None:
        return {}
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"DeepSpeed(config={str(config)!r}): there is no such file.")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"DeepSpeed(config={str(config)!r}) holds no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"DeepSpeed(config={str(config)!r}) must hold a JSON mapping, not {content!r:.40}")
        return content
    if isinstance(config, Mapping):
        copy: dict[str, Any] = json.loads(json.dumps(dict(config)))
        return copy
    raise TypeError(f"DeepSpeed(config=...) takes a path or a mapping. Received: {config!r:.100}")


def given_stage(config: Mapping[str, Any], stage: int | None) -> int:
    """The ZeRO stage of a config and an option, of which one may be silent.

    Raises:
        ValueError: they contradict each other, or the config's is none.
    """
    section = config.get("zero_optimization", {})
    configured = section.get("stage", AUTO if not config.get("zero_optimization") else 0)
    if configured == AUTO:
        return DEFAULT_STAGE if stage is None else stage
    if configured not in (0, 1, 2, 3) or isinstance(configured, bool):
        raise ValueError(f"zero_optimization.stage={configured!r}: write 0, 1, 2, 3 or 'auto'.")
    if stage is not None and configured != stage:
        raise ValueError(
            f"The config has zero_optimization.stage={configured}, and the strategy was asked for stage {stage}. "
            'Write "auto" in the config, or leave one of them out.'
        )
    return int(configured)


def fill(
    config: Mapping[str, Any],
    run: RunDescription,
    *,
    stage: int,
    world_size: int,
    computes_in_bf16: bool,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> dict[str, Any]:
    """Complete the config: no "auto" is left in it, and nothing that disagrees with the run.

    Args:
        config: as ``read`` gave it; is left as it is.
        run: what is trained.
        stage: see ``given_stage``.
        world_size: ranks.
        computes_in_bf16: whether products are bfloat16, by autocast.
        offload_optimizer, offload_parameters: see DeepSpeedOptions.

    Raises:
        ValueError: a line for each thing that can't work or contradicts the run, with what to write instead.
    """
    filled: dict[str, Any] = json.loads(json.dumps(dict(config)))
    problems = list(unknown_keys(filled))
    if stage == 3 and run.compiles_checkpointed_blocks:
        problems.append(
            "torch_compile=True with gradient_checkpointing=True would compile nothing at stage 3, whose hooks gather "
            "parameters inside each block: leave one out, or take stage 2, or strategy='fsdp2'"
        )
    zero = filled.setdefault("zero_optimization", {})
    zero["stage"] = stage
    for wanted, key, lowest in ((offload_optimizer, "offload_optimizer", 1), (offload_parameters, "offload_param", 3)):
        if wanted:
            zero.setdefault(key, {"device": "cpu"})
        device = (zero.get(key) or {}).get("device", "none")
        if device == "nvme":
            problems.append(f"zero_optimization.{key}.device='nvme' is untested with our checkpoints: write 'cpu'")
        elif device != "none" and stage < lowest:
            problems.append(f"zero_optimization.{key} needs stage {lowest} or more, and the stage is {stage}")
    if zero.get("compute_grad_norm") is False:
        problems.append(
            "zero_optimization.compute_grad_norm=false: without the norm, updates whose gradients aren't finite would "
            "be made; leave it out"
        )
    problems += precision_problems(filled, stage, computes_in_bf16)
    for key, value in ZERO_AUTO.items():
        if zero.get(key) == AUTO:
            zero[key] = value
    for path, filling in fillings(run, world_size).items():
        problems += settle(filled, path, filling)
    problems += optimizer_problems(filled.get("optimizer"), run)
    problems += scheduler_problems(filled.get("scheduler"), run)
    filled["torch_autocast"] = {"enabled": computes_in_bf16}
    if computes_in_bf16:
        # Autocast's list of modules would also have their gradients summed over ranks in bfloat16.
        filled["torch_autocast"] |= {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    filled["bf16"] = filled["fp16"] = {"enabled": False}
    filled.setdefault("steps_per_print", NEVER)
    filled["zero_allow_untested_optimizer"] = True  # those that stratagem offers are tested
    filled["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's optimizer for the host would be compiled
    problems += [f"{path}='auto': nothing in a run says what it should be; write a value" for path in autos(filled)]
    if problems:
        raise ValueError("The DeepSpeed config can't be used for this run:\n  " + "\n  ".join(problems))
    return filled


def unknown_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key that would have no effect, or an effect that is untested here."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in config:
        if key in OURS_INSTEAD:
            yield f"{key}: {OURS_INSTEAD[key]}"
        elif key not in TAKEN:
            yield f"{key}: DeepSpeed would pass over it. {did_you_mean(key, TAKEN)}"
    fields = DeepSpeedZeroConfig.model_fields
    known = {name for field_name, field in fields.items() for name in (field.alias or field_name, field_name)}
    for key, value in (config.get("zero_optimization") or {}).items():
        if key in ZERO_REFUSED:
            if value not in (False, None, 1, -1):  # these values switch the option off
                yield f"zero_optimization.{key}: {ZERO_REFUSED[key]}"
        elif key not in known:
            yield f"zero_optimization.{key} is no such option. {did_you_mean(key, known - ZERO_REFUSED.keys())}"


def precision_problems(config: Mapping[str, Any], stage: int, computes_in_bf16: bool) -> Iterator[str]:
    """A line for each section on number formats that can't work, or asks for another than the run's."""
    for name in ("bf16", "fp16"):
        if (config.get(name) or {}).get("enabled") not in (True, "true"):
            continue
        if stage == 0:
            yield (
                f"{name}.enabled=true trains wrongly at stage 0 (DeepSpeed steps once too often): leave it to "
                "precision='bf16-mixed', or take stage 1"
            )
        else:
            yield (
                f"{name}.enabled=true: the number format is Fit's precision; write {name}.enabled='auto' and "
                "precision='bf16-mixed'"
            )
    autocast = config.get("torch_autocast") or {}
    enabled, dtype = autocast.get("enabled", AUTO), autocast.get("dtype", AUTO)
    if enabled is not False and str(dtype).removeprefix("torch.") in ("float16", "fp16", "half"):
        yield (
            f"torch_autocast.dtype={dtype!r} never trains under ZeRO: write 'bfloat16' or 'auto', and "
            "precision='bf16-mixed'"
        )
    elif enabled != AUTO and bool(enabled) != computes_in_bf16:
        runs = "bfloat16" if computes_in_bf16 else "float32"
        yield (
            f"torch_autocast.enabled={enabled!r}, and the run computes in {runs} (precision=): write 'auto', or "
            f"precision={'bf16-mixed' if enabled else '32-true'!r}"
        )


def fillings(run: RunDescription, world_size: int) -> dict[str, Filling]:
    """Map each dotted path in a config to what the run says about it."""
    total = run.micro_batch_size * run.gradient_accumulation_steps * world_size
    product = (
        f"per_device_train_batch_size={run.micro_batch_size} x gradient_accumulation_steps="
        f"{run.gradient_accumulation_steps} x {world_size} ranks"
    )
    steps = f"max_steps={run.total_steps}"
    return {
        "train_batch_size": Filling(total, product),
        "train_micro_batch_size_per_gpu": Filling(run.micro_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": Filling(run.gradient_accumulation_steps, "gradient_accumulation_steps"),
        "gradient_clipping": Filling(run.max_grad_norm, "max_grad_norm"),
        "optimizer.params.lr": Filling(run.learning_rate, "learning_rate"),
        "optimizer.params.betas": Filling(list(run.betas), "adam_beta1, adam_beta2"),
        "optimizer.params.eps": Filling(run.epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": Filling(run.weight_decay, "weight_decay"),
        "scheduler.params.warmup_min_lr": Filling(0.0, "schedules begin at 0"),
        "scheduler.params.warmup_max_lr": Filling(run.learning_rate, "learning_rate"),
        "scheduler.params.warmup_num_steps": Filling(run.warmup_steps, "warmup_steps"),
        "scheduler.params.total_num_steps": Filling(run.total_steps, steps),
        "scheduler.params.warmup_type": Filling("linear", "warm-up is linear"),
    }


def settle(config: dict[str, Any], path: str, filling: Filling) -> Iterator[str]:
    """Write the run's value where the config has "auto", or nothing where DeepSpeed needs something; a line where it
    has another value.
    """
    *parents, key = path.split(".")
    place: Any = config
    for parent in parents:
        place = place.get(parent)
        if not isinstance(place, dict):
            return
    given = place.get(key, AUTO if not parents else None)
    if given == AUTO:
        place[key] = filling.value
    elif given is not None and not equal(given, filling.value):
        yield f"{path}={given!r} in the config, but the run has {filling.value!r} ({filling.source}): write 'auto'"


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same but for the way that JSON writes numbers."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def optimizer_problems(section: Any, run: RunDescription) -> Iterator[str]:
    """A line for each thing in an optimizer section that the run's optimizer isn't."""
    if section is None:
        return
    kind, params = section.get("type", "Adam"), section.get("params", {})
    adam_w = kind == "AdamW" or (kind == "Adam" and params.get("adam_w_mode", True))
    if run.optimizer is None:
        yield "optimizer: the module brings its own (configure_optimizer); leave the section out"
    elif kind not in ("Adam", "AdamW"):
        yield f"optimizer.type={kind!r}: leave the section out and choose by Fit's optim=, now {run.optimizer!r}"
    elif run.optimizer != ("adamw" if adam_w else "adam"):
        yield f"optimizer.type={kind!r}, but the run has optim={run.optimizer!r}: choose one"
    known = ("adam_w_mode", "betas", "eps", "fused", "lr", "torch_adam", "weight_decay")
    for name in params:
        if name not in known:
            yield f"optimizer.params.{name} has no effect. {did_you_mean(name, known)}"


def scheduler_problems(section: Any, run: RunDescription) -> Iterator[str]:
    """A line for each thing in a scheduler section that the run's schedule isn't."""
    if section is None:
        return
    kind = section.get("type")
    if run.schedule is None:
        yield "scheduler: the module brings its own (configure_scheduler); leave the section out"
    elif kind not in SCHEDULES:
        yield f"scheduler.type={kind!r}: leave the section out and choose by Fit's lr_scheduler_type="
    elif run.schedule != SCHEDULES[kind]:
        yield f"scheduler.type={kind!r} is lr_scheduler_type={SCHEDULES[kind]!r}, but the run has {run.schedule!r}"
    known = ("total_num_steps", "warmup_max_lr", "warmup_min_lr", "warmup_num_steps", "warmup_type")
    for name in section.get("params", {}):
        if name not in known:
            yield f"scheduler.params.{name} has no effect. {did_you_mean(name, known)}"


def autos(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of every "auto" in a config."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from autos(part, f"{path}.{key}" if path else key)
    elif value == AUTO:
        yield path
