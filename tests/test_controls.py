"""What comparisons need: runs without the memory, without the evidence, with the old settings, and `--dev`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, SmallBuild, SmallRun, train_batches
from helpers import FAST, differences, load, offer, timeless

from arc.agent import AgentOutput
from arc.batches import QueryBatch
from arc.datasets import load_dataset
from arc.efe import size_loss
from arc.evaluate import exact
from arc.evidence import NUM_RULES, NUM_TABLES, NoEvidence
from arc.evidence.counting import TaskEvidence
from arc.evidence.store import silence
from arc.predict import PairPrediction
from arc.splits import Development, carve, hold_out
from arc.tasks import Pair, Task, same_content
from trainloop_complete_with_fixes import ABLATION, parse_arguments, predictor, read_prompt, train_step

# --------------------------------------------------------------------------------------------------------------------
# no memory
# --------------------------------------------------------------------------------------------------------------------


def test_without_the_memory_nothing_is_stored(small_run: SmallRun, tmp_path: Path) -> None:
    """`FAST` and a low threshold would fill it: the same command with the memory does."""
    kept = small_run(tmp_path / "kept", *FAST, "--val_limit", "1")
    outcome = small_run(tmp_path / "run", *FAST, "--val_limit", "1", "--no_memory")
    assert (kept.code, outcome.code) == (0, 0), outcome.stderr
    assert kept.epochs[-1]["memory.updates"] > 0
    last = outcome.epochs[-1]
    assert (last["memory.updates"], last["memory.offers"], last["memory.size"]) == (0, 0, 0)
    assert "EPOCH 0 SUMMARY (without the memory)" in outcome.stdout
    assert "Memory: 0 of 0 offers stored" in outcome.stdout


@pytest.mark.parametrize(
    ("flags", "count"), [((), 0), (("--recall", "9"), 3), (("--recall", "2"), 2), (("--recall", "2", "--no_memory"), 0)]
)
def test_as_much_is_recalled_as_was_asked_for(small_build: SmallBuild, flags: tuple[str, ...], count: int) -> None:
    run = small_build(*flags)
    (batch,) = train_batches(run, 1)
    with torch.no_grad():
        prompt, key = read_prompt(run, batch)
    for number, value in enumerate(torch.ones(3, *prompt.shape[1:])):
        assert offer(run.memory, key[0], value, 1000 + number, 1.0, 0.5, step=0)
    assert len(predictor(run).recall(key)) == count


# --------------------------------------------------------------------------------------------------------------------
# no policy
# --------------------------------------------------------------------------------------------------------------------


def test_without_the_policy_every_query_counts_alike(small_build: SmallBuild) -> None:
    """There is no second pass, over some of the queries only, for them to count in once more."""
    run = small_build("--no_policy", "--views", "3", "--refined_views", "1")
    (batch,) = train_batches(run, 1)
    assert 0 < len(batch.refined) < len(batch.query)
    torch.nn.init.normal_(run.agent.size_head.weight)  # at first the views of a pair are answered alike
    noise = torch.zeros(run.args.policy_samples, len(batch.task), run.policy.log_std.numel())
    measured = train_step(run, batch, noise, 1).measured
    with torch.no_grad():
        output = run.agent(batch.query, read_prompt(run, batch)[0])
    expected = size_loss(output.size_logits, batch.query.target_size)
    assert float(measured["efe.size"]) == pytest.approx(float(expected), rel=1e-5)


def test_with_the_policy_every_prediction_counts_alike(small_build: SmallBuild) -> None:
    """Those after refinement, of some of the queries, beside those before, of all."""
    run = small_build("--views", "3", "--refined_views", "1")
    (batch,) = train_batches(run, 1)
    torch.nn.init.normal_(run.agent.size_head.weight)
    noise = torch.zeros(run.args.policy_samples, len(batch.task), run.policy.log_std.numel())
    losses: list[tuple[torch.Tensor, float]] = []  # of the sizes, of each pass, by its targets

    def look(_: torch.nn.Module, inputs: tuple[QueryBatch, torch.Tensor], output: AgentOutput) -> None:
        losses.append((inputs[0].target, float(size_loss(output.size_logits.detach(), inputs[0].target_size))))

    hook = run.agent.register_forward_hook(look)
    measured = train_step(run, batch, noise, 1).measured
    hook.remove()
    targets = (batch.query.target, batch.query.target[batch.refined])
    (before,), (after,) = ([loss for target, loss in losses if torch.equal(target, each)] for each in targets)
    every, few = map(len, targets)
    assert before != after and 0 < few < every
    assert float(measured["efe.size"]) == pytest.approx((every * before + few * after) / (every + few), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# no evidence
# --------------------------------------------------------------------------------------------------------------------


def test_without_evidence_the_agent_gets_none(small_build: SmallBuild, data_dir: Path) -> None:
    """Every number that evidence could reach is what it is where nothing is known, in training and in prediction."""
    run = small_build("--no_evidence", "--val_splits", "seed,unseen", "--unseen", str(data_dir))
    seen: list[QueryBatch] = []
    for batch in train_batches(run, 100):
        seen += [batch.query, *batch.feedback]
    trained = len(seen)
    run.agent.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for split in run.splits:
        predictor(run).split(split)
    assert trained > 10 and len(seen) > trained + 4
    assert [is_silent(query) for query in seen] == [True] * len(seen)
    assert not is_silent(train_batches(small_build(), 1)[0].query)


def is_silent(query: QueryBatch) -> bool:
    """Whether nothing in a batch comes from evidence."""
    from_evidence = (query.codes, query.table_stats, query.vote_weight, query.rule_sizes, query.rule_features)
    present = query.input_grid >= 0
    in_size = torch.stack((present.any(2).sum(1), present.any(1).sum(1)), dim=-1)  # (B, 2)
    return (
        not any(bool(part.any()) for part in from_evidence)
        and bool(torch.isneginf(query.rule_logits).all())
        and torch.equal(query.out_size, in_size)
        and torch.equal(query.in_size, in_size)
    )


def test_without_evidence_it_still_learns_and_predicts(small_run: SmallRun, tmp_path: Path) -> None:
    """Nothing is computed or cached, answers have the input's size at most, and gradients are finite and not zero."""
    cache = tmp_path / "cache"
    outcome = small_run(tmp_path / "run", *FAST, "--no_evidence", "--cache_dir", str(cache))
    assert outcome.code == 0, outcome.stderr
    assert not (cache / "evidence").exists()
    assert "EPOCH 0 SUMMARY (without the evidence)" in outcome.stdout
    assert all(row["loss"] > 0 and row["agent_grad"] > 0 and row["qwen_grad"] > 0 for row in outcome.batches)
    assert {row["vote_solved"] for row in outcome.batches} == {0.0}
    assert 0 < outcome.epochs[-1]["val.cell_acc"] and outcome.epochs[-1]["val.vote_pass1"] == 0


