"""The command line: what is wrong is said in one line that names it, with exit code 2, before anything is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, SCRIPT, command, everything_below

from arc.run.files import default_cache
from trainloop_complete_with_fixes import build_parser, main, parse_arguments

Refused = Callable[..., str]

GRID = [[0, 1], [2, 3]]
TASK = {"train": [{"input": GRID, "output": GRID}, {"input": GRID, "output": GRID}], "test": [{"input": GRID}]}


def task_with(grid: Any) -> str:
    """JSON of a task whose second demonstration pair has `grid` as its output."""
    return json.dumps({**TASK, "train": [TASK["train"][0], {"input": GRID, "output": grid}]})


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good task in it and a file where one may want a folder; also the place of the default
    cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    (tmp_path / "a_file").write_text("in the way")
    return tmp_path


@pytest.fixture
def refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(*flags)`: the one line that main says to these flags, without its "error: "; checks everything else
    that a refusal promises."""

    def run(*flags: str) -> str:
        before = everything_below(workplace)
        code = main(["--device", "cpu", "--qwen", "tiny", "--data", "task.json", *flags])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert err.startswith("error: ")
        assert everything_below(workplace) == before
        return err.removeprefix("error: ").removesuffix("\n")

    return run


# --------------------------------------------------------------------------------------------------------------------
# flags
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        # unknown flags; abbreviations are none
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--epoch", "3"], ["--epoch"]),
        (["stray"], ["stray"]),
        # unknown values
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--amp", "fp8"], ["--amp", "'fp8'", "bf16"]),
        (["--augment", "rotate"], ["--augment", "'rotate'"]),
        (["--qwen_tune", "half"], ["--qwen_tune", "'half'"]),
        (["--policy_objective", "ppo"], ["--policy_objective", "'ppo'", "rloo"]),
        (["--val_splits", "test"], ["--val_splits", "'test'"]),
        (["--val_splits", "seed,seed"], ["--val_splits"]),
        (["--ablate", "8"], ["--ablate", "'8'"]),
        (["--ablate", "one"], ["--ablate", "'one'"]),
        # numbers out of range, and what is no number
        (["--epochs", "-1"], ["--epochs", "'-1'"]),
        (["--epochs", "0"], ["--epochs", "'0'"]),
        (["--batch_size", "-8"], ["--batch_size", "'-8'"]),
        (["--time_budget", "-5"], ["--time_budget", "'-5'"]),
        (["--agent_lr=-0.1"], ["--agent_lr", "'-0.1'"]),
        (["--qwen_lr", "0"], ["--qwen_lr", "'0'"]),
        (["--grad_clip", "inf"], ["--grad_clip", "'inf'"]),
        (["--policy_lr", "nan"], ["--policy_lr", "'nan'"]),
        (["--epochs", "two"], ["--epochs", "'two'"]),
        (["--epochs", "1.5"], ["--epochs", "'1.5'"]),
        (["--seed", str(2**31)], ["--seed"]),
        # argparse drops two dashes from what stands behind an equals sign
        (["--epochs=--"], ["--epochs", "'--'"]),
        (["--data=--"], ["'--'"]),
        # a path that would split a log line
        (["--output_dir", "a\nb"], ["--output_dir", "control character"]),
        (["--qwen", "./a\nb"], ["--qwen", "control character"]),
        # what a shell makes of a variable that is not set
        (["--cache_dir", ""], ["--cache_dir", "''"]),
        (["--output_dir", ""], ["--output_dir", "''"]),
        # values forgotten
        (["--epochs"], ["--epochs"]),
        (["--output_dir", "--quiet"], ["--output_dir"]),
        # flags that do not go together
        (["--agent_width", "20", "--agent_heads", "3"], ["--agent_width 20", "--agent_heads"]),
        (["--views", "8", "--batch_size", "4"], ["--views 8", "--batch_size 4"]),
        (["--eval_only"], ["--eval_only", "--resume"]),
        (["--data", "generated", "--tasks", "0", "--task_latent"], ["--task_latent", "--tasks 0"]),
        (["--data", "generated", "--adapt"], ["--data generated", "--adapt"]),
        (["--data", "generated", "--dev"], ["--data generated", "--dev"]),
        (["--data", "generated", "--augment", "full"], ["--augment full"]),
        (["--val_splits", "seed,families"], ["--val_splits families", "--data generated"]),
        (
            ["--data", "generated", "--queries", "9", "--batch_size", "8", "--views", "1"],
            ["--queries 9", "--batch_size 8"],
        ),
        (["--extra_data", "generated", "--queries", "99"], ["--queries 99", "--batch_size 32"]),
        (["--episodes", str(10**9)], ["--episodes"]),
        # what would be written where something else is read or written
        (["--submission", "task.json"], ["--submission", "--data"]),
        (["--output_dir", "one", "--submission", "one"], ["--submission", "the folder of the run"]),
        (["--output_dir", "one", "--submission", "one/config.json"], ["--submission: one/config.json", "a run keeps"]),
        (["--data", "tasks", "--output_dir", "tasks/run"], ["--output_dir", "--data"]),
        (["--output_dir", "one/run", "--backup_dir", "one"], ["--backup_dir", "the run itself"]),
        (["--backup_dir", "no/such"], ["--backup_dir", "not mounted"]),
    ],
)
def test_bad_flags(flags: list[str], names: list[str], refused: Refused, workplace: Path) -> None:
    (workplace / "tasks").mkdir()
    line = refused(*flags)
    for name in names:
        assert name in line


