"""The machinery behind the script's flags: one dataclass says what there is, what it is for and what a resumed run may
change; all problems come in one line, and nothing is built or written before they are checked."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from arc.run.files import UserError, read_json


class Resume(Enum):
    """What --resume makes of a flag."""

    FIXED = "enters the maths of a training step: the checkpoint's value holds, another one is refused"
    MODEL = "the same, but --eval_only may change it: another machine, another copy of the same Qwen"
    FREE = "may be changed; where it is not given the checkpoint's value holds"
    COMMAND = "belongs to each command: where it runs, how it behaves; the checkpoint's value is never taken"
    UNSAVED = "only says where flags come from and go to"


@dataclass(frozen=True)
class Flag:
    """What a field of a dataclass of flags is on the command line: group and text of --help, and argparse's options."""

    group: str
    help: str
    resume: Resume
    options: Mapping[str, Any]


def flag(group: str, default: Any, text: str, kind: Any = None, resume: Resume = Resume.FIXED, **options: Any) -> Any:
    """A field that is a flag of its name. kind: a function of the text, or a tuple of choices; none for a switch and a
    string. options: more for argparse, and `also`, other names."""
    if isinstance(kind, tuple):
        options["choices"] = kind
    elif kind is not None:
        options["type"] = kind
    if isinstance(default, bool):
        options["action"] = "store_true"
    return dataclasses.field(default=default, metadata={"flag": Flag(group, text, resume, options)})


def declared(flags: Any) -> dict[str, Flag]:
    """The flags of a dataclass, or of an instance, by name in the order of the source."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(flags)}


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


def comma_separated(text: str) -> list[str]:
    """The parts of 'a, b,' without what is empty: ['a', 'b']."""
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclass(frozen=True, eq=False)
class NumbersOf:
    """An argparse type: whole numbers out of `allowed`, separated by commas, sorted and each once: '3,1' -> (1, 3)."""

    allowed: Collection[int]
    what: str  # for messages

    def __call__(self, text: str) -> tuple[int, ...]:
        try:
            chosen = {int(part) for part in comma_separated(text)}
        except ValueError:
            chosen = {min(self.allowed) - 1}
        if not chosen <= set(self.allowed):
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of {self.what}")
        return tuple(sorted(chosen))


def path(text: str) -> str:
    """An argparse type: a path, or a name that stands for one; a leading ~ is the home folder. No line breaks or other
    control characters: messages and log lines name it. Not empty, as a shell makes it of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no name that a file can have") from None
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} has a control character in it")
    return os.path.expanduser(text)


whole = functools.partial(Number, int)
real = functools.partial(Number, float)


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

    def __init__(self, flags: type, description: str) -> None:
        super().__init__(
            prog="trainloop_complete_with_fixes.py",
            usage="%(prog)s [flags]",
            description=description,
            allow_abbrev=False,
            formatter_class=Help,
        )
        self.problems: list[str] = []
        self.config: dict[str, Any] = {}  # what --config says
        self.actions: dict[str, argparse.Action] = {}
        groups: dict[str, argparse._ArgumentGroup] = {}
        for field in dataclasses.fields(flags):
            what: Flag = field.metadata["flag"]
            if what.group not in groups:  # in the order of the source
                groups[what.group] = self.add_argument_group(what.group)
            options = dict(what.options)
            names = (f"--{field.name}", *options.pop("also", ()))
            add = groups[what.group].add_argument
            self.actions[field.name] = add(*names, default=field.default, help=what.help, **options)

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], set[str], set[str]]:
        """The values by name; which were chosen for this command; which were given at all, on the command line or by
        --config. Chosen is what is typed, or is in a --config that names a few flags: one that lists them all, as a
        run's own does, says what they happened to be. A problem does not end it: see `problems`."""
        parsed, unknown = self.parse_known_args(argv)
        values = vars(parsed)
        if unknown:
            self.problems.append(f"unknown: {' '.join(unknown)}")
        typed = {
            name
            for name, action in self.actions.items()
            for option in action.option_strings
            if any(word == option or word.startswith(option + "=") for word in argv)
        }
        given = set(typed)
        if values["config"] is not None:
            self.config = read_config(self, Path(values["config"]), resuming=values["resume"] is not None)
            values |= {name: value for name, value in self.config.items() if name not in typed}
            given |= {name for name, value in self.config.items() if value is not None}  # null: when the model is built
        return values, given if len(self.config) < len(self.actions) // 2 else typed, given

    def error(self, message: str) -> NoReturn:
        self.problems.append(message)
        self.report()

    def report(self) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"error: {' '.join('; '.join(self.problems).split())}\n")

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
            if action.nargs is None and arg_strings == ["--"]:  # argparse drops it and would give an empty list
                value = self._get_value(action, "--")
                self._check_value(action, value)
                return value
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


