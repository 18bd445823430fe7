"""model_persistence.py in ordinary use: what goes in comes out, which checkpoints stay, who may write, the commands."""

from __future__ import annotations

import calendar
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from arc.persistence import runs, snapshot
from arc.persistence.files import FileSpec, _parse_header, memory_available, read_safetensors
from arc.persistence.folder import RunFolder
from arc.persistence.lock import RunLock
from arc.persistence.manifest import MAX_MANIFEST_BYTES, read_manifest, seal
from arc.persistence.names import MAX_DEPTH, Corrupt
from arc.persistence.runs import human
from arc.persistence.tree import dump_json
from benchmarks.persistence import fail_at, fill, hooked, left_overs, make_frozen, make_state, quiet, same
from model_persistence import ModelPersistence, PersistenceError, find_newest_run, main, setup_drive_backup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


@pytest.fixture
def persistence(run: Path) -> Iterator[ModelPersistence]:
    with ModelPersistence(run, log=quiet) as opened:
        yield opened


def round_trip(folder: Path, extra: Any, background: bool = True) -> Any:
    """`extra` saved and loaded as the tree of that group."""
    with ModelPersistence(folder, log=quiet, background=background) as persistence:
        persistence.save({"extra": extra}, step=1, wait=True)
        return persistence.load().state["extra"]


# --------------------------------------------------------------------------------------------------------------------
# what goes in comes out
# --------------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]
NUMPY_TYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits in any dtype and shape (0-dim and empty too), contiguous or seen through a transpose or a step."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if size else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if tensor.dim() and draw(st.booleans()):
        return tensor.transpose(0, -1)
    return tensor[::2] if tensor.dim() and draw(st.booleans()) else tensor


def arrays() -> st.SearchStrategy[np.ndarray]:
    def make(kind: str, shape: list[int], seed: int, fortran: bool) -> np.ndarray:
        raw = np.random.default_rng(seed).integers(0, 2, size=shape)
        return np.asarray(raw.astype(kind), order="F" if fortran else "C")

    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(make, st.sampled_from(NUMPY_TYPES), shapes, st.integers(0, 99), st.booleans())


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), tensors(), arrays(),
    st.floats(width=32).map(np.float32), st.booleans().map(np.bool_),
)  # fmt: skip
AWKWARD_KEYS = ["0", "a/b", "__metadata__", "", "~2", "T"]
KEYS = st.one_of(st.text(max_size=6), st.integers(-3, 300), st.sampled_from(AWKWARD_KEYS))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("background", [False, True])
def test_any_tree_comes_back_bit_for_bit(run: Path, background: bool) -> None:
    with ModelPersistence(run, log=quiet, keep=1, background=background) as persistence:

        @settings(max_examples=100)
        @given(tree=TREES)
        def check(tree: Any) -> None:
            state = {"model": {"a": tree}, "optim": [tree], "extra": tree}
            persistence.save(state, step=1)
            assert same(persistence.load().state, state)

        check()


def test_what_is_given_away_is_written_as_it_is(run: Path) -> None:
    weight = torch.randn(50, 20)
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save({"model": {"a": {"w": weight}}, "extra": {"epoch": 1}}, step=1, given=True)
        persistence.wait()
        assert torch.equal(persistence.load("latest").state["model"]["a"]["w"], weight)


