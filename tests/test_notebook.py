"""colab.ipynb runs from top to bottom in a real kernel; the script can be used, and stopped, in the cells of one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_FLAGS
from helpers import PATIENCE, ROOT, SCRIPT, load, metrics

pytest.importorskip("ipykernel", reason="the notebook's tests need ipykernel, nbclient and nbformat")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")

NOTEBOOK = ROOT / "colab.ipynb"
ENDLESS = ("--epochs", "10000", "--val_every", "0")  # a run that does not end while a test looks at it


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the kernels: nothing of the user's own configuration, history or settings."""
    place = tmp_path_factory.mktemp("jupyter")
    own = {name: value for name, value in os.environ.items() if not name.startswith("ARC_")}
    folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    return {**own, "OMP_NUM_THREADS": "1", **{name: str(place / name) for name in folders}}


# --------------------------------------------------------------------------------------------------------------------
# colab.ipynb
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(cell: Any) -> str:
    """What a cell has printed, stdout and stderr."""
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def html_of(cell: Any) -> str:
    return "".join(output["data"].get("text/html", "") for output in cell["outputs"] if "data" in output)


def execute(notebook: Any, cwd: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The notebook's cells by id after a kernel has executed them all in `cwd`; nbclient's CellExecutionError if one
    fails."""
    client = nbclient.NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(cwd)}})
    client.execute(env={**environment})
    return {cell["id"]: cell for cell in notebook.cells}


def test_the_notebook_is_clean(notebook: Any) -> None:
    """Valid, and such that running it changes nothing but outputs: a diff shows what somebody changed."""
    nbformat.validate(notebook)
    assert json.loads(NOTEBOOK.read_text(encoding="utf-8"))["nbformat_minor"] >= 5  # cells have ids
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(name.replace("-", "").isalpha() for name in ids)  # words, not random
    for cell in notebook.cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert notebook.metadata.kernelspec.name == "python3"


def test_the_notebook_from_top_to_bottom(
    notebook: Any, environment: dict[str, str], data_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*SMALL_FLAGS, "--epochs", "10000", "--cache_dir", str(cache_dir)]
    budget = {"ARC_SECONDS": "4", "ARC_TASKS": "4", "ARC_FLAGS": shlex.join(flags)}
    settings = {"ARC_RUN": str(run), "ARC_DATA": str(data_dir), "ARC_DEVICE": "cpu", **budget}
    cells = execute(notebook, ROOT, {**environment, **settings})

    assert text_of(cells["files"]) == f"Working in {ROOT}\n"
    assert "not running on Colab" in text_of(cells["drive"])
    assert cells["tensorboard"]["outputs"] == []
    # Trained, validated and went on from there.
    trained, resumed = text_of(cells["train"]), text_of(cells["resume"])
    assert "Resumed from" not in trained and "Resumed from step-0" in resumed
    assert "Val Accuracy" in trained and "Val Accuracy" in resumed
    done = [int(text.split("Done: ")[1].split()[0]) for text in (trained, resumed)]
    assert 0 < done[0] < done[1] == load(run).step
    assert [row["step"] for row in metrics(run) if "loss" in row] == list(range(1, done[1] + 1))
    # Watched.
    assert text_of(cells["metrics"]).split()[:6] == ["step", "loss", "reward", "qwen_grad", "mask_ratio", "solved"]
    # Saw grids.
    pictures = html_of(cells["predictions"])
    assert "<svg" in pictures and "http://" not in pictures.replace("http://www.w3.org/", "")
    # Two attempts at each test input of each task, evaluation tasks too.
    answers = json.loads((run / "submission.json").read_text(encoding="utf-8"))
    tasks = {path.stem: json.loads(path.read_text()) for path in data_dir.rglob("*.json")}
    assert {name: len(pairs) for name, pairs in answers.items()} == {n: len(t["test"]) for n, t in tasks.items()}
    for pairs in answers.values():
        for attempts in pairs:
            assert attempts.keys() == {"attempt_1", "attempt_2"}
            for grid in attempts.values():
                assert 1 <= len(grid) <= 30 and len({len(row) for row in grid}) == 1 and 1 <= len(grid[0]) <= 30
                assert all(type(colour) is int and 0 <= colour <= 9 for row in grid for colour in row)
    assert f"{len(tasks)} tasks" in text_of(cells["submission"])


# --------------------------------------------------------------------------------------------------------------------
# the script in cells
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """What a cell left: "ok" or "error" and its exception, the text of its last expression, what it printed."""

    status: str = ""
    error: str = ""
    result: str = ""
    out: str = ""
    err: str = ""
    interrupted: bool = False


@dataclass
class Kernel:
    """A running kernel; call it with a cell's code. stop_at: it is interrupted, as by Stop, once that was printed."""

    manager: Any
    client: Any
    flags: str = field(default="")

    def __call__(self, code: str, *, stop_at: str = "") -> Reply:
        reply = Reply()

        def listen(message: Mapping[str, Any]) -> None:
            kind, content = message["msg_type"], message["content"]
            if kind == "stream" and content["name"] == "stdout":
                reply.out += content["text"]
            elif kind == "stream":
                reply.err += content["text"]
            elif kind == "execute_result":
                reply.result = content["data"]["text/plain"]
            elif kind == "error":
                reply.error = f"{content['ename']}: {content['evalue']}"
            if stop_at and stop_at in reply.out and not reply.interrupted:
                reply.interrupted = True
                self.manager.interrupt_kernel()

        answer = self.client.execute_interactive(code, output_hook=listen, timeout=PATIENCE)
        reply.status = answer["content"]["status"]
        assert reply.interrupted == bool(stop_at), reply
        return reply


@pytest.fixture(scope="module")
def kernel(environment: dict[str, str], small_flags: tuple[str, ...]) -> Iterator[Kernel]:
    """A kernel in the project's folder, for all tests: what one leaves behind, the next ones meet."""
    manager, client = jupyter_client.manager.start_new_kernel(
        kernel_name="python3", startup_timeout=PATIENCE, cwd=str(ROOT), env=environment
    )
    try:
        yield Kernel(manager, client, shlex.join(small_flags))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def as_cell(way: str, flags: str) -> str:
    """A cell that runs the script with `flags` in one of the three ways."""
    return {
        "main": f"from {SCRIPT.stem} import main\nmain({shlex.split(flags)!r})",
        "run": f"%run {SCRIPT.name} {flags}",
        "shell": f"!{shlex.quote(sys.executable)} {SCRIPT.name} {flags}",
    }[way]


LEFT_BEHIND = """
import multiprocessing, signal, threading
(multiprocessing.active_children(), signal.getsignal(signal.SIGINT) is signal.default_int_handler,
 signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
 [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name])
"""


def test_the_three_ways_to_run(kernel: Kernel, tmp_path: Path) -> None:
    """Each goes on where the one before ended."""
    flags = f"{kernel.flags} --output_dir {shlex.quote(str(tmp_path / 'run'))} --max_batches 2 --val_limit 1"
    for epochs, way in enumerate(("main", "run", "shell"), 1):
        reply = kernel(as_cell(way, f"{flags} --epochs {epochs} {'--resume' * (epochs > 1)}"))
        assert (reply.status, reply.error, reply.result) == ("ok", "", "0" if way == "main" else ""), reply
        assert reply.out.count("[Batch    1]") == 1  # no line comes twice
        assert f"Done: {2 * epochs} batches" in reply.out
    assert kernel("_exit_code").result == "0"  # of the process that ! started
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("[Batch ") for line in log) == 6