# ----------------------------------------------------------------------------------------------------------------------
# Flags from a JSON file: --config
# ----------------------------------------------------------------------------------------------------------------------

OF_THE_PARSER = {"config", "print_config"}
# What a run's own record says of the command that made it, not of its settings.
OF_ANOTHER_COMMAND = {"resume", "eval_only", "submission"}


def read_config(parser: Arguments, file: Path, *, resuming: bool) -> dict[str, Any]:
    """The flags in a JSON object {name without dashes: value}, checked as on the command line. Problems are added to
    the parser's.

    A run's own config.json repeats its settings: it is another command that is given now, so `resume`, `eval_only` and
    `submission` are not taken from it, and its folder only when that run is to be continued (resuming).
    """
    try:
        content = read_json(file)
    except UserError as problem:
        parser.problems.append(f"--config {problem}")
        return {}
    if not isinstance(content, dict):
        parser.problems.append(f"--config {file}: is not a JSON object of flags")
        return {}
    if is_a_runs_record(file):
        left_out = OF_ANOTHER_COMMAND if resuming else OF_ANOTHER_COMMAND | {"output_dir"}
        content = {name: value for name, value in content.items() if name not in left_out}
    actions = {name: action for name, action in parser.actions.items() if name not in OF_THE_PARSER}
    also = {option.lstrip("-"): name for name, action in actions.items() for option in action.option_strings}
    values = {}
    for written, value in content.items():
        name = also.get(written, written)
        try:
            if name not in actions or (name != written and name in content):
                raise ValueError("there is no such flag")
            values[name] = flag_value(parser, actions[name], value)
        except ValueError as problem:
            parser.problems.append(f"--config {file}: {written[:80]!r}: {problem}")
    return values


def is_a_runs_record(file: Path) -> bool:
    """Whether the file is the one in a run's folder, or in its backup: beside logs or checkpoints."""
    beside = file.resolve().parent
    named = any((beside / name).is_file() for name in ("metrics.jsonl", "train.log"))
    saved = any(any(beside.glob(f"{kind}-*/manifest.json")) for kind in ("step", "best"))
    return file.name == "config.json" and (named or saved)


def flag_value(parser: Arguments, action: argparse.Action, value: object) -> Any:
    """The flag's value for a JSON value of the flag's own type: a number, true or false, a string, a list (or its
    comma-separated form) where there can be several, null where the default is not known beforehand. ValueError with
    the reason."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{shown(value)} is neither true nor false")
    if isinstance(action.type, Number):
        fits = (int,) if action.type.kind is int else (int, float)
        if type(value) in fits:
            return parser.value_of(action, json.dumps(value))
        raise ValueError(f"{shown(value)} is not {'a whole' if action.type.kind is int else 'a'} number")
    if isinstance(action.default, tuple) and isinstance(value, list):
        if all(type(part) in (int, str) for part in value):
            return parser.value_of(action, ",".join(map(str, value)))
        raise ValueError(f"{shown(value)} is not a list of what {action.option_strings[0]} takes")
    if isinstance(value, str):
        return parser.value_of(action, value)
    raise ValueError(f"{shown(value)} is not a string")


def shown(value: object) -> str:
    """A JSON value for a message; containers and long texts are not printed."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:80]


# ----------------------------------------------------------------------------------------------------------------------
# Flags from a checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def saved_flags(flags: Any) -> dict[str, Any]:
    """The flags as plain values, sorted by name, as config.json and checkpoints have them."""
    names = sorted(name for name, what in declared(flags).items() if what.resume is not Resume.UNSAVED)
    values = {name: getattr(flags, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def adopt_flags(
    parser: Arguments, flags: Any, given: set[str], saved: object, *, free: set[str], own: set[str]
) -> None:
    """On resume: flags not given take the checkpoint's values; one given that changes the maths is refused by name
    (UserError). free, own: flags that are `FREE` and `COMMAND` this time. A checkpoint may come from elsewhere: each of
    its values passes the check that a --config's does."""
    if not isinstance(saved, dict):
        raise UserError("--resume: the checkpoint's flags are not an object of flags")
    changed = []
    for name, what in sorted(declared(flags).items()):
        if name not in saved or what.resume in (Resume.COMMAND, Resume.UNSAVED) or name in own:
            continue
        try:
            value = flag_value(parser, parser.actions[name], saved[name])
        except ValueError as problem:
            raise UserError(f"--resume: the checkpoint's --{name}: {problem}") from None
        if name not in given:
            setattr(flags, name, value)
        elif what.resume is not Resume.FREE and name not in free and getattr(flags, name) != value:
            changed.append(f"--{name} {getattr(flags, name)} (the checkpoint has {value})")
    if changed:
        raise UserError(f"--resume: cannot change {', '.join(changed)}")
