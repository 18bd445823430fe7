"""`--time_budget`: how long the run may train, and until when it may predict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from arc.run.terminal import duration

# What a prediction costs in passes under one view, before and after refinement: a demonstration on which the agent is
# tried, one that chooses among prompts (for each of them), and one that gives feedback (backwards too). Fitted to
# validations on the machine that benchmarks/RESULTS.md names, as are the next two.
TRIAL_VIEWS, CHOICE_VIEWS, FEEDBACK_VIEWS = 0.2, 0.4, 0.5
VIEW_STEPS = 0.5  # a view in training steps of as many cells
EVIDENCE_SECONDS = 0.09  # to prepare one task on one core
SPLIT_SECONDS, PAIR_SECONDS = 2.0, 0.006  # whatever the agent's size: workers that start, batches, files
LEAVING = 0.02  # share of the budget that writing checkpoint, predictions and report takes, about


def part_of(deadline: float, part: float, whole: float) -> float:
    """The moment at which part / whole of the time from now to `deadline` (time.monotonic; inf: no limit) is over."""
    now = time.monotonic()
    return now + part / max(1, whole) * max(0.0, deadline - now) if math.isfinite(deadline) else deadline


@dataclass(frozen=True)
class PredictionCost:
    """What a prediction has to do: cells, in passes under one view, tasks whose evidence is still to be prepared,
    divided by the processes that prepare it, and the pairs of so many splits."""

    cells: float
    missing: float
    pairs: int = 0
    splits: int = 0

    def seconds(self, seconds_per_cell: float) -> float:
        """How long that takes where training takes `seconds_per_cell`."""
        fixed = SPLIT_SECONDS * self.splits + PAIR_SECONDS * self.pairs
        return VIEW_STEPS * self.cells * seconds_per_cell + EVIDENCE_SECONDS * self.missing + fixed


class Budget:
    """Seconds for the whole command (0: no limit), at least half of them for training.

    cost: what is to be predicted at the end, as it stands now. Training ends when what is left is needed for that;
    a prediction that turns out slower than expected ends at `deadline` with what it has reached by then.
    """

    def __init__(self, seconds: float, started: float, cost: Callable[[], PredictionCost]) -> None:
        self.seconds, self.started, self.cost = seconds, started, cost
        self.seconds_per_cell = 0.0  # of training, measured
        self.last_prediction = 0.0  # seconds that the last prediction of everything took, 0 before there was one
        self._reserve = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def deadline(self) -> float:
        """The moment (time.monotonic) at which predicting ends; inf without a limit."""
        return self.started + (1 - LEAVING) * self.seconds if self.seconds else math.inf

    def measure(self, seconds_per_cell: float) -> None:
        """Take a batch's speed into the running mean."""
        old = self.seconds_per_cell
        self.seconds_per_cell = 0.95 * old + 0.05 * seconds_per_cell if old else seconds_per_cell

    def reserve(self, step: int) -> float:
        """Seconds that predicting at the end needs, at most half of the budget. 0 until a speed is measured; looked at
        anew every 20 batches."""
        if not self.seconds or not self.seconds_per_cell:
            return 0.0
        if step % 20 == 0 or not self._reserve:
            predicting = max(self.cost().seconds(self.seconds_per_cell), self.last_prediction)
            needed = predicting + LEAVING * self.seconds
            self._reserve = min(needed, 0.5 * self.seconds)
        return self._reserve

    def share(self, step: int) -> float:
        """Share of the time for training that is over; 0 without a limit."""
        return self.elapsed() / max(1.0, self.seconds - self.reserve(step)) if self.seconds else 0.0

    def is_spent(self, step: int) -> bool:
        """Whether what is left of the time is needed for the prediction at the end."""
        return bool(self.seconds) and self.elapsed() > self.seconds - self.reserve(step)

    def expectation(self, seconds_per_batch: float, batches: int, epochs: float, val_every: int) -> list[str]:
        """How long an epoch of `batches`, a validation and what is left (epochs) will take, at the speed of now."""
        epoch, predict = seconds_per_batch * batches, self.cost().seconds(self.seconds_per_cell)
        validations = math.ceil(epochs / val_every) if val_every else 1
        whole = f"{duration(epochs * epoch + validations * predict)} until all epochs are over"
        if self.seconds:
            whole += f", if --time_budget {self.seconds:g} s does not end it before"
        lines = [
            f"Expected time: about {duration(epoch)} an epoch ({batches} batches) and {duration(predict)} a "
            f"validation, {whole}"
        ]
        if self.seconds and predict > 0.5 * self.seconds:
            lines.append(
                "Half of --time_budget is kept for training, so the prediction at the end will not get to all "
                "views; fewer --val_views or a --val_limit make it complete"
            )
        return lines