@pytest.mark.parametrize("way", ["main", "run"])
@pytest.mark.parametrize("workers", [0, 1])
def test_stop_saves_and_the_next_cell_runs(way: str, workers: int, kernel: Kernel, tmp_path: Path) -> None:
    run = shlex.quote(str(tmp_path / "run"))
    flags = f"{kernel.flags} --workers {workers} --output_dir {run} {shlex.join(ENDLESS)}"
    stopped = kernel(as_cell(way, flags), stop_at="[Batch    2]")
    assert (stopped.status, stopped.error, stopped.result) == ("ok", "", "130" if way == "main" else ""), stopped
    # What a cell prints is seen later, on a busy machine in the next epoch.
    assert re.match(r"Saved at epoch \d+, batch \d+; ", stopped.out.splitlines()[-1]) and "Traceback" not in stopped.err
    step = load(tmp_path / "run").step
    assert step >= 2
    assert kernel(LEFT_BEHIND).result == "([], True, True, [])"
    resumed = kernel(as_cell(way, f"{flags} --resume"), stop_at="[Batch")
    assert (resumed.status, resumed.error) == ("ok", "") and f"Resumed from step-{step:09d}" in resumed.out
    assert load(tmp_path / "run").step > step


def test_mistakes_and_help_are_no_exceptions(kernel: Kernel) -> None:
    """In a cell they would be shown with a traceback, and %tb offered."""
    for way, flags, said in (
        ("main", "--epoch 1", "error: unknown: --epoch 1\n"),
        ("run", "--epoch 1", "error: unknown: --epoch 1\n"),
        ("main", "--data nowhere --qwen tiny", "error: data 'nowhere'"),
        ("run", "--help", ""),
    ):
        reply = kernel(as_cell(way, flags))
        assert (reply.status, reply.error) == ("ok", ""), reply
        assert reply.err.startswith(said) and reply.err.count("\n") <= 1 and "SystemExit" not in reply.out + reply.err
    assert "usage:" in reply.out


