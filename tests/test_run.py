"""A short real run from end to end: what it prints, what it writes, what its flags change, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, SmallBuild, SmallRun
from helpers import (
    FAST,
    differences,
    differences_of_runs,
    everything_below,
    load,
    metrics,
    same_bits,
    strict_json,
    timeless,
)
from safetensors.torch import load_file

from arc.qwen import context_codes
from arc.run.records import TrainState
from model_persistence import export_best
from trainloop_complete_with_fixes import prompt_spread, restore, saved_parts

EPOCHS = 2
NUMBER = r"\d+\.\d{4}"
SIGNED = r"[+-]\d+\.\d{4}"
NORM = r"\d\.\d{2}e[+-]\d{2}"
RULE = "=" * 70


@pytest.fixture(scope="module")
def finished(small_run: SmallRun, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two epochs, both splits; not to be written to."""
    splits = ("--val_splits", "seed,unseen", "--unseen", str(data_dir))
    outcome = small_run(tmp_path_factory.mktemp("finished") / "run", "--epochs", str(EPOCHS), *splits, *FAST)
    assert outcome.code == 0, outcome.stderr
    return outcome


# --------------------------------------------------------------------------------------------------------------------
# what is printed
# --------------------------------------------------------------------------------------------------------------------


def lines_of_epoch(epoch: int, warmup: str, threshold: str, title: str = r"All 7 Problems Fixed") -> list[str]:
    """The lines that each epoch must have, in their order, as regular expressions for the whole line."""
    return [
        rf"\[Epoch {epoch}\] Size Warmup Weight: {warmup} \(FIX #4\)",
        rf"\[Epoch {epoch}\] Memory Threshold: {threshold} \(FIX #5\)",
        rf"\[Batch    1\] Reward: {SIGNED} \| Loss: {NUMBER} \| Qwen_grad: {NORM} \| Mask_ratio: {NUMBER}",
        RULE,
        rf"EPOCH {epoch} SUMMARY \({title}\)",
        RULE,
        rf"  Average Loss: {NUMBER}",
        rf"  Average RL Reward: {SIGNED}",
        rf"  Qwen Gradient Norm: {NORM} \(FIX #1 - verifying Qwen trains\)",
        rf"  Size Warmup Weight: {warmup} \(FIX #4 - early emphasis on size\)",
        rf"  Memory Threshold: {threshold} \(FIX #5 - dynamic threshold\)",
        RULE,
        rf"\[Epoch {epoch}\] Val Accuracy: {NUMBER} \(\d+/\d+\)",
        rf"\[Epoch {epoch}\] Accuracy Delta: {SIGNED}",
        rf"\[Epoch {epoch}\] Time: \d+\.\d{{2}}s",
    ]


def missing_line(expected: list[str], lines: list[str]) -> str | None:
    """The first of the expected lines that does not come after the one before it; None if all do."""
    rest = iter(lines)
    for pattern in expected:
        if not any(re.fullmatch(pattern, line) for line in rest):
            return pattern
    return None


def test_log_lines_have_their_exact_shape(finished: Outcome) -> None:
    lines = finished.stdout.splitlines()
    expected = [*lines_of_epoch(0, "1\\.000", "0\\.2200"), *lines_of_epoch(1, "0\\.833", NUMBER)]
    assert missing_line(expected, lines) is None
    assert missing_line(expected[::-1], lines) is not None  # their order counts
    assert lines[0].startswith("Qwen: tiny") and "parameters" in lines[0]


def test_every_batch_has_its_line(finished: Outcome) -> None:
    """With `--log_every 1`; the numbers are those of metrics.jsonl."""
    pattern = rf"\[Batch ([ \d]{{4}})\] Reward: ({SIGNED}) \| Loss: ({NUMBER}) \| Qwen_grad: ({NORM}) \| "
    pattern += rf"Mask_ratio: ({NUMBER})"
    printed = [re.fullmatch(pattern, line) for line in finished.stdout.splitlines() if line.startswith("[Batch")]
    assert len(printed) == len(finished.batches) > 8
    for match, row in zip(printed, finished.batches, strict=True):
        assert match is not None
        shown = (f"{row['reward']:+.4f}", f"{row['loss']:.4f}", f"{row['qwen_grad']:.2e}", f"{row['mask_ratio']:.4f}")
        assert (int(match[1]), *match.groups()[1:]) == (row["batch"], *shown)


