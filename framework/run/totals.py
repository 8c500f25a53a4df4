"""A run's numbers: the means of each log, and the totals at the end."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..measures.averages import Averages
from ..measures.exact_sums import ExactSum
from ..measures.flops import device_name, peak_flops
from ..state import TrainState
from .stepping import Stepping, TurnStepping


class Totals:
    """Adds up what a run does, from the moment this object is made.

    Args:
        args: of the run.
        state: holds the sums over the whole run, those before a resume included.
        averages: what updates noted since the last log.
        strategy: of the run.
    """

    def __init__(self, args: FitArguments, state: TrainState, averages: Averages, strategy: Strategy) -> None:
        self.args, self.state, self.averages, self.strategy = args, state, averages, strategy
        self.began = time.perf_counter()
        # What a checkpoint holds of counts between two logs is counted already.
        items, tokens = averages.counts_settled
        self.first = replace(
            state, items_seen=state.items_seen + items, num_input_tokens_seen=state.num_input_tokens_seen + tokens
        )
        self.logged_at, self.tokens_logged = self.began, self.first.num_input_tokens_seen

    def take_means(self) -> dict[str, float] | None:
        """Take the means over the updates since the last log, and add these to the sums over the run. None where no
        update was made; without a loss where none of them had an item that counts.

        Losses that aren't finite are left out of means and counted (``logging_nan_inf_filter``), or make the mean
        theirs.
        """
        taken, items, tokens = self.averages.take()
        state, filters = self.state, self.args.logging_nan_inf_filter
        losses = taken.get("loss", ExactSum())
        state.count(losses.total, losses.count, items, tokens)
        if not taken:
            return None
        means = {name: sums.mean(only_finite=filters) for name, sums in taken.items() if sums.count + sums.nonfinite}
        if losses.nonfinite and filters:
            means["nonfinite_losses"] = losses.nonfinite
        return means

    def training_log(self, steppings: Mapping[str, Stepping]) -> dict[str, float]:
        """The numbers of a training log; empty where no update was made since the last one.

        Args:
            steppings: of the run; see ``Run``.
        """
        state = self.state
        logs = self.take_means()
        if logs is None:
            return {}
        for turn, stepping in steppings.items():
            of_turn = f"_{turn}" if turn else ""
            if stepping.grad_norm is not None:
                logs[f"grad_norm{of_turn}"] = stepping.grad_norm.item()
            logs[f"learning_rate{of_turn}"] = float(stepping.learning_rate if turn else state.learning_rate)
            if isinstance(stepping, TurnStepping) and stepping.skipped:
                logs[f"skipped_updates{of_turn}"] = stepping.skipped
        logs |= self.strategy.precision.log_values()
        if state.skipped_updates:
            logs["skipped_updates"] = state.skipped_updates
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        if self.args.include_tokens_per_second:
            now, tokens = time.perf_counter(), state.num_input_tokens_seen
            logs["tokens_per_second"] = (tokens - self.tokens_logged) / (now - self.logged_at)
            self.logged_at, self.tokens_logged = now, tokens
        return logs

    def final_metrics(self, samples: int, flops_per_token: float) -> dict[str, float]:
        """What was done since this object was made; a resumed run's earlier part is left out of rates.

        Args:
            samples: that this run handed out.
            flops_per_token: operations of forward and backward for a token, or an item where none are counted.
        """
        self.take_means()
        state, seconds = self.state, time.perf_counter() - self.began
        items = state.items_seen - self.first.items_seen
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": samples / seconds,
            "train_steps_per_second": (state.global_step - self.first.global_step) / seconds,
            "train_items_per_second": items / seconds,
        }
        tokens = state.num_input_tokens_seen - self.first.num_input_tokens_seen
        if tokens:
            metrics["train_tokens_per_second"] = tokens / seconds
        flops = flops_per_token * (tokens or items)
        metrics["total_flos"] = flops
        if (peak := peak_flops(device_name(self.strategy.device))) is not None:
            metrics["mfu"] = flops / seconds / (peak * self.strategy.world_size)
        count = state.train_loss_count
        metrics["train_loss"] = state.train_loss_sum / count if count else math.nan
        return metrics