def test_all_problems_in_one_line(refused: Refused) -> None:
    line = refused(
        *("--epochs", "-1", "--amp", "fp8", "--nonsense", "--views", "9", "--batch_size", "4", "--eval_only"),
        *("--output_dir", "a_file", "--cache_dir", "a_file/cache", "--seed", "x", "--val_splits", "train"),
    )
    named = ("--epochs", "--amp", "--nonsense", "--views", "--eval_only", "--output_dir", "--cache_dir", "--seed")
    for name in (*named, "--val_splits"):
        assert line.count(name) == 1, f"{name} in {line!r}"


def test_every_numeric_flag_is_checked(refused: Refused) -> None:
    """Words, infinities and negative numbers for all of them; with one line that names each."""
    numeric = [flag for flag, value in flags_with_defaults().items() if type(value) in (int, float)]
    assert len(numeric) > 25 and "--epochs" in numeric and "--w_risk" in numeric and "--backup_quota_gb" in numeric
    for bad in ("many", "inf", "-0.5"):
        line = refused(*(f"{flag}={bad}" for flag in numeric))
        assert [flag for flag in numeric if f"{flag}: '{bad}'" not in line] == []


def test_line_breaks_in_a_flag_stay_in_the_line(refused: Refused) -> None:
    assert "two" in refused("--one\ntwo")
    assert "two" in refused("--data", "one\ntwo")
    assert "two" in refused("--epochs", "one\ntwo")


def test_half_of_torchruns_variables_are_no_job(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun" in refused()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse_arguments([])[0].device == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(refused: Refused) -> None:
    line = refused("--device", "cuda")
    assert "--device cuda" in line and "--device cpu" in line  # what is wrong, and the way out


# --------------------------------------------------------------------------------------------------------------------
# data, models, folders
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (task_with([[0, 1], [2]]), ["bad.json", "train pair 1", "row 1"]),  # ragged
        (task_with([[0, 10]]), ["bad.json", "train pair 1", "10"]),
        (task_with([[0, -1]]), ["bad.json", "train pair 1", "-1"]),
        (task_with([[0, "1"]]), ["bad.json", "train pair 1", "'1'"]),
        (task_with([]), ["bad.json", "train pair 1", "empty"]),
        (task_with([[0]] * 31), ["bad.json", "train pair 1", "31"]),
        (task_with(GRID)[:-9], ["bad.json", "JSON"]),  # broken off
        (json.dumps({"train": TASK["train"]}), ["bad.json", "test"]),
        ("", ["bad.json"]),
    ],
)
def test_bad_data(content: str, words: list[str], refused: Refused, workplace: Path) -> None:
    (workplace / "bad.json").write_text(content)
    line = refused("--data", "bad.json")
    for word in words:
        assert word in line


def test_all_problems_of_the_data_in_one_line(refused: Refused, workplace: Path) -> None:
    folder = workplace / "tasks"
    folder.mkdir()
    for name, content in {"ragged": task_with([[0], [1, 2]]), "colour": task_with([[10]]), "broken": "{"}.items():
        (folder / f"{name}.json").write_text(content)
    line = refused("--data", "tasks")
    for name in ("ragged.json", "colour.json", "broken.json"):
        assert name in line


