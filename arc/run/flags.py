"""The machinery behind the script's flags: all problems in one line, nothing built or written before they are
checked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Number:
    """An argparse type: a whole number (kind int) or any finite one (float) in [low, high]; above: in (low, high]."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
            good = math.isfinite(value) and (value > self.low if self.above else value >= self.low)
            good = good and value <= self.high
        except (ValueError, OverflowError):
            good = False
        if not good:
            bound = f"{'above' if self.above else 'at least'} {self.low:g}"
            bound += "" if self.high == math.inf else f" and at most {self.high:g}"
            what = "a whole" if self.kind is int else "a"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} number {bound}")
        return value


class Help(argparse.HelpFormatter):
    """Help that ends with the flag's default, unless the text names it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if default is argparse.SUPPRESS or "default" in text:
            return text
        if action.nargs == 0:
            return f"{text} (default: {'on' if default else 'off'})"
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str("" if default is None else default)
        return f"{text} (default: {shown.replace('%', '%%') or 'none'})"


class Arguments(argparse.ArgumentParser):
    """An argparse parser that collects problems instead of leaving at the first, and reports them in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(
            prog="trainloop_complete_with_fixes.py",
            usage="%(prog)s [flags]",
            description=description,
            allow_abbrev=False,
            formatter_class=Help,
        )
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self.problems: list[str] = []

    def error(self, message: str) -> NoReturn:
        self.problems.append(message)
        self.report()

    def report(self) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"error: {' '.join('; '.join(self.problems).split())}\n")

    def declare_groups(self, titles: Sequence[str]) -> None:
        """The groups of --help in their order, wherever in the source their flags stand."""
        self._groups = {title: self.add_argument_group(title) for title in titles}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """A declared group."""
        return self._groups[title]

    def value_of(self, action: argparse.Action, text: str) -> Any:
        """The value that `text` gives to a flag. ValueError with the reason, without the flag's name."""
        try:
            value = self._get_value(action, text)
            self._check_value(action, value)
        except argparse.ArgumentError as problem:
            raise ValueError(self._reason(action, text, problem)) from problem
        return value

    def _reason(self, action: argparse.Action, text: str, problem: argparse.ArgumentError) -> str:
        if action.choices is not None:
            return f"{text!r} is none of {', '.join(map(str, action.choices))}"
        return problem.message

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # The one place all values pass on their way in; a bad one becomes a problem and the default stands in for it.
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as problem:
            reason = self._reason(action, arg_strings[0] if arg_strings else "", problem)
            self.problems.append(f"{'/'.join(action.option_strings)}: {reason}")
            return action.default


def ipython_shell() -> Any:
    """The shell whose process this is, as a notebook's kernel is one; None where something merely imported IPython."""
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def own_arguments() -> list[str]:
    """The command line's arguments that are the script's own: none in a notebook's cell.

    There `sys.argv` is the command line of the kernel, whose launcher has many names (Colab's is not ipykernel's). What
    tells a cell is that its `__main__` has no file, while that of `%run script.py --flag` has one.
    """
    in_cell = ipython_shell() is not None and not hasattr(sys.modules["__main__"], "__file__")
    return [] if in_cell else sys.argv[1:]