def test_a_background_save_is_the_same_as_a_foreground_one(tmp_path: Path) -> None:
    state = make_state(3)
    for background in (True, False):
        with ModelPersistence(tmp_path / str(background), log=quiet, background=background) as persistence:
            persistence.save(state, step=3, metrics={"accuracy_delta": math.nan}, frozen=make_frozen(), wait=True)
    for name in ("model", "optim", "extra", "frozen"):
        files = [tmp_path / str(b) / "step-000000003" / f"{name}.safetensors" for b in (True, False)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_optimizer_and_random_states_survive(run: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optim": optimizer.state_dict(), "np": np.random.get_state(), "py": random.getstate()}
    state["torch"] = torch.get_rng_state()
    back = round_trip(run, state)
    assert same(back, state)
    optimizer.load_state_dict(back["optim"])
    np.random.set_state(back["np"])
    random.setstate(back["py"])


def test_an_ordered_dict_comes_back_as_a_dict(run: Path) -> None:
    model = torch.nn.Linear(2, 2)
    assert isinstance(model.state_dict(), OrderedDict)
    back = round_trip(run, model.state_dict())
    assert type(back) is dict and list(back) == ["weight", "bias"]
    model.load_state_dict(back)


def test_tied_tensors_are_stored_once_and_come_back_tied(run: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(100, 100))
    array = np.arange(1000.0)
    state = {"model": {"a": {"w": weight}, "b": {"w": weight.detach()}}, "extra": {"w": weight, "x": array, "y": array}}
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(state, step=1, wait=True)
        checkpoint = persistence.load()
    model, extra = checkpoint.state["model"], checkpoint.state["extra"]
    assert model["a"]["w"] is model["b"]["w"] is extra["w"] and extra["x"] is extra["y"]
    assert checkpoint.manifest["aliases"] == {
        "model/b/w": "model/a/w", "extra/w": "model/a/w", "extra/y": "extra/x"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors")) < 40_000 + 8_000 + 1_000


def test_equal_or_overlapping_tensors_are_not_tied(run: Path) -> None:
    base = torch.arange(6.0)
    tree = [base, base.clone(), base[:3], base[3:], base.view(2, 3), base.view(2, 3).t(), torch.empty(0)]
    tree.append(torch.empty(0))
    wave = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    tree += [wave, wave.conj(), wave.imag, wave.conj().imag]  # views of the same bytes that read them differently
    back = round_trip(run, tree)
    assert same(back, tree)
    assert len({id(tensor) for tensor in back}) == len(tree)
    assert len({tensor.data_ptr() for tensor in back[:6]}) == 6


def test_a_save_is_a_snapshot(run: Path) -> None:
    weight, numbers = torch.zeros(200_000), [1, 2]
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save({"model": {"a": weight}, "extra": numbers}, step=1)
        weight.fill_(1.0)
        numbers.append(3)
        checkpoint = persistence.load()
    assert not checkpoint.state["model"]["a"].any() and checkpoint.state["extra"] == [1, 2]


def test_host_buffers_are_reused(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        places = []
        for step, size in enumerate((1000, 1000, 400, 1000)):
            persistence.save({"model": {"w": torch.full((size,), float(step))}}, step=step, wait=True)
            places.append(persistence._stager.buffers["model"].data_ptr())
            assert persistence.load().state["model"]["w"].tolist() == [float(step)] * size
    assert len(set(places)) == 1


def test_without_memory_for_a_copy_the_save_waits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "memory_available", lambda: 10)
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        persistence.save(make_state(1), step=1)
        assert not persistence._writer.busy
        assert same(persistence.load().state, make_state(1))
    assert any("training waits" in line for line in lines)


class Odd:
    pass


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": [1, Odd()]}, "extra/a/1"),
        ({"a": {1.5: 1}}, "extra/a"),
        ({True: 1}, "extra"),
        ({"s": {1, 2}}, "extra/s"),
        ({"b": b"x"}, "extra/b"),
        ({"f": len}, "extra/f"),
        ({"t": torch.zeros(2).to_sparse()}, "extra/t"),
        ({"m": torch.zeros(2, device="meta")}, "extra/m"),
        ({"z": torch.zeros(2, dtype=torch.complex128)}, "extra/z"),
        ({"o": np.array(["x"], dtype=object)}, "extra/o"),
        ({"u": np.array(["x"])}, "extra/u"),
        ({"e": np.zeros(2, dtype=">f4")}, "extra/e"),
        ({"n": np.ma.masked_array([1, 2], [False, True])}, "extra/n"),
        ({"i": 1 << 5000}, "extra/i"),
        ({"size": torch.Size([1])}, "extra/size"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(
    run: Path, persistence: ModelPersistence, tree: Any, place: str
) -> None:
    with pytest.raises(PersistenceError, match=rf"^state: {place} is ") as caught:
        persistence.save({"extra": tree}, step=1)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(run)) == ["LOCK"]


def test_numbers_that_belong_in_a_tensor_are_refused(persistence: ModelPersistence, run: Path) -> None:
    text = "x" * 2**20
    with pytest.raises(
        PersistenceError, match=r": state: .* takes [\d,]+ bytes of JSON .*; keep long lists of numbers"
    ):
        persistence.save({"extra": [text] * (MAX_MANIFEST_BYTES // len(text) + 1)}, step=1, wait=True)
    assert sorted(os.listdir(run)) == ["LOCK"]


@pytest.mark.parametrize(
    ("shape", "read"),
    [([1] * 64, True), ([1] * 65, False), ([-1, -1], False), ([1.0], False), ([True], False), ("1", False)],
)
def test_shapes_in_a_header(shape: Any, *, read: bool) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}).encode()
    if read:
        assert _parse_header(header, 1, "file") == [("x", torch.uint8, tuple(shape))]
    else:
        with pytest.raises(Corrupt, match="^file: broken header entry 'x'$"):
            _parse_header(header, 1, "file")


def test_an_empty_tensor_of_an_absurd_shape() -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [0, 1 << 44, 1 << 44], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(Corrupt, match="'x' has an absurd shape"):
        _parse_header(header, 0, "file")


def test_a_tree_that_contains_itself_is_refused(persistence: ModelPersistence) -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(PersistenceError, match="nested deeper"):
        persistence.save({"extra": tree}, step=1)


@pytest.mark.parametrize("state", [{}, {"weights": {}}, {"model": {}, "loss": 1.0}, [1]])
def test_unknown_groups_are_refused(persistence: ModelPersistence, state: Any) -> None:
    with pytest.raises(PersistenceError, match="model, optim, extra"):
        persistence.save(state, step=1)


@pytest.mark.parametrize("step", [-1, 10**9, 1.0, True, "3"])
def test_a_step_out_of_range_is_refused(persistence: ModelPersistence, step: Any) -> None:
    with pytest.raises(PersistenceError, match="^step: "):
        persistence.save(make_state(1), step=step)


def test_files_are_plain_safetensors_both_ways(run: Path, tmp_path: Path) -> None:
    state = make_state(5)
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(state, step=5, wait=True)
        path = persistence.latest()
    assert path is not None
    ours = load_file(path / "model.safetensors")
    assert same(ours["agent/weight"], state["model"]["agent"]["weight"])
    assert set(ours) == {"agent/weight", "agent/half", "agent/mask", "qwen/embed", "qwen/empty"}
    theirs = {"b": torch.randn(3).bfloat16(), "a": torch.tensor(7), "e": torch.empty(0, 2), "m": torch.ones(5).bool()}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "theirs.safetensors").read_bytes()
    spec = FileSpec(len(data), hashlib.sha256(data).hexdigest())
    read = read_safetensors(tmp_path / "theirs.safetensors", spec)
    assert same(dict(sorted(read.items())), dict(sorted(theirs.items())))


def test_the_manifest_is_strict_json(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save({"extra": [math.nan, -math.inf, -0.0, 1e300]}, step=1, metrics={"loss": math.nan}, wait=True)
        back = persistence.load()
    text = (run / "step-000000001" / "manifest.json").read_text("ascii")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the manifest"))
    assert same(back.state["extra"], [math.nan, -math.inf, -0.0, 1e300]) and math.isnan(back.metrics["loss"])


def test_estimate_bytes_is_what_a_checkpoint_takes(run: Path) -> None:
    state, frozen = make_state(1, 200), make_frozen(100)
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(state, step=1, frozen=frozen, wait=True)
    size = sum(path.stat().st_size for path in (run / "step-000000001").iterdir())
    assert 0 <= size - ModelPersistence.estimate_bytes(state, frozen) < 1000


# --------------------------------------------------------------------------------------------------------------------
# frozen tensors
# --------------------------------------------------------------------------------------------------------------------


def test_frozen_tensors_are_stored_once_and_survive_rotation(run: Path) -> None:
    weight = torch.randn(64, 64)
    frozen = {"qwen/embed": weight, "qwen/head": weight, "qwen/norm": torch.ones(3)}
    with ModelPersistence(run, keep=2, log=quiet) as persistence:
        for step in range(1, 6):
            persistence.save(make_state(step), step=step, frozen=frozen, wait=True)
        checkpoint = persistence.load()
    assert same(checkpoint.frozen, frozen) and "frozen" not in checkpoint.state
    assert checkpoint.frozen["qwen/embed"] is checkpoint.frozen["qwen/head"]
    (blob,) = (run / "blobs").iterdir()
    assert blob.stat().st_nlink == 3 and blob.stat().st_size < 17_000  # blobs/ and two checkpoints


def test_changed_frozen_tensors_are_noticed_and_the_old_ones_go(run: Path) -> None:
    frozen = {"q": torch.zeros(10)}
    with ModelPersistence(run, keep=1, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, frozen=frozen, wait=True)
        frozen["q"].add_(1)
        persistence.save(make_state(2), step=2, frozen=frozen, wait=True)
        assert persistence.load().frozen["q"].tolist() == [1.0] * 10
        assert len(list((run / "blobs").iterdir())) == 1
        persistence.save(make_state(3), step=3, wait=True)
        assert list((run / "blobs").iterdir()) == [] and persistence.load().frozen == {}


def test_a_damaged_blob_is_replaced_by_the_next_process(run: Path) -> None:
    fill(run, 1)
    (blob,) = (run / "blobs").iterdir()
    blob.write_bytes(bytes(blob.stat().st_size))
    with ModelPersistence(run, log=quiet) as persistence:
        with pytest.raises(PersistenceError, match="none of"):
            persistence.load()
        persistence.save(make_state(2), step=2, frozen=make_frozen(), wait=True)
        assert same(persistence.load().frozen, make_frozen())
        assert persistence.load(run / "step-000000001").step == 1  # by the new blob: its own link is damaged


def test_frozen_tensors_without_hard_links(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    fill(run, 7)
    with ModelPersistence(run, log=quiet) as persistence:
        assert same(persistence.load().frozen, make_frozen())
        best = persistence.load("best")
        assert best.step == 7 and same(best.state, make_state(7))
    assert not (run / "step-000000007" / "frozen.safetensors").exists() and len(list((run / "blobs").iterdir())) == 1


def test_frozen_must_be_tensors(persistence: ModelPersistence) -> None:
    with pytest.raises(PersistenceError, match="frozen/q is a int, not a tensor"):
        persistence.save(make_state(1), step=1, frozen={"q": 3})  # type: ignore[dict-item]


# --------------------------------------------------------------------------------------------------------------------
# which checkpoints there are
# --------------------------------------------------------------------------------------------------------------------


def test_saving_a_step_again_replaces_it(run: Path, persistence: ModelPersistence) -> None:
    for version in (1, 2):
        persistence.save(make_state(version), step=50, metrics={"accuracy_delta": version}, wait=True)
        assert same(persistence.load().state, make_state(version))
        assert same(persistence.load("best").state, make_state(version))
    assert sorted(os.listdir(run)) == ["LOCK", "best-accuracy_delta", "step-000000050"]


def test_ties_and_nan_keep_the_earlier_best(persistence: ModelPersistence) -> None:
    for step, value in enumerate([math.nan, 0.5, 0.5, math.nan, -math.inf, math.inf, 0.4]):
        persistence.save(make_state(step), step=step, metrics={"val_accuracy": value}, wait=True)
    assert persistence.load("best").step == 1
    assert persistence.best() is None and persistence.best("val_accuracy") is not None
    with pytest.raises(ValueError, match="loss"):
        persistence.best("loss")


def test_best_by_accuracy_delta_comes_before_best_by_validation(persistence: ModelPersistence) -> None:
    for step, (delta, accuracy) in enumerate([(0.1, 0.9), (0.3, 0.1), (0.2, 0.5)]):
        metrics = {"accuracy_delta": delta, "val_accuracy": accuracy}
        persistence.save(make_state(step), step=step, metrics=metrics, wait=True)
    assert persistence.load("best").step == 1
    assert persistence.load(persistence.best("val_accuracy") or "").step == 0


def test_without_a_best_the_latest_is_used_and_said(run: Path) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        persistence.save(make_state(1), step=1)
        assert persistence.load("best").step == 1
    assert any("no best checkpoint" in line for line in lines)


def test_after_going_back_the_new_branch_is_the_latest(run: Path) -> None:
    fill(run, 6)
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load(run / "step-000000003").step == 3
        persistence.save(make_state(104), step=4, metrics={"accuracy_delta": 0}, wait=True)
        assert same(persistence.load().state, make_state(104))
        persistence.save(make_state(105), step=5, metrics={"accuracy_delta": 0}, wait=True)
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load().step == 5 and persistence.load("best").step == 6
        for step in range(6, 9):
            persistence.save(make_state(100 + step), step=step, wait=True)
        assert same(persistence.load("best").state, make_state(6))
    assert sorted(path.name for path in run.glob("step-*")) == [f"step-{step:09d}" for step in range(4, 9)]


def test_a_best_that_a_kill_prevented_is_made_at_the_next_start(run: Path) -> None:
    fill(run, 3)
    for name in list(os.listdir(run / "best-accuracy_delta")):
        (run / "best-accuracy_delta" / name).unlink()
    (run / "best-accuracy_delta").rmdir()
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load(persistence.best() or "").step == 3


def test_corrupt_checkpoints_are_set_aside_by_name_and_kept(run: Path) -> None:
    fill(run, 3)
    (run / "step-000000003" / "optim.safetensors").write_bytes(b"")
    (run / "step-000000002" / "manifest.json").unlink()
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        assert persistence.load().step == 1
    assert sorted(name[:19] for name in os.listdir(run) if name.startswith(".bad-")) == [
        ".bad-step-000000002", ".bad-step-000000003"
    ]  # fmt: skip
    text = "\n".join(lines)
    assert "step-000000003 is corrupt (optim.safetensors has 0 bytes" in text
    assert "step-000000002 is corrupt (manifest.json is missing)" in text


def test_a_damaged_best_is_set_aside_under_all_its_names(run: Path) -> None:
    """Else its step, the same file, is made the best again at the next start, in place of the valid one."""
    with ModelPersistence(run, log=quiet) as persistence:
        for step, value in ((1, 0.9), (2, 0.5)):
            persistence.save(make_state(step), step=step, metrics={"val_accuracy": value}, wait=True)
        damaged = run / "best-val_accuracy" / "model.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        assert persistence.load("best").step == 2
        assert not (run / "step-000000001").exists() and len(list(run.glob(".bad-*"))) == 2
        for step, value in ((3, 0.8), (4, 0.1)):
            persistence.save(make_state(step), step=step, metrics={"val_accuracy": value}, wait=True)
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load("best").step == 3


def test_what_cannot_be_set_aside_is_said_in_one_line(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        (run / "step-000000001" / "model.safetensors").write_bytes(b"")

        def full(name: str, path: str, target: Any) -> None:
            if name == "rename" and ".bad-" in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        with hooked(full), pytest.raises(PersistenceError, match="step-000000001 is damaged and can't be set aside"):
            persistence.load()
        with pytest.raises(PersistenceError, match="none of 1 is valid"):
            persistence.load()
        assert len(list(run.glob(".bad-step-000000001-*"))) == 1


def test_what_cannot_be_deleted_yet_fails_no_save(run: Path) -> None:
    lines: list[str] = []

    def held_open(name: str, path: str, _: Any) -> None:
        if name == "rmdir" and ".tmp-discarded-" in path:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    with ModelPersistence(run, keep=1, log=lines.append) as persistence, hooked(held_open):
        for step in (1, 2):
            persistence.save(make_state(step), step=step, wait=True)
    assert any("can't be deleted yet" in line for line in lines) and list(run.glob(".tmp-discarded-*"))
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load().step == 2 and not list(run.glob(".tmp-*"))


def test_a_blobs_folder_that_is_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    victim, blob = tmp_path / "victim", f"sha256-{'a' * 64}.safetensors"
    (victim / ".tmp-precious").mkdir(parents=True)
    (victim / blob).write_bytes(b"not ours")
    run.mkdir(parents=True)
    (run / "blobs").symlink_to(victim)
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        with pytest.raises(PersistenceError, match="blobs is a link"):
            persistence.save(make_state(2), step=2, frozen=make_frozen(), wait=True)
        assert persistence.load().step == 1
    assert sorted(path.name for path in victim.iterdir()) == [".tmp-precious", blob]


def test_a_time_beyond_all_numbers_is_a_broken_manifest(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        for step in (1, 2):
            persistence.save(make_state(step), step=step, wait=True)
    body, _ = read_manifest(run / "step-000000002")
    (run / "step-000000002" / "manifest.json").write_bytes(seal({**body, "created": 10**400}))
    assert find_newest_run(run.parent) == run
    with ModelPersistence(run, log=quiet) as persistence:
        assert persistence.load().step == 1


def test_if_nothing_is_valid_that_is_an_error(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        with pytest.raises(PersistenceError, match="there is none yet"):
            persistence.load()
        persistence.save(make_state(1), step=1, wait=True)
        (run / "step-000000001" / "extra.safetensors").unlink()
        with pytest.raises(PersistenceError, match="none of 1 is valid"):
            persistence.load()


def test_an_explicit_path_is_loaded_or_refused(run: Path, tmp_path: Path) -> None:
    fill(run, 3)
    with ModelPersistence(tmp_path / "other", log=quiet) as persistence:
        assert persistence.load(run / "step-000000002").step == 2
        assert persistence.load(str(run / "best-accuracy_delta")).step == 3
        (run / "step-000000002" / "model.safetensors").write_bytes(b"x")
        with pytest.raises(PersistenceError, match=r"step-000000002 can't be loaded: model.safetensors has 1 bytes"):
            persistence.load(run / "step-000000002")
        for path in (tmp_path / "nowhere", run / "LOCK"):
            with pytest.raises(PersistenceError, match="not a checkpoint folder"):
                persistence.load(path)
        with pytest.raises(PersistenceError, match="manifest.json is missing"):
            persistence.load(run)
    assert (run / "step-000000002").is_dir()


def test_reading_only_changes_nothing(run: Path) -> None:
    fill(run, 3)
    (run / "step-000000003" / "optim.safetensors").write_bytes(b"")
    (run / ".tmp-000000004-x").mkdir()
    before = sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*"))
    with ModelPersistence(run, read_only=True, log=quiet) as reader:
        assert reader.load().step == 2 and reader.latest() == run / "step-000000002"
        assert {info.kind for info in reader.inspect()} == {"step", "best", "unfinished"}
        with pytest.raises(PersistenceError, match="read-only"):
            reader.save(make_state(1), step=1)
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(PersistenceError, match="not a folder"):
        ModelPersistence(run / "nowhere", read_only=True)


def test_the_newest_run_is_the_one_saved_last(tmp_path: Path) -> None:
    assert find_newest_run(tmp_path / "runs") is None
    for name in ("z", "a", "m"):
        fill(tmp_path / "runs" / name, 1)
    (tmp_path / "runs" / "zz_no_checkpoint").mkdir()
    (tmp_path / "runs" / "file").touch()
    assert find_newest_run(tmp_path / "runs") == tmp_path / "runs" / "m"
    fill(tmp_path / "runs" / "z", 2)
    assert find_newest_run(str(tmp_path / "runs")) == tmp_path / "runs" / "z"


def test_a_run_whose_checkpoints_are_all_damaged_is_the_oldest(tmp_path: Path) -> None:
    """It is not passed over in silence where there is no other; whoever resumes it is told what is wrong."""
    fill(tmp_path / "damaged", 1)
    for path in (tmp_path / "damaged").glob("*/manifest.json"):
        path.write_text("{")
    assert find_newest_run(tmp_path) == tmp_path / "damaged"
    fill(tmp_path / "a", 1)
    assert find_newest_run(tmp_path) == tmp_path / "a"


# --------------------------------------------------------------------------------------------------------------------
# errors of the background, locks
# --------------------------------------------------------------------------------------------------------------------


def test_an_error_in_the_background_surfaces_once_and_the_next_save_works(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        with hooked(fail_at(2, errno.EIO, under=str(run)), ("write",)):
            persistence.save(make_state(2), step=2)
            persistence._writer.join()
        with pytest.raises(PersistenceError, match=r"step 2 was not saved: .*Input/output error"):
            persistence.save(make_state(3), step=3)
        persistence.save(make_state(3), step=3, wait=True)
        assert persistence.load().step == 3
    assert left_overs(run) == []


@pytest.mark.parametrize("call", ["wait", "close", "load"])
def test_an_error_in_the_background_surfaces_at(run: Path, call: str) -> None:
    persistence = ModelPersistence(run, log=quiet)
    with hooked(fail_at(0, errno.ENOSPC, under=str(run)), ("mkdir",)):
        persistence.save(make_state(1), step=1)
        persistence._writer.join()
    with pytest.raises(PersistenceError, match="No space left"):
        getattr(persistence, call)()
    persistence.close()
    ModelPersistence(run, log=quiet).close()  # the lock is free


def test_an_error_on_its_way_is_not_replaced_by_that_of_closing(run: Path) -> None:
    lines: list[str] = []
    with pytest.raises(KeyError), ModelPersistence(run, log=lines.append) as persistence:
        with hooked(fail_at(0, errno.ENOSPC, under=str(run)), ("mkdir",)):
            persistence.save(make_state(1), step=1)
            persistence._writer.join()
        raise KeyError("the training's own error")
    assert any("was not saved" in line for line in lines)


def test_too_little_space_is_found_out_before_writing(
    run: Path, persistence: ModelPersistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    seen: list[str] = []
    with hooked(lambda name, path, _: seen.append(path)), pytest.raises(PersistenceError, match="MB free"):
        persistence.save(make_state(1), step=1, wait=True)
    assert [path for path in seen if path.startswith(str(run))] == []  # other threads may have work elsewhere


def test_a_disk_that_is_too_small_for_five_is_told_beforehand(
    persistence: ModelPersistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, frozen = make_state(1), make_frozen()
    one, once = ModelPersistence.estimate_bytes(state), ModelPersistence.estimate_bytes(state, frozen)
    blob = once - one
    few, between = (4 * one + blob, "use --keep 1;"), (7 * one + blob + one // 2, "use --keep 4;")
    exact = (7 * one + blob, "use --keep 4;")
    for free, advice in ((8 * one + blob, None), between, exact, few, (3 * one, "free some space")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        warning = persistence.space_warning(state, frozen)
        assert (warning is None) if advice is None else (warning is not None and advice in f"{warning};")


def test_what_is_still_to_come_is_counted(persistence: ModelPersistence, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(1)
    one = ModelPersistence.estimate_bytes(state)
    for growth, fits in ((0, True), (one, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 8 * one))
        assert (persistence.space_warning(state, growth=growth) is None) == fits
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 16 * one))
    assert persistence.space_warning(state, growth=one) is None


def test_each_metric_has_its_own_best(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, metrics={"accuracy_delta": math.nan, "val_accuracy": 0.5}, wait=True)
        assert [path.name for path in sorted(run.glob("best-*"))] == ["best-val_accuracy"]
        persistence.save(make_state(2), step=2, metrics={"accuracy_delta": 0.1, "val_accuracy": 0.25}, wait=True)
    with ModelPersistence(run, read_only=True, log=quiet) as reader:
        steps = {info.path.name: info.step for info in reader.inspect() if info.kind == "best"}
    assert steps == {"best-accuracy_delta": 2, "best-val_accuracy": 1}


def test_a_checkpoint_that_cannot_be_moved_in_leaves_the_one_before(run: Path) -> None:
    folder = RunFolder(run, quiet)
    (run / "there").mkdir(parents=True)
    (run / "there" / "file").write_text("kept")
    with pytest.raises(FileNotFoundError):
        folder.move_in(run / "nowhere", run / "there")
    assert os.listdir(run) == ["there"] and (run / "there" / "file").read_text() == "kept"


def test_a_log_that_cannot_be_written_fails_no_save(run: Path) -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with ModelPersistence(run, log=closed) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        assert persistence.load().step == 1


def test_frozen_tensors_that_were_cut_short_are_written_again(run: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(make_state(1), step=1, frozen=make_frozen(), wait=True)
        (blob,) = (run / "blobs").iterdir()
        os.truncate(blob, 10)
        persistence.save(make_state(2), step=2, frozen=make_frozen(), wait=True)
        loaded = persistence.load()
    assert loaded.step == 2 and same(dict(loaded.frozen), dict(make_frozen()))


def test_two_views_of_one_array_come_back_as_one(run: Path) -> None:
    numbers = np.arange(6)
    found = round_trip(run, {"a": numbers, "b": numbers[:], "c": numbers.copy(), "d": numbers[::2], "e": numbers[:3]})
    assert found["a"] is found["b"] and found["a"] is not found["c"]
    assert found["d"].tolist() == [0, 2, 4] and found["e"].tolist() == [0, 1, 2]


def test_manifests_are_compact_and_hold_finite_numbers() -> None:
    assert dump_json({"a": [1, 2.5, "\u00e9"]}) == b'{"a":[1,2.5,"\\u00e9"]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json(math.nan)


def test_memory_that_is_available() -> None:
    found = memory_available()
    assert found is not None and found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_without_a_best_checkpoint_the_latest_is_taken(run: Path) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        assert persistence.load("best").step == 1
    assert "[Checkpoint] no best checkpoint yet: using the latest" in lines


def test_as_deep_as_a_state_may_be_it_comes_back(run: Path) -> None:
    def nested(kind: type, depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = {"k": value} if kind is dict else kind([value])
        return value

    for kind in (list, tuple, dict):
        deepest = nested(kind, MAX_DEPTH - 1)
        assert same(round_trip(run / kind.__name__, deepest), deepest)
        with pytest.raises(PersistenceError, match=f"nested deeper than {MAX_DEPTH} levels"):
            round_trip(run / f"{kind.__name__}_deeper", nested(kind, MAX_DEPTH + 1))


def test_after_close_nothing_is_saved(run: Path) -> None:
    persistence = ModelPersistence(run, log=quiet)
    persistence.close()
    persistence.close()
    with pytest.raises(PersistenceError, match="after close"):
        persistence.save(make_state(1), step=1)


def test_a_second_writer_is_refused_until_the_first_has_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelPersistence(run, log=quiet) as first:
        first.save(make_state(1), step=1, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: pytest.fail("waits for a holder that lives"))
            with pytest.raises(PersistenceError, match=rf"{run} is in use .*process {os.getpid()}"):
                ModelPersistence(run, log=quiet)
        with ModelPersistence(run, read_only=True, log=quiet) as reader:
            assert reader.load().step == 1
        first.save(make_state(2), step=2, wait=True)
    with ModelPersistence(run, log=quiet) as second:
        assert second.load().step == 2


def test_a_lock_that_is_a_link_is_refused_and_its_target_untouched(run: Path, tmp_path: Path) -> None:
    run.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    for target in ("mine", "nowhere"):
        (run / "LOCK").symlink_to(tmp_path / target)
        with pytest.raises((PersistenceError, OSError)):
            ModelPersistence(run, log=quiet)
        (run / "LOCK").unlink()
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "nowhere").exists()


HOLDER = """
import os, sys, time
sys.path.insert(0, {root!r})
os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # ours comes after it: so long the lock outlives its holder
from model_persistence import ModelPersistence
persistence = ModelPersistence({run!r})
if os.fork() == 0:  # as a DataLoader worker, which may outlive its parent for a while
    time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free_even_if_its_workers_live_on(run: Path) -> None:
    script = HOLDER.format(root=str(ROOT), run=str(run))
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        with pytest.raises(PersistenceError, match=f"process {holder.pid} on"):
            ModelPersistence(run, log=quiet)
        holder.kill()
        holder.wait()
        ModelPersistence(run, log=quiet).close()
    finally:
        os.killpg(holder.pid, 9)
        holder.stdout.close()  # type: ignore[union-attr]


def test_a_forked_child_cannot_save(run: Path) -> None:
    from benchmarks.persistence import forked

    with ModelPersistence(run, log=quiet) as persistence:

        def child(pipe: int) -> None:
            try:
                persistence.save(make_state(1), step=1)
            except PersistenceError as error:
                os.write(pipe, str(error).encode())

        assert b"forked process" in forked(child)
        with pytest.raises(PersistenceError, match="in use"):  # the child did not free the parent's lock
            ModelPersistence(run, log=quiet)


def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def card(pid: int, host: str) -> str:
    return json.dumps({"pid": pid, "host": host, "since": 0, "id": "x"})


def test_without_flock_a_heartbeat_holds_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch)
    run.mkdir(parents=True)
    lock = run / "LOCK"
    lock.write_text(card(1, "another machine"))
    with pytest.raises(PersistenceError, match=r"process 1 on another machine, last seen \d+ s ago"):
        ModelPersistence(run, log=quiet)
    os.utime(lock, (0, time.time() - RunLock.STALE - 1))  # nobody has refreshed it
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        persistence.save(make_state(1), step=1, wait=True)
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert any("taking over" in line for line in lines) and lock.read_text() == ""


def test_without_flock_the_lock_of_a_dead_process_is_taken_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch)
    run.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / "LOCK").write_text(card(ended.pid, socket.gethostname()))
    ModelPersistence(run, log=quiet).close()
    (run / "LOCK").write_text(card(os.getppid(), socket.gethostname()))
    with pytest.raises(PersistenceError, match=f"process {os.getppid()} on"):
        ModelPersistence(run, log=quiet)


def test_a_heartbeat_is_refreshed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch)
    monkeypatch.setattr(RunLock, "HEARTBEAT", 0.02)
    with ModelPersistence(run, log=quiet):
        os.utime(run / "LOCK", (0, 0))
        deadline = time.monotonic() + 10
        while (run / "LOCK").stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (run / "LOCK").stat().st_mtime > 1


@pytest.mark.parametrize("blocker", ["file", "below a file"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, blocker: str) -> None:
    (tmp_path / "x").touch()
    target = tmp_path / "x" if blocker == "file" else tmp_path / "x" / "run"
    with pytest.raises(PersistenceError, match=f"^{target} can't be used: "):
        ModelPersistence(target, log=quiet)


def test_keep_must_be_positive(run: Path) -> None:
    with pytest.raises(ValueError, match="keep: 0"):
        ModelPersistence(run, keep=0)


# --------------------------------------------------------------------------------------------------------------------
# folders that may not be looked into
# --------------------------------------------------------------------------------------------------------------------


def forbid(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Nothing in these folders can be listed or reached; by intercepting the calls, since root may do anything."""

    def guarded(real: Any) -> Any:
        def call(path: Any = ".", *args: Any, **options: Any) -> Any:
            if isinstance(path, (str, os.PathLike)):
                place = Path(path).absolute()
                below = any(folder in place.parents for folder in folders)
                if below or (place in folders and real in (os_listdir, os_scandir)):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **options)

        return call

    os_listdir, os_scandir = os.listdir, os.scandir
    for name in ("listdir", "scandir", "open", "stat", "lstat"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


def test_a_run_that_may_not_be_listed_is_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(run, 1)
    fill(run.with_name("b"), 1)
    assert find_newest_run(run.parent) == run.with_name("b")
    forbid(monkeypatch, run.with_name("b"))
    assert find_newest_run(run.parent) == run


@pytest.mark.parametrize("read_only", [True, False])
def test_a_folder_that_may_not_be_listed_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, *, read_only: bool
) -> None:
    fill(run, 1)
    assert find_newest_run(run / "nowhere") is None and find_newest_run(run / "LOCK") is None
    forbid(monkeypatch, run)
    with pytest.raises(PersistenceError, match="can't be listed: Permission denied$"):
        find_newest_run(run)
    with pytest.raises(PersistenceError, match="Permission denied$"):
        ModelPersistence(run, log=quiet, read_only=read_only).load()
    with pytest.raises(PersistenceError, match="can't be loaded: Permission denied$"):
        ModelPersistence(run, log=quiet, read_only=True).load(run / "step-000000001")


def test_a_checkpoint_that_may_not_be_listed_is_inspected_with_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(run, 2)
    forbid(monkeypatch, run / "step-000000002")
    with ModelPersistence(run, log=quiet, read_only=True) as reader:
        problems = {info.path.name: info.problem for info in reader.inspect()}
        assert reader.load().step == 1
    assert problems.pop("step-000000002") and set(problems.values()) == {None}


# --------------------------------------------------------------------------------------------------------------------
# commands
# --------------------------------------------------------------------------------------------------------------------


def test_inspect_lists_and_verify_judges(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(run, 2)
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "best-accuracy_delta: ok", "step-000000001: ok", "step-000000002: ok"
    ]  # fmt: skip
    (run / "step-000000001" / "extra.safetensors").write_bytes(b"1")
    assert main(["verify", str(run)]) == 1
    assert "step-000000001: FAILED: extra.safetensors has 1 bytes" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "accuracy_delta=2" in lines[1] and " ok " in lines[1] and "FAILED" in lines[2]


def test_what_inspect_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = int(time.time())
    fill(run, 2)
    (run / "step-000000002" / "manifest.json").unlink()
    assert main(["inspect", str(run)]) == 0
    header, best, first, second, why = capsys.readouterr().out.splitlines()
    assert header == "checkpoint                    step       size  saved (UTC)          verified   metrics"
    name, step, number, unit, day, hour, verified, *metrics = first.split()
    assert (name, step, unit, verified, metrics) == ("step-000000001", "1", "kB", "ok", ["accuracy_delta=1"])
    tensors = [path for path in (run / name).iterdir() if path.suffix == ".safetensors"]
    assert float(number) == pytest.approx(sum(path.stat().st_size for path in tensors) / 1000, rel=0.25)
    saved = calendar.timegm(time.strptime(f"{day} {hour}", "%Y-%m-%d %H:%M:%S"))
    assert before <= saved <= time.time()
    size = sum(path.stat().st_size for path in (run / "step-000000002").iterdir())
    assert second.split() == ["step-000000002", "-", *human(size).split(), "-", "FAILED"]
    assert "manifest.json" in why and why.startswith(" " * 25)


def test_inspect_knows_what_is_no_checkpoint_any_more(run: Path) -> None:
    fill(run, 1)
    for name in (".bad-step-000000003-1", ".tmp-step-000000004-1", ".old-best-accuracy_delta-1", "tensorboard"):
        shutil.copytree(run / "step-000000001", run / name)
    with ModelPersistence(run, read_only=True, log=quiet) as reader:
        kinds = {info.path.name: info.kind for info in reader.inspect()}
    assert kinds == {
        "best-accuracy_delta": "best",
        "step-000000001": "step",
        ".bad-step-000000003-1": "quarantined",
        ".tmp-step-000000004-1": "unfinished",
        ".old-best-accuracy_delta-1": "unfinished",
    }


def test_sizes_for_people() -> None:
    sizes = (0, 999, 1000, 999_949, 2_500_000, 3e9, 4.5e12)
    assert [human(size) for size in sizes] == ["0 B", "999 B", "1.0 kB", "999.9 kB", "2.5 MB", "3.0 GB", "4.5 TB"]


def test_the_commands_describe_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["--help"], ["list checkpoints with step", "read every byte", "weights of the best model", "changes no run"]),
        (["export", "--help"], ["RUN DEST", "--base DIR", "run folder, of runs/ or of a backup", "folder to create"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        out = " ".join(capsys.readouterr().out.split())
        assert caught.value.code == 0 and all(text in out for text in expected)


def test_an_export_keeps_the_names_of_the_models(run: Path, tmp_path: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save({"model": {"Agent-2": {"w.Weight": torch.arange(3.0)}}}, step=1, wait=True)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Agent-2"]
    found = load_file(tmp_path / "out" / "Agent-2" / "model.safetensors")
    assert found.keys() == {"w.Weight"} and torch.equal(found["w.Weight"], torch.arange(3.0))


def test_one_checkpoint_is_exported(run: Path) -> None:
    """By its folder: the best by another metric, say."""
    fill(run, 2)
    for step in (1, 2):
        assert main(["export", str(run / f"step-{step:09d}"), str(run.parent / str(step))]) == 0
    one, two = (load_file(run.parent / name / "agent" / "model.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_what_is_no_folder_of_a_run_is_named(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of a run, and what a shell makes of a variable that is not set."""
    fill(run, 1)
    dest = [str(run.parent / "out")] if command == "export" else []
    if command != "export":
        assert main([command, str(run / "step-000000001"), *dest]) == 2
        err = capsys.readouterr().err
        assert err == f"{run}/step-000000001 is a checkpoint: give the folder of its run, {run}\n"
    with pytest.raises(SystemExit) as end:
        main([command, "", *dest])
    assert end.value.code == 2 and "names nothing" in capsys.readouterr().err


def test_an_export_is_not_written_over_anything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(run, 1)
    assert main(["export", str(run), str(run)]) == 2
    assert capsys.readouterr().err == f"{run} exists: give a new folder\n"


def test_commands_with_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"{tmp_path} holds no checkpoint\n"
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "there is none yet" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path)]) == 2
    for words in (["delete", str(tmp_path)], []):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert sorted(os.listdir(tmp_path)) == []


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_run_that_cannot_be_looked_at_is_one_line(
    command: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(run, 1)
    forbid(monkeypatch, run)
    for place, reason in (
        (tmp_path / ("n" * 300), "File name too long"),
        (run, "Permission denied"),
        (run / "below", "Permission denied"),
    ):
        assert main([command, str(place)]) == 2
        err = capsys.readouterr().err
        assert err.endswith(f"can't be listed: {reason}\n") and err.count("\n") == 1


def test_an_export_to_a_name_that_is_too_long_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(run, 1)
    assert main(["export", str(run), "n" * 300]) == 2
    err = capsys.readouterr().err
    assert err.endswith("File name too long\n") and err.count("\n") == 1


def test_a_time_that_no_calendar_has_is_listed_as_unknown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(run, 1)
    body = read_manifest(run / "step-000000001")[0]
    (run / "step-000000001" / "manifest.json").write_bytes(seal({**body, "created": 1 << 61}))
    assert main(["inspect", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[4:] == ["?", "ok", "accuracy_delta=1"]


def test_names_that_stdout_has_no_letters_for_are_escaped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is not called a failure for them."""
    fill(run, 1)
    shutil.copytree(run / "step-000000001", run / ".bad-ü-1")
    for words in (["export", str(run), str(tmp_path / "exp_ü")], ["inspect", str(run)]):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert main(words) == 0
        out.flush()
        assert b"\\xfc" in out.buffer.getvalue()
    assert (tmp_path / "exp_ü").is_dir()


def test_an_interrupted_command_leaves_without_a_traceback(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    fill(run, 1)
    monkeypatch.setattr(runs, "read_checkpoint", interrupted)
    assert main(["verify", str(run)]) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_the_module_runs_as_a_script(run: Path) -> None:
    fill(run, 1)
    script = [sys.executable, str(ROOT / "model_persistence.py"), "verify", str(run)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "step-000000001: ok" in done.stdout


@pytest.mark.parametrize("frozen", [False, True])
def test_an_exported_qwen_is_read_by_transformers(run: Path, tmp_path: Path, frozen: bool) -> None:
    from transformers import AutoConfig, AutoModel

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(
        "qwen3", hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=20, **heads
    )
    model = AutoModel.from_config(config)
    weights = model.state_dict()
    state = {
        "model": {"agent": {"w": torch.ones(2)}} | ({} if frozen else {"qwen": weights}),
        "extra": {"export": {"qwen": {"config.json": config.to_json_string(use_diff=False)}}},
    }
    with ModelPersistence(run, log=quiet) as persistence:
        metrics = {"accuracy_delta": 1.0}
        names = {f"qwen/{name}": tensor for name, tensor in weights.items()} if frozen else None
        persistence.save(state, step=1, metrics=metrics, frozen=names, wait=True)
        persistence.save(make_state(2), step=2, wait=True)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    loaded, info = AutoModel.from_pretrained(tmp_path / "out" / "qwen", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(dict(loaded.state_dict()), dict(weights))
    assert load_file(tmp_path / "out" / "agent" / "model.safetensors")["w"].tolist() == [1.0, 1.0]
    assert sorted(os.listdir(tmp_path)) == ["out", "runs"]


@pytest.mark.parametrize("name", ["../config.json", "/etc/x", ".hidden", "", "model.safetensors", "a/b"])
def test_export_writes_no_file_outside_or_twice(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    state = {"model": {"m": {"w": torch.ones(1)}}, "extra": {"export": {"m": {name: "text"}}}}
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(state, step=1, wait=True)
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and (repr(name) if name != "model.safetensors" else "File exists") in told
    assert sorted(os.listdir(tmp_path)) == ["runs"]


BASE = {"name": "b", "revision": "", "folder": "none", "files": {}, "prefix": "", "tensors": []}


@pytest.mark.parametrize(
    ("group", "value"),
    [
        *(("export", value) for value in (3, [1], {"m": 3}, {"m": {"a": 3}}, {"m": {"a": "\udcff"}})),
        *(("lora", value) for value in (3, ["m"], {"m": 3}, {"m": {"base": 3, "scale": 1}})),
        ("lora", {"m": {"base": {**BASE, "files": 3}, "scale": 1}}),
        ("lora", {"m": {"base": {**BASE, "tensors": [3]}, "scale": 1}}),
        ("model", [1, 2]),
        ("model", {"m": {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, 3: torch.ones(1)}),
    ],
    ids=lambda each: str(each)[:30],
)
def test_export_of_what_someone_else_wrote_ends_in_one_line(
    group: str, value: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = {"model": {"m": {"w": torch.ones(1)}}, "extra": {}}
    if group == "model":
        state["model"] = value
    else:
        state["extra"][group] = value
    with ModelPersistence(run, log=quiet) as persistence:
        persistence.save(state, step=1, wait=True)
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["runs"]


# --------------------------------------------------------------------------------------------------------------------
# SLURM
# --------------------------------------------------------------------------------------------------------------------


def test_a_job_resumes_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    """Not where there is a folder alone: it would be refused for ever."""
    text = (ROOT / "slurm.sbatch").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("RESUME=")]
    script = f'set -euo pipefail\nFOLDER={tmp_path}/run\n{line}\necho "[$RESUME]"'
    for below, expected in (("", "[]"), ("train", "[]"), ("step-000000050", "[--resume]")):
        (tmp_path / "run" / below).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")


# --------------------------------------------------------------------------------------------------------------------
# Colab
# --------------------------------------------------------------------------------------------------------------------


def test_without_colab_there_is_no_drive(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert setup_drive_backup("runs/x") is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "not running on Colab" in lines[0]


def test_on_colab_without_a_mounted_drive_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert setup_drive_backup("runs/x") is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "Google Drive is not mounted" in lines[0]


def test_on_colab_a_mounted_drive_has_the_backups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = tmp_path / "MyDrive"
    drive.mkdir()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setattr(runs, "Path", lambda name: drive if str(name).startswith("/content/drive") else Path(name))
    assert setup_drive_backup("runs/x") == str(drive / "arc_backups")
    assert setup_drive_backup(drive / "runs" / "x") is None  # already there
