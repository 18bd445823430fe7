"""Settings that go together: what a flag stands for where nothing else is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arc.generate import GENERATED
from arc.splits import DEV_SPLITS

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

# --old: every fix turned back, and the seed's learning rates.
OLD: Mapping[str, Any] = {"ablate": tuple(range(1, 8)), "agent_lr": 1e-5, "qwen_lr": 5e-5}


def tiny_qwen_lr(data: str) -> float:
    """Learning rate of the tiny Qwen, which is random like the agent. On generated tasks all that the agent knows of a
    task is read by it, and it learns to read from nothing."""
    return 1e-3 if data == GENERATED else 3e-4


def expand(args: Any, chosen: set[str], given: set[str], config: Mapping[str, Any]) -> None:
    """Flags that stand for others, or decide their defaults, where those are not given. One that was chosen for this
    command is stronger than what a list of all flags (`config`) says of the others. chosen, given: as `Arguments.parse`
    returns them; what a list says of another model or other data is no longer given afterwards."""
    plain, drawn = type(args)(), args.data == GENERATED
    if "data" in chosen and (config.get("data", args.data) == GENERATED) != drawn:
        for name in (DRAWN.keys() | {"qwen_lr"}) - chosen:
            setattr(args, name, getattr(plain, name))
            given.discard(name)

    def settle(settings: Mapping[str, Any], explicit: set[str]) -> None:
        vars(args).update({name: value for name, value in settings.items() if name not in explicit})

    settle(RECIPES.get(args.recipe or "", {}), chosen if "recipe" in chosen else given)
    settle(DRAWN if drawn else {}, given)
    settle(OLD if args.old else {}, chosen if "old" in chosen else given)
    for one, other in (("adapt", "dev"), ("dev", "adapt")):  # which exclude each other
        if getattr(args, one) and one in chosen and other not in chosen:
            setattr(args, other, False)
    if drawn and not args.tasks and "task_latent" not in chosen:
        args.task_latent = False  # no task comes twice
    if "val_splits" not in (chosen if {"adapt", "dev"} & chosen else given):
        if args.adapt or args.dev:
            args.val_splits = DEV_SPLITS if args.dev else ("seed", "adapted")
        elif "adapted" in args.val_splits:  # the recipe's, without its --adapt
            args.val_splits = plain.val_splits
    if {"qwen", "qwen_tune"} & chosen and "qwen_lr" not in chosen and not args.old:
        args.qwen_lr = None  # the config's is that of another model
        given.discard("qwen_lr")
