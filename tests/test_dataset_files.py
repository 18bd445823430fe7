"""The forms in which people have ARC tasks: folders of any depth and case, gzip, zip, lists of pairs; and what is no
data although it lies among it."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from arc import dataset_files
from arc.datasets import LISTED_DEMONSTRATIONS, DataError, load_dataset
from arc.run.files import MAX_FILE_BYTES
from arc.tasks import DataSet


def raw_pair(colour: int) -> dict[str, Any]:
    return {"input": [[colour, 0]], "output": [[0, colour]]}


def raw_task(colour: int = 1) -> dict[str, Any]:
    return {"train": [raw_pair(colour), raw_pair(colour + 1)], "test": [raw_pair(colour + 2)]}


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(value).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def ids(data: DataSet) -> tuple[list[str], list[str]]:
    return [task.id for task in data.training], [task.id for task in data.evaluation]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as problem:
        load_dataset(str(path))
    assert "\n" not in str(problem.value)
    return str(problem.value)


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder.parent))
    return archive


def fill(root: Path, b: str = "b.json") -> Path:
    """The layout of the public repositories, in the case that some have, with what editors and systems leave."""
    write(root / "data" / "Training" / "a.JSON", raw_task(1))
    write(root / "data" / "Training" / "deeper" / b, raw_task(2))
    write(root / "data" / "evaluation" / "c.json", raw_task(3))
    write(root / "data" / "evaluation" / ".ipynb_checkpoints" / "c-checkpoint.json", raw_task(3))
    write(root / "data" / "Training" / ".Trash-0" / "a.json", raw_task(1))
    write(root / "__MACOSX" / "training" / "._a.json", raw_task(1))
    return root


def test_a_repository_on_disk_and_in_an_archive(tmp_path: Path) -> None:
    root = fill(tmp_path / "ARC")
    assert ids(load_dataset(str(fill(tmp_path / "gzipped", "b.json.gz")))) == (["a", "b"], ["c"])
    data = load_dataset(str(root))
    assert ids(data) == (["a", "b"], ["c"])
    packed = load_dataset(str(zipped(root, tmp_path / "ARC.zip")))
    assert ids(packed) == ids(data) and packed.fingerprint == data.fingerprint and packed.name == data.name


def test_folders_of_folders_without_parts(tmp_path: Path) -> None:
    for group in ("AboveBelow", "Center"):
        write(tmp_path / "corpus" / group / f"{group}1.json", raw_task(len(group) % 5))
    assert ids(load_dataset(str(tmp_path))) == (["AboveBelow1", "Center1"], [])
    assert ids(load_dataset(str(tmp_path), as_evaluation=True)) == ([], ["AboveBelow1", "Center1"])


def test_a_flat_folder_may_be_the_unseen_set(tmp_path: Path) -> None:
    write(tmp_path / "x.json", raw_task(4))
    assert ids(load_dataset(str(tmp_path), as_evaluation=True)) == ([], ["x"])
    write(tmp_path / "both" / "training" / "y.json", raw_task(5))  # a name that says otherwise is stronger
    assert ids(load_dataset(str(tmp_path / "both"), as_evaluation=True)) == (["y"], [])


def test_a_list_of_pairs_is_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "many.json", [raw_pair(colour) for colour in range(1, 9)])
    data = load_dataset(str(path))
    (task,) = data.training
    assert (task.id, len(task.train), len(task.test)) == ("many", LISTED_DEMONSTRATIONS, 1)
    assert task.test[0].input[0, 0] == 8 and any("3 pairs were not read" in note for note in data.notes)
    assert "a list of one pair" in error_of(write(tmp_path / "one.json", [raw_pair(1)]))


def test_what_cannot_be_unpacked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "a.json.gz"
    damaged.write_bytes(gzip.compress(json.dumps(raw_task()).encode())[:-9])
    assert error_of(damaged).startswith(f"{damaged}: cannot be unpacked")
    (tmp_path / "b.zip").write_bytes(b"PK no archive")
    assert "is not a readable zip archive" in error_of(tmp_path / "b.zip")

    archive = zipped(fill(tmp_path / "ARC"), tmp_path / "ARC.zip")
    content = bytearray(archive.read_bytes())
    at = content.index(b"a.JSON") + 20
    content[at] ^= 255
    archive.write_bytes(bytes(content))
    assert "ARC.zip" in error_of(archive)

    twice = zipped(fill(tmp_path / "twice", "b.json.gz"), tmp_path / "twice.zip")
    assert "is packed twice" in error_of(twice)
    monkeypatch.setattr(dataset_files, "MAX_FILES", 2)
    assert "more than 2 files" in error_of(zipped(tmp_path / "ARC", tmp_path / "many.zip"))


def test_what_unpacks_to_too_much_is_refused_before_it_is(tmp_path: Path) -> None:
    nothing = b" " * (MAX_FILE_BYTES + 1)
    with gzip.open(tmp_path / "a.json.gz", "wb", compresslevel=1) as file:
        file.write(nothing)
    assert "unpacks to more than" in error_of(tmp_path / "a.json.gz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("training/a.json", nothing)
    assert "unpack to" in error_of(tmp_path / "a.zip")


def test_a_fifo_among_the_files_does_not_block(tmp_path: Path) -> None:
    write(tmp_path / "good.json", raw_task())
    os.mkfifo(tmp_path / "pipe.json")
    assert "is not a regular file" in error_of(tmp_path)
