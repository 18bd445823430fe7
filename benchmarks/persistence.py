"""What model_persistence.py promises, measured: kills, faults, corruption, hostile files, backups, cost.

    python benchmarks/persistence.py                          everything, about ten minutes on two cores
    python benchmarks/persistence.py --only kill_calls cost   some parts
    python benchmarks/persistence.py --scale 0.1 --json       a tenth of the repetitions, one JSON object a part

Each part prints its figures and whether they are what they must be; the exit code is 1 if one is not. The tests in
tests/test_persistence*.py run smaller shares of the same code. Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model_persistence as mp  # noqa: E402
from arc.persistence.mirror import Mirror  # noqa: E402
from model_persistence import ModelPersistence, PersistenceError  # noqa: E402

Figures = dict[str, Any]


def quiet(_: str) -> None:
    """A log for runs whose messages are of no interest."""


# ---------------------------------------------------------------------------------------------------------------------
# States that are a pure function of the step, so that a mixture of two saves shows
# ---------------------------------------------------------------------------------------------------------------------


def make_state(step: int, width: int = 32) -> dict[str, Any]:
    """A small training state; every group and every tensor depends on `step`."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(width, width, generator=generator)
    return {
        "model": {
            "agent": {"weight": weight, "tied": weight, "half": weight.bfloat16(), "mask": weight > 0},
            "qwen": {"embed": torch.randn(width, 4, generator=generator).t(), "empty": torch.empty(0, 3)},
        },
        "optim": {
            "state": {0: {"step": torch.tensor(float(step)), "avg": torch.randn(width, generator=generator)}, 1: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "extra": {
            "step": step,
            "best": float("nan"),
            "rng": (3, (step, 2, 1), None),
            "numpy": np.arange(step, step + 5, dtype=np.uint32),
            "scale": np.float32(step / 3),
        },
    }


def make_frozen(width: int = 32) -> dict[str, torch.Tensor]:
    """Tensors that do not train, the same for every step."""
    return {"qwen/base": torch.randn(width, width, generator=torch.Generator().manual_seed(-1))}


def same(a: Any, b: Any) -> bool:
    """Bit equality of two trees: types, keys and their order, dtypes, shapes, values (NaN equals NaN)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _raw(a) == _raw(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def _raw(tensor: torch.Tensor) -> bytes:
    fresh = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return fresh.view(torch.uint8).numpy().tobytes()


def left_overs(run: Path) -> list[str]:
    """Unfinished things in a run folder."""
    return [str(path.relative_to(run)) for path in run.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


def fill(run: Path, steps: int, frozen: bool = True, background: bool = False) -> None:
    """A run with `steps` saves; the metric rises, so that the last is the best."""
    with ModelPersistence(run, log=quiet, background=background) as persistence:
        for step in range(1, steps + 1):
            persistence.save(
                make_state(step), step=step, metrics={"accuracy_delta": step}, frozen=make_frozen() if frozen else None
            )


# ---------------------------------------------------------------------------------------------------------------------
# Watching and breaking system calls: every change to the disk goes through these functions of `os`
# ---------------------------------------------------------------------------------------------------------------------

CALLS = ("open", "mkdir", "write", "fsync", "ftruncate", "close", "rename", "replace", "link", "unlink", "rmdir")
Hook = Callable[[str, str, Any], None]  # (call, path, second argument) just before the call; may raise or kill


@contextlib.contextmanager
def hooked(hook: Hook, calls: tuple[str, ...] = CALLS) -> Iterator[None]:
    """Calls `hook` before every one of the `calls` of this process, with the path that it is about."""
    originals = {name: getattr(os, name) for name in CALLS}
    paths: dict[int, str] = {}

    def wrap(name: str) -> Callable[..., Any]:
        original = originals[name]

        def call(first: Any, *rest: Any, **kwargs: Any) -> Any:
            path = paths.get(first, f"fd {first}") if isinstance(first, int) else os.fspath(first)
            if name in calls:
                hook(name, path, rest[0] if rest else None)
            result = original(first, *rest, **kwargs)
            if name == "open":
                paths[result] = path
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def fail_at(number: int, error: int, torn: bool = False, under: str = "") -> Hook:
    """A hook whose `number`-th call (from 0) below the path `under` fails; a torn write leaves half of its bytes.
    A negative number: none fails."""
    seen = 0

    def hook(name: str, path: str, argument: Any) -> None:
        nonlocal seen
        if under in path:
            seen += 1
            if seen == number + 1:
                if torn and name == "write":
                    with open(path, "r+b", buffering=0) as file:
                        file.seek(0, os.SEEK_END)
                        file.write(argument[: len(argument) // 2])
                raise OSError(error, os.strerror(error), path)

    return hook


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def forked(child: Callable[[int], None], parent: Callable[[int, int], None] | None = None) -> bytes:
    """Runs `child(pipe)` in a fork until it ends or is killed (`parent(pid, pipe)` may do that); what it wrote."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            child(writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    written = b""
    if parent is not None:
        parent(pid, reader)
    while chunk := os.read(reader, 65536):
        written += chunk
    os.close(reader)
    os.waitpid(pid, 0)
    return written


def judge(run: Path, acknowledged: int, last: int, figures: Figures) -> None:
    """After a kill: starts anew and counts what is lost, mixed or left over. `last` is the newest step begun."""
    with ModelPersistence(run, log=quiet) as persistence:
        figures["left_overs"] += len(left_overs(run))
        try:
            checkpoint = persistence.load()
        except PersistenceError:
            figures["unrecoverable"] += 1
            return
        figures["lost"] += not acknowledged <= checkpoint.step <= last
        figures["mixed"] += not same(checkpoint.state, make_state(checkpoint.step))
        figures["quarantined"] += sum(name.startswith(".bad-") for name in os.listdir(run))
        best = persistence.load("best")
        figures["lost"] += best.metrics["accuracy_delta"] < acknowledged
        figures["mixed"] += not same(best.state, make_state(best.step))


def kill_at_every_call(base: Path, stride: int = 1) -> Figures:
    """SIGKILL just before each call, and in the middle of each write, of: a save that is a new best and prunes, a save
    that replaces its own step, and the start in a run full of left-overs. With `stride`: at every `stride`-th call and
    at every rename."""
    figures: Figures = {"kills": 0, "unrecoverable": 0, "lost": 0, "mixed": 0, "left_overs": 0, "quarantined": 0}
    for scenario, step in {"new": 7, "replace": 6, "start": 6}.items():
        template, run = base / f"template-{scenario}", base / "run"
        fill(template, 6)
        if scenario == "start":
            _litter(template)
        _clone(template, run)
        names = _killed_action(run, scenario, step, None, False).decode().split()
        shutil.rmtree(run)
        for number in range(len(names)):
            for torn in (False, True) if names[number] == "write" else (False,):
                if number % stride == 0 or names[number] == "rename":
                    _clone(template, run)
                    assert _killed_action(run, scenario, step, number, torn) == b"", "it was not killed"
                    figures["kills"] += 1
                    judge(run, 6, step, figures)
                    shutil.rmtree(run)
    return figures


def _killed_action(run: Path, scenario: str, step: int, number: int | None, torn: bool) -> bytes:
    """Kills the scenario at its `number`-th call; without a number, the names of its calls."""
    names: list[str] = []

    def child(pipe: int) -> None:
        fail = fail_at(-1 if number is None else number, errno.EIO, torn)

        def hook(name: str, path: str, argument: Any) -> None:
            names.append(name)
            try:
                fail(name, path, argument)
            except OSError:
                os.kill(os.getpid(), signal.SIGKILL)

        if scenario == "start":
            with hooked(hook):
                ModelPersistence(run, log=quiet)
        else:
            persistence = ModelPersistence(run, log=quiet, background=False)
            with hooked(hook):
                persistence.save(make_state(step), step=step, metrics={"accuracy_delta": step}, frozen=make_frozen())
        os.write(pipe, " ".join(names).encode())

    return forked(child)


def _litter(run: Path) -> None:
    """What kills at the worst moments leave: a moved-aside step without successor, one with, half-deleted folders."""
    os.rename(run / "step-000000006", run / f".old-step-000000006-{'0' * 32}")
    shutil.copytree(run / "step-000000005", run / f".old-step-000000005-{'1' * 32}")
    os.rename(run / "best-accuracy_delta", run / f".old-best-accuracy_delta-{'2' * 32}")
    shutil.copytree(run / "step-000000004", run / ".tmp-discarded-3")
    (run / "blobs" / ".tmp-4").write_bytes(b"half")


def _clone(template: Path, run: Path) -> None:
    """A copy of a run with its hard links."""
    subprocess.run(["cp", "-a", str(template), str(run)], check=True)


def kill_at_random(base: Path, kills: int, seed: int = 0) -> Figures:
    """SIGKILL at random times while a process saves one checkpoint after the other, half of them in the background.
    One run takes all the kills: each child goes on where the last one was killed."""
    figures: Figures = {"kills": 0, "unrecoverable": 0, "lost": 0, "mixed": 0, "left_overs": 0, "quarantined": 0}
    rng = random.Random(seed)
    run = base / "random"
    fill(run, 1)
    acknowledged = 1
    for n in range(kills):
        first = acknowledged + 1
        child = functools.partial(_save_forever, run, first, background=n % 2 == 0)
        report = forked(child, lambda pid, pipe: _kill_after(pid, pipe, rng.uniform(0.0, 0.2)))
        acknowledged = max([acknowledged, *map(int, report.decode().split())])
        figures["kills"] += 1
        judge(run, acknowledged, 10**9, figures)
        with ModelPersistence(run, log=quiet) as persistence:
            acknowledged = max(acknowledged, persistence.load().step)
    figures["saves"] = acknowledged
    return figures


def _save_forever(run: Path, first: int, pipe: int, *, background: bool) -> None:
    os.write(pipe, b" ")  # the clock of the killer starts here, not with the fork
    with ModelPersistence(run, log=quiet, background=background) as persistence:
        for step in range(first, 10**8):
            metrics = {"accuracy_delta": step, "val_accuracy": step % 7}
            persistence.save(make_state(step), step=step, metrics=metrics, frozen=make_frozen())
            if background and step % 3:
                os.write(pipe, b"%d " % (step - 1 if step > first else 0))  # this save returned: the one before is done
            else:
                persistence.wait()
                os.write(pipe, b"%d " % step)


def _kill_after(pid: int, pipe: int, seconds: float) -> None:
    os.read(pipe, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_pruning(base: Path, kills: int, seed: int = 1) -> Figures:
    """SIGKILL at a random moment after a save has been moved into place: while the best is made, while pruning."""
    figures: Figures = {"kills": 0, "unrecoverable": 0, "lost": 0, "mixed": 0, "left_overs": 0, "quarantined": 0}
    rng = random.Random(seed)
    run = base / "pruning"
    fill(run, 7)
    for step in range(8, 8 + kills):

        def child(pipe: int, step: int = step) -> None:
            persistence = ModelPersistence(run, log=quiet, background=False)

            def hook(name: str, path: str, argument: Any) -> None:
                if name == "rename" and str(argument).endswith(f"step-{step:09d}"):
                    threading.Thread(target=_die_after, args=(rng.uniform(0, 0.004),)).start()

            with hooked(hook):
                persistence.save(make_state(step), step=step, metrics={"accuracy_delta": step}, frozen=make_frozen())
            time.sleep(1)

        rng.random()
        forked(child)
        figures["kills"] += 1
        judge(run, step - 1, step, figures)
        with ModelPersistence(run, log=quiet, background=False) as persistence:  # the next kill needs this step
            if persistence.load().step < step:
                persistence.save(make_state(step), step=step, metrics={"accuracy_delta": step}, frozen=make_frozen())
    return figures


def kill_in_load(base: Path, kills: int, seed: int = 2) -> Figures:
    """SIGKILL at a random moment of a load that has to set two corrupt checkpoints aside."""
    figures: Figures = {"kills": 0, "unrecoverable": 0, "lost": 0, "mixed": 0, "left_overs": 0, "quarantined": 0}
    rng = random.Random(seed)
    template = base / "load-template"
    fill(template, 6)
    for step in (5, 6):
        _flip_bit(template / f"step-{step:09d}" / "optim.safetensors", 3)
    for n in range(kills):
        run = base / f"load-{n}"
        shutil.copytree(template, run)

        def child(pipe: int, run: Path = run) -> None:
            persistence = ModelPersistence(run, log=quiet)
            os.write(pipe, b" ")
            persistence.load()

        forked(child, lambda pid, pipe: _kill_after(pid, pipe, rng.uniform(0.0, 0.01)))
        figures["kills"] += 1
        with ModelPersistence(run, log=quiet) as persistence:
            checkpoint = persistence.load()
            figures["lost"] += checkpoint.step != 4
            figures["mixed"] += not same(checkpoint.state, make_state(4))
            figures["left_overs"] += len(left_overs(run))
            bad = sorted(name[:19] for name in os.listdir(run) if name.startswith(".bad-"))
            figures["unrecoverable"] += bad != [".bad-step-000000005", ".bad-step-000000006"]
        shutil.rmtree(run)
    del figures["quarantined"]  # two each, by construction
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Order of the calls
# ---------------------------------------------------------------------------------------------------------------------


def check_order(calls: list[tuple[str, str]], run: str, final: str) -> Figures:
    """Figures of a trace of (call, path): is every file synced after its last write and before the rename of the
    folder into `final`, is the folder synced between its last new name and the rename, and the parent after it?"""
    renames = [i for i, (name, path) in enumerate(calls) if name.startswith("rename") and path.endswith(f" {final}")]
    assert len(renames) == 1, renames
    at = renames[0]
    folder = calls[at][1].split(" ")[0]
    files = sorted({path for name, path in calls[:at] if name == "write" and path.startswith(run)})
    late = 0
    for path in files:
        wrote = max(i for i, call in enumerate(calls) if call == ("write", path))
        late += not any(call == ("fsync", path) for call in calls[wrote + 1 : at])
    after = [call for call in calls[at + 1 :] if call[0] not in ("open", "close")]
    named = max(i for i, (name, path) in enumerate(calls[:at]) if name in ("open", "link") and path.startswith(folder))
    return {
        "files": len(files),
        "not_synced_before_rename": late,
        "folder_not_synced": not any(call == ("fsync", folder) for call in calls[named + 1 : at]),
        "parent_not_synced": after[0] != ("fsync", run),  # before the best, before pruning
        "pruned_too_early": any(name in ("unlink", "rmdir") for name, _ in calls[: at + 1]),
    }


def trace_in_process(run: Path) -> list[tuple[str, str]]:
    """(call, path) of one save that prunes, seen from Python; a rename is "source target"."""
    fill(run, 6)
    seen: list[tuple[str, str]] = []
    with ModelPersistence(run, log=quiet, background=False) as persistence:
        with hooked(lambda name, path, second: seen.append((name, _pair(name, path, second)))):
            persistence.save(make_state(7), step=7, metrics={"accuracy_delta": 7}, frozen=make_frozen())
    return seen


def _pair(name: str, path: str, second: Any) -> str:
    if name == "link":
        return os.fspath(second)
    return f"{path} {os.fspath(second)}" if name in ("rename", "replace") else path


def trace_by_strace(run: Path) -> list[tuple[str, str]] | None:
    """The same from the kernel's side, by strace; None where there is no strace."""
    if shutil.which("strace") is None:
        return None
    trace = run.with_name("trace.txt")
    names = "openat,write,fsync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir"
    watch = ["strace", "-f", "-y", "-o", str(trace), "-e", f"trace={names}"]
    if subprocess.run([*watch, sys.executable, __file__, "--one_save", str(run)], capture_output=True).returncode != 0:
        return None  # not allowed to trace here
    calls = []
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if match and str(run) in line:
            calls.append(_strace_call(match.group(1), match.group(2)))
    start = next(i for i, (name, path) in enumerate(calls) if name == "open" and path.endswith("BEGIN"))
    return calls[start + 1 :]


def _strace_call(name: str, rest: str) -> tuple[str, str]:
    name = {"openat": "open", "unlinkat": "unlink", "linkat": "link"}.get(name, name)
    if name in ("write", "fsync"):
        found = re.match(r"\d+<([^>]*)>", rest)
        return name, found.group(1) if found else ""
    quoted = re.findall(r'"([^"]*)"', rest)
    if name.startswith("rename"):
        return "rename", " ".join(quoted)
    return name, quoted[-1] if quoted else ""


def one_save(run: Path) -> None:
    """The save that strace watches: the seventh of a run, behind a marker."""
    fill(run, 6)
    with ModelPersistence(run, log=quiet, background=False) as persistence:
        (run / "BEGIN").touch()
        persistence.save(make_state(7), step=7, metrics={"accuracy_delta": 7}, frozen=make_frozen())


def order(base: Path) -> Figures:
    """The order of the calls of one save, from the kernel's trace where there is strace, and from Python."""
    run = base / "order"
    figures = check_order(trace_in_process(run), str(run), str(run / "step-000000007"))
    watched = base / "strace"
    calls = trace_by_strace(watched)
    if calls is None:
        return {**figures, "strace": "not available"}
    kernel = check_order(calls, str(watched), str(watched / "step-000000007"))
    return {**{name: max(int(value), int(kernel[name])) for name, value in figures.items()}, "strace": "used"}


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the disk
# ---------------------------------------------------------------------------------------------------------------------


def disk_errors(base: Path, stride: int = 1) -> Figures:
    """Each error at each open, mkdir, write (whole and torn), fsync, rename and link of one save: told in one line, the
    earlier five intact, the next save works, and nothing is left behind after the next start. Every `stride`-th call
    only."""
    figures: Figures = {"faults": 0, "silent": 0, "damaged": 0, "next_save_failed": 0, "left_overs": 0}
    template = base / "faults-template"
    fill(template, 6)
    for error in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        for torn in (False, True):
            number, finished = 0, False
            while not finished:
                run = base / "faults"
                _clone(template, run)
                finished = _one_fault(run, number, error, torn, figures)
                shutil.rmtree(run)
                number += stride
    return figures


def _one_fault(run: Path, number: int, error: int, torn: bool, figures: Figures) -> bool:
    """True when the save ended before its `number`-th call."""
    calls = ("open", "mkdir", "write", "fsync", "rename", "replace", "link")
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        hook = fail_at(number, error, torn)
        hit: list[str] = []

        def noted(name: str, path: str, argument: Any) -> None:
            try:
                hook(name, path, argument)
            except OSError:
                hit.append(name)
                raise

        with hooked(noted, calls):
            save = functools.partial(persistence.save, make_state(7), step=7, metrics={"accuracy_delta": 7}, wait=True)
            told = _message(save)
        if not hit:
            return True
        figures["faults"] += 1
        saved = (run / "step-000000007").is_dir()
        # An error is raised or logged; only a hard link that fails is simply replaced by a copy.
        figures["silent"] += hit[0] != "link" and not (told or lines)
        figures["silent"] += not saved and "was not saved" not in told
        figures["damaged"] += not _sound(run, {4, 5, 6, 7} if saved else {2, 3, 4, 5, 6})
        save = functools.partial(persistence.save, make_state(8), step=8, metrics={"accuracy_delta": 8}, wait=True)
        figures["next_save_failed"] += bool(_message(save)) or not same(persistence.load().state, make_state(8))
    with ModelPersistence(run, log=quiet):
        figures["left_overs"] += len(left_overs(run))
    return False


def _sound(run: Path, steps: set[int]) -> bool:
    """Are these steps there, every byte of them right?"""
    with ModelPersistence(run, read_only=True, log=quiet) as persistence:
        return all(
            same(persistence.load(run / f"step-{step:09d}").state, make_state(step)) for step in steps
        ) and not any(info.problem for info in persistence.inspect() if info.kind != "unfinished")


def full_disk(base: Path, megabytes: int = 60) -> Figures:
    """A real file system of 60 MB that fills up: once found out before writing, once while writing because the space
    is taken away meanwhile."""
    mount = base / "small"
    mount.mkdir()
    options = f"size={megabytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], capture_output=True).returncode:
        return {"tmpfs": "not allowed here"}
    try:
        return _fill_disk(mount / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _fill_disk(run: Path) -> Figures:
    def state(step: int) -> dict[str, Any]:
        return {"model": {"m": torch.full((2_000_000,), float(step))}, "extra": {"step": step}}  # 8 MB each

    with ModelPersistence(run, log=quiet) as persistence:
        for step in range(1, 6):
            persistence.save(state(step), step=step, wait=True)
        hog = run.parent / "hog"
        room = shutil.disk_usage(run).free
        hog.write_bytes(bytes(room - 5_000_000))
        first = _message(lambda: persistence.save(state(6), step=6, wait=True))

        def eat_space(name: str, path: str, argument: Any) -> None:
            if name == "mkdir":
                hog.write_bytes(bytes(room - 5_000_000))

        with hooked(eat_space):
            hog.unlink()
            second = _message(lambda: persistence.save(state(6), step=6, wait=True))
        kept = sorted(int(path.name[5:]) for path in run.glob("step-*"))
        intact = all(persistence.load(run / f"step-{step:09d}").step == step for step in kept)
        hog.unlink()
        persistence.save(state(6), step=6, wait=True)
        works = persistence.load().step == 6
    return {
        "tmpfs": "used",
        "refused_before_writing": "MB free" in first,
        "refused_while_writing": "No space left" in second,
        "five_intact": kept == [1, 2, 3, 4, 5] and intact,
        "next_save_works": works,
        "left_overs": len(left_overs(run)),
    }


def _message(action: Callable[[], None]) -> str:
    try:
        action()
    except PersistenceError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Corruption and hostile files
# ---------------------------------------------------------------------------------------------------------------------


def _flip_bit(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def mutate(path: Path, kind: str, rng: random.Random) -> bool:
    """Damages a file in one of the ways of MUTATIONS; False if that left it as it was."""
    data = path.read_bytes()
    at, size = rng.randrange(len(data)), max(1, min(4096, len(data) // 4))
    block = data[at : at + size]
    other = rng.randrange(len(data))
    match kind:
        case "bit":
            new = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case "zeros":
            new = data[:at] + bytes(len(block)) + data[at + len(block) :]
        case "swap":
            low, high = sorted((at, other))
            span = min(size, high - low, len(data) - high)
            new = data[:low] + data[high : high + span] + data[low + span : high] + data[low : low + span]
            new += data[high + span :]
        case "truncate":
            new = data[:at]
        case "longer":
            new = data + block
        case "empty":
            new = b""
        case "foreign":
            new = rng.randbytes(len(data))
        case _:
            path.unlink()
            return True
    path.write_bytes(new)
    return new != data


MUTATIONS = ("bit", "bit", "bit", "zeros", "swap", "truncate", "longer", "empty", "foreign", "missing")


def corruption(base: Path, count: int, seed: int = 0) -> Figures:
    """Damages one file of the newest checkpoint after the other: what `load` returns must be an older checkpoint, bit
    for bit, or (frozen tensors have a second copy) the newest from undamaged bytes."""
    figures: Figures = {"mutations": 0, "silently_wrong": 0, "not_recovered": 0, "not_named": 0, "fell_back": 0}
    rng = random.Random(seed)
    template = base / "corrupt-template"
    fill(template, 3)
    files = sorted(path.name for path in (template / "step-000000003").iterdir())
    while figures["mutations"] < count:
        run = base / "corrupt"
        shutil.copytree(template, run)
        victim = run / "step-000000003" / files[figures["mutations"] % len(files)]
        if mutate(victim, MUTATIONS[figures["mutations"] // len(files) % len(MUTATIONS)], rng):
            figures["mutations"] += 1
            _judge_corruption(run, victim, figures)
        shutil.rmtree(run)
    return figures


def _judge_corruption(run: Path, victim: Path, figures: Figures) -> None:
    lines: list[str] = []
    with ModelPersistence(run, log=lines.append) as persistence:
        try:
            checkpoint = persistence.load()
        except PersistenceError:
            figures["not_recovered"] += 1
            return
    right = same(checkpoint.state, make_state(checkpoint.step)) and same(checkpoint.frozen, make_frozen())
    figures["silently_wrong"] += not right
    if victim.name == mp.FROZEN:
        figures["not_recovered"] += checkpoint.step != 3
    else:
        figures["fell_back"] += checkpoint.step == 2
        figures["silently_wrong"] += checkpoint.step == 3
        figures["not_named"] += not any("step-000000003" in line for line in lines)


Forgery = Callable[[dict[str, Any]], None] | tuple[str, str] | bytes  # a change of the body, of its text, or all of it


def forge(folder: Path, change: Forgery) -> None:
    """Rewrites a manifest as an attacker would: with a valid digest over whatever the body has become."""
    manifest = folder / mp.MANIFEST
    body = json.loads(manifest.read_bytes())["body"]
    if callable(change):
        change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    if isinstance(change, tuple):
        pattern, replacement = change
        text, count = re.subn(pattern.encode(), replacement.encode(), text, count=1)
        assert count == 1, pattern
    elif isinstance(change, bytes):
        text = change
    digest = hashlib.sha256(text).hexdigest().encode()
    manifest.unlink()
    manifest.write_bytes(b'{"digest":"' + digest + b'","body":' + text + b"}\n")


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change that puts the last argument at the path of the others."""

    def change(body: dict[str, Any]) -> None:
        *parents, key, value = path
        for parent in parents:
            body = body[parent]
        body[key] = value

    return change


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        del body[key]

    return change


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["files"].update({new: body["files"].pop(old)})


def hostile_manifests() -> list[tuple[str, Forgery]]:
    """(name, forgery) of manifests that must all be refused, though their digests are right."""
    model, spec = "model.safetensors", {"size": 100, "sha256": "0" * 64}
    nodes: list[Any] = [{}, {"T": 1}, {"T": "../x"}, {"x": 1}, {"f": "1"}, {"f": 1}, {"t": {}}, {"d": []}, {"m": {}}]
    nodes += [{"m": [[1]]}, {"m": [[1, 1], [1, 2]]}, {"m": [[1.5, 1]]}, {"m": [[True, 1]]}, {"T": "a", "N": "a"}]
    cases: list[tuple[str, Any]] = [(f"node {json.dumps(node)}", _set("tree", "extra", node)) for node in nodes]
    names = ["../evil.safetensors", "/etc/passwd", "a/../../b", "model.safetensors\0", "x.safetensors", "", ".", ".."]
    cases += [(f"file {name!r}", _renamed(model, name)) for name in names]
    more = ("/etc/shadow", "../../x", "manifest.json")
    cases += [(f"extra file {name!r}", _set("files", name, spec)) for name in more]
    sizes: list[Any] = [-1, 0, 1 << 62, 1 << 70, 1e9, "100", True, None]
    cases += [(f"size {size!r}", _set("files", model, "size", size)) for size in sizes]
    digests: list[Any] = ["", "0" * 63, "Z" * 64, "../" + "0" * 61, 5, None]
    cases += [(f"digest {digest!r}", _set("files", model, "sha256", digest)) for digest in digests]
    cases += [(f"version {v!r}", _set("version", v)) for v in (0, 2, 99, "1", 1.0, True, None)]
    cases += [(f"step {v!r}", _set("step", v)) for v in (-1, 7, 10**10, "3", 3.0, None)]
    cases += [(f"without {key}", _drop(key)) for key in ("format", "files", "tree", "sequence", "aliases", "run")]
    cases += [("format", _set("format", "other")), ("unknown key", _set("hook", "os.system"))]
    cases += [("alias to itself", _set("aliases", "model/agent/weight", "model/agent/weight2"))]
    cases += [("alias number", _set("aliases", "model/agent/weight", 3)), ("run id", _set("run", "../../x"))]
    cases += [("metric text", _set("metrics", "accuracy_delta", "high")), ("frozen path", _set("frozen", "../../x"))]
    cases += [("frozen missing", _set("frozen", None)), ("tree list", _set("tree", []))]
    cases += [("tree empty", _set("tree", {})), ("tree of a text", _set("tree", "model"))]
    deep = b"[" * 100_000 + b"]" * 100_000
    cases += [("deep nesting", deep), ("deep nodes", _deepen), ("tensors left out", _set("tree", "extra", None))]
    cases += [(f"created {text}", (r'"created":[0-9.]+', f'"created":{text}')) for text in ("NaN", "Infinity", "1e999")]
    cases += [("step twice", ('"step":3', '"step":3,"step":3')), ("not ASCII", ("accuracy_delta", "accuracy_délta"))]
    cases += [("huge integer", ('"scale"', '"x":' + "9" * 5000 + ',"scale"')), ("trailing", (r"}$", "} {}"))]
    cases += [("a list", b"[]"), ("nothing", b""), ("not JSON", b"{'a': 1}"), ("pickle", b"\x80\x04K\x01.")]
    return cases


def _deepen(body: dict[str, Any]) -> None:
    for _ in range(200):
        body["tree"]["extra"] = [body["tree"]["extra"]]


def hostile_headers() -> list[tuple[str, bytes]]:
    """(name, safetensors file with one tensor "w") that must all be refused, though size and digest are right."""
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    changes: dict[str, dict[str, Any]] = {
        "hole": {"shape": [1], "data_offsets": [4, 8]},
        "bytes too many": {"shape": [1], "data_offsets": [0, 4]},
        "beyond the end": {"shape": [4], "data_offsets": [0, 16]},
        "negative": {"shape": [-2], "data_offsets": [8, 0]},
        "huge": {"shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]},
        "wrong shape": {"shape": [3]},
        "shape of texts": {"shape": ["2"]},
        "unknown dtype": {"dtype": "F31"},
        "dtype number": {"dtype": 3},
        "unknown key": {"file": "/etc/passwd"},
        "offsets missing": {"data_offsets": []},
    }
    headers = [(name, json.dumps({"w": {**good, **change}})) for name, change in changes.items()]
    entry = json.dumps(good)
    headers += [("twice", f'{{"w":{entry},"w":{entry}}}'), ("a list", f"[{entry}]"), ("not an object", '{"w":8}')]
    headers += [("overlap", f'{{"w":{entry},"v":{entry}}}'), ("not JSON", "{w}"), ("NaN", '{"w":NaN}')]
    files = [(name, len(text).to_bytes(8, "little") + text.encode() + bytes(8)) for name, text in headers]
    text = json.dumps({"w": good})
    lengths = (0, 7, len(text) + 9, 1 << 63)
    return files + [(f"length {n}", n.to_bytes(8, "little") + text.encode() + bytes(8)) for n in lengths]


def hostile(base: Path) -> Figures:
    """Forged manifests, links and pickles in place of the newest checkpoint's files. Each must be refused without
    opening anything outside the run, without running anything, and with the older checkpoint loaded instead."""
    template = base / "hostile-template"
    fill(template, 3)
    canary = base / "canary"
    names = ("manifests", "headers", "pickles", "links", "loaded", "outside", "executed")
    figures: Figures = dict.fromkeys(names, 0)
    figures["control"] = _control(template, base / "control")
    for _name, change in hostile_manifests():
        figures["manifests"] += 1
        _attack(template, base, canary, figures, functools.partial(forge, change=change))
    for _name, file in hostile_headers():
        figures["headers"] += 1
        _attack(template, base, canary, figures, functools.partial(_plant_model, file=file))
    payloads = pickle_payloads(canary)
    for n, payload in enumerate(payloads):
        figures["pickles"] += 1
        target = ("model.safetensors", "optim.safetensors", "extra.safetensors", mp.MANIFEST, mp.FROZEN)[n % 5]
        _attack(template, base, canary, figures, functools.partial(_plant, name=target, payload=payload))
    for target in ("model.safetensors", mp.MANIFEST):
        for source in (base / "secret", template / "step-000000003" / target):
            figures["links"] += 1
            source.touch()
            _attack(template, base, canary, figures, functools.partial(_link, name=target, source=source))
        figures["links"] += 1
        _attack(template, base, canary, figures, functools.partial(_pipe, name=target))
    figures["links"] += 1
    _attack(template, base, canary, figures, functools.partial(_link_folder, source=template / "step-000000003"))
    return figures


def _control(template: Path, run: Path) -> bool:
    """Does a harmless file planted in the same way load? Else the refusals would prove nothing."""
    shutil.copytree(template, run)
    text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    _plant_model(run / "step-000000003", len(text).to_bytes(8, "little") + text + bytes(8))
    with ModelPersistence(run, log=quiet) as persistence:
        checkpoint = persistence.load()
    return checkpoint.step == 3 and same(checkpoint.state["model"], {"w": torch.zeros(2)})


def pickle_payloads(canary: Path) -> list[bytes]:
    """Ten pickles that create the canary file when unpickled, as bytes written by hand (nothing is pickled here)."""
    command = f"touch {canary}".encode()
    return [
        bytes([0x80, protocol]) + b"c" + module + b"\n" + name + b"\n(S'" + command + b"'\ntR."
        for protocol in range(1, 6)
        for module, name in ((b"os", b"system"), (b"posix", b"system"))
    ]


def _plant(folder: Path, name: str, payload: bytes) -> None:
    """Puts bytes in the place of a file and forges the manifest to match them."""
    (folder / name).unlink()
    (folder / name).write_bytes(payload)
    if name == mp.MANIFEST:
        return
    spec = {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    key: tuple[Any, ...] = ("frozen", spec) if name == mp.FROZEN else ("files", name, spec)
    forge(folder, _set(*key))


def _plant_model(folder: Path, file: bytes) -> None:
    """Makes `file` the model of the checkpoint, whose state has one tensor then."""

    def change(body: dict[str, Any]) -> None:
        body["tree"]["model"] = {"d": {"w": {"T": "w"}}}
        body["aliases"] = {}
        body["files"]["model.safetensors"] = {"size": len(file), "sha256": hashlib.sha256(file).hexdigest()}

    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(file)
    forge(folder, change)


def _link(folder: Path, name: str, source: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(source)


def _link_folder(folder: Path, source: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(source)


def _pipe(folder: Path, name: str) -> None:
    """A named pipe: opening it to read would wait for ever."""
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _attack(template: Path, base: Path, canary: Path, figures: Figures, prepare: Callable[[Path], None]) -> None:
    run = base / "hostile"
    shutil.copytree(template, run)
    prepare(run / "step-000000003")
    opened: list[str] = []
    with hooked(lambda name, path, _: opened.append(path), ("open",)):
        with ModelPersistence(run, log=quiet) as persistence:
            checkpoint = persistence.load()
    figures["loaded"] += checkpoint.step != 2 or not same(checkpoint.state, make_state(2))
    figures["outside"] += sum(not Path(path).resolve().is_relative_to(run) for path in opened)
    figures["executed"] += canary.exists()
    shutil.rmtree(run)


# ---------------------------------------------------------------------------------------------------------------------
# Rotation, exact resume
# ---------------------------------------------------------------------------------------------------------------------


def rotation(base: Path, saves: int, seed: int = 0) -> Figures:
    """Saves with random metrics, NaN and ties among them: the five newest and the right bests remain, and a second
    run beside this one is not touched."""
    run, other = base / "rotation", base / "other"
    fill(other, 3)
    before = {str(path): path.stat().st_mtime_ns for path in sorted(other.rglob("*"))}
    rng = random.Random(seed)
    wrong, best = 0, {metric: (-math.inf, -1) for metric in mp.BEST_METRICS}
    with ModelPersistence(run, log=quiet) as persistence:
        for step in range(1, saves + 1):
            metrics = {metric: rng.choice([math.nan, math.inf, rng.randrange(20) / 10]) for metric in mp.BEST_METRICS}
            for metric, value in metrics.items():
                if math.isfinite(value) and value > best[metric][0]:
                    best[metric] = (value, step)
            persistence.save(make_state(step, 4), step=step, metrics=metrics, wait=True)
            kept = sorted(int(path.name[5:]) for path in run.glob("step-*"))
            wrong += kept != list(range(max(1, step - 4), step + 1))
            for metric, (value, at) in best.items():
                path = persistence.best(metric)
                found = None if path is None else persistence.load(path)
                wrong += (found.step if found else -1) != at or (found is not None and found.metrics[metric] != value)
    after = {str(path): path.stat().st_mtime_ns for path in sorted(other.rglob("*"))}
    return {"saves": saves, "wrong": wrong, "other_run_touched": before != after, "left_overs": len(left_overs(run))}


class Trainer:
    """A small training loop with everything that makes resuming hard: dropout, Adam, accumulation, a moving average of
    the weights, numpy and python random numbers, a tied weight. One call of `step` is one micro-batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.embed = torch.nn.Linear(8, 16, bias=False)
        self.head = torch.nn.Linear(16, 8, bias=False)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(0.2), torch.nn.Tanh())
        self.tied = self.body[0].weight
        self.model = torch.nn.ModuleDict({"embed": self.embed, "body": self.body, "head": self.head})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.micro = 0
        self.rows: list[tuple[int, float]] = []

    def step(self) -> None:
        noise = torch.from_numpy(np.random.standard_normal((4, 8)).astype(np.float32)) * random.random()
        batch = torch.randn(4, 8) + noise
        loss = (self.head(self.body(self.embed(batch))) - batch).square().mean() / 2
        loss.backward()
        self.micro += 1
        self.rows.append((self.micro, loss.item()))
        if self.micro % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.detach(), 0.1)

    def state(self) -> dict[str, Any]:
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        rng = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
        return {
            "model": {"net": self.model.state_dict(), "average": self.average, "tied": {"w": self.tied}},
            "optim": self.optimizer.state_dict(),
            "extra": {"grads": grads, "rng": rng, "micro": self.micro, "rows": self.rows},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"]["net"])
        self.average = state["model"]["average"]
        self.optimizer.load_state_dict(state["optim"])
        extra = state["extra"]
        for name, parameter in self.model.named_parameters():
            parameter.grad = extra["grads"].get(name)
        self.micro, self.rows = extra["micro"], extra["rows"]
        torch.set_rng_state(extra["rng"]["torch"])
        np.random.set_state(extra["rng"]["numpy"])
        random.setstate(extra["rng"]["python"])


def exact_resume(base: Path, positions: int, length: int = 60) -> Figures:
    """Stops at random micro-batches (half of them between two halves of an accumulated step), resumes two or three
    times in a row, and compares the whole final state with that of the uninterrupted run, at zero tolerance."""
    reference = Trainer()
    for _ in range(length):
        reference.step()
    wanted = reference.state()
    rng = random.Random(0)
    different = 0
    for n in range(positions):
        stops = sorted(rng.sample(range(1, length), 1 + n % 3))
        trainer = Trainer()
        for stop in [*stops, length]:
            while trainer.micro < stop:
                trainer.step()
            with ModelPersistence(base / f"exact-{n}", log=quiet) as persistence:
                persistence.save(trainer.state(), step=stop)
            torch.manual_seed(rng.randrange(1 << 30))  # what is not restored must show
            np.random.seed(rng.randrange(1 << 30))
            random.seed(rng.randrange(1 << 30))
            with ModelPersistence(base / f"exact-{n}", log=quiet) as persistence:
                trainer = Trainer()
                trainer.restore(persistence.load().state)
        different += not same(_plain(trainer.state()), _plain(wanted))
    return {"positions": positions, "different": different}


def _plain(value: Any) -> Any:
    """OrderedDict as dict: the one change of type that a checkpoint makes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------------------------
# Backup
# ---------------------------------------------------------------------------------------------------------------------

MOUNTS = ("healthy", "gone", "slow", "zero_length", "late", "full", "stuck")


def flaky_mount(kind: str, backup: str) -> Hook:
    """A hook that makes everything below `backup` behave like a troubled network mount."""
    born = time.monotonic()

    def hook(name: str, path: str, argument: Any) -> None:
        if not path.startswith(backup) or kind == "healthy":
            return
        if kind == "gone":
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), path)
        if kind == "full" and name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if kind == "slow" and name in ("write", "fsync", "open"):
            time.sleep(0.05)
        if kind == "stuck" and name == "write":
            time.sleep(3600)
        if kind == "late" and name == "open" and time.monotonic() - born < 0.5:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if kind == "zero_length" and name == "close" and path.endswith(".safetensors") and "ledger" not in path:
            os.truncate(path, 0)

    return hook


def train_with_backup(base: Path, kind: str | None, saves: int) -> float:
    """Wall seconds of a fixed amount of training with a save of 1.6 MB after every half second or so of it."""
    run, backup = base / "run", base / "drive"
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    backup.mkdir(parents=True, exist_ok=True)
    with hooked(flaky_mount(kind or "healthy", str(backup))):
        persistence = ModelPersistence(run, log=quiet, backup_dir=backup if kind is not None else None)
        started = time.perf_counter()
        for step in range(1, saves + 1):
            for _ in range(400):
                a = torch.tanh(a @ b)
            persistence.save(make_state(step, 400), step=step, metrics={"accuracy_delta": step})
        persistence.wait()
        took = time.perf_counter() - started
        persistence.close()
    return took


def backups(base: Path, saves: int, rounds: int) -> Figures:
    """Training time with each kind of troubled backup folder against none. The rounds are interleaved, each in another
    order, and the fastest of each kind compared: other programs can only make one slower."""
    rng = random.Random(0)
    times: dict[str | None, list[float]] = {kind: [] for kind in (None, *MOUNTS)}
    with patched_mirror({"CLOSE_WAIT": 0.2, "LATE_WAIT": 0.1, "FIRST_DELAY": 0.1}):
        for n in range(rounds):
            for kind in rng.sample(list(times), len(times)):
                times[kind].append(train_with_backup(base / f"{n}-{kind}", kind, saves))
    plain = min(times.pop(None))
    figures: Figures = {f"{kind}_overhead": round(min(values) / plain - 1, 3) for kind, values in times.items()}
    return {**figures, "worst_overhead": max(figures.values()), "training_s": round(plain, 2)}


@contextlib.contextmanager
def patched_mirror(values: dict[str, float]) -> Iterator[None]:
    """The mirror with shorter waits."""
    before = {name: getattr(Mirror, name) for name in values}
    for name, value in values.items():
        setattr(Mirror, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(Mirror, name, value)


def new_machine(base: Path) -> Figures:
    """A run that exists only in the backup is found, restored and continued, and a damaged backup is not trusted."""
    run, backup = base / "runs" / "x", base / "drive"
    backup.mkdir(parents=True)
    with ModelPersistence(run, log=quiet, backup_dir=backup) as persistence:
        for step in range(1, 8):
            (run / "metrics.jsonl").write_text("{}\n" * step)
            metrics = {"accuracy_delta": -abs(step - 3)}
            persistence.save(make_state(step), step=step, metrics=metrics, frozen=make_frozen(), wait=True)
    shutil.rmtree(base / "runs")
    _flip_bit(backup / "x" / "step-000000007" / "optim.safetensors", 1)
    found = mp.find_newest_run(backup)
    with ModelPersistence(run, log=quiet, backup_dir=backup) as persistence:
        checkpoint = persistence.load()
        best = persistence.best()
        fell_back = checkpoint.step == 3 and same(checkpoint.state, make_state(3))
        persistence.save(make_state(4), step=4, metrics={"accuracy_delta": -9}, frozen=make_frozen(), wait=True)
    mirrored = sorted(path.name for path in (backup / "x").glob("step-*"))
    return {
        "found": found == backup / "x",
        "damaged_newest_refused": fell_back,
        "frozen_restored": same(checkpoint.frozen, make_frozen()),
        "best_restored": best is not None and best.name == "best-accuracy_delta",
        "metrics_restored": (run / "metrics.jsonl").read_text() == "{}\n" * 7,
        "continued": mirrored == ["step-000000003", "step-000000004"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def cost(base: Path, megabytes: int, rounds: int = 5) -> Figures:
    """Blocking and total time of a save against a memory copy and against safetensors + fsync + SHA-256 of the same
    bytes, in the same process, medians of `rounds` interleaved measurements after two warm-ups of each."""
    from safetensors.torch import save_file

    per = megabytes * 1_000_000 // 4 // 24
    weights = {f"w{i}": torch.randn(per) for i in range(24)}
    items = list(weights.items())
    state = {"model": {"m": dict(items[:8])}, "optim": dict(items[8:])}  # Adam: two thirds are moments
    copies = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    rows: dict[str, list[float]] = {name: [] for name in ("copy", "plain", "blocking", "total")}
    with ModelPersistence(base / "cost", log=quiet, keep=1) as persistence:
        for step in range(rounds + 2):
            os.sync()
            rows["copy"].append(_timed(lambda: [copies[name].copy_(tensor) for name, tensor in weights.items()]))
            rows["plain"].append(_timed(functools.partial(_plain_save, save_file, weights, base / f"plain-{step}")))
            os.sync()
            started = time.perf_counter()
            persistence.save(state, step=step)
            rows["blocking"].append(time.perf_counter() - started)
            persistence.wait()
            rows["total"].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[2:]) for name, values in rows.items()}
    return {
        "megabytes": megabytes,
        **{f"{name}_s": round(value, 3) for name, value in medians.items()},
        "blocking_over_copy": round(medians["blocking"] / medians["copy"], 2),
        "total_over_plain": round(medians["total"] / medians["plain"], 2),
    }


def _plain_save(save_file: Callable[..., None], weights: dict[str, torch.Tensor], path: Path) -> None:
    """What a careful user would do by hand: safetensors, fsync, SHA-256 of the file, and only then the old one goes."""
    save_file(weights, path)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
    for old in path.parent.glob("plain-*"):
        if old != path:
            old.unlink()


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------------
# Parts and their demands
# ---------------------------------------------------------------------------------------------------------------------


def parts(scale: float) -> dict[str, tuple[Callable[[Path], Figures], Callable[[Figures], bool]]]:
    """Name -> (measurement, what its figures must fulfil)."""

    def n(full: int) -> int:
        return max(2, round(full * scale))

    stride = max(1, round(1 / scale))

    def no_loss(f: Figures) -> bool:
        bad = ("unrecoverable", "lost", "mixed", "left_overs", "quarantined")
        return f["kills"] > 0 and not any(f.get(name) for name in bad)

    def all_true(f: Figures) -> bool:
        return all(value for key, value in f.items() if key != "left_overs") and not f.get("left_overs")

    return {
        "kill_calls": (lambda base: kill_at_every_call(base, stride), no_loss),
        "kill_random": (lambda base: kill_at_random(base, n(300)), no_loss),
        "kill_pruning": (lambda base: kill_in_pruning(base, n(50)), no_loss),
        "kill_load": (lambda base: kill_in_load(base, n(50)), no_loss),
        "order": (order, lambda f: not any(value for key, value in f.items() if key not in ("files", "strace"))),
        "disk_errors": (
            lambda base: disk_errors(base, stride),
            lambda f: not any(value for key, value in f.items() if key != "faults"),
        ),
        "full_disk": (full_disk, all_true),
        "corruption": (
            lambda base: corruption(base, n(1000)),
            lambda f: not (f["silently_wrong"] or f["not_recovered"] or f["not_named"]),
        ),
        "hostile": (hostile, lambda f: f["control"] and not (f["loaded"] or f["outside"] or f["executed"])),
        "exact_resume": (lambda base: exact_resume(base, n(50)), lambda f: f["different"] == 0),
        "rotation": (
            lambda base: rotation(base, n(200)),
            lambda f: not (f["wrong"] or f["other_run_touched"] or f["left_overs"]),
        ),
        "backups": (lambda base: backups(base, n(4), n(15)), lambda f: f["worst_overhead"] <= 0.05),
        "new_machine": (new_machine, all_true),
        "cost": (
            lambda base: cost(base, n(1000)),
            lambda f: f["blocking_over_copy"] <= 2.0 and f["total_over_plain"] <= 1.5,
        ),
    }


def run_part(name: str, scale: float, folder: str | None = None) -> tuple[Figures, bool]:
    """Measures one part in a fresh temporary folder."""
    measure, demand = parts(scale)[name]
    with tempfile.TemporaryDirectory(prefix="persistence-", dir=folder) as base:
        figures = measure(Path(base).resolve())
    return figures, demand(figures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts(1.0)), help="parts to run (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the repetitions and bytes")
    parser.add_argument("--folder", help="where the temporary folders go: the disk to be measured")
    parser.add_argument("--json", action="store_true", help="one JSON object a part")
    parser.add_argument("--one_save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a forked child must not wait for threads it does not have
    if args.one_save:
        one_save(args.one_save)
        return 0
    failed = 0
    for name in args.only or parts(1.0):
        started = time.perf_counter()
        figures, good = run_part(name, args.scale, args.folder)
        failed += not good
        if args.json:
            print(json.dumps({"part": name, "good": good, **figures}), flush=True)
        else:
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            took = time.perf_counter() - started
            print(f"{'ok  ' if good else 'FAIL'} {name:<13} {text}  [{took:.1f} s]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
