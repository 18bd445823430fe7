"""Data, models, metrics and caches from elsewhere: read, or refused in one line."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import ATTACK, VALUES, as_text, damaged_bytes, damaged_json, read_or_refused

from arc.datasets import load_dataset
from arc.evidence.store import EvidenceStore, evidence_key, pack, planned_queries, sign
from arc.qwen import build_qwen
from arc.report.records import read_metrics
from arc.run.runlog import RunLog
from arc.tasks import DataSet, Pair, Task

GRID = [[0, 1, 2], [3, 0, 1]]
PAIR = {"input": GRID, "output": [[1]]}
TASK: dict[str, Any] = {"train": [PAIR, PAIR, PAIR], "test": [PAIR]}

# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------

TASKS = st.one_of(
    damaged_json(TASK).map(as_text),
    damaged_json({"abc": TASK, "def": TASK}).map(as_text),
    damaged_json([PAIR] * 4).map(as_text),
    damaged_bytes(as_text(TASK)),
    VALUES.map(as_text),
)
PLACES = (
    "task.json",
    "training/a.json",
    "evaluation/a.json",
    "Training/B.JSON",
    "corpus/Above/x.json",
    ".hidden/a.json",
)
SETS = st.dictionaries(st.sampled_from(PLACES), TASKS, min_size=1, max_size=3)


def judge(path: Path) -> None:
    found = read_or_refused(lambda: load_dataset(str(path)))
    assert found is None or isinstance(found, DataSet)


@ATTACK
@given(SETS)
def test_folders_of_data(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "data"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    judge(folder)
    judge(folder / next(iter(files)))


@ATTACK
@given(SETS, st.data())
def test_archives_of_data(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = tmp_path_factory.getbasetemp() / "data.zip"
    path.write_bytes(data.draw(st.one_of(st.just(packed.getvalue()), damaged_bytes(packed.getvalue()))))
    judge(path)


# --------------------------------------------------------------------------------------------------------------------
# a model's folder
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(cache_dir: Path) -> Path:
    """The folder of the built-in Qwen."""
    build_qwen("tiny", **PLAIN, cache_dir=cache_dir)
    return next(path for path in cache_dir.iterdir() if path.name.startswith("tiny-"))


PLAIN: dict[str, Any] = {"device_type": "cpu", "prompt_len": 2, "prompt_dim": 8, "max_context_tokens": 256, "seed": 0}


@ATTACK
@given(data=st.data())
def test_model_folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny, folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    if path.suffix == ".json" and len(content) < 20_000 and data.draw(st.booleans()):
        changed = as_text(data.draw(damaged_json(json.loads(content))))
    elif data.draw(st.integers(0, 9)) == 0:
        path.unlink()
        changed = None
    else:
        head = data.draw(damaged_bytes(content[:4000]))  # where lengths, types and names are
        changed = head + content[4000:]
    if changed is not None:
        path.write_bytes(changed)
    read_or_refused(lambda: build_qwen(str(folder), **PLAIN, cache_dir=folder.parent))


# --------------------------------------------------------------------------------------------------------------------
# metrics
# --------------------------------------------------------------------------------------------------------------------

ROW = {"step": 3, "epoch": 0, "loss": 0.5, "reward": -0.1, "queries": 8, "samples_per_s": 3.0, "batch": 4}
LINES = st.one_of(
    st.just(as_text(ROW)),
    damaged_json(ROW).map(as_text),
    damaged_bytes(as_text(ROW)),
    VALUES.map(as_text),
    st.binary(max_size=9),
)


@ATTACK
@given(st.lists(LINES, max_size=5), st.integers(0, 6), st.booleans())
def test_rows_of_metrics(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rows: int, ended: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" * ended)
    read_metrics(folder / "metrics.jsonl")
    log = RunLog(quiet=True)
    log.open(folder, rows=rows)
    log.metrics({"step": 9})
    log.close()
    assert json.loads((folder / "metrics.jsonl").read_text(errors="replace").splitlines()[-1]) == {"step": 9}
    read_metrics(folder / "metrics.jsonl")


# --------------------------------------------------------------------------------------------------------------------
# cached evidence, with the digest that it should have
# --------------------------------------------------------------------------------------------------------------------


def small_task() -> Task:
    grids = [np.array(GRID, np.uint8), np.array([[2, 1], [0, 3]], np.uint8)]
    return Task("small", tuple(Pair(grid, np.fliplr(grid)) for grid in grids), (Pair(grids[0], None),))


@pytest.fixture(scope="module")
def known() -> tuple[Task, EvidenceStore]:
    store = EvidenceStore(None)
    store.get(small_task())
    return small_task(), store


@ATTACK
@given(data=st.data())
def test_cached_evidence(
    known: tuple[Task, EvidenceStore], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    task, computed = known
    arrays = {name: array.copy() for name, array in computed.get(task).to_arrays().items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    flat = arrays[name].reshape(-1)
    for _ in range(data.draw(st.integers(0, 3))):
        value = data.draw(st.sampled_from([0, 1, 9, 10, 39, 40, 255, -1, 0.5, np.nan, np.inf, -np.inf]))
        with np.errstate(all="ignore"):
            flat[data.draw(st.integers(0, len(flat) - 1))] = np.array(value).astype(flat.dtype)
    content = pack(arrays)
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    folder = tmp_path_factory.getbasetemp() / "evidence"
    shutil.rmtree(folder, ignore_errors=True)
    store, key = EvidenceStore(folder), evidence_key(task)
    path = store._path(key)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_bytes(sign(key, content) + content)
    found = store.get(task)
    for query in planned_queries(len(task.train), len(task.test), 1):
        held_out, number, without = query
        evidence = found.test(number) if held_out < 0 else found.held_out(held_out, None if without < 0 else without)
        assert np.isfinite(evidence.weights()).all() and evidence.codes.max(initial=0) < 40
        assert not np.isnan(evidence.rule_logits).any() and all(1 <= side <= 30 for side in evidence.size)
