"""Flags and --config: whatever is given is resolved, or refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import ATTACK, SCALARS, VALUES, WORDS, as_text, damaged_bytes, damaged_json, refused_or_done

from arc.run.flags import declared
from trainloop_complete_with_fixes import Flags

NAMES = sorted(declared(Flags))
WORD = st.one_of(st.sampled_from(WORDS), SCALARS.map(str), st.text(max_size=6))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own, with a file in it; where commands here are run."""
    folder = tmp_path_factory.mktemp("flags")
    (folder / "task.json").write_text("{}")
    return folder


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Flags with values that fit or do not, stray words among them."""
    words: list[str] = []
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=5)):
        form, value = draw(st.sampled_from(["apart", "joined", "alone", "twice"])), draw(WORD)
        flag = f"--{name}"
        words += {
            "apart": [flag, value],
            "joined": [f"{flag}={value}"],
            "alone": [flag],
            "twice": [flag, value, flag, draw(WORD)],
        }[form]
    return words + draw(st.lists(WORD, max_size=1))


@ATTACK
@given(command_lines())
def test_command_lines(workplace: Path, words: list[str]) -> None:
    here = os.getcwd()
    os.chdir(workplace)
    try:
        said = refused_or_done(["--device", "cpu", *words, "--print_config"], workplace)
    finally:
        os.chdir(here)
    if said.code == 0 and not {"--help", "-h"} & set(words):
        assert isinstance(json.loads(said.out), dict)


SOUND = {"epochs": 3, "agent_lr": 3e-4, "ablate": [1, 3], "val_splits": ["seed"], "data": "arcagi1", "no_policy": True}
CONFIGS = st.one_of(
    st.dictionaries(st.sampled_from([*NAMES, "nonsense"]), VALUES, max_size=5).map(as_text),
    damaged_json(SOUND).map(as_text),
    damaged_bytes(as_text(SOUND)),
    VALUES.map(as_text),
)


@ATTACK
@given(CONFIGS)
def test_configuration_files(workplace: Path, content: bytes) -> None:
    path = workplace / "flags.json"
    path.write_bytes(content)
    said: Any = refused_or_done(["--config", str(path), "--device", "cpu", "--print_config"], workplace)
    assert said.code == 2 or isinstance(json.loads(said.out), dict)
