"""What the attacks have in common: values that nobody expects, ways to damage what was sound, and what must hold.

A fixed share of them is part of the suite; as many as wanted, and others each time:

    FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from arc.run.files import UserError
from trainloop_complete_with_fixes import main

_ASKED = os.environ.get("FUZZ_EXAMPLES")
ATTACK = settings(
    deadline=None,
    max_examples=int(_ASKED or 40),
    derandomize=not _ASKED,  # the suite's share is always the same
    database=None,
    suppress_health_check=list(HealthCheck),
)
PATIENCE = 30.0  # seconds of computing for one input; the slowest take a second or two
STARVED = 300.0  # seconds on the clock, where other programs may have the cores

WORDS = (
    *("", " ", "-", "--", "-1", "0", "1", "3", "2.5", "1e308", "1e999", "nan", "inf", "-inf", "9" * 40, "٣", "1_000"),
    *("0x10", "True", "false", "None", "null", "[]", "{}", "1,2", ",", "1,,2", "a=b", "~", "~nobody/x", "..", "/", "."),
    *("/dev/null", "/dev/full", "x" * 300, "é", "\udcff", "a\nb", "a\rb", "\x1b[2J", "\x00", "%s", "%(prog)s", "@file"),
    *(
        "generated",
        "arcagi1",
        "tiny",
        "latest",
        "best",
        "cpu",
        "all",
        "basic",
        "seed",
        "gpu",
        "full",
        "runs",
        "task.json",
    ),
)
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, 1e308]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    keys: Iterator[Any] = iter(())
    if isinstance(value, dict):
        keys = iter(list(value))
    elif isinstance(value, list):
        keys = iter(range(len(value)))
    for key in keys:
        yield value, key
        yield from places(value[key])


@st.composite
def damaged_json(draw: st.DrawFn, sound: Any) -> Any:
    """A copy of `sound` in which one to three things are something else, twice there or not there."""
    copy = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(copy))
        if not found:
            return draw(VALUES)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "double"]))
        if change == "replace":
            container[key] = draw(VALUES)
        elif change == "remove":
            del container[key]
        elif change == "wrap":
            container[key] = [container[key]]
        elif isinstance(container, list):
            container.insert(key, container[key])
        else:
            container[f"{key}_"] = container[key]
    return copy


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """`sound` cut, with a byte changed, with a piece twice, or with something in between."""
    at = draw(st.integers(0, max(0, len(sound) - 1)))
    piece = draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"\x00" * 64, b"\xff\xfe", b"[" * 5000, b"1" * 5000]))
    )
    change = draw(st.sampled_from(["cut", "flip", "insert", "double"]))
    if change == "cut":
        return sound[:at]
    if change == "flip":
        return sound[:at] + bytes([sound[at] ^ (1 << draw(st.integers(0, 7)))]) + sound[at + 1 :] if sound else b"\x00"
    return sound[:at] + (piece if change == "insert" else sound[at : at + 200]) + sound[at:]


def as_text(value: Any) -> bytes:
    """JSON, also of what no strict writer would write (NaN, half characters)."""
    return json.dumps(value).encode()


@contextlib.contextmanager
def bounded(what: object = "") -> Iterator[None]:
    """What is done inside ends in bounded time; what: shown where it does not."""
    started, computed = time.monotonic(), time.process_time()
    yield
    taken = time.process_time() - computed, time.monotonic() - started
    assert taken[0] < PATIENCE and taken[1] < STARVED, (what, taken)


@dataclass(frozen=True)
class Said:
    """What a command has said."""

    code: int
    out: str
    err: str


def call(flags: Sequence[str], command: Callable[[Sequence[str]], int] = main) -> Said:
    """The command, in this process and in bounded time."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(flags), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(list(flags))
    return Said(code, out.getvalue(), err.getvalue())


def everything(folder: Path) -> dict[str, bytes]:
    """Content by path of all regular files below `folder`."""
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    }


def refused_or_done(flags: Sequence[str], folder: Path, codes: Sequence[int] = (0,)) -> Said:
    """The command ends in one of `codes`, or refuses: 2, one line on stderr, nothing else, and no file changed."""
    before = everything(folder)
    said = call(flags)
    assert said.code in (*codes, 2), (flags, said)
    if said.code == 2:
        assert said.out == "" and said.err.startswith("error: "), (flags, said)
        assert len(said.err.splitlines()) == 1 and said.err.endswith("\n"), (flags, said)
        assert everything(folder) == before, flags
    return said


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it refuses with one line; in bounded time."""
    with bounded():
        try:
            return read()
        except UserError as problem:
            assert str(problem) and len(str(problem).splitlines()) == 1, repr(problem)
            return None
