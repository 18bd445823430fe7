"""What a run says of itself: the rows and lines of batches and epochs, and the red flags.

Nothing here decides anything for the training but to stop under --strict.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arc.run.budget import Budget
from arc.run.files import UserError
from arc.run.runlog import RunLog

RULE = "=" * 70
MOST_STEPS = 10**9 - 1  # that a checkpoint can be named after
MOST = 2**53  # of anything else that is counted: floats and event files hold it exactly
SUMMED = ("loss", "reward", "solved", "vote_solved", "mask_ratio", "cells", "cells_processed", "qwen_grad")


@dataclass
class TrainState:
    """Where the run is. Every field is in each checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch whose optimizer step is done
    step: int = 0  # batches of the whole run whose optimizer step is done
    updates: int = 0  # optimizer steps made
    skipped_steps: int = 0  # optimizer steps skipped for non-finite gradients
    queries: int = 0  # queries trained on
    trained: bool = False  # this epoch's batches are done, its summary and validation are not
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch, for its summary
    memory_updates: int = 0  # of this epoch
    memory_offers: int = 0
    accuracy_delta: float = math.nan  # of the last validation
    val_accuracy: float = math.nan

    @property
    def trained_epoch(self) -> int:
        """The epoch that was trained last; between two epochs the state is at the beginning of the next."""
        return max(0, self.epoch - (self.batch == 0 and not self.trained))

    def load(self, saved: object) -> None:
        """Take over what a checkpoint holds; UserError for what no run has written."""
        fields = dataclasses.asdict(self)
        if not isinstance(saved, dict) or saved.keys() != fields.keys():
            raise UserError("--resume: the checkpoint's state is not that of a training of this version")
        for name, value in saved.items():
            kind = type(fields[name])
            fits = type(value) is not int or -1 < value <= (MOST_STEPS if name == "step" else MOST)
            value = float(value) if kind is float and type(value) is int and fits else value
            sums = value.values() if isinstance(value, dict) else ()
            if type(value) is not kind or not fits or not all(type(each) is float for each in sums):
                raise UserError(f"--resume: the checkpoint's state {name} is {str(value)[:80]!r}")
            setattr(self, name, value)

    def forget_validation(self) -> None:
        """As before the first validation."""
        self.val_accuracy = self.accuracy_delta = math.nan

    def count(self, row: Mapping[str, Any]) -> None:
        """Take in the row of a batch whose optimizer step is done."""
        self.batch, self.step = self.batch + 1, self.step + 1
        self.queries += row["queries"]
        self.memory_updates += row["stored"]
        self.memory_offers += row["offers"]
        values = {**{key: row[key] for key in SUMMED}, "batches": 1.0, "reward_square": row["reward"] ** 2}
        for key, value in values.items():
            if math.isfinite(value):
                self.sums[key] = self.sums.get(key, 0.0) + value
            else:  # left out of the mean, which is over the others
                self.sums[f"{key}.missing"] = self.sums.get(f"{key}.missing", 0.0) + 1

    def means(self) -> dict[str, float]:
        """Means over this epoch's batches, non-finite values left out; NaN where there is none."""
        batches = max(1.0, self.sums.get("batches", 0.0))
        means = {k: v / max(1.0, batches - self.sums.get(f"{k}.missing", 0.0)) for k, v in self.sums.items()}
        return {**dict.fromkeys(SUMMED, math.nan), **means}

    def next_epoch(self) -> None:
        """The epoch is over, with everything that belongs to it."""
        self.epoch, self.batch, self.trained, self.sums = self.epoch + 1, 0, False, {}
        self.memory_updates = self.memory_offers = 0


# --------------------------------------------------------------------------------------------------------------------
# red flags
# --------------------------------------------------------------------------------------------------------------------


class RedFlag(RuntimeError):
    """A red flag under --strict: the run saves and stops with exit code 3."""


