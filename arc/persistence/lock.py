"""One writer a run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from arc.persistence.names import PersistenceError

try:
    import fcntl
except ImportError:  # Windows: the lock falls back to a heartbeat file
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """One writer a run. flock where there is one: the kernel frees it when its holder dies, however it dies. On a
    folder without flock (some network mounts): a file that its holder refreshes every `HEARTBEAT` seconds; one not
    refreshed for `STALE` seconds, or whose holder was on this machine and is dead, is taken over."""

    HEARTBEAT, STALE = 20.0, 120.0
    REMAINS = 5.0  # seconds in which a dead holder's children let go of a lock that they were born with

    def __init__(self, run: Path, log: Callable[[str], None]) -> None:
        self._path = run / "LOCK"
        self._log = log
        self._fd: int | None = None
        self._stop = threading.Event()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self._path, flags, 0o644)
        try:
            self._exclusive = self._flock(fd)
            if not self._exclusive:
                self._take_by_heartbeat(fd)
            self._write_card(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        if not self._exclusive:
            threading.Thread(target=self._beat, daemon=True, name="checkpoint-lock").start()

    def _flock(self, fd: int) -> bool:
        if fcntl is None:
            return False
        until = time.monotonic() + self.REMAINS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not self._holder_is_dead(fd) or time.monotonic() > until:
                    text = f"{self._path.parent} is in use by another run ({self._holder(fd)})"
                    raise PersistenceError(text) from None
                time.sleep(0.05)
            except OSError:
                return False  # ENOTSUP, ENOLCK, ENOSYS, EINVAL: this file system has no such locks

    def _take_by_heartbeat(self, fd: int) -> None:
        try:
            pid, host = self._read_card(fd)
        except (ValueError, KeyError, TypeError):
            return  # released, or never written
        dead = host == socket.gethostname() and not _is_alive(pid)
        age = time.time() - os.fstat(fd).st_mtime
        if not dead and age < self.STALE and (pid, host) != (os.getpid(), socket.gethostname()):
            raise PersistenceError(
                f"{self._path.parent} is in use by process {pid} on {host}, last seen {age:.0f} s ago; "
                f"if that is gone, wait {self.STALE:.0f} s or delete {self._path}"
            )
        self._log(f"[Checkpoint] taking over the lock that process {pid} on {host} left in {self._path.parent}")

    def _write_card(self, fd: int) -> None:
        card = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time()), "id": uuid.uuid4().hex}
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, json.dumps(card).encode())
        if not self._exclusive:  # two that found the lock free at the same instant: the one that wrote last has it
            time.sleep(0.2)
            os.lseek(fd, 0, os.SEEK_SET)
            if json.loads(os.read(fd, 4096)) != card:
                raise PersistenceError(f"{self._path.parent} was taken by another process at this moment")

    @staticmethod
    def _read_card(fd: int) -> tuple[int, str]:
        os.lseek(fd, 0, os.SEEK_SET)
        held = json.loads(os.read(fd, 4096))
        return int(held["pid"]), str(held["host"])[:80]

    def _holder_is_dead(self, fd: int) -> bool:
        try:
            pid, host = self._read_card(fd)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return host == socket.gethostname() and not _is_alive(pid)

    def _holder(self, fd: int) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return "process {} on {}".format(*self._read_card(fd))
        return "another process"

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def abandon(self) -> None:
        """In a forked child: drops the child's share of the lock, or it would outlive a killed parent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        self._stop.set()
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)  # not unlinked: another process may be opening it right now
        os.close(self._fd)
        self._fd = None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
