"""The machinery behind the script's flags: all problems in one line, nothing built or written before they are
checked."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Arguments(argparse.ArgumentParser):
    """An argparse parser that collects problems instead of leaving at the first, and reports them in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(
            prog="trainloop_complete_with_fixes.py",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.problems: list[str] = []

    def error(self, message: str) -> NoReturn:
        self.problems.append(message)
        self.report()

    def report(self) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"error: {' '.join('; '.join(self.problems).split())}\n")

    def number(self, kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
        """An argparse type: a number in [low, high] (above: in (low, high]); problems are collected."""
        bound = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")

        def parse(text: str) -> Any:
            try:
                value = kind(text)
                good = math.isfinite(value) and (value > low if above else value >= low) and value <= high
            except (ValueError, OverflowError):
                good = False
            if not good:
                raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bound}")
            return value

        return parse

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # The one place all values pass on their way in; a bad one becomes a problem and the default stands in for it.
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as problem:
            reason = problem.message
            if action.choices is not None:
                reason = f"{arg_strings[0]!r} is none of {', '.join(map(str, action.choices))}"
            self.problems.append(f"{'/'.join(action.option_strings)}: {reason}")
            return action.default


def cannot_write(folder: Path) -> str | None:
    """Why nothing could be written below `folder`, or None; creates nothing."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"no permission to write in {place}"
    return None


def default_cache() -> str:
    """The user's cache folder."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "arc-trainloop"
    )


def in_ipython() -> bool:
    """Whether this process is IPython's, as a notebook's kernel is; not whether something has imported IPython."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def own_arguments() -> list[str]:
    """The command line's arguments that are the script's own: none in a notebook's cell.

    There `sys.argv` is the command line of the kernel, whose launcher has many names (Colab's is not ipykernel's). What
    tells a cell is that its `__main__` has no file, while that of `%run script.py --flag` has one.
    """
    in_cell = in_ipython() and not hasattr(sys.modules["__main__"], "__file__")
    return [] if in_cell else sys.argv[1:]