class Records:
    """What is written down of batches whose optimizer step is done: state, speed, metrics, log lines, and the seed's
    red flags, each kind of which is named once, and under --strict stops the run."""

    def __init__(self, log: RunLog, state: TrainState, budget: Budget, *, strict: bool, log_every: int) -> None:
        self.log, self.state, self.budget, self.strict, self.log_every = log, state, budget, strict, log_every
        self.raised: set[str] = set()

    def add(self, rows: Sequence[dict[str, Any]], took: float, computing: float) -> None:
        """Take in the rows of the batches of an optimizer step. took: seconds a batch, with the wait for its data, of
        which the step itself took `computing`."""
        for row in rows:
            self.state.count(row)
            self.budget.measure(computing / max(1, row["cells_processed"]))
            row |= {"batch": self.state.batch, "samples_per_s": round(row["queries"] / took, 2)}
            self.log.metrics({"step": self.state.step, "epoch": self.state.epoch, **row})
            if row["batch"] % self.log_every == 0:
                self.log(batch_line(row))
        for row in rows:
            self.check_batch(row)

    def sound(self, name: str, message: str) -> None:
        """Warn once for each kind of flag; under --strict stop the run (it is saved first)."""
        if name not in self.raised:
            self.raised.add(name)
            self.log(f"RED FLAG: {message}")
            if self.strict:
                raise RedFlag(message)

    def check_batch(self, row: Mapping[str, Any]) -> None:
        """After each optimizer step, for each of its batches."""
        if row["qwen_grad"] == 0.0:
            self.sound("qwen", "Qwen_grad: 0.00e+00, Qwen is not training (FIX #1)")
        if row["qwen_missing"]:
            self.sound("missing", f"{row['qwen_missing']} tensors of Qwen get no gradient, these do not train (FIX #1)")
        if row["mask_ratio"] < 1e-3 and row["solved"] < 0.5:
            ratio = f"Mask_ratio: {row['mask_ratio']:.4f}"
            self.sound("mask", f"{ratio} with few queries solved, the mask is broken (FIX #3)")
        if not math.isfinite(row["loss"]):
            self.sound("loss", "Loss is not finite, numerical instability (FIX #7)")
        if row["prompt_spread"] < 1e-3:
            self.sound("prompt", "all tasks get the same prompt, it has collapsed (FIX #6, prompt consistency)")

    def check_weights(self, modules: Sequence[torch.nn.Module]) -> None:
        """Before anything is predicted."""
        every = (value for module in modules for value in itertools.chain(module.parameters(), module.buffers()))
        weights = [value.detach() for value in every if value.is_floating_point()]
        if not bool(torch.stack([torch.isfinite(value).all().cpu() for value in weights]).all()):
            self.sound(
                "weights",
                "weights are not finite, so all answers are the evidence's (FIX #7); --resume best goes on from a time "
                "when they may have been, a new run wants lower learning rates",
            )

    def check_epoch(self) -> None:
        """At the end of an epoch's batches."""
        mean = self.state.means()
        reward, count = mean.get("reward", 0.0), max(1.0, self.state.sums.get("batches", 0.0))
        spread = math.sqrt(max(0.0, mean.get("reward_square", 0.0) - reward**2) / count)
        if reward + 2 * spread < 0:  # below 0 by more than chance
            self.sound(
                "reward",
                f"Average RL Reward {reward:+.4f} below 0 for a whole epoch: refinement makes predictions worse "
                "(FIX #6, reward signs; or --policy_lr too high)",
            )


# --------------------------------------------------------------------------------------------------------------------
# lines and rows
# --------------------------------------------------------------------------------------------------------------------


def batch_line(row: Mapping[str, Any]) -> str:
    """The seed's line of a batch."""
    return (
        f"[Batch {row['batch']:4d}] Reward: {row['reward']:+.4f} | Loss: {row['loss']:.4f} | "
        f"Qwen_grad: {row['qwen_grad']:.2e} | Mask_ratio: {row['mask_ratio']:.4f}"
    )


def summary_lines(state: TrainState, title: str, size_weight: float, threshold: float, entries: int) -> list[str]:
    """The seed's block at the end of an epoch's training, then what else is worth knowing."""
    mean = state.means()
    real = state.sums.get("cells", 0.0) / max(1.0, state.sums.get("cells_processed", 1.0))
    return [
        RULE,
        f"EPOCH {state.epoch} SUMMARY ({title})",
        RULE,
        f"  Average Loss: {mean['loss']:.4f}",
        f"  Average RL Reward: {mean['reward']:+.4f}",
        f"  Qwen Gradient Norm: {mean['qwen_grad']:.2e} (FIX #1 - verifying Qwen trains)",
        f"  Size Warmup Weight: {size_weight:.3f} (FIX #4 - early emphasis on size)",
        f"  Memory Threshold: {threshold:.4f} (FIX #5 - dynamic threshold)",
        RULE,
        f"[Epoch {state.epoch}] Memory: {state.memory_updates} of {state.memory_offers} offers stored, "
        f"{entries} entries | training queries solved "
        f"{mean['solved']:.4f}, by the vote alone {mean['vote_solved']:.4f} | "
        f"cells processed that are real {real:.3f} | skipped steps {state.skipped_steps}",
    ]
