"""Forecasts of made hourly series with a daily and a weekly rhythm: a Transformer over days, which gives a band.

    python examples/time_series.py           # needs matplotlib; takes seconds
    python examples/time_series.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 32    # the same loss
    python examples/time_series.py --help    # every option of the run

It ends with output/time_series/forecasts.png and a table of errors beside those of naive forecasts.
"""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import print as show
from rich.table import Table
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn

HOURS, DAYS, AHEAD, NOISE, QUANTILES = 24, 14, 2, 0.3, (0.1, 0.5, 0.9)
"""Of a day; days that are seen and that are asked; the noise's standard deviation; what is forecast of each hour."""
WEEK_AGO = slice((DAYS - 7) * HOURS, (DAYS - 7 + AHEAD) * HOURS)


class Forecaster(TrainModule):
    """A token for each day that is seen, and for each that is asked; quantiles by the pinball loss (Koenker, 1978).

    Args:
        width: features of a token.
        layers: of the Transformer.
    """

    item_name = "series"

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(HOURS, width), nn.Linear(width, HOURS * len(QUANTILES))
        self.place = nn.Parameter(0.1 * torch.randn(DAYS + AHEAD, width))
        kind: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(width, 4, 2 * width, **kind) for _ in range(layers)))

    def forward(self, past: Tensor) -> Tensor:
        """Forecast: (batch, DAYS * HOURS) to (batch, AHEAD * HOURS, quantiles)."""
        mean, scale = past.mean(1, keepdim=True), past.std(1, keepdim=True)
        days = self.read(((past - mean) / scale).unflatten(1, (DAYS, HOURS)))
        asked = days.new_zeros(len(past), AHEAD, days.shape[2])
        days = self.layers(torch.cat((days, asked), dim=1) + self.place)
        found = self.write(days[:, -AHEAD:]).view(len(past), AHEAD * HOURS, len(QUANTILES))
        return found * scale[..., None] + mean[..., None]

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        missed, levels = batch["future"][..., None] - outputs, outputs.new_tensor(QUANTILES)
        return torch.maximum(levels * missed, (levels - 1) * missed).mean()


def data(series: int = 4000, held_out: int = 500) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Series that each have a rhythm, a first weekday, a quieter weekend, a trend and a level of their own.

    Args:
        series, held_out: how many to learn from, and how many others that are forecast at the end.
    """
    draw, count = torch.Generator().manual_seed(0), series + held_out
    hour, wave = torch.arange((DAYS + AHEAD) * HOURS), torch.arange(1, 4)[:, None]
    size, start = torch.randn(count, 3, 1, generator=draw) / wave, torch.rand(count, 3, 1, generator=draw)
    daily = (size * torch.sin(2 * math.pi * (wave * hour / HOURS + start))).sum(1)
    is_weekend = (hour // HOURS + torch.randint(7, (count, 1), generator=draw)) % 7 >= 5
    trend, level = (torch.randn(count, 1, generator=draw) for _ in range(2))
    clean = daily * torch.where(is_weekend, 0.3, 1.0) + trend * hour / len(hour) + level
    noisy = clean + NOISE * torch.randn(clean.shape, generator=draw)
    past, future = noisy.split([DAYS * HOURS, AHEAD * HOURS], dim=1)
    return {"past": past[:series], "future": future[:series]}, {"past": past[series:], "future": future[series:]}


def draw(path: Path, past: Tensor, future: Tensor, found: Tensor) -> None:
    """Write a picture of four forecasts, each with what came before, what came, and what came a week ago."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    before, after = torch.arange(-3 * HOURS, AHEAD * HOURS).div(HOURS).split([3 * HOURS, AHEAD * HOURS])
    for series, axes in enumerate(figure.subplots(2, 2, sharex=True).flat):
        low, middle, high = found[series].T
        axes.axvline(0, color="lightgray", linewidth=1)
        axes.plot(before, past[series, -len(before) :], color="gray", linewidth=0.8, label="seen")
        axes.plot(after, past[series][WEEK_AGO], color="tab:orange", linewidth=1, label="a week ago")
        axes.plot(after, future[series], color="black", linewidth=1, label="what came")
        axes.fill_between(after, low, high, color="tab:blue", alpha=0.3, linewidth=0, label="8 of 10 are to be here")
        axes.plot(after, middle, color="tab:blue", linewidth=1.5, label="forecast")
        axes.set(xlabel="days from now")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=100)


ARGUMENTS = {
    "output_dir": "output/time_series", "num_train_epochs": 10, "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 500, "learning_rate": 3e-3, "warmup_steps": 0.1, "logging_strategy": "epoch",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
}  # fmt: skip


def main() -> None:
    """Train, forecast series that were held out, and compare."""
    run = configure(Forecaster, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    found = fit.predict(fit.eval_data).predictions
    if fit.strategy.is_main:
        past, future = fit.eval_data["past"], fit.eval_data["future"]
        table, yesterday = Table("forecast", "mean error"), past[:, -HOURS:].repeat(1, AHEAD)
        rows = {"as yesterday": yesterday, "as a week ago": past[:, WEEK_AGO], "this model": found[..., 1]}
        errors = {name: (forecast - future).abs().mean() for name, forecast in rows.items()}
        for name, error in {**errors, "all but the noise": NOISE * math.sqrt(2 / math.pi)}.items():
            table.add_row(name, f"{error:.4f}")
        show(table)
        inside, path = (found[..., 0] <= future) & (future <= found[..., 2]), Path(fit.args.output_dir, "forecasts.png")
        draw(path, past, future, found)
        print(f"in the band of 0.8: {inside.float().mean():.3f} of the hours; see {path}")


if __name__ == "__main__":
    main()
