"""The comparing benchmarks, run for real on small data: what they run, what they print, and that they go on where they
were stopped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL_FLAGS

from benchmarks import fixes, frameworks, learning, scaling, scaling_out, scratch, speed
from benchmarks.runs import Job, Result, RunFailed, Split, difference, rows_of, split_scores, table, verdict
from trainloop_complete_with_fixes import parse_arguments

AT = SMALL_FLAGS.index("--epochs")
SMALL = (*SMALL_FLAGS[:AT], *SMALL_FLAGS[AT + 2 :])  # the benchmarks say how many epochs

Tables = list[dict[str, dict[str, str]]]


def tables(text: str) -> Tables:
    """The markdown tables of a text: rows by their first cell, cells by the header; every row as long as the header."""
    found: Tables = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("| "):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
            found.append({})
        elif set(cells) != {"---"}:
            found[-1][cells[0]] = dict(zip(header, cells, strict=True))
    return found


def mean(cell: str) -> float:
    """The first number of a cell."""
    return float(cell.split()[0])


def results(work: Path) -> dict[Path, int]:
    """Every run's record and when it was written."""
    return {path: path.stat().st_mtime_ns for path in work.glob("*/metrics.jsonl")}


# --------------------------------------------------------------------------------------------------------------------
# benchmarks/fixes.py
# --------------------------------------------------------------------------------------------------------------------