def test_log_every(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--log_every", "2", "--max_batches", "5", "--val_limit", "1")
    numbers = re.findall(r"^\[Batch +(\d+)\]", outcome.stdout, re.MULTILINE)
    assert numbers == ["2", "4"] and len(outcome.batches) == 5


def test_train_log_is_what_was_printed(finished: Outcome) -> None:
    assert (finished.folder / "train.log").read_text(encoding="utf-8") == finished.stdout


def test_progress_bars_do_not_break_log_lines(finished: Outcome) -> None:
    """Bars are on stderr, with speed and remaining time; nothing of them is in a log line."""
    assert "\r" not in finished.stdout and "\x1b" not in finished.stdout
    assert "samples/s" in finished.stderr and re.search(r"\d+/\d+ \[\d\d:\d\d<", finished.stderr)


def test_quiet(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--max_batches", "2", "--val_limit", "1", "--quiet")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "", "")
    log = (outcome.folder / "train.log").read_text(encoding="utf-8").splitlines()
    assert missing_line(lines_of_epoch(0, "1\\.000", "0\\.2200"), log) is None
    config = strict_json((outcome.folder / "config.json").read_text(encoding="utf-8"))
    assert config["qwen_lr"] == 3e-4  # resolved: this flag's default depends on the model


# --------------------------------------------------------------------------------------------------------------------
# what is written
# --------------------------------------------------------------------------------------------------------------------

ROW_OF_A_BATCH = {
    *("step", "epoch", "loss", "reward", "d_acc", "d_size", "d_color", "d_rev", "mask_ratio", "samples_per_s"),
    *("qwen_grad", "qwen_missing", "agent_grad", "policy_grad", "skipped_steps", "lr.agent", "lr.qwen", "lr.policy"),
    *("efe.risk", "efe.ambiguity", "efe.size", "efe.reversibility", "efe.prompt", "efe.total"),
}
ROW_OF_AN_EPOCH = {
    *("step", "epoch", "val.pass1", "val.pass2", "val.before_pass1", "val.cell_acc", "val.size_acc", "accuracy_delta"),
    *("memory.size", "memory.updates", "memory.threshold"),
}


def test_metrics(finished: Outcome) -> None:
    rows = metrics(finished.folder)  # strictly parsed
    for row in finished.batches:
        assert ROW_OF_A_BATCH - row.keys() == set()
        assert row.keys() == finished.batches[0].keys()
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
    for row in finished.epochs:
        assert ROW_OF_AN_EPOCH - row.keys() == set()
        assert row.keys() == finished.epochs[0].keys()
    assert [row["step"] for row in finished.batches] == list(range(1, len(finished.batches) + 1))
    assert [row["epoch"] for row in finished.epochs] == list(range(EPOCHS))
    assert len(rows) == len(finished.batches) + EPOCHS
    assert (finished.folder / "metrics.jsonl").read_text(encoding="utf-8").endswith("\n")


def test_numbers_agree_with_each_other(finished: Outcome) -> None:
    assert any(row["reward"] != 0 for row in finished.batches)
    for row in finished.batches:
        parts = row["d_acc"] + 0.5 * (row["d_size"] + row["d_color"] + row["d_rev"])
        assert row["reward"] == pytest.approx(parts, abs=1e-6)
        assert row["loss"] == pytest.approx(0.7 * row["efe.total"] - 0.3 * row["reward_objective"], abs=1e-5)
        assert row["qwen_grad"] > 0 and row["agent_grad"] > 0 and row["policy_grad"] > 0
        assert 0 <= row["mask_ratio"] <= 1
    for epoch, row in enumerate(finished.epochs):
        assert row["memory.updates"] > 0, "nothing was stored"
        own = [batch for batch in finished.batches if batch["epoch"] == epoch]
        assert row["memory.updates"] == sum(batch["stored"] for batch in own)
        average = sum(batch["loss"] for batch in own) / len(own)
        assert f"  Average Loss: {average:.4f}\n" in finished.stdout
    assert finished.epochs[0]["memory.threshold"] == pytest.approx(0.22)


def test_config(finished: Outcome, data_dir: Path) -> None:
    config = strict_json((finished.folder / "config.json").read_text(encoding="utf-8"))
    assert (config["epochs"], config["data"], config["agent_width"]) == (EPOCHS, str(data_dir), 16)
    assert config["output_dir"] == str(finished.folder)


@pytest.mark.parametrize(("split", "part"), [("seed", "training"), ("unseen", "evaluation")])
def test_predictions_are_well_formed_and_score_what_was_logged(
    split: str, part: str, finished: Outcome, data_dir: Path
) -> None:
    predictions = strict_json((finished.folder / f"predictions-{split}.json").read_text(encoding="utf-8"))
    tasks = {file.stem: json.loads(file.read_text()) for file in (data_dir / part).glob("*.json")}
    assert predictions.keys() == tasks.keys()
    solved = {"pass1": 0, "pass2": 0, "pairs": 0}
    for name, task in tasks.items():
        assert len(predictions[name]) == len(task["test"])
        for answer, pair in zip(predictions[name], task["test"], strict=True):
            assert list(answer) == ["attempt_1", "attempt_2"]
            assert all(is_grid(grid) for grid in answer.values())
            assert answer["attempt_1"] != answer["attempt_2"]
            solved["pass1"] += pair["output"] == answer["attempt_1"]
            solved["pass2"] += pair["output"] in answer.values()
            solved["pairs"] += 1

    prefix = "val" if split == "seed" else "val.unseen"
    last = finished.epochs[-1]
    assert last[f"{prefix}.pairs"] == solved["pairs"]
    assert last[f"{prefix}.pass1"] == pytest.approx(solved["pass1"] / solved["pairs"])
    assert last[f"{prefix}.pass2"] == pytest.approx(solved["pass2"] / solved["pairs"])
    if split == "seed":
        share = solved["pass1"] / solved["pairs"]
        assert f"[Epoch 1] Val Accuracy: {share:.4f} ({solved['pass1']}/{solved['pairs']})\n" in finished.stdout
        assert f"[Epoch 1] Accuracy Delta: {last['accuracy_delta']:+.4f}\n" in finished.stdout


def is_grid(grid: Any) -> bool:
    rows = isinstance(grid, list) and 1 <= len(grid) <= 30 and 1 <= len(grid[0]) <= 30
    return rows and all(len(row) == len(grid[0]) and all(type(c) is int and 0 <= c <= 9 for c in row) for row in grid)


def test_nothing_unfinished_is_left(finished: Outcome) -> None:
    names = {re.sub(r"\d{9}", "N", path.name) for path in finished.folder.iterdir()}
    assert names == {
        *("LOCK", "train.log", "metrics.jsonl", "config.json", "predictions-seed.json", "predictions-unseen.json"),
        *("gallery-seed.json", "gallery-unseen.json", "report.html"),
        *("step-N", "best-accuracy_delta", "best-val_accuracy", "tensorboard"),
    }


# --------------------------------------------------------------------------------------------------------------------
# the same again
# --------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run(small_run: SmallRun, tmp_path: Path) -> None:
    flags = ("--max_batches", "4", "--val_limit", "3")
    first, second, other = (
        small_run(tmp_path / name, *flags, "--seed", seed) for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    assert timeless(first.rows) == timeless(second.rows) != timeless(other.rows)
    assert differences_of_runs(first.folder, second.folder) == []
    assert differences(load(first.folder).state["model"], load(other.folder).state["model"])


def test_main_works_outside_the_main_thread(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    """As some notebook front ends call it; there no signal handler can be installed."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(small_run(tmp_path / "run", "--max_batches", "2", "--val_limit", "1"))
    )
    thread.start()
    thread.join()
    assert [outcome.code for outcome in outcomes] == [0]
    assert timeless(outcomes[0].batches)[0]["efe.risk"] == finished.batches[0]["efe.risk"]


# --------------------------------------------------------------------------------------------------------------------
# flags that change what a run does
# --------------------------------------------------------------------------------------------------------------------


def test_gradient_accumulation(small_run: SmallRun, tmp_path: Path) -> None:
    """One optimizer step for three batches, and one for what is left at the end of the epoch."""
    outcome = small_run(tmp_path / "run", "--grad_accum", "3", "--max_batches", "5", "--val_limit", "1")
    assert [row["step"] for row in outcome.batches] == [1, 2, 3, 4, 5]
    norms = [row["qwen_grad"] for row in outcome.batches]  # of the accumulated gradient
    assert norms[0] == norms[1] == norms[2] != norms[3] == norms[4]
    state = load(outcome.folder).state
    assert (state["extra"]["state"]["updates"], state["extra"]["state"]["step"]) == (2, 5)
    assert state["optim"]["average"]["updates"] == 2


def test_policy_objective_rloo(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    flags = ("--policy_objective", "rloo", "--policy_samples", "2", "--max_batches", "4", "--val_limit", "1")
    outcome = small_run(tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.stderr
    assert all(row["policy_grad"] > 0 for row in outcome.batches)
    # The same first batch, another objective: the free energy does not depend on it.
    first, expected = outcome.batches[0], finished.batches[0]
    assert first["efe.total"] == expected["efe.total"] and first["reward_objective"] != expected["reward_objective"]


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_what_is_exported_is_what_was_validated(
    ema: str, small_run: SmallRun, small_build: SmallBuild, tmp_path: Path
) -> None:
    """The averaged weights, where there are any, under the names that the raw ones have."""
    flags = ("--ema", ema, "--task_latent", *FAST)
    assert small_run(tmp_path / "run", *flags, "--max_batches", "6", "--val_limit", "1").code == 0
    export_best(tmp_path / "run", tmp_path / "out")
    run, checkpoint = small_build(*flags), load(tmp_path / "run", "best")
    restore(run, checkpoint)
    raw = checkpoint.state["model"]
    with run.average.applied() if run.average else contextlib.nullcontext():
        for name, part in saved_parts(run).items():
            exported = load_file(tmp_path / "out" / name / "model.safetensors")
            assert differences(exported, dict(part.state_dict())) == []
            assert name != "agent" or (differences(exported, dict(raw[name])) == []) == (ema == "0")


def test_no_policy(small_run: SmallRun, tmp_path: Path) -> None:
    """The control: one pass, so that nothing is refined and nothing rewarded."""
    outcome = small_run(tmp_path / "run", "--no_policy", "--max_batches", "4")
    assert outcome.code == 0, outcome.stderr
    for row in outcome.batches:
        gains = [row[name] for name in ("reward", "reward_objective", "d_acc", "d_size", "d_color", "d_rev")]
        assert gains == [0.0] * 6
        assert row["agent_grad"] > 0 and row["qwen_grad"] > 0
    last = outcome.epochs[-1]
    assert last["accuracy_delta"] == 0.0 and last["val.pass1"] == last["val.before_pass1"]


def test_a_frozen_qwen_stays_as_it_is(small_run: SmallRun, tmp_path: Path) -> None:
    """Its backbone is stored once a run, the queries and the projection after it train."""
    flags = ("--qwen_tune", "frozen", "--max_batches", "4", "--val_limit", "1", "--save_every", "2")
    outcome = small_run(tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.stderr
    assert all(row["qwen_grad"] > 0 for row in outcome.batches)
    steps = [load(outcome.folder, str(path)) for path in sorted(outcome.folder.glob("step-*"))]
    assert len(steps) == 2 and len(list((outcome.folder / "blobs").iterdir())) == 1
    assert len(steps[0].frozen) > 10 and differences(steps[0].frozen, steps[1].frozen) == []
    assert "qwen" not in steps[0].state["model"]
    queries = [step.state["model"]["qwen_query"]["query"] for step in steps]
    assert not same_bits(*queries)


def test_save_every_and_keep(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--epochs", "2", "--max_batches", "5", "--save_every", "2", "--keep", "3")
    steps = sorted(int(path.name.removeprefix("step-")) for path in outcome.folder.glob("step-*"))
    assert steps == [6, 8, 10]  # of 2, 4, 5 (end of epoch 0), 6, 8, 10
    best = load(outcome.folder, "best")
    assert best.metrics["accuracy_delta"] == max(row["accuracy_delta"] for row in outcome.epochs)


def test_what_is_kept_is_the_checkpoints_affair(small_run: SmallRun, tmp_path: Path) -> None:
    """A resume without --keep deletes nothing that the run was to keep."""
    flags = ("--max_batches", "4", "--save_every", "1", "--val_limit", "1", "--val_every", "0")
    folder = small_run(tmp_path / "run", *flags, "--epochs", "1", "--keep", "7").folder
    assert len([*folder.glob("step-*")]) == 4
    assert small_run(folder, *flags, "--epochs", "2", "--resume", "latest").code == 0
    assert len([*folder.glob("step-*")]) == 7


def test_without_the_way_back(small_run: SmallRun, tmp_path: Path) -> None:
    """Its term weighs nothing, so it is not computed: trained is the same, but what only the way back needs."""
    outcome = small_run(tmp_path / "run", "--max_batches", "2", "--w_reversibility", "0", "--val_limit", "1")
    assert outcome.code == 0 and all(row["efe.reversibility"] == 0 for row in outcome.batches)
    assert all(row["efe.total"] > 0 for row in outcome.batches)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_record_that_is_no_file(name: str, small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "train.log").touch()
    outcome = small_run(tmp_path / "run", "--max_batches", "1")
    assert outcome.code == 2 and outcome.stderr.startswith("error: --output_dir: ") and name in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_validation_only_at_the_end(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--epochs", "3", "--max_batches", "1", "--val_every", "0", "--val_limit", "2")
    assert [("val.pass1" in row) for row in outcome.epochs] == [False, False, True]
    assert [row["memory.updates"] >= 0 for row in outcome.epochs] == [True] * 3
    assert outcome.epochs[-1]["val.pairs"] <= 4 and outcome.stdout.count("Val Accuracy") == 1


# --------------------------------------------------------------------------------------------------------------------
# how it ends
# --------------------------------------------------------------------------------------------------------------------


def test_red_flag(small_run: SmallRun, tmp_path: Path) -> None:
    """A Qwen that does not train is told once and names the fix; under --strict the run saves and ends with 3."""
    flags = ("--ablate", "1", "--max_batches", "4", "--val_limit", "1")
    warned = small_run(tmp_path / "warned", *flags)
    assert warned.code == 0 and len(warned.batches) == 4
    flagged = [line for line in warned.stdout.splitlines() if line.startswith("RED FLAG: ")]
    assert len([line for line in flagged if "FIX #1" in line]) == 1
    assert "EPOCH 0 SUMMARY (without fix 1" in warned.stdout and "All 7 Problems Fixed" not in warned.stdout

    stopped = small_run(tmp_path / "stopped", *flags, "--strict")
    assert stopped.code == 3 and len(stopped.batches) == 1
    *_, flag, last, _ = stopped.stdout.splitlines()
    assert flag.startswith("RED FLAG: ") and "FIX #1" in flag and last.startswith("Saved at epoch 0, batch 1;")
    assert load(stopped.folder).step == 1


def test_no_red_flag_in_a_healthy_run(small_run: SmallRun, tmp_path: Path) -> None:
    """Without a policy, whose average reward over a dozen batches is a matter of chance."""
    outcome = small_run(tmp_path / "run", "--epochs", "2", "--no_policy", "--strict", "--val_limit", "1")
    assert outcome.code == 0, outcome.stdout
    assert "RED FLAG" not in outcome.stdout and len(outcome.batches) > 8


def test_time_budget(small_run: SmallRun, tmp_path: Path) -> None:
    """The command stops in time, validates what it has, saves it, and could go on."""
    started = time.monotonic()
    outcome = small_run(tmp_path / "run", "--epochs", "100000", "--time_budget", "3", "--val_every", "0")
    took = time.monotonic() - started
    assert outcome.code == 0, outcome.stderr
    assert 1.5 < took < 20
    assert outcome.stdout.count("Val Accuracy") == 1 and outcome.epochs[-1]["val.pairs"] > 6
    saved = load(outcome.folder)
    assert saved.step == len(outcome.batches) > 0
    assert saved.metrics["val_accuracy"] == outcome.epochs[-1]["val.pass1"]

    goes_on = small_run(tmp_path / "run", "--epochs", "100000", "--time_budget", "2", "--val_every", "0", "--resume")
    assert goes_on.code == 0 and load(goes_on.folder).step > saved.step
    steps = [row["step"] for row in goes_on.batches]
    assert steps == list(range(1, len(steps) + 1))


def test_eval_only(finished: Outcome, small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """It prints the same figures again, and neither trains nor saves nor forgets what the run had recorded."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    flags = ("--epochs", str(EPOCHS), "--val_splits", "seed,unseen", "--unseen", str(data_dir), *FAST, "--eval_only")
    older = min(folder.glob("step-*"))
    assert load(folder).step > load(folder, str(older)).step
    for which in ("latest", str(older)):
        outcome = small_run(folder, *flags, "--resume", which)
        assert outcome.code == 0, outcome.stderr
        assert outcome.batches == finished.batches
        assert "SUMMARY" not in outcome.stdout and len(re.findall(r"Val Accuracy: .*\(\d+/\d+\)", outcome.stdout)) == 1
        if which == "latest":
            assert figures(outcome.stdout) == figures(finished.stdout[finished.stdout.index("EPOCH 1 SUMMARY") :])
            name = "predictions-seed.json"
            assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()
    other = shutil.copytree(finished.folder, tmp_path / "other")
    before = everything_below(other)
    outcome = small_run(other, *flags, "--resume", str(older))  # of another run: this one's records are its own
    assert outcome.code == 2 and "holds a run already" in outcome.stderr and everything_below(other) == before
    checkpoints = [path for path in finished.folder.iterdir() if path.is_dir()]
    copies = [folder / path.name for path in checkpoints]
    assert list(everything_below(*copies).values()) == list(everything_below(*checkpoints).values())


def figures(text: str) -> list[str]:
    """What a validation says, without the epoch before it."""
    return re.findall(r"(?:Val Accuracy|Accuracy Delta|seed split|unseen split|training-free).*", text)


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of any file fails in this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("flags", [(), ("--ablate", "1", "--strict")])
def test_a_checkpoint_that_cannot_be_written(flags: tuple[str, ...], small_run: SmallRun, tmp_path: Path) -> None:
    """Loudly, in one line, with exit code 1; also where the run was about to end for another reason."""
    with no_file_longer_than(1 << 19):  # logs are shorter, the model is longer
        outcome = small_run(tmp_path / "run", "--max_batches", "3", "--val_limit", "1", *flags)
    assert outcome.code == 1
    errors = [line for line in re.split(r"[\r\n]", outcome.stderr) if line.startswith("error: ")]
    assert len(errors) == 1 and str(outcome.folder) in errors[0] and os.strerror(errno.EFBIG) in errors[0]
    assert not list(outcome.folder.glob("step-*")) and not list(outcome.folder.glob(".tmp-*"))


def test_the_same_prompt_for_the_same_context_is_no_collapse() -> None:
    prompt, contexts = torch.ones(3, 2, 4), context_codes(torch.tensor([[1, 2, 0], [1, 3, 0], [1, 2, 0]]))
    assert prompt_spread(prompt, contexts) == 0  # different tasks, one prompt
    assert prompt_spread(prompt, contexts[:1].expand(3)) == 1  # tasks without any context, say
    assert prompt_spread(torch.randn(3, 2, 4), contexts) > 0.1


@pytest.mark.parametrize(
    ("epoch", "batch", "trained", "last"), [(0, 0, False, 0), (0, 3, False, 0), (1, 6, True, 1), (2, 0, False, 1)]
)
def test_the_epoch_of_the_weights(epoch: int, batch: int, trained: bool, last: int) -> None:
    assert TrainState(epoch=epoch, batch=batch, trained=trained).trained_epoch == last


def test_predictions_that_cannot_be_written_do_not_end_the_run(small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "run" / "predictions-seed.json").mkdir(parents=True)
    (tmp_path / "run" / "train.log").touch()  # of a run that was lost before it saved anything
    outcome = small_run(tmp_path / "run", "--max_batches", "1", "--val_limit", "1")
    assert outcome.code == 0 and "Predictions of the seed split are not written: " in outcome.stdout
