"""Checkpoints that never lose a run: crash-safe, verified before use, exact.

What is promised
    * A checkpoint that `save` has acknowledged (`wait` returned, or the next `save` did not raise) survives a kill at
      any instant and a power loss; a checkpoint that was being written is either wholly there or not there at all.
    * Nothing is loaded that differs in one bit from what was saved: every file has its size and SHA-256 in the
      manifest and the manifest has its own; what fails is set aside by name and the next older one is used.
    * Nothing that is loaded can run code: tensors are in safetensors files, everything else is strict JSON.
    * The tree that comes back is the tree that went in: key types, tuples, dtypes, ties, non-finite numbers.

Layout of a run folder
    LOCK                                     held by the one writer
    blobs/sha256-<hex>.safetensors           tensors that do not train, stored once, hard-linked into the checkpoints
    step-000000050/                          model.safetensors optim.safetensors extra.safetensors manifest.json
    best-accuracy_delta/ best-val_accuracy/  hard links to a step's files and a manifest of their own
    .tmp-…                                   unfinished or being deleted: swept by the next writer
    .old-<name>-<id>                         a checkpoint while its replacement is moved in; put back if that fails
    .bad-<name>-<id>                         quarantined: named in the log, never deleted by this module

Commit order
    write and fsync each file -> manifest, fsync -> fsync the folder -> rename -> fsync the parent -> best -> prune.
    There is no file that says which checkpoint is the latest: each manifest carries a sequence number that grows with
    every save of the run, and readers scan. (A step number would not do: after resuming from an older checkpoint the
    steps of the abandoned future are larger than those of the new saves.)

Use
    with ModelPersistence("runs/x", backup_dir=setup_drive_backup("runs/x")) as persistence:
        checkpoint = persistence.load("latest")                  # .state, .step, .metrics, .frozen
        state = {"model": {"agent": agent.state_dict()}, "optim": optimizer.state_dict(), "extra": {"epoch": 3}}
        persistence.save(state, step=150, metrics={"accuracy_delta": 0.02})
    python model_persistence.py inspect runs/x  |  verify runs/x  |  export runs/x DEST

What it does not promise: a disk that lies about fsync, two writers on a network folder that has no locks where clocks
differ by minutes, one was suspended for minutes or two machines have one name, or someone who edits a file *and* forges
the digests.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from arc.persistence.export import export_best
from arc.persistence.manifest import Checkpoint
from arc.persistence.names import (
    BEST_METRICS,
    CHUNK,
    FORMAT,
    FROZEN,
    GROUPS,
    MANIFEST,
    MAX_DEPTH,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_INT_BITS,
    MAX_MANIFEST_BYTES,
    MAX_STEP,
    VERSION,
    PersistenceError,
)  # fmt: skip
from arc.persistence.runs import CheckpointInfo, find_newest_run, human, setup_drive_backup
from arc.persistence.say import say
from arc.persistence.store import ModelPersistence, newest_checkpoint

__all__ = [
    "Checkpoint", "CheckpointInfo", "ModelPersistence", "PersistenceError", "export_best", "find_newest_run",
    "newest_checkpoint", "setup_drive_backup",
    "BEST_METRICS", "CHUNK", "FORMAT", "FROZEN", "GROUPS", "MANIFEST", "MAX_DEPTH", "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES", "MAX_INT_BITS", "MAX_MANIFEST_BYTES", "MAX_STEP", "VERSION",
]  # fmt: skip


def _cannot_list(run: Path, *, export: bool) -> str | None:
    """Why the folder given as RUN is none of a run, as far as its names tell, or None; a checkpoint's will do to
    export it."""
    try:
        if MANIFEST in os.listdir(run) and not export:
            return f"{run} is a checkpoint: give the folder of its run, {run.absolute().parent}"
    except (FileNotFoundError, NotADirectoryError):
        return f"{run} is not a folder"
    except (OSError, ValueError) as error:  # too long a name, no permission
        return f"{str(run)[:60]!r} can't be listed: {getattr(error, 'strerror', None) or error}"
    return None


def _folder(text: str) -> Path:
    """An argparse type. Not empty, as a shell makes it of a variable that is not set: that would be this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return Path(text).expanduser()


def _print_inspection(infos: Sequence[CheckpointInfo]) -> None:
    say(f"{'checkpoint':<24} {'step':>9} {'size':>10}  {'saved (UTC)':<19}  {'verified':<10} metrics")
    for info in infos:
        step = "-" if info.step is None else str(info.step)
        when = "-" if info.created is None else _moment(info.created)
        metrics = " ".join(f"{name}={value:.6g}" for name, value in info.metrics.items())
        verified = "ok" if info.problem is None else "FAILED"
        say(f"{info.path.name:<24} {step:>9} {human(info.bytes):>10}  {when:<19}  {verified:<10} {metrics}".rstrip())
        if info.problem is not None:
            say(f"{'':<24} {info.problem}")


def _moment(created: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(created))
    except (OSError, OverflowError, ValueError):  # whoever wrote the manifest may have written any time
        return "?"


def _verify(infos: Sequence[CheckpointInfo]) -> int:
    live = [info for info in infos if info.kind in ("step", "best")]
    for info in live:
        say(f"{info.path.name}: {'ok' if info.problem is None else f'FAILED: {info.problem}'}")
    if not live:
        say("no checkpoints")
    return 0 if live and all(info.problem is None for info in live) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python model_persistence.py`; returns 0, 1 (something is not valid), 2 (wrong arguments) or 130
    (interrupted)."""
    parser = argparse.ArgumentParser(description="Look at, verify and export checkpoints; changes no run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "list checkpoints with step, size, metrics and verification result"),
        ("verify", "read every byte of every checkpoint; exit code 1 if one fails"),
        ("export", "write the weights of the best model, or of one checkpoint, to a new folder DEST"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "run", metavar="RUN", type=_folder, help="run folder, of runs/ or of a backup; export: or a checkpoint's"
        )
        if name == "export":
            command.add_argument("dest", metavar="DEST", type=_folder, help="folder to create")
            command.add_argument(
                "--base", metavar="DIR", type=_folder, help="of a LoRA run: where its base model is now"
            )
    args = parser.parse_args(argv)
    if problem := _cannot_list(args.run, export=args.command == "export"):
        print(problem, file=sys.stderr)
        return 2
    try:
        if args.command == "export":
            export_best(args.run, args.dest, base=args.base)
            return 0
        infos = ModelPersistence(args.run, read_only=True).inspect()
        if args.command == "verify":
            return _verify(infos)
        if not infos:
            print(f"{args.run} holds no checkpoint", file=sys.stderr)
            return 1
        _print_inspection(infos)
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (PersistenceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
