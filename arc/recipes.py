"""Settings that go together: what a flag stands for where nothing else is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arc.generate import GENERATED

# --data generated: small grids, learned from nothing. Small batches of many contexts with few queries each, read cell
# by cell: what is slow to be learned is reading (benchmarks/RESULTS.md). A nearly right grid weighs no more than
# another, since at first none is nearly right.
DRAWN: Mapping[str, Any] = {
    "unseen": GENERATED,
    "adapt": False,  # under --recipe gpu too: what is validated is held apart by itself
    "val_splits": ("seed", "unseen", "families"),
    "val_views": 1,
    "augment": "none",
    "batch_size": 64,
    "agent_width": 64,
    "agent_heads": 8,
    "agent_blocks": 3,
    "agent_lr": 2e-3,
    "context_text": "cells",
    "grid_focus": 0.0,
    "feedback_pairs": 1,  # under --recipe gpu too
    "refined_views": 1,
    "w_size": 0.5,
    "recall": 16,
    "refine_steps": 5,
}

# --recipe gpu: an agent of tens of millions of parameters, trained on the demonstrations of both sets. Sizes are those
# of published systems of this kind. A batch is as large as 24 GiB should hold: on a card a step costs about the same
# whether it has 6,000 tokens or 60,000 (benchmarks/RESULTS.md), so more memory is worth a larger --max_cells.
GPU: Mapping[str, Any] = {
    "adapt": True,
    "val_splits": ("seed", "adapted"),
    "task_latent": True,
    "agent_width": 512,
    "agent_heads": 8,
    "agent_blocks": 8,
    "feedback_pairs": 2,
    "refined_views": 2,
    "agent_lr": 1e-3,
    "optimizer": "muon",
    "ema": 0.999,
    "augment": "full",
    "views": 8,
    "batch_size": 512,
    "max_cells": 24576,
    "amp": "auto",
    "epochs": 100,
    "val_every": 10,
    "val_views": 16,
    "qwen": "tiny",
}
RECIPES: Mapping[str, Mapping[str, Any]] = {"gpu": GPU}


def tiny_qwen_lr(data: str) -> float:
    """Learning rate of the tiny Qwen, which is random like the agent. On generated tasks all that the agent knows of a
    task is read by it, and it learns to read from nothing."""
    return 1e-3 if data == GENERATED else 3e-4
