"""The mirror in a backup folder: what it holds, what it deletes, and that training never notices its troubles."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import model_persistence as mp
from arc.persistence.manifest import scan
from arc.persistence.mirror import _read_ledger
from benchmarks.persistence import (
    _flip_bit,
    fill,
    flaky_mount,
    hooked,
    make_frozen,
    make_state,
    patched_mirror,
    quiet,
    same,
)
from model_persistence import ModelPersistence, PersistenceError, find_newest_run


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with patched_mirror({"REST": 0.0, "FIRST_DELAY": 0.02, "LATE_WAIT": 0.05, "CLOSE_WAIT": 20.0}):
        yield


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def save(persistence: ModelPersistence, step: int, value: float | None = None, width: int = 32) -> None:
    metrics = {} if value is None else {"accuracy_delta": value}
    persistence.save(make_state(step, width), step=step, metrics=metrics, frozen=make_frozen(), wait=True)


def idle(persistence: ModelPersistence) -> None:
    """Waits until the mirror has nothing to do, or has given up."""
    mirror = persistence._mirror
    assert mirror is not None
    with mirror._state:
        assert mirror._state.wait_for(lambda: mirror.failed or not (mirror._wanted or mirror._busy), timeout=30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_the_newest_and_the_best_are_mirrored_byte_for_byte(run: Path, drive: Path) -> None:
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        for step, value in enumerate([0.1, 0.9, 0.5, 0.6, 0.2, 0.3, 0.4, 0.0]):
            (run / "metrics.jsonl").write_text("{}\n" * step)
            save(persistence, step, value)
    assert steps(drive / "a") == [1, 7]
    for step in (1, 7):
        with ModelPersistence(drive / "a", read_only=True, log=quiet) as reader:
            checkpoint = reader.load(drive / "a" / f"step-{step:09d}")
        assert same(checkpoint.state, make_state(step)) and same(checkpoint.frozen, make_frozen())
    assert mp.main(["verify", str(drive / "a")]) == 0
    assert (drive / "a" / "metrics.jsonl").read_text() == "{}\n" * 7
    assert len(list((drive / "a" / "blobs").iterdir())) == 1
    ledger = json.loads((drive / "a" / "ledger.json").read_text())
    assert list(ledger["checkpoints"]) == ["step-000000007", "step-000000001"]
    size = sum(path.stat().st_size for path in (drive / "a").rglob("*") if path.is_file())
    assert abs(ledger["bytes"] - size) < 1000


def test_a_run_that_is_only_in_the_backup_is_resumed(run: Path, drive: Path) -> None:
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        for step, value in enumerate([0.1, 0.9, 0.5]):
            save(persistence, step, value)
    shutil.rmtree(run)
    assert find_newest_run(drive) == drive / "a"
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        assert same(persistence.load().state, make_state(2))
        assert same(persistence.load("best").state, make_state(1))
        save(persistence, 3, 0.7)
        assert persistence.load("best").step == 1
    assert steps(drive / "a") == [1, 3]


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_without_a_valid_checkpoint_gets_its_own_backup(run: Path, drive: Path, *, whole: bool) -> None:
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        (run / "metrics.jsonl").write_text("{}\n")
        save(persistence, 1)
        save(persistence, 2)
        idle(persistence)
    assert steps(drive / "a") == [2]
    (run / "metrics.jsonl").unlink()
    for folder in (
        run / "step-000000001",
        run / "step-000000002",
        *([] if whole else [drive / "a" / "step-000000002"]),
    ):
        _flip_bit(folder / "model.safetensors", 200)
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        if whole:
            assert persistence.load().step == 2 and (run / "metrics.jsonl").read_text() == "{}\n"
        else:
            with pytest.raises(PersistenceError, match="none of 2 is valid"):
                persistence.load()
            assert not (run / "metrics.jsonl").exists()  # rows of checkpoints that did not come


def test_local_checkpoints_come_first_and_damaged_backups_are_not_restored(run: Path, drive: Path) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
        save(persistence, 2)
    _flip_bit(drive / "a" / "step-000000002" / "model.safetensors", 5)
    with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
        assert persistence.load().step == 2 and lines == []
        for step in (1, 2):
            shutil.rmtree(run / f"step-{step:09d}")
        with pytest.raises(PersistenceError, match="no checkpoint to load"):
            persistence.load()
    assert any("does not match its manifest" in line for line in lines)
    assert not list(run.glob(".tmp-*"))


def test_another_run_of_the_same_name_is_not_overwritten(run: Path, drive: Path) -> None:
    for first in (10, 20):
        with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
            save(persistence, first)
        shutil.rmtree(run)  # a new machine, and the user forgot --resume
    assert steps(drive / "a") == [10] and steps(drive / "a.2") == [20]
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        assert persistence.load().step == 20  # the more recent of the two
        save(persistence, 21)
    assert steps(drive / "a") == [10] and steps(drive / "a.2") == [21]


def test_a_backup_whose_manifests_are_unreadable_is_not_taken_for_ours(run: Path, drive: Path) -> None:
    foreign = drive / "a" / "step-000000009"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"someone's work")
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
    assert steps(drive / "a") == [9] and steps(drive / "a.2") == [1]


@pytest.mark.parametrize("name", ["config.json", "train.log", "metrics.jsonl", "ledger.json.part", "notes.txt", ""])
def test_a_folder_with_anything_in_it_is_not_taken(run: Path, drive: Path, name: str) -> None:
    """Nor a file ("") of the run's name."""
    theirs = drive / "a" / name if name else drive / "a"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("someone's work")
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        for side_file in ("config.json", "train.log", "metrics.jsonl"):
            (run / side_file).write_text("{}\n")
        save(persistence, 1)
    assert theirs.read_text() == "someone's work" and list(drive.glob("a/*")) == ([theirs] if name else [])
    assert steps(drive / "a.2") == [1] and (drive / "a.2" / "config.json").read_text() == "{}\n"