def test_silence_is_what_no_demonstration_says() -> None:
    """A task with a single demonstration has none to answer it from: the real evidence then says the same."""
    pair = Pair(np.eye(3, 4, dtype=np.uint8), np.ones((2, 2), np.uint8))
    real, ours = TaskEvidence([pair], []).query(held_out=0), silence(pair.input)
    assert real.size == ours.size
    assert (real.codes < 10).all() and (ours.codes == 0).all()
    assert (real.table_stats == ours.table_stats).all() and ours.table_stats.shape == (NUM_TABLES, 3)
    assert ours.rule_logits.shape == real.rule_logits.shape == (NUM_RULES,)
    assert not ours.vote()[1].any()


def test_silent_evidence_has_no_ballot() -> None:
    """A blank grid is nobody's vote: it is no attempt, and the views need not outvote it."""
    blank, one, two = (np.full((2, 2), colour, np.uint8) for colour in range(3))
    task = Task("t", (), (Pair(one, None),))
    pair = PairPrediction(task, 0, blank, [one, one], [one, two], [0.1, 0.9], [0.1, 0.9])
    first, second = pair.attempts()
    assert exact(first, blank) and exact(second, two)
    pair.evidence = False
    first, second = pair.attempts()
    assert exact(first, two) and exact(second, one)


# --------------------------------------------------------------------------------------------------------------------
# the old settings
# --------------------------------------------------------------------------------------------------------------------


def test_old_settings() -> None:
    args, _ = parse_arguments(["--old"])
    assert (args.ablate, args.agent_lr, args.qwen_lr) == ((1, 2, 3, 4, 5, 6, 7), 1e-5, 5e-5)
    by_hand, _ = parse_arguments(["--ablate", "1,2,3,4,5,6,7", "--agent_lr", "1e-5", "--qwen_lr", "5e-5"])
    assert {**vars(args), "old": False} == vars(by_hand)
    args, _ = parse_arguments(["--agent_lr", "0.25", "--old", "--ablate", "3"])
    assert (args.ablate, args.agent_lr, args.qwen_lr) == ((3,), 0.25, 5e-5)


