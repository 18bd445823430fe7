"""Bringing checkpoints back from a backup."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from arc.persistence.files import copy_file, fsync_dir, removed_on_error, size_of
from arc.persistence.folder import RunFolder
from arc.persistence.manifest import Entry, frozen_path, read_manifest, scan
from arc.persistence.mirror import SIDE_FILES, backup_roots
from arc.persistence.names import FROZEN, MANIFEST, Corrupt, PersistenceError


def restore(run: RunFolder, backup_dir: Path) -> bool:
    """Brings back from the backup what is not here, every file re-hashed on the way; True if a checkpoint came."""
    restored = 0
    try:
        source = _backup_of(run, backup_dir)
        if source is None:
            return False
        for entry in reversed(scan(source)[0]):  # oldest first
            if not (run.path / entry.path.name).exists():
                restored += _restore_checkpoint(run, entry)
        for name in SIDE_FILES if restored else ():
            if size_of(run.path / name) <= 0 < size_of(source / name):
                (run.path / name).unlink(missing_ok=True)
                copy_file(source / name, run.path / name)
    except (OSError, PersistenceError) as error:
        run.log(f"[Backup] {backup_dir}: {error}")
    if restored:
        run.log(f"[Backup] restored {restored} checkpoint(s) from {source}")
    return restored > 0


def _backup_of(run: RunFolder, backup_dir: Path) -> Path | None:
    """The folder of this run in the backup: by its id where the run is known here, else the most recent."""
    known = run.adopted  # nothing may be left of it here that is not set aside
    found = []
    for root in backup_roots(backup_dir, run.path.absolute().name):
        entries, _ = scan(root)
        if entries and (not known or entries[0].run == run.run_id):
            found.append((max(entry.created for entry in entries), str(root)))
    return Path(max(found)[1]) if found else None


def _restore_checkpoint(run: RunFolder, entry: Entry) -> bool:
    tmp = run.path / f".tmp-restored-{uuid.uuid4().hex}"
    try:
        with removed_on_error(tmp):
            os.mkdir(tmp)
            for name, spec in [*entry.files.items(), *([(FROZEN, entry.frozen)] if entry.frozen else [])]:
                source = frozen_path(entry) if name == FROZEN else entry.path / name
                if copy_file(source, tmp / name) != spec:
                    raise Corrupt(f"{source} does not match its manifest")
            copy_file(entry.path / MANIFEST, tmp / MANIFEST)
            if read_manifest(tmp)[1].digest != entry.digest:
                raise Corrupt(f"{entry.path} changed while it was read")
            fsync_dir(tmp)
            run.move_in(tmp, run.path / entry.path.name)
    except (OSError, PersistenceError) as error:
        run.log(f"[Backup] {entry.path} can't be restored: {error}")
        return False
    return True
