"""Names and limits of a run folder, and what may go wrong with one."""

from __future__ import annotations

import re
import uuid

FORMAT = "arc-checkpoint"
VERSION = 1
GROUPS = ("model", "optim", "extra")
BEST_METRICS = ("accuracy_delta", "val_accuracy")  # in the order in which load("best") prefers them
MANIFEST = "manifest.json"
FROZEN = "frozen.safetensors"

MAX_STEP = 999_999_999
MAX_MANIFEST_BYTES = 32 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_FILE_BYTES = 1 << 44
MAX_DEPTH = 64
MAX_INT_BITS = 4096  # Python refuses to parse decimal strings beyond 4,300 digits
CHUNK = 4 << 20  # large enough for the disk, small enough to be hashed while it is still in the cache

STEP_NAME = re.compile(r"step-(\d{9})")
BEST_NAME = re.compile(r"best-(" + "|".join(BEST_METRICS) + ")")
OLD_NAME = re.compile(rf"\.old-({STEP_NAME.pattern}|{BEST_NAME.pattern})-[0-9a-f]{{32}}")
TMP_NAME = re.compile(r"\.tmp-[0-9A-Za-z_.-]+")
BLOB_NAME = re.compile(r"sha256-([0-9a-f]{64})\.safetensors")
RUN_ID = re.compile(r"[0-9a-f]{32}")
HEX = re.compile(r"[0-9a-f]{64}")


def old_name(name: str) -> str:
    """What a checkpoint is called (`OLD_NAME`) from when it makes room for another of its name until that is there."""
    return f".old-{name}-{uuid.uuid4().hex}"


class PersistenceError(RuntimeError):
    """A save, load or lock that failed; the message is one line that names the file or the place in the state."""


class Corrupt(PersistenceError):
    """Content that fails verification: the checkpoint is set aside and an older one is tried."""


class FrozenMissing(PersistenceError):
    """The blob of a checkpoint is gone or damaged: the checkpoint's own files may be fine, so it stays in place."""
