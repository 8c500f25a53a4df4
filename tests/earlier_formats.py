"""The run whose checkpoints lie in tests/data/format-1 and format-2, and its continuation.

``python tests/earlier_formats.py format-2`` writes them, with the version that is there: those in the repository were
written by a version that knew no other format, and by the last one before the framework's core was rebuilt.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
FORMATS = ("format-1", "format-2")
SAVED_AT, LENGTH = 7, 16  # 7 updates of 8 samples of 43: in the middle of the second epoch


class Earlier(TrainModule):
    """A tied weight, buffers, dropout, and two parameter groups under AdamW."""

    def __init__(self, forward_updates_buffers: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6) if forward_updates_buffers else nn.LayerNorm(6)
        self.drop = nn.Dropout(0.25)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.head = nn.Linear(6, 1)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(x)))) + self.shift
        return self.head(self.third(torch.tanh(self.second(hidden))))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = outputs - batch["y"]
        return {"loss": error.square().mean(), "absolute_error": error.abs().mean()}

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.5 * args.learning_rate}]
        return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.8, 0.99), fused=True)


class LossesSeen(Callback):
    """Keeps the logged losses, and their sum as its state."""

    def __init__(self) -> None:
        self.total, self.logs = 0.0, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **context: Any) -> None:
        if "loss" in logs:
            self.total, self.logs = self.total + logs["loss"], self.logs + 1

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "logs": self.logs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.logs = state["total"], state["logs"]


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(43, 3, generator=generator)
    return [{"x": row, "y": row.sum().sin().reshape(1)} for row in x]


def train(output_dir: str, strategy: str, resume: str | None = None, **arguments: Any) -> dict[str, Any]:
    """The run, or what is left of it after a checkpoint: its logs and final numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    seen = LossesSeen()
    given: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": LENGTH,
        "per_device_train_batch_size": 4 if strategy == "single" else 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 3,
        "save_strategy": "no",
        "progress": False,
    }
    fit = Fit(
        Earlier(strategy == "single"),
        rows(),
        strategy=strategy,
        loggers=(),
        callbacks=[seen],
        **{**given, **arguments},
    )
    fit.train(resume_from_checkpoint=resume)
    wanted = ("step", "loss", "absolute_error", "learning_rate", "grad_norm", "epoch")
    state = fit.strategy.optimizer_state()
    return {
        "logs": [{key: log[key] for key in wanted if key in log} for log in fit.state.log_history if "loss" in log],
        "weights": {name: t.double().sum().item() for name, t in fit.strategy.model_state().items()},
        "second_moments": {name: entries["exp_avg_sq"].double().sum().item() for name, entries in state.items()},
        "losses_seen": seen.state_dict(),
        "items_seen": fit.state.items_seen,
    }


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on: also who made the processor, by which libraries choose their kernels."""
    made_by = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor" in line), "")
    vendor = made_by.partition(":")[2].strip()
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "vendor": vendor}


def assert_continues(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to the bit on a machine that adds as the one did that wrote the checkpoint; nearly so on any other."""
    exact = expected["machine"] == machine()
    for key, value in found.items():
        # Adam moves a weight whose gradient is nearly 0 (a bias before a norm) by the sign of rounding.
        nearly = 2e-2 if key in ("weights", "second_moments") else 1e-6
        assert_equal(value, expected[key], 0.0 if exact else nearly, key)


def assert_equal(found: Any, expected: Any, tolerance: float, at: str = "") -> None:
    """Compare JSON types; numbers within a relative tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_equal(found[key], expected[key], tolerance, f"{at}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, tolerance, f"{at}[{index}]")
    else:
        assert abs(found - expected) <= tolerance * max(1.0, abs(expected)), (at, found, expected)


def make(kept: Path, strategy: str, run: Any) -> None:
    """Write a checkpoint of the run and what comes after it, from the run that wasn't interrupted."""
    place = kept / strategy
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        expected = run(output_dir=directory, strategy=strategy, save_strategy="steps", save_steps=SAVED_AT)
        shutil.copytree(Path(directory) / f"checkpoint-{SAVED_AT}", place / f"checkpoint-{SAVED_AT}")
    text = json.dumps({"machine": machine(), **expected}, indent=1)
    (place / "continuation.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "distributed")]
    import earlier_formats
    from ranks import Ranks

    kept = DATA / sys.argv[1]
    make(kept, "single", earlier_formats.train)
    two = Ranks(2)
    make(kept, "ddp", lambda **options: two.run(earlier_formats.train, **options)[0])
    two.end()