def test_data_that_are_not_there(refused: Refused, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    (workplace / "evaluation").mkdir()
    (workplace / "evaluation" / "task.json").write_text(json.dumps(TASK))
    for spec in ("missing.json", "missing/folder", "empty"):
        assert spec in refused("--data", spec)
    assert "no training tasks" in refused("--data", "evaluation")
    assert "empty" in refused("--val_splits", "unseen", "--unseen", "empty")
    (workplace / "other" / "training").mkdir(parents=True)
    (workplace / "other" / "training" / "task.json").write_text(json.dumps(TASK))
    assert "--unseen other" in refused("--val_splits", "seed,unseen", "--unseen", "other")


def test_a_fault_inside_the_model_is_a_traceback(small_flags: list[str], tmp_path: Path) -> None:
    """One line and exit code 2 are for what the user can mend; a ValueError that nobody foresaw is no such thing."""
    code = (
        "import sys, trainloop_complete_with_fixes as script\nfrom arc.agent import GridAgent\n"
        "def forward(*inputs, **options):\n    raise ValueError('unforeseen')\n"
        "GridAgent.forward = forward\nsys.exit(script.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *small_flags, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and done.stderr.endswith("ValueError: unforeseen\n")
    assert "in train_step" in done.stderr and "error: " not in done.stderr


def test_models_that_are_not_there(refused: Refused, workplace: Path) -> None:
    (workplace / "no_model").mkdir()
    for spec in ("nonsense", "./missing", "no_model", "a_file"):
        line = refused("--qwen", spec)
        assert "--qwen" in line and spec in line


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir", "--backup_dir"])
@pytest.mark.parametrize("folder", ["a_file", "a_file/run"])
def test_folders_that_cannot_be_written(flag: str, folder: str, refused: Refused) -> None:
    line = refused(flag, folder)
    assert flag in line and "a_file" in line


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir", "--backup_dir", "--submission"])
def test_nothing_is_written_among_the_tasks(flag: str, refused: Refused, workplace: Path) -> None:
    """There it would be read as a task by the next command, and could replace one."""
    (workplace / "tasks" / "deep").mkdir(parents=True)
    for name in ("task.json", "deep/other.json"):
        (workplace / "tasks" / name).write_text(json.dumps(TASK))
    for place in ("tasks/new", "tasks/deep/other.json"):
        assert f"{flag}: " in (line := refused("--data", "tasks", flag, place)) and "lies in --data" in line


@pytest.mark.parametrize("kept", ["metrics.jsonl", "predictions-seed.json", "step-000000001/manifest.json"])
def test_a_submission_replaces_nothing_of_a_run(kept: str, refused: Refused, workplace: Path) -> None:
    (workplace / "other" / "step-000000001").mkdir(parents=True)
    for name in ("train.log", kept):
        (workplace / "other" / name).touch()
    assert f"other/{kept} is a file that a run keeps" in refused("--submission", f"other/{kept}")


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir", "--backup_dir", "--submission"])
def test_links_that_lead_nowhere(flag: str, refused: Refused, workplace: Path) -> None:
    (workplace / "round").symlink_to("round")
    (workplace / "away").symlink_to("not_mounted")
    for folder in ("round", "round/run", *(["away", "away/run"] if flag != "--submission" else [])):
        assert f"{flag}: " in refused(flag, folder)


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir", "--backup_dir", "--resume"])
def test_names_that_are_too_long(flag: str, refused: Refused) -> None:
    assert f"{flag}: 'aaaa" in refused(flag, "a" * 300)


def test_names_that_no_file_can_have(refused: Refused, workplace: Path) -> None:
    (workplace / "flags.json").write_text(json.dumps({"output_dir": "half a pair \ud800"}))
    assert "'output_dir'" in refused("--config", "flags.json")


@pytest.mark.parametrize(
    "name", ["config.json", "report.html", "predictions-seed.json", "metrics.jsonl", "tensorboard"]
)
def test_a_run_does_not_begin_where_it_would_replace_what_is_not_its_own(
    name: str, refused: Refused, workplace: Path
) -> None:
    """A folder of a model has a config.json, too."""
    (workplace / "mine").mkdir()
    (workplace / "mine" / name).write_text("mine")
    assert name in refused("--output_dir", "mine")


def test_a_run_does_not_begin_where_a_best_model_is_left(refused: Refused, workplace: Path) -> None:
    (workplace / "run" / "best-val_accuracy").mkdir(parents=True)
    (workplace / "run" / "train.log").touch()
    assert "holds a run already" in refused("--output_dir", "run")


def test_without_a_home_the_cache_is_in_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user whom the system does not know
    assert default_cache() == str(Path(".cache") / "arc-trainloop")


def test_a_rank_that_a_job_has_left_behind_silences_nothing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--epochs" in refused("--epochs", "-1")


def test_a_model_that_no_memory_holds(refused: Refused) -> None:
    assert "no memory" in refused("--memory_size", str(2**20), "--prompt_len", "64", "--prompt_dim", "4096")


def test_a_configuration_that_cannot_be_printed(workplace: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full here")
    with open("/dev/full", "w") as full:
        printing = [sys.executable, str(SCRIPT), "--data", "task.json", "--print_config"]
        assert subprocess.run(printing, cwd=workplace, stdout=full, check=False).returncode == 1


def test_numbers_from_a_cell_are_flags_as_well() -> None:
    assert parse_arguments(["--epochs", 3, "--qwen", "tiny"])[0].epochs == 3  # type: ignore[list-item]


# --------------------------------------------------------------------------------------------------------------------
# the same in a process of its own
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "-1", "--amp", "fp8", "--nonsense"], ["--epochs", "--amp", "--nonsense"]),
        (["--data", "bad.json", "--device", "cpu"], ["bad.json", "train pair 1", "row 1"]),
    ],
)
def test_refusal_seen_from_outside(flags: list[str], words: list[str], workplace: Path) -> None:
    (workplace / "bad.json").write_text(task_with([[0, 1], [2]]))
    before = everything_below(workplace)
    code, out, err = command(flags, workplace)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1  # so there is no traceback either
    for word in words:
        assert word in err
    assert everything_below(workplace) == before


