"""--config and --print_config: where a flag's value comes from, and what is said when a file is no good."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallRun
from helpers import Tripwire, everything_below, load, run_into, strict_json

from arc.run.flags import Number, saved_flags
from trainloop_complete_with_fixes import main, parse_arguments

Said = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flags.json"


@pytest.fixture
def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """`refused(content, *flags)`: the one line that is said to this file; all that a refusal promises is checked."""

    def run(content: str, *flags: str) -> str:
        file.write_text(content, encoding="utf-8")
        code = main(["--config", str(file), *flags])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


def given_by(file: Path, content: dict[str, Any], *flags: str) -> Any:
    file.write_text(json.dumps(content), encoding="utf-8")
    return parse_arguments(["--config", str(file), *flags])[0]


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    """What --print_config prints; it must be all of stdout, and nothing may be said besides."""
    capsys.readouterr()
    assert main([*flags, "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return strict_json(out)


def test_values_come_from_the_file_and_the_command_line_wins(file: Path) -> None:
    content = {
        **{"epochs": 3, "agent_lr": 1, "quiet": True, "strict": False, "data": "arcagi1", "amp": "off"},
        **{"ablate": [3, 1], "val_splits": ["seed", "unseen"], "qwen_lr": None, "resume": None},
    }
    args = given_by(file, content, "--epochs", "5", "--amp=bf16", "--quiet")
    assert (args.epochs, args.amp) == (5, "bf16")
    assert (args.agent_lr, args.quiet, args.strict, args.data) == (1.0, True, False, "arcagi1")
    assert (args.ablate, args.val_splits, args.qwen_lr, args.resume) == ((1, 3), ("seed", "unseen"), None, None)
    assert type(args.agent_lr) is float
    assert given_by(file, {"ablate": "1,3", "val_splits": "unseen"}).val_splits == ("unseen",)
    assert given_by(file, {"optim": "adamw8bit", "qwen_tune": "frozen"}).optim_qwen == "adamw8bit"  # another name of it
    assert vars(given_by(file, {})) == {**vars(parse_arguments([])[0]), "config": str(file)}


def test_every_flag_may_stand_in_the_file(file: Path) -> None:
    """A file with the default of each flag changes nothing."""
    defaults = saved_flags(parse_arguments([])[0])
    assert len(defaults) > 50
    assert saved_flags(given_by(file, defaults)) == defaults


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, ["'epoch'", "no such flag"]),
        ({"--epochs": 3}, ["'--epochs'", "no such flag"]),
        ({"config": "other.json"}, ["'config'", "no such flag"]),
        ({"help": True}, ["'help'"]),
        ({"optim": "adamw", "optim_qwen": "adamw"}, ["'optim'", "no such flag"]),
        ({"epochs": "3"}, ["'epochs'", '"3"', "whole number"]),
        ({"epochs": 3.5}, ["'epochs'", "3.5", "whole number"]),
        ({"epochs": True}, ["'epochs'", "true", "whole number"]),
        ({"epochs": 0}, ["'epochs'", "at least 1"]),
        ({"epochs": None}, ["'epochs'", "null"]),
        ({"agent_lr": [0.1]}, ["'agent_lr'", "a list", "number"]),
        ({"agent_lr": 0}, ["'agent_lr'", "above 0"]),
        ({"agent_lr": 10**400}, ["'agent_lr'", "number"]),
        ({"agent_lr": float("nan")}, ["'agent_lr'"]),
        ({"quiet": 1}, ["'quiet'", "true nor false"]),
        ({"quiet": "yes"}, ["'quiet'", "true nor false"]),
        ({"device": "tpu"}, ["'device'", "'tpu'", "cuda"]),
        ({"data": 3}, ["'data'", "string"]),
        ({"data": ["a", "b"]}, ["'data'", "a list", "string"]),
        ({"ablate": [8]}, ["'ablate'", "fixes 1 to 7"]),
        ({"ablate": [[1]]}, ["'ablate'", "a list"]),
        ({"val_splits": []}, ["'val_splits'"]),
        ({"output_dir": {}}, ["'output_dir'", "an object", "string"]),
    ],
)
def test_bad_values(content: dict[str, Any], words: list[str], refused: Said) -> None:
    line = refused(json.dumps(content))
    for word in ["--config", "flags.json", *words]:
        assert word in line


@pytest.mark.parametrize("content", ["", "[]", '"epochs"', "3", "null", '{"epochs": 3', '{"epochs": 3, "epochs": 4}'])
def test_what_is_no_object(content: str, refused: Said) -> None:
    assert "--config" in (line := refused(content)) and "flags.json" in line


def test_all_problems_in_one_line(refused: Said) -> None:
    line = refused('{"epochs": 0, "nonsense": 1, "views": 9, "batch_size": 4}', "--amp", "fp8")
    for word in ("'epochs'", "'nonsense'", "--amp", "--views 9"):
        assert word in line


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_files_that_cannot_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --config") and str(tmp_path / name) in err


def test_print_config_writes_nothing_and_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = printed(capsys, "--epochs", "7", "--ablate", "2", "--quiet")
    assert (flags["epochs"], flags["ablate"], flags["quiet"], flags["output_dir"]) == (7, [2], True, None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert printed(capsys, "--config", "flags.json") == flags
    assert printed(capsys, "--config", "flags.json", "--epochs", "8") == {**flags, "epochs": 8}


def test_a_runs_own_config_repeats_its_settings(
    small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_run(tmp_path / "first", "--max_batches", "2", "--val_limit", "1", "--agent_lr", "0.01")
    assert first.code == 0, first.stderr
    own = first.folder / "config.json"
    record = strict_json(own.read_text())
    assert record == saved_flags(parse_arguments(["--config", str(own), "--output_dir", str(first.folder)])[0])

    fresh = printed(capsys, "--config", str(own))  # a new run, in a folder of its own
    assert fresh == {**record, "output_dir": None}
    second = tmp_path / "second"
    assert main(["--config", str(own), "--output_dir", str(second), "--quiet"]) == 0
    assert load(second).state["extra"]["flags"]["agent_lr"] == 0.01

    resumed = printed(capsys, "--config", str(own), "--resume")  # that run
    assert resumed == {**record, "resume": "latest"}


def test_a_flag_that_stands_for_others_is_stronger_than_a_runs_config(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = str(small_run(tmp_path / "run", "--max_batches", "1", "--val_limit", "1").folder / "config.json")
    old = printed(capsys, "--config", own, "--old", "--agent_lr", "0.02")
    assert (old["ablate"], old["agent_lr"], old["qwen_lr"]) == ([1, 2, 3, 4, 5, 6, 7], 0.02, 5e-5)
    assert printed(capsys, "--config", own, "--adapt")["val_splits"] == ["seed", "adapted"]
    assert printed(capsys, "--config", own, "--dev")["val_splits"] == ["dev_unseen", "dev_seen"]
    assert strict_json(Path(own).read_text())["qwen_lr"] == 3e-4
    assert printed(capsys, "--config", own, "--qwen", "auto")["qwen_lr"] is None  # it was the tiny one's


SWITCHED_OFF = {"adapt": False, "task_latent": False}


@pytest.mark.parametrize(
    ("listed", "some", "flags", "expected"),
    [
        # A file that names a few flags is as good as typing them.
        ((), {**SWITCHED_OFF, "agent_width": 64}, ("--recipe", "gpu"), {**SWITCHED_OFF, "agent_width": 64}),
        ((), {"recipe": "gpu", "adapt": False}, (), {"adapt": False, "val_splits": ["seed"], "agent_width": 512}),
        ((), {"agent_lr": 0.02}, ("--old",), {"agent_lr": 0.02, "qwen_lr": 5e-5}),
        ((), {"qwen_lr": 0.02}, ("--qwen", "tiny"), {"qwen_lr": 0.02}),
        # Of a list of all what was chosen for this command is left.
        (("--agent_width", "64"), {}, ("--recipe", "gpu"), {"agent_width": 512, "adapt": True}),
        (("--adapt",), {}, ("--dev",), {"adapt": False, "val_splits": ["dev_unseen", "dev_seen"]}),
        (("--dev",), {}, ("--adapt",), {"dev": False, "val_splits": ["seed", "adapted"]}),
        ((), {}, ("--data", "generated"), {"unseen": "generated", "agent_width": 64, "recall": 16}),
        (("--data", "generated"), {}, ("--data", "arcagi1"), {"val_splits": ["seed"], "agent_width": 128, "recall": 0}),
        (("--data", "generated", "--recall", "3"), {}, ("--data", "generated"), {"recall": 3, "agent_width": 64}),
        # What a recipe cannot have here.
        ((), {}, ("--recipe", "gpu", "--dev"), {"adapt": False, "val_splits": ["dev_unseen", "dev_seen"]}),
        ((), {}, ("--recipe", "gpu", "--data", "generated", "--tasks", "0"), {"task_latent": False, "recall": 16}),
    ],
)
def test_what_is_stronger(
    listed: tuple[str, ...],
    some: dict[str, Any],
    flags: tuple[str, ...],
    expected: dict[str, Any],
    file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Between flags that stand for others, on the command line, and a --config that lists all flags or names some."""
    file.write_text(json.dumps(some or printed(capsys, *listed)))
    found = printed(capsys, "--config", str(file), *flags)
    assert {name: found[name] for name in expected} == expected


