"""Forecasts of made hourly series with a daily and a weekly rhythm: a Transformer over days, which gives a band.

    python examples/time_series.py                                # needs matplotlib; takes seconds
    python examples/time_series.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 32    # the same loss
    python examples/time_series.py --help                         # every option of the run

It ends with a picture of forecasts, output/time_series/forecasts.png, and with a table of errors beside those of two
naive forecasts and of who knows all but the noise.
"""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn

HOURS, DAYS, AHEAD, NOISE = 24, 14, 2, 0.3
"""Of a day; of what is seen, of what is asked; and the noise's standard deviation."""
QUANTILES = 0.1, 0.5, 0.9
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
        self.read = nn.Linear(HOURS, width)
        self.place = nn.Parameter(0.1 * torch.randn(DAYS + AHEAD, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.write = nn.Linear(width, HOURS * len(QUANTILES))

    def forward(self, past: Tensor) -> Tensor:
        """Forecast: (batch, DAYS * HOURS) to (batch, AHEAD * HOURS, quantiles)."""
        mean, scale = past.mean(1, keepdim=True), past.std(1, keepdim=True)
        days = self.read(((past - mean) / scale).unflatten(1, (DAYS, HOURS)))
        days = torch.cat((days, days.new_zeros(len(past), AHEAD, days.shape[2])), dim=1) + self.place
        for layer in self.layers:
            days = layer(days)
        return self.write(days[:, -AHEAD:]).view(len(past), AHEAD * HOURS, -1) * scale[..., None] + mean[..., None]

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        missed = batch["future"][..., None] - outputs
        levels = outputs.new_tensor(QUANTILES)
        return torch.maximum(levels * missed, (levels - 1) * missed).mean()


def data(series: int = 4000, held_out: int = 500) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Series that each have a rhythm, a first weekday, a quieter weekend, a trend and a level of their own.

    Args:
        series: to learn from.
        held_out: others, that are forecast at the end.
    """
    draw, count = torch.Generator().manual_seed(0), series + held_out
    hour, wave = torch.arange((DAYS + AHEAD) * HOURS), torch.arange(1, 4)[:, None]
    size, start = torch.randn(count, 3, 1, generator=draw) / wave, torch.rand(count, 3, 1, generator=draw)
    daily = (size * torch.sin(2 * math.pi * (wave * hour / HOURS + start))).sum(1)
    is_weekend = (hour // HOURS + torch.randint(7, (count, 1), generator=draw)) % 7 >= 5
    trend, level = (torch.randn(count, 1, generator=draw) for _ in range(2))
    clean = daily * torch.where(is_weekend, 0.3, 1.0) + trend * hour / len(hour) + level
    noisy = clean + NOISE * torch.randn(clean.shape, generator=draw)
    parts = {"past": noisy[:, : -AHEAD * HOURS], "future": noisy[:, -AHEAD * HOURS :]}
    return {name: part[:series] for name, part in parts.items()}, {n: part[series:] for n, part in parts.items()}


def draw(path: Path, past: Tensor, future: Tensor, found: Tensor, days: int = 3) -> None:
    """Write a picture of four forecasts, each with what came before, what came, and what came a week ago."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    before, after = torch.arange(-days * HOURS, 0) / HOURS, torch.arange(AHEAD * HOURS) / HOURS
    for series, axes in enumerate(figure.subplots(2, 2, sharex=True).flat):
        low, middle, high = found[series].T
        axes.axvline(0, color="lightgray", linewidth=1)
        axes.plot(before, past[series, -len(before) :], color="gray", linewidth=0.8, label="seen")
        axes.plot(after, past[series][WEEK_AGO], color="tab:orange", linewidth=1, label="a week ago")
        axes.plot(after, future[series], color="black", linewidth=1, label="what came")
        axes.fill_between(after, low, high, color="tab:blue", alpha=0.3, linewidth=0, label="8 of 10 are to be here")
        axes.plot(after, middle, color="tab:blue", linewidth=1.5, label="forecast")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("days from now")
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
    found, held_out = fit.predict(fit.eval_data).predictions, fit.eval_data
    if fit.strategy.is_main:
        past, future = held_out["past"], held_out["future"]
        table, yesterday = Table("forecast", "mean error"), past[:, -HOURS:].repeat(1, AHEAD)
        rows = {"as yesterday": yesterday, "as a week ago": past[:, WEEK_AGO], "this model": found[..., 1]}
        for name, forecast in rows.items():
            table.add_row(name, f"{(forecast - future).abs().mean():.4f}")
        table.add_row("all but the noise", f"{NOISE * math.sqrt(2 / math.pi):.4f}")
        Console(width=80).print(table)
        inside = (found[..., 0] <= future) & (future <= found[..., 2])
        path = Path(fit.args.output_dir) / "forecasts.png"
        draw(path, past, future, found)
        print(f"in the band of 0.8: {inside.float().mean():.3f} of the hours; see {path}")


if __name__ == "__main__":
    main()
