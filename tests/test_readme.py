"""Every command in the README: those of the product are run, on small data; of the benchmarks, which tests of their own
run, the flags are checked."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FAST, ROOT
from torch.distributed.run import get_args_parser

import arc.report
import model_persistence
from trainloop_complete_with_fixes import build_parser, main, parse_arguments

README = (ROOT / "README.md").read_text(encoding="utf-8")
SBATCH = (ROOT / "slurm.sbatch").read_text(encoding="utf-8")
SCRIPT = "trainloop_complete_with_fixes.py"


def commands() -> list[str]:
    """Lines of the bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def starting(start: str) -> list[list[str]]:
    """The arguments of the commands that begin so."""
    return [shlex.split(line)[len(start.split()) :] for line in commands() if line.startswith(start)]


@pytest.fixture(scope="module")
def workplace(small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in with a finished run in runs/my_run, the name that the README uses."""
    folder = tmp_path_factory.mktemp("readme")
    assert main([*small_flags, *FAST, "--epochs", "1", "--output_dir", str(folder / "runs" / "my_run")]) == 0
    return folder


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    kinds = (
        "make ",
        "pip install ",
        "torchrun ",
        f"python {SCRIPT} ",
        "python model_persistence.py ",
        "python -m arc.report ",
    )
    assert len(commands()) > 15
    assert [line for line in commands() if not line.startswith((*kinds, "python benchmarks/"))] == []


TORCHRUN = [
    *(line for line in commands() if line.startswith("torchrun ")),
    " ".join(re.findall(r"^srun (torchrun .*?\$RESUME)$", SBATCH, re.DOTALL | re.MULTILINE)).replace("\\\n", ""),
]


@pytest.mark.parametrize("line", TORCHRUN)
def test_torchrun_and_the_program_know_their_flags(line: str) -> None:
    """What becomes of them is in tests/test_parallel.py."""
    plain = line.replace("$RESUME", "--resume").replace("$SLURM_NNODES", "2").replace("--device cuda", "--device cpu")
    launch = get_args_parser().parse_args(shlex.split(plain)[1:])
    assert launch.training_script == SCRIPT and int(launch.nproc_per_node) > 1
    assert parse_arguments(launch.training_script_args)[0].epochs == 20


def test_the_sbatch_file_is_a_shell_script() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "slurm.sbatch")], check=False).returncode == 0


@pytest.mark.parametrize("flags", starting(f"python {SCRIPT}"), ids=" ".join)
def test_training_and_solving(
    flags: list[str],
    small_flags: tuple[str, ...],
    data_dir: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each as it stands there, on the CPU and with the small settings that a later flag of the same name brings."""
    monkeypatch.chdir(workplace)
    where = [] if "--resume" in flags else ["--output_dir", f"runs/{len(list(Path('runs').iterdir()))}"]
    small = [*small_flags, *FAST, "--epochs", "2" if "--resume" in flags else "1", "--unseen", str(data_dir)]
    if "--resume" in flags:  # a resumed run keeps its own settings
        small = ["--epochs", "2", "--device", "cpu", "--data", str(data_dir), "--workers", "0", *small_flags[-2:]]
    assert main([*flags, *small, *where]) == 0, capsys.readouterr().err
    if "--submission" in flags:
        assert (workplace / flags[flags.index("--submission") + 1]).is_file()


@pytest.mark.parametrize("arguments", starting("python model_persistence.py"), ids=" ".join)
def test_checkpoints(arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert model_persistence.main(arguments) == 0


@pytest.mark.parametrize("arguments", starting("python -m arc.report"), ids=" ".join)
def test_reports(arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert arc.report.main(arguments) == 0


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("python benchmarks/")])
def test_flags_of_benchmarks(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once it takes them, and each is explained. As a script, in this process: torch is loaded once."""
    _, script, *arguments = shlex.split(line)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))  # it puts the project there
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert leave.value.code in (0, None)
    shown = capsys.readouterr().out
    assert all(argument in shown for argument in arguments if argument.startswith("--"))


@pytest.mark.parametrize("arguments", starting("make"), ids=" ".join)
def test_targets(arguments: list[str], tmp_path: Path) -> None:
    """What make would do; the flags that it trains with are ones that the script takes."""
    venv = f"VENV={tmp_path / 'venv'}"
    command = ["make", "--dry-run", "--no-print-directory", venv, *arguments]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in shown.stdout.replace("\\\n", " ").splitlines():
        if f" {SCRIPT} " in line:
            args, _ = parse_arguments([*shlex.split(line.partition(SCRIPT)[2])])
            assert (args.time_budget, args.device) == (300, "cpu")
    assert {"train": SCRIPT, "test": "pytest"}[arguments[0]] in shown.stdout


@pytest.mark.parametrize("arguments", starting("pip install"), ids=" ".join)
def test_packages(arguments: list[str]) -> None:
    """Files are there; optional packages are ones that the tests run with."""
    tested = (ROOT / "requirements-dev.txt").read_text()
    for argument in arguments:
        if argument != "-r":
            assert (ROOT / argument).is_file() or re.search(rf"^{argument}\b", tested, re.MULTILINE)


def test_every_flag_in_the_text_exists() -> None:
    """Of the script or of a benchmark; a link's target is a heading, a file or an address."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("arc/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    known = set(re.findall(r"--[a-z_]+", "".join(path.read_text(encoding="utf-8") for path in sources)))
    known |= {option for action in build_parser().actions.values() for option in action.option_strings}
    known |= set(get_args_parser().format_help().replace(",", " ").split())
    assert set(re.findall(r"(?<![\w-])--[a-z_]+\b", README)) <= known
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            file = ROOT / (path or "README.md")
            assert file.exists()
            assert not heading or heading in headings(file.read_text(encoding="utf-8"))


def headings(text: str) -> set[str]:
    """What a link can name in a markdown file."""
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