def test_old_settings_run_and_say_so(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--old", "--max_batches", "2", "--val_limit", "1")
    assert outcome.code == 0, outcome.stderr
    off = "; ".join(f"fix {number}: {text}" for number, text in ABLATION.items())
    assert f"EPOCH 0 SUMMARY (the old settings: without {off})" in outcome.stdout
    assert "learning rates: agent 1e-05, policy 0.001\n" in outcome.stdout  # Qwen is frozen: no group of its own


# --------------------------------------------------------------------------------------------------------------------
# all of them enter the maths
# --------------------------------------------------------------------------------------------------------------------


def test_controls_are_refused_on_resume(small_run: SmallRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert small_run(folder, "--max_batches", "2", "--val_limit", "1").code == 0
    controls = ("old", "no_memory", "no_evidence", "dev")
    refused = small_run(folder, "--resume", *(f"--{name}" for name in controls), "--dev_tasks", "2")
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    for name in (*controls, "dev_tasks"):
        assert f"--{name} " in refused.stderr


def test_controls_are_kept_on_resume(small_run: SmallRun, tmp_path: Path) -> None:
    """`--resume` alone goes on with the run's own: the old settings, the development split, no memory, no evidence."""
    flags = ("--old", "--dev", "--dev_tasks", "2", "--no_memory", "--no_evidence")
    assert small_run(tmp_path / "run", *flags, "--max_batches", "2").code == 0
    longer = small_run(tmp_path / "run", "--resume", "--epochs", "2")
    assert longer.code == 0, longer.stderr
    assert "EPOCH 1 SUMMARY (the old settings: without fix 1" in longer.stdout
    assert "; the memory; the evidence)" in longer.stdout
    assert [row["val.dev_seen.pairs"] for row in longer.epochs] == [4, 4]


# --------------------------------------------------------------------------------------------------------------------
# the development split
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Tasks of 1 to 5 demonstrations, the last a twin of the first under another id."""
    rng = np.random.default_rng(3)

    def pair() -> Pair:
        return Pair(rng.integers(0, 10, (3, 3), np.uint8), rng.integers(0, 10, (2, 3), np.uint8))

    made = [Task(f"t{n}", tuple(pair() for _ in range(1 + n % 5)), (pair(),)) for n in range(20)]
    return [*made, Task("twin", made[4].train, (pair(),))]


@pytest.mark.parametrize("seed", range(5))
def test_carve(tasks: list[Task], seed: int) -> None:
    """Every demonstration is trained on or predicted, and no demonstration of a held-out task is trained on."""
    found = carve(tasks, whole=6, seed=seed)
    by_id = {task.id: task for task in tasks}
    held = {task.id.rpartition("-")[0] for task in found.unseen}
    assert len(held) == 6 and len(found.unseen) == sum(len(by_id[name].train) for name in held)
    for task in (*found.seen, *found.unseen):
        origin, _, number = task.id.rpartition("-")
        (query,) = task.test
        assert query is by_id[origin].train[int(number)]
        assert task.train == tuple(p for p in by_id[origin].train if p is not query) and len(task.train) > 0
    assert found.training[: len(found.seen)] == found.seen and all(len(task.train) > 1 for task in found.seen)
    assert all(not task.test for task in found.training[len(found.seen) :])
    assert not any(same_content(a, b) for a in found.training for b in found.unseen)
    trained = {task.id.rpartition("-")[0] or task.id for task in found.training}
    twins = {"t4", "twin"}
    apart = len(twins & trained) < 2 - len(twins & held) - found.dropped  # they hold different demonstrations out
    assert len(trained) == len(found.training) == len(tasks) - 6 - found.dropped - apart and not trained & held
    assert found.dropped == len(twins & held) % 2
    asked = {task.id: {pair.input.tobytes() for pair in task.test} for task in found.seen}
    for task in found.training:
        others = set().union(*(inputs for name, inputs in asked.items() if name != task.id))
        assert not others & {pair.input.tobytes() for pair in task.train}


def test_carve_is_drawn_by_the_seed(tasks: list[Task]) -> None:
    def names(found: Development) -> list[str]:
        return [task.id for task in (*found.training, *found.unseen)]

    assert names(carve(tasks, whole=6, seed=1)) == names(carve(tasks, whole=6, seed=1))
    assert names(carve(tasks, whole=6, seed=1)) != names(carve(tasks, whole=6, seed=2))


def test_hold_out(tasks: list[Task]) -> None:
    task = hold_out(tasks[3], 1)
    assert task.id == "t3-1" and task.test == (tasks[3].train[1],)
    assert task.train == (tasks[3].train[0], *tasks[3].train[2:])


def test_dev_validates_on_its_two_splits(small_run: SmallRun, tmp_path: Path) -> None:
    outcome = small_run(tmp_path / "run", "--dev", "--dev_tasks", "2")
    assert outcome.code == 0, outcome.stderr
    last = outcome.epochs[-1]
    assert (last["val.pairs"], last["val.dev_seen.pairs"]) == (8, 4)
    assert last["val.pass1"] > 0 and last["val.vote_pass1"] > 0
    assert "[Epoch 0] dev_unseen split (demonstrations of tasks held out whole): pass@1" in outcome.stdout
    assert "[Epoch 0] dev_seen split (a held-out demonstration of each training task): pass@1" in outcome.stdout
    assert "dev_unseen has 8 demonstrations of tasks held out whole, dev_seen one demonstration of" in outcome.stdout
    names = [json.loads((outcome.folder / f"predictions-dev_{name}.json").read_text()) for name in ("unseen", "seen")]
    held, trained = ({task_id.rpartition("-")[0] for task_id in part} for part in names)
    assert (len(held), len(trained)) == (2, 4) and not held & trained


def test_dev_never_touches_a_test_pair(
    small_run: SmallRun, data_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With every test pair another one, input and output and number, the same bytes are learned and predicted, and even
    the scores are the same."""
    changed = shutil.copytree(data_dir, tmp_path / "changed")
    for file in sorted(changed.rglob("*.json")):
        task = json.loads(file.read_text())
        task["test"] = [{"input": [[7, 8]], "output": [[9]]}] * (3 if len(task["test"]) < 3 else 1)
        file.write_text(json.dumps(task))
    assert load_dataset(str(changed)).fingerprint != load_dataset(str(data_dir)).fingerprint

    def run_on(data: Path) -> Outcome:
        place = tmp_path_factory.mktemp("run")
        where = ("--data", str(data), "--cache_dir", str(place / "cache"))
        outcome = small_run(place / "run", *FAST, "--dev", "--dev_tasks", "2", *where)
        assert outcome.code == 0, outcome.stderr
        return outcome

    ours, theirs = run_on(data_dir), run_on(changed)
    assert timeless(ours.rows) == timeless(theirs.rows)
    learned, same = (load(outcome.folder).state for outcome in (ours, theirs))
    for group in ("model", "optim"):
        assert differences(learned[group], same[group]) == []
    for name in ("predictions-dev_unseen.json", "predictions-dev_seen.json"):
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes()


def test_dev_learns_from_nothing_that_it_scores(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """A held-out demonstration's output changes no weight and no prediction, of either split."""
    plain = small_run(tmp_path / "plain", *FAST, "--dev", "--dev_tasks", "2")
    held = json.loads((plain.folder / "predictions-dev_seen.json").read_text())
    changed = shutil.copytree(data_dir, tmp_path / "changed")
    for derived in held:
        name, _, number = derived.rpartition("-")
        file = changed / "training" / f"{name}.json"
        task = json.loads(file.read_text())
        task["train"][int(number)]["output"] = [[9, 9, 9]]
        file.write_text(json.dumps(task))
    other = small_run(tmp_path / "other", *FAST, "--dev", "--dev_tasks", "2", "--data", str(changed))
    assert timeless(other.batches) == timeless(plain.batches)
    assert other.epochs[-1]["val.dev_seen.pass1"] == 0 < plain.epochs[-1]["val.dev_seen.pass1"]
    for name in ("predictions-dev_unseen.json", "predictions-dev_seen.json"):
        assert (other.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert differences(load(plain.folder).state["model"], load(other.folder).state["model"]) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dev", "--dev_tasks", "6"), ("--dev_tasks 6", "6 training tasks")),
        (("--dev", "--val_splits", "seed"), ("--dev", "--val_splits")),
        (("--val_splits", "dev_seen"), ("--val_splits", "dev_seen")),
        (("--dev", "--adapt"), ("--dev", "--adapt")),
        (("--dev", "--submission", "s.json"), ("--dev", "--submission")),
    ],
)
def test_what_cannot_be_developed_on(
    flags: tuple[str, ...], words: tuple[str, ...], small_run: SmallRun, tmp_path: Path
) -> None:
    refused = small_run(tmp_path / "run", *flags)
    assert (refused.code, refused.stdout) == (2, "") and refused.stderr.count("\n") == 1
    assert all(word in refused.stderr for word in words)
    assert not (tmp_path / "run").exists()


def test_no_evidence_is_always_prepared(tasks: list[Task]) -> None:
    store = NoEvidence()
    assert store.is_prepared(tasks[0]) and store.get(tasks[0]).test(0).size == tasks[0].test[0].input.shape