def test_an_empty_folder_is_taken_and_a_mount_that_fails_over_it_leads_to_no_other(run: Path, drive: Path) -> None:
    (drive / "a").mkdir()
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        with hooked(flaky_mount("full", str(drive))):
            save(persistence, 1)
            time.sleep(0.1)
        until(lambda: steps(drive / "a") == [1])
    assert os.listdir(drive) == ["a"]


def test_of_two_saves_of_a_step_the_newer_is_mirrored(run: Path, drive: Path) -> None:
    """Where the best one is an earlier save of the newest's step."""
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 7, 0.5)
        idle(persistence)
        again = {"accuracy_delta": 0.5}
        persistence.save(make_state(8), step=7, metrics=again, frozen=make_frozen(), wait=True)
        assert same(persistence.load("best").state, make_state(7))
    shutil.rmtree(run)
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        assert same(persistence.load().state, make_state(8))


def test_a_step_that_is_saved_again_is_in_the_backup_all_the_time(run: Path, drive: Path) -> None:
    """The mount fills up while the second save is copied: the first is what a new machine finds."""
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
        idle(persistence)
        with hooked(flaky_mount("full", str(drive))):
            persistence.save(make_state(2), step=1, frozen=make_frozen(), wait=True)
            idle(persistence)
        assert [entry.step for entry in scan(drive / "a")[0]] == [1]
    shutil.rmtree(run)
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        assert same(persistence.load().state, make_state(1))
        persistence.save(make_state(3), step=1, frozen=make_frozen(), wait=True)
    assert sorted(path.name for path in (drive / "a").glob("*step-*")) == ["step-000000001"]


def test_a_damaged_run_gets_its_own_backup_not_its_namesakes(run: Path, drive: Path, tmp_path: Path) -> None:
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 10)
    run.rename(tmp_path / "first")
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 20)  # to a.2, and later than the other
    shutil.rmtree(run)
    (tmp_path / "first").rename(run)
    _flip_bit(run / "step-000000010" / "model.safetensors", 200)
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        assert persistence.load().step == 10


def test_a_folder_that_a_namesake_has_begun_is_left_to_it(run: Path, drive: Path) -> None:
    """Its ledger is there, its first checkpoint is not yet; and should both be in one folder, neither is deleted."""
    (drive / "a").mkdir()
    (drive / "a" / "ledger.json").write_text(json.dumps({"run": "f" * 32, "bytes": 0}))
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
    assert steps(drive / "a") == [] and steps(drive / "a.2") == [1]
    other = run.with_name("other")
    with ModelPersistence(other, log=quiet) as persistence:
        save(persistence, 5)
    shutil.copytree(other / "step-000000005", drive / "a.2" / "step-000000005")
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 2)
        idle(persistence)
    assert 5 in steps(drive / "a.2")


def test_the_quota_is_kept_and_the_newest_goes_before_the_best(run: Path, drive: Path) -> None:
    one = ModelPersistence.estimate_bytes(make_state(1, 200), make_frozen())
    quota = 2.5 * one / 1e9  # room for two
    lines: list[str] = []
    most = 0
    with ModelPersistence(run, log=lines.append, backup_dir=drive, backup_quota_gb=quota) as persistence:
        for step, value in enumerate([0.9, 0.1, 0.2, 0.3]):
            save(persistence, step, value, width=200)
            idle(persistence)
            most = max(most, sum(path.stat().st_size for path in drive.rglob("*") if path.is_file()))
            assert step in steps(drive / "a")
    assert most <= 2.5 * one
    assert 0 in steps(drive / "a") and len(steps(drive / "a")) == 2  # the best is the other one