@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_arguments_of_the_kernel_are_not_ours(launcher: str, kernel: Kernel) -> None:
    reply = kernel(
        f"import sys\nfrom {SCRIPT.stem} import parse_arguments\n"
        f"sys.argv = ['/usr/lib/{launcher}', '-f', '/root/kernel.json']\nparse_arguments(None) == parse_arguments([])"
    )
    assert (reply.error, reply.result) == ("", "True")


def test_bars_in_a_cell_are_redrawn(kernel: Kernel) -> None:
    reply = kernel("from arc.run.terminal import is_live\nis_live()")
    assert (reply.error, reply.result) == ("", "True")


def test_the_script_as_a_cell(kernel: Kernel, tmp_path: Path) -> None:
    """Pasted, there is no `__file__`, `__name__` is "__main__" and main is called at once: without arguments, here on
    the only flags that a cell cannot give it."""
    source = SCRIPT.read_text(encoding="utf-8")
    start = source.index('if __name__ == "__main__":')
    pasted = source[:start] + "main = lambda argv=(), run=main: run(['--epoch'])\n" + source[start:]
    reply = kernel(pasted)
    assert (reply.status, reply.error, reply.err) == ("ok", "", "error: unknown: --epoch\n")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_notebook_without_the_files(kernel: Kernel, notebook: Any, tmp_path: Path) -> None:
    """As in Colab, with a repository on this disk: cloned once, and found again when the kernel was restarted."""
    origin, place = tmp_path / "the origin", tmp_path / "alone"
    origin.mkdir()
    place.mkdir()
    shutil.copy(SCRIPT, origin)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", str(origin), *words], check=True)
    source = {cell["id"]: cell["source"] for cell in notebook.cells}
    try:
        for address, said in (("", "set REPOSITORY"), (str(origin), ""), ("", "")):
            kernel(f"import os\nos.chdir({str(place)!r})\nos.environ['ARC_REPOSITORY'] = {address!r}")
            assert kernel(source["settings"]).status == "ok"
            reply = kernel(source["files"])
            if said:
                assert reply.error.startswith("FileNotFoundError: ") and said in reply.error
            else:
                assert reply.error == "" and f"Working in {place / 'arc-trainloop'}" in reply.out
    finally:
        kernel(f"os.chdir({str(ROOT)!r})\ndel os.environ['ARC_REPOSITORY']")
    assert (place / "arc-trainloop" / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
