"""Lines for people."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """`print`, with an escape in place of each character that stdout's encoding does not have."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