def test_what_print_config_prints_can_be_resumed_with(
    interrupted: Path, file: Path, small_flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--agent_lr", "0.01", "--save_every", "4", "--max_batches", "4", "--val_limit", "1")
    settings = printed(capsys, *small_flags, *flags)
    assert settings["qwen_lr"] is None  # decided when the model was built
    file.write_text(json.dumps(settings))
    assert main(["--config", str(file), "--output_dir", str(interrupted), "--resume", "--quiet"]) == 0


def test_a_moved_run_is_still_told_from_a_list_of_flags(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", "--max_batches", "1", "--val_limit", "1").folder
    moved = run.rename(tmp_path / "moved")
    assert printed(capsys, "--config", str(moved / "config.json"), "--seed", "1")["output_dir"] is None


@pytest.fixture
def interrupted(small_flags: tuple[str, ...], tmp_path: Path) -> Path:
    """A run with --agent_lr 0.01 and --save_every 4, stopped after two batches."""
    flags = ["--agent_lr", "0.01", "--save_every", "4", "--max_batches", "4", "--val_limit", "1"]
    wire = Tripwire("[Batch    2]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *flags, "--output_dir", str(tmp_path / "run")]) == 130
    return tmp_path / "run"


def test_precedence_on_resume(interrupted: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Command line, then --config, then the checkpoint, then the defaults."""
    file.write_text(json.dumps({"save_every": 6, "keep": 2, "agent_lr": 0.01}))
    flags = ("--resume", "--output_dir", str(interrupted), "--config", str(file), "--keep", "3")
    before = everything_below(interrupted)
    resolved = printed(capsys, *flags)
    assert everything_below(interrupted) == before
    assert [resolved[name] for name in ("keep", "save_every", "max_batches", "log_every")] == [3, 6, 4, 1]
    assert main([*flags, "--quiet"]) == 0
    record = strict_json((interrupted / "config.json").read_text())
    assert {**record, "quiet": False, "resume": "latest"} == resolved


def test_a_config_that_changes_the_maths_is_refused_by_name(
    interrupted: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(json.dumps({"agent_lr": 0.02, "no_policy": True, "save_every": 6}))
    for more in ((), ("--print_config",)):
        code = main(["--resume", "--output_dir", str(interrupted), "--config", str(file), "--quiet", *more])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and "--agent_lr 0.02" in err and "--no_policy True" in err
        assert "save_every" not in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# help
# --------------------------------------------------------------------------------------------------------------------


def test_help_names_every_default_and_groups_the_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    parts = re.split(r"^  (?=--)", re.sub(r"\n {3,}", " ", text), flags=re.MULTILINE)[1:]
    assert len(parts) > 50
    assert [part.split()[0] for part in parts if "default" not in part] == []
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    fixes = [number for number, title in enumerate(titles) if title.startswith(("the seven", "fix"))]
    assert fixes == list(range(fixes[0], len(titles)))  # together, at the end
    assert set("1234567") <= set("".join(titles[fixes[0] :]))


def test_numbers() -> None:
    assert Number(int, 1)("3") == 3 and Number(float, 0, above=True)("1e-3") == 1e-3