def test_what_does_not_fit_is_told_once_and_nothing_is_deleted_for_it(run: Path, drive: Path) -> None:
    one = ModelPersistence.estimate_bytes(make_state(1, 200), make_frozen())
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=drive, backup_quota_gb=1.5 * one / 1e9) as persistence:
        save(persistence, 1, 0.5, width=200)
        idle(persistence)
        for step in (2, 3):
            save(persistence, step, 0.1, width=300)
            idle(persistence)
    assert steps(drive / "a") == [1]
    assert [line for line in lines if "no room for step 2" in line] and not any("step 1 " in line for line in lines)


def test_where_the_newest_does_not_fit_the_best_is_copied(run: Path, drive: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        save(persistence, 1, 0.5, width=100)
        save(persistence, 2, 0.1, width=400)
    room = 2 * ModelPersistence.estimate_bytes(make_state(1, 100), make_frozen())
    assert room < ModelPersistence.estimate_bytes(make_state(2, 400), make_frozen())
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=drive, backup_quota_gb=room / 1e9) as persistence:
        persistence.load()
        idle(persistence)
    assert steps(drive / "a") == [1]
    (told,) = [line for line in lines if "no room" in line]
    assert re.fullmatch(rf"\[Backup\] no room for step 2 \(0\.\d\d GB\) within {room / 1e9:g} GB: not backed up", told)


def test_the_ledger_says_what_is_there(run: Path, drive: Path) -> None:
    before = time.time()
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1, 0.5)
        idle(persistence)
        (entry,) = scan(run)[0]
    ledger = json.loads((drive / "a" / "ledger.json").read_text())
    assert before <= ledger.pop("updated") <= time.time()
    held = sum(
        path.stat().st_size for path in (drive / "a").rglob("*") if path.is_file() and path.name != "ledger.json"
    )
    assert ledger.pop("bytes") == pytest.approx(held, rel=0.1)
    known = {"sequence": entry.sequence, "bytes": entry.bytes, "manifest": entry.digest}
    assert ledger == {"run": entry.run, "checkpoints": {"step-000000001": known}}


def test_other_runs_count_towards_the_quota_by_their_ledgers(run: Path, drive: Path) -> None:
    one = ModelPersistence.estimate_bytes(make_state(1, 200), make_frozen())
    (drive / "other").mkdir()
    (drive / "other" / "ledger.json").write_text(json.dumps({"run": "x", "bytes": one}))
    (drive / "broken").mkdir()
    (drive / "broken" / "ledger.json").write_text("{" * 10)
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=drive, backup_quota_gb=1.5 * one / 1e9) as persistence:
        save(persistence, 1, width=200)
    assert any("no room for step 1" in line for line in lines) and steps(drive / "a") == []


def test_a_ledger_that_is_none_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    assert _read_ledger(path) == (None, 0)
    for text, found in (
        ('{"run": "x", "bytes": 5}', ("x", 5)),
        ('{"run": "x", "bytes": -5}', ("x", 0)),
        ('{"run": "x"}', (None, 0)),
        ("[]", (None, 0)),
        (json.dumps({"run": "x", "bytes": 5, "more": "x" * 2**20}), (None, 0)),  # longer than any ledger is
    ):
        path.write_text(text)
        assert _read_ledger(path) == found


def test_deleting_empties_each_file_first_and_the_manifest_before_all(run: Path, drive: Path) -> None:
    calls: list[tuple[str, str]] = []
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
        idle(persistence)
        old = str(drive / "a" / "step-000000001")
        with hooked(lambda name, path, _: calls.append((name, path)), ("ftruncate", "unlink", "rmdir")):
            save(persistence, 2)
            idle(persistence)
    mine = [(name, path.removeprefix(old)) for name, path in calls if path.startswith(old)]
    assert mine[:2] == [("ftruncate", "/manifest.json"), ("unlink", "/manifest.json")]
    assert [name for name, _ in mine[2:-1]] == ["ftruncate", "unlink"] * 3 and mine[-1] == ("rmdir", "")


def test_a_mount_that_comes_back_gets_what_it_missed(run: Path, drive: Path) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
        with hooked(flaky_mount("gone", str(drive))):
            for step in (1, 2):
                save(persistence, step)
            until(lambda: any("not connected" in line for line in lines))
        idle(persistence)
    assert steps(drive / "a") == [2]
    assert sum("trying again" in line for line in lines) == 1 and not any("OFF" in line for line in lines)


