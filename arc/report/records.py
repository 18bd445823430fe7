"""What the report reads of a run's folder: metrics.jsonl, train.log, the galleries, config.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arc.report.gallery import Gallery, read_gallery
from arc.run.files import read_json

RED_FLAG = "RED FLAG: "
LARGEST = 3.4e38  # sums and spans of what is larger overflow
BATCH_KEYS = ("loss", "reward", "d_acc", "d_size", "d_color", "d_rev", "qwen_grad", "mask_ratio")


@dataclass
class Metrics:
    """metrics.jsonl, read once: the rows of batches as series by key, the other rows whole."""

    series: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    batches: int = 0
    unreadable: int = 0  # lines; a kill can tear the last one

    def of(self, key: str) -> list[tuple[float, float | None]]:
        return self.series.get(key, [])


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl line by line; a missing file is an empty one. Raises OSError."""
    found = Metrics()
    for line in _lines(path):
        try:
            row = json.loads(line)
            step = finite(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            step = None
        if step is None:
            found.unreadable += 1
            continue
        if "loss" not in row:
            found.epochs.append(row)
            continue
        found.batches += 1
        for key in BATCH_KEYS:
            found.series.setdefault(key, []).append((step, finite(row.get(key))))
    return found


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def finite(value: Any) -> float | None:
    """The value if it is a number that can be drawn: neither NaN nor so large that no float of 32 bits could be it."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= LARGEST else None


def red_flags(log_file: Path) -> list[tuple[str, int]]:
    """The red flags in train.log in the order they first fired, each with how often (once a command at most)."""
    fired = (line.strip()[len(RED_FLAG) :] for line in _lines(log_file) if line.startswith(RED_FLAG))
    return list(Counter(fired).items())


def read_galleries(folder: Path) -> list[Gallery]:
    """The galleries of a run: first those of its --val_splits, then others by name. ValueError if one of the files is
    damaged."""
    config = folder / "config.json"
    flags = read_json(config) if config.is_file() else {}
    validated = flags.get("val_splits", []) if isinstance(flags, dict) else []
    galleries = [read_gallery(path) for path in sorted(folder.glob("gallery-*.json"))]
    order = [str(name) for name in validated] if isinstance(validated, list) else []
    return sorted(galleries, key=lambda g: order.index(g.split) if g.split in order else len(order))


def read_flags(folder: Path) -> list[tuple[str, str]] | None:
    """config.json as (flag, its value in JSON); None if it is not there. ValueError if it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not an object of flags")
    return [(name, json.dumps(value)) for name, value in config.items()]