def test_fixes(data_dir: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    flags = ["--work", str(work), "--steps", "4", "--epochs", "2", "--seeds", "0", "1", "--only", "no_policy"]
    flags += ["--cache_dir", str(cache_dir), "--", *SMALL, "--data", str(data_dir), "--dev_tasks", "2"]
    assert fixes.main(flags) == 0
    out, err = capsys.readouterr()
    assert (work / "table.md").read_text() == out and "[4/4] no_policy, seed 1: pass@1 0." in err
    assert "- 4 batches in 2 epochs, seeds 0 1; pairs (first seed): dev_unseen 8, dev_seen 4\n- machine: " in out
    assert "- device: cpu | AMP: off" in out and "caution" not in out
    worth, absolute = tables(out)
    assert list(absolute) == ["full", "no_policy"] and list(worth) == [fixes.MEANING["no_policy"]]

    # every figure of the control that is known beforehand, and the difference from the two absolute ones
    full, control = absolute.values()
    assert mean(control["accuracy delta"]) == mean(control["mean reward"]) == 0
    assert (control["loss finite"], mean(control["skipped steps"]), control["seeds"]) == ("yes", 0, "2")
    assert control["pass@1"] == control["before"] and mean(full["vote alone"]) == mean(control["vote alone"]) > 0
    (row,) = worth.values()
    for name in ("pass@1", "pass@2", "agent alone", "its cells", "its sizes"):
        assert mean(row[name]) == pytest.approx(mean(full[name]) - mean(control[name]), abs=0.11)
    assert re.fullmatch(
        r"zero|(positive|negative|zero) (with|on average, not with) every seed", row["effect on the agent alone"]
    )

    # the same batches for both, records but no checkpoints left, and nothing is run a second time
    order: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(work.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        order[path.parent.name[:-9]] = [(row["queries"], row["cells"]) for row in rows if "loss" in row]
        assert sorted(p.name for p in path.parent.iterdir()) == [
            *("LOCK", "config.json", "metrics.jsonl", "predictions-dev_seen.json", "predictions-dev_unseen.json"),
            *("report.html", "result.json", "train.log"),
        ]
    assert order["full-seed0"] == order["no_policy-seed0"] != order["full-seed1"]
    before = results(work)
    assert fixes.main(flags) == 0 and capsys.readouterr().out == out
    assert results(work) == before

    # one that was stopped before it was complete is run anew, with the same figures
    (stopped,) = work.glob("no_policy-seed1-*")
    (stopped / "result.json").unlink()
    assert fixes.main(["--table_only", *flags]) == 0
    assert tables(capsys.readouterr().out)[1]["no_policy"]["seeds"] == "1" and results(work) == before
    assert fixes.main(flags) == 0
    again = tables(capsys.readouterr().out)[1]
    changed = {path for path, when in results(work).items() if before[path] != when}
    assert changed == {stopped / "metrics.jsonl"}
    for name, cell in again["no_policy"].items():
        assert cell == control[name] or name == "seconds"


def test_fixes_covers_what_was_asked_for() -> None:
    """All seven fixes, the seed's settings, and every control; each is flags that the script takes."""
    assert len(fixes.VARIANTS) == 18 and fixes.MEANING.keys() == fixes.VARIANTS.keys() - {fixes.FULL}
    taken = [vars(parse_arguments(flags)[0]) for flags in fixes.VARIANTS.values()]
    assert all(taken.count(flags) == 1 for flags in taken)
    jobs = fixes.make_jobs(*fixes.options(["--seeds", "3", "4", "--", "--amp", "off"]))
    assert len(jobs) == len({job.name for job in jobs}) == 36
    for job in jobs:
        flags, given = parse_arguments(job.flags)
        assert (flags.dev, flags.epochs * flags.max_batches, flags.val_every, flags.amp) == (True, 150, 0, "off")
        assert "seed" not in given and "time_budget" not in given


# --------------------------------------------------------------------------------------------------------------------
# benchmarks/learning.py
# --------------------------------------------------------------------------------------------------------------------


def test_learning(data_dir: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, flags = tmp_path / "work", ["--budgets", "2", "1", "--seeds", "0", "--regimes", "unseen", "--control"]
    flags += ["--work", str(work), "--cache_dir", str(cache_dir), "--", *SMALL]
    flags += ["--data", str(data_dir), "--unseen", str(data_dir), "--max_batches", "2"]
    assert learning.main(flags) == 0
    out = capsys.readouterr().out
    assert (work / "table.md").read_text() == out
    (rows,) = tables(out)
    assert list(rows) == ["1 s", "1 s, policy off", "2 s", "2 s, policy off"]
    for name, row in rows.items():
        assert mean(row["batches"]) >= 1 and mean(row["seconds taken"]) > 0
        assert mean(row["learned"]) == pytest.approx(mean(row["pass@1"]) - mean(row["vote alone"]), abs=0.11)
        # Nothing to tell where not even one view of a pair was reached.
        assert re.fullmatch(r"[+-]0\.\d{4} ± 0\.\d{4}|\+nan ± nan", row["accuracy delta"])
        assert "policy off" not in name or (row["pass@1"], mean(row["mean reward"])) == (row["before (pass@1)"], 0)
    assert learning.REFERENCE in out and re.search(r"Here, 2 s, two guesses: \d\.0 of 4\.", out)
    assert re.search(
        r"^2 s against policy off, pass@1 in points: after refinement [+-]\d+\.\d\d, before [+-]", out, re.M
    )
    assert re.search(r"^pass@2 by budget: 1 s \d+\.\d, 2 s \d+\.\d; it (never falls|falls at 2 s by \d)", out, re.M)
    before = results(work)
    assert learning.main(flags) == 0 and capsys.readouterr().out == out
    assert results(work) == before and len(before) == 4


def test_learning_says_where_accuracy_falls() -> None:
    def split(pass2: float) -> list[Split]:
        return [Split(10, 0, pass2, 0, 0, 0, 0, 0, 0, 0)]

    text = learning.rising({60: split(0.25), 900: split(0.235), 300: split(0.31)})
    assert text == "pass@2 by budget: 60 s 25.0, 300 s 31.0, 900 s 23.5; it falls at 900 s by 7.50.\n"
    assert learning.rising({60: split(0.2), 300: split(0.2)}).endswith("it never falls.\n")


def test_a_run_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--work", str(tmp_path / "work"), "--budgets", "1", "--regimes", "seed", "--seeds", "7"]
    assert learning.main([*flags, "--", "--no_such_flag"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "error: seed 1 s, seed 7: exit code 2: error: unknown: --no_such_flag"
    assert learning.main([*flags, "--table_only"]) == 1
    assert f"error: no complete run of these in {tmp_path / 'work'}" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--steps", "4", "--epochs", "3"], ["--steps", "0"], ["--only", "ablate_8"]])
def test_what_fixes_cannot_do(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fixes.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# arithmetic
# --------------------------------------------------------------------------------------------------------------------


def test_paired_differences() -> None:
    """By hand: 1 and 3 points have mean 2 and standard error 1."""
    assert difference([0.01, 0.03]) == "+2.00 ± 1.00 [+1.00, +3.00]"
    assert difference([-0.005]) == "-0.50"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0, 0.0], "zero"),
        ([0.1, 0.2], "positive with every seed"),
        ([0.1, 0.1, 0.3], "positive with every seed"),  # 2.5 standard errors of three
        ([0.1, 0.11, 0.12], "positive with every seed, beyond chance"),
        ([-0.1, -0.11, -0.12], "negative with every seed, beyond chance"),
        ([0.5, -0.1, 0.5, 0.5, 0.5, 0.5], "positive on average, not with every seed, beyond chance"),
        ([-0.1, -0.2], "negative with every seed"),
        ([-0.1], "negative with the one seed"),
        ([0.2, -0.1], "positive on average, not with every seed"),
        ([0.1, -0.2], "negative on average, not with every seed"),
        ([0.1, -0.1], "zero on average, not with every seed"),
        ([0.0, 0.1], "positive on average, not with every seed"),
    ],
)
def test_verdict(values: list[float], said: str) -> None:
    assert verdict(values) == said


def test_pairs_of_both_splits_count_alike() -> None:
    small = Split(10, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.3)
    large = Split(30, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.9, -0.1, 0.1)
    result = Result({"a": small, "b": large}, 1, 1.0, 0.0, 0.0, 0.0, 0, 0, True, 0, "", "", "", "")
    assert (result.pooled.pairs, result.pooled.pass1) == (40, pytest.approx(0.4))
    assert result.pooled.accuracy_delta == pytest.approx(0.1)
    assert result.pooled.accuracy_delta_error == pytest.approx(math.sqrt(3**2 + 3**2) / 40)


def test_a_split_without_solutions_has_no_figures() -> None:
    with pytest.raises(RunFailed, match="unseen split was not scored"):
        split_scores({"memory.updates": 0}, ["unseen"])


def test_folders_differ_where_flags_do() -> None:
    job = Job("full", 0, ("--steps", "1"))
    assert job.name == Job("full", 0, ("--steps", "1")).name
    others = [Job("full", 1, job.flags), Job("full", 0, ("--steps", "2")), Job("full", 0, job.flags, cold=True)]
    assert len({job.name, *(other.name for other in others)}) == 4


def test_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


# --------------------------------------------------------------------------------------------------------------------
# benchmarks/scratch.py and benchmarks/speed.py
# --------------------------------------------------------------------------------------------------------------------

TINY = "--qwen tiny --agent_width 16 --agent_heads 1 --agent_blocks 1 --prompt_len 2 --prompt_dim 8 --threads 1".split()
DRAWN = ("--families", "flip,crop", "--tasks", "1", "--pairs", "2", "--queries", "2", "--episodes", "8")


def test_scratch(cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    flags = ["--work", str(work), "--budgets", "6", "--steps", "2", "--epochs", "2", "--seeds", "0", "--parallel", "2"]
    flags += ["--only", "no_policy", "ablate_4", "--cache_dir", str(cache_dir), "--", *SMALL, *DRAWN]
    assert scratch.main(flags) == 0
    out, _ = capsys.readouterr()
    assert (work / "table.md").read_text() == out and "caution" not in out
    budgets, families, worth, about, runs = tables(out)
    assert list(budgets) == ["6 s"] and list(runs) == ["full", "ablate_4", "no_policy"]
    assert list(about) == [scratch.MEANING["ablate_4"]]  # the same batch first: the loss of its sizes is the same
    fix = about[scratch.MEANING["ablate_4"]]
    assert fix["with it"] == fix["without"] and float(fix["with it"]) > 0 and fix["better with it"] == "0 of 1"
    assert set(families) == {"flip", "crop"} and all(" / " in row["6 s"] for row in families.values())
    assert list(worth) == [scratch.MEANING["ablate_4"], scratch.MEANING["no_policy"]]
    with_it, without = (
        [row["solved"] for path in work.glob(f"{label}-*") for row in rows_of(path) if "solved" in row][-1]
        for label in ("full", "no_policy")
    )
    said = worth[scratch.MEANING["no_policy"]]["training queries solved, last quarter"]
    assert said == f"{100 * (with_it - without):+.2f}"  # of the last of two batches
    assert runs["no_policy"]["delta known"].startswith("+0.0000")
    page = (work / "curves.html").read_text(encoding="utf-8")
    assert "<svg" in page and "unseen" in page and "http://" not in page.replace("http://www.w3.org", "")
    before = results(work)
    assert len(before) == 4
    assert scratch.main(flags) == 0 and capsys.readouterr().out == out and results(work) == before


def test_what_a_fix_is_about_is_looked_for_where_it_acts() -> None:
    rows: list[dict[str, float | None]] = [{"epoch": 0}, *({"x": value} for value in (8.0, None, 4.0, 2.0, 1.0))]
    assert scratch.mean_over(rows, "x", (0.0, 0.25)) == 8.0 and scratch.mean_over(rows, "x", (0.5, 1.0)) == 1.5
    assert scratch.mean_over(rows[:2], "x", (0.75, 1.0)) == 8.0  # of a single row
    assert scratch.ABOUT.keys() <= scratch.PARTS.keys()


def test_scratch_turns_off_each_part() -> None:
    assert scratch.PARTS.keys() == fixes.VARIANTS.keys() - set(fixes.ARC_ONLY)
    jobs = scratch.make_jobs(*scratch.options(["--seeds", "0", "1", "--budgets", "300"]))
    assert len(jobs) == len({job.name for job in jobs}) == 2 + 2 * len(scratch.PARTS)
    for job in jobs:
        args, given = parse_arguments(job.flags)
        assert (args.data, args.no_evidence, args.max_side) == ("generated", True, 6)
        assert ("time_budget" in given) == (job.label == "300 s")


def test_scratch_refuses_more_batches_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch that is asked for more would end sooner, without a word."""
    enough = ["--epochs", "2", "--", "--episodes", "8", "--queries", "2", "--batch_size", "4"]
    scratch.options(["--steps", "8", *enough])
    with pytest.raises(SystemExit):
        scratch.options(["--steps", "10", *enough])
    assert "an epoch has 4 batches" in capsys.readouterr().err


def test_speed(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--regimes", "drawn", "--repeats", "1", "--batches", "8", "--evidence_tasks", "1", "--val_tasks", "1", "3"]
    assert speed.main([*flags, "--cache_dir", str(cache_dir), "--", *SMALL, *DRAWN, "--episodes", "40"]) == 0
    out = capsys.readouterr().out
    others, rows = tables(out)
    assert float(others["this checkout"]["evidence, core-seconds a task"].split()[0]) > 0
    assert float(rows["this checkout"]["queries/s"].split()[0]) > 0
    assert rows["this checkout"]["median against this checkout"] == "1.00"
    assert float(rows["this checkout"]["seconds to the first batch"].split()[0]) > 0
    assert "bare loop" in out and "waits for the device in a step: cpu" in out


def test_scaling(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--only", "batch", "tasks", "--repeats", "1", "--cache_dir", str(cache_dir), "--", *TINY]
    assert scaling.main(flags) == 0
    batch, tasks = tables(capsys.readouterr().out)
    assert list(batch) == ["16", "32", "64", "128", "256", "exponent"] == [row["queries"] for row in batch.values()]
    assert list(tasks)[:-1] == ["4", "16", "64", "256", "1,024"] and float(tasks["4"]["ms a step"]) > 0


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_an_exponent_is_the_slope_of_the_logarithms(power: float) -> None:
    sizes = [2.0, 3.0, 50.0, 700.0]
    assert scaling.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize("loop", list(frameworks.LOOPS))
def test_loops_of_frameworks(loop: str, cache_dir: Path, tmp_path: Path) -> None:
    package = {"Hugging Face Trainer": "accelerate", "Lightning": "lightning"}.get(loop)
    if package is not None:
        pytest.importorskip(package)
    run = speed.build([*SMALL, *DRAWN, "--data", "generated", "--quiet"], cache_dir, tmp_path)
    batches = (speed.ready_batches(run, 4) * 8)[:8]
    before = [parameter.detach().clone() for parameter in run.agent.parameters()]
    with frameworks.quietly():
        assert frameworks.LOOPS[loop](run, batches) > 0
    run.log.close()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.agent.parameters(), strict=True))


def test_scaling_out(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--processes", "2", "--repeats", "1", "--batches", "7", "--", *SMALL, *DRAWN, "--episodes", "40"]
    assert scaling_out.main([*flags, "--cache_dir", str(cache_dir)]) == 0
    speeds, sent, links = tables(capsys.readouterr().out)
    assert speeds["1, 2 thread(s) each"]["against one"] == "1.00"
    assert float(speeds["2, 1 thread(s) each"]["queries/s"].split()[0]) > 0
    gradients, predicted = (
        float(sent[name]["MiB"]) for name in ("gradients", "gradients, predicted from the model's size")
    )
    assert gradients == pytest.approx(predicted, rel=0.02)  # small parameters of their own kind count as the rest
    assert len(links) == 3