def test_pauses_double_up_to_the_longest(run: Path, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float | None] = []
    wait_for = threading.Condition.wait_for

    def told(self: threading.Condition, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if threading.current_thread().name == "checkpoint-mirror":
            pauses.append(timeout)
        return wait_for(self, predicate, timeout)

    def broken(name: str, path: str, argument: object) -> None:
        if path.startswith(str(drive)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(threading.Condition, "wait_for", told)
    changed = {"FIRST_DELAY": 0.001, "LONGEST_DELAY": 0.005, "RETRIES": 6}
    with patched_mirror(changed), hooked(broken, ("open", "mkdir")):
        with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
            (thread,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint-mirror")
            assert thread.daemon  # or a mount that hangs would keep the process from ending
            save(persistence, 1)
            idle(persistence)
    assert [pause for pause in pauses if pause is not None] == [0.001, 0.002, 0.004, 0.005, 0.005]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.ENOTCONN, errno.EDQUOT])
def test_after_many_failures_the_mirror_is_off_and_says_so(run: Path, drive: Path, error: int) -> None:
    lines: list[str] = []

    def broken(name: str, path: str, argument: object) -> None:
        if path.startswith(str(drive)):
            raise OSError(error, os.strerror(error), path)

    with patched_mirror({"FIRST_DELAY": 0.0001, "RETRIES": 4}), hooked(broken, ("open", "mkdir")):
        with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
            save(persistence, 1)
            idle(persistence)
            save(persistence, 2)
            assert persistence.load().step == 2
    off = [line for line in lines if "OFF after 4 failure(s)" in line]
    assert len(off) == 1 and os.strerror(error) in off[0] and str(run) in off[0]


def test_a_missing_mount_point_is_not_replaced_by_a_local_folder(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=tmp_path / "gone" / "arc_backups") as persistence:
        save(persistence, 1)
    assert not (tmp_path / "gone").exists() and any("No such file" in line for line in lines)


def test_a_copy_that_lost_its_content_is_made_again(run: Path, drive: Path) -> None:
    with ModelPersistence(run, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1, 0.9)
        idle(persistence)
        (drive / "a" / "step-000000001" / "optim.safetensors").write_bytes(b"")
        save(persistence, 2, 0.1)
    assert steps(drive / "a") == [1, 2] and mp.main(["verify", str(drive / "a")]) == 0


def test_writes_that_do_not_arrive_are_noticed(run: Path, drive: Path) -> None:
    lines: list[str] = []
    with hooked(flaky_mount("zero_length", str(drive))):
        with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
            save(persistence, 1)
    assert any("did not keep what was written" in line for line in lines)
    assert not (drive / "a" / "step-000000001" / "manifest.json").exists()  # so it does not look complete


def test_a_damaged_local_file_is_not_mirrored_as_good(run: Path, drive: Path) -> None:
    fill(run, 1)
    _flip_bit(run / "step-000000001" / "model.safetensors", 2)
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
        assert persistence._mirror is not None
        persistence._mirror.request()
    assert any("does not match its manifest" in line for line in lines)
    assert not list((drive / "a").glob("step-*/manifest.json"))


def test_a_checkpoint_that_is_rotated_out_while_it_is_copied(run: Path, drive: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(name: str, path: str, argument: object) -> None:
        if path.startswith(str(drive)) and path.endswith("optim.safetensors") and "step-000000001" in path:
            entered.set()
            leave.wait(30)

    with hooked(slow, ("write",)), ModelPersistence(run, keep=1, log=quiet, backup_dir=drive) as persistence:
        save(persistence, 1)
        assert entered.wait(30)
        for step in (2, 3):
            save(persistence, step)
        assert steps(run) == [3]
        leave.set()
    assert steps(drive / "a") == [3] and mp.main(["verify", str(drive / "a")]) == 0


def test_closing_does_not_wait_for_a_stuck_mount(run: Path, drive: Path) -> None:
    release = threading.Event()
    lines: list[str] = []

    def stuck(name: str, path: str, argument: object) -> None:
        if path.startswith(str(drive)):
            release.wait(60)

    with patched_mirror({"CLOSE_WAIT": 0.1}), hooked(stuck, ("write",)):
        with ModelPersistence(run, log=lines.append, backup_dir=drive) as persistence:
            save(persistence, 1)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert any("too slow" in line for line in lines)
        ModelPersistence(run, log=quiet).close()  # the run is free
        release.set()


def test_the_backup_folder_must_not_be_the_folder_of_the_runs(run: Path) -> None:
    with pytest.raises(ValueError, match="backup_dir: .* is the folder that holds the run itself"):
        ModelPersistence(run, backup_dir=run.parent)


def test_a_backup_that_is_named_when_all_is_trained_is_filled(run: Path, drive: Path) -> None:
    with ModelPersistence(run, log=quiet) as persistence:
        save(persistence, 1)
    with ModelPersistence(run, backup_dir=drive, log=quiet) as persistence:
        persistence.load()
    assert [folder.name for folder in (drive / run.name).glob("step-*")] == ["step-000000001"]
