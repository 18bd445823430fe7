"""Flags from a JSON file: `--config`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arc.run.files import read_json
from arc.run.flags import Arguments, Number

OF_THE_PARSER = {"help", "config", "print_config"}
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
    except ValueError as problem:
        parser.problems.append(f"--config {problem}")
        return {}
    if not isinstance(content, dict):
        parser.problems.append(f"--config {file}: is not a JSON object of flags")
        return {}
    if is_a_runs_record(file):
        left_out = OF_ANOTHER_COMMAND if resuming else OF_ANOTHER_COMMAND | {"output_dir"}
        content = {name: value for name, value in content.items() if name not in left_out}
    actions = {action.dest: action for action in parser._actions if action.dest not in OF_THE_PARSER}
    values = {}
    for name, value in content.items():
        try:
            if name not in actions:
                raise ValueError("there is no such flag")
            values[name] = flag_value(parser, actions[name], value)
        except ValueError as problem:
            parser.problems.append(f"--config {file}: {name[:80]!r}: {problem}")
    return values


def is_a_runs_record(file: Path) -> bool:
    """Whether the file lies in a run's folder, or in its backup: beside logs or checkpoints."""
    beside = file.resolve().parent
    named = any((beside / name).is_file() for name in ("metrics.jsonl", "train.log"))
    return named or any(any(beside.glob(f"{kind}-*/manifest.json")) for kind in ("step", "best"))


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