# --------------------------------------------------------------------------------------------------------------------
# help, notebooks
# --------------------------------------------------------------------------------------------------------------------


def flags_with_defaults() -> dict[str, Any]:
    """Every flag but --help, with its default."""
    return {action.option_strings[-1]: action.default for action in build_parser()._actions[1:]}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    promised = (
        "epochs batch_size max_batches device seed agent_lr qwen_lr policy_lr grad_clip grad_accum amp ablate data "
        "augment qwen qwen_tune gradient_checkpointing output_dir resume save_every keep backup_dir eval_only strict "
        "quiet time_budget policy_objective"
    )
    listed = re.findall(r"^  --(\w+)", out, re.MULTILINE)
    assert sorted(set(promised.split()) - set(listed)) == []
    assert len(listed) == len(set(listed))


def test_every_flag_is_explained() -> None:
    for action in build_parser()._actions:
        assert action.help and len(action.help) > 4, action.option_strings


def test_every_default_may_be_given_by_hand() -> None:
    flags = flags_with_defaults()
    given = [f"{flag}={value}" for flag, value in flags.items() if type(value) in (int, float, str)]
    assert len(given) > 40
    args, _ = parse_arguments(given)
    assert vars(args) == vars(parse_arguments([])[0])


def test_defaults_of_the_design() -> None:
    args, given = parse_arguments([])
    assert given == set()
    assert (args.epochs, args.grad_clip, args.save_every, args.keep) == (20, 1.0, 50, 5)
    assert (args.data, args.device, args.amp, args.qwen, args.qwen_tune) == ("arcagi2", "auto", "auto", "auto", "full")
    assert (args.resume, args.policy_objective, args.output_dir) == (None, "expected", None)
    assert parse_arguments(["--resume"])[0].resume == "latest"


def test_a_scripts_arguments_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not something has imported IPython; what a kernel's cell does is in test_notebook.py."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--epochs", "7"])
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert parse_arguments(None)[0].epochs == 7
    ipython = types.ModuleType("IPython")
    monkeypatch.setattr(ipython, "get_ipython", lambda: None, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert parse_arguments(None)[0].epochs == 7


def test_the_script_can_be_pasted_into_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell has no `__file__` and is no module on disk."""
    cell = types.ModuleType("cell")
    monkeypatch.setitem(sys.modules, "cell", cell)
    assert "__file__" not in vars(cell)
    exec(compile(SCRIPT.read_text(encoding="utf-8"), "<cell>", "exec"), vars(cell))
    assert cell.parse_arguments([])[0].epochs == 20
