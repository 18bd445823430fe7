"""What prompt refinement is worth, against simpler ways to spend the same passes of the agent.

    python benchmarks/refinement.py --run runs/arc_complete_20260101_120000 [--splits demonstrations seed] [--tasks N]

Every method starts from the same prompts of a trained run and is scored on the same pairs under the same views: mean
change of cell accuracy (after - before) with its paired standard error, grids solved before and after, and the passes
of the agent over one pair that a test task took to refine its prompt, forward and backward apart. The fixed step sizes
are in units of the normalised gradient. "from another task" is the control: whatever it gives is not the feedback's.

The split `demonstrations` is made here: the last demonstration of each training task is the test pair, the others
demonstrate, test pairs are dropped. The run has trained on that demonstration unless it was made with a development
split of its own; designs are chosen on demonstrations, test pairs are looked at only to report.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from arc.augment import evaluation_views  # noqa: E402
from arc.batches import PredictionBatch, PredictionData, QueryBatch, prediction_order  # noqa: E402
from arc.evaluate import cell_accuracy, paired_delta  # noqa: E402
from arc.predict import PairPrediction, collect  # noqa: E402
from arc.refine import best_first, farther, pairs_loss  # noqa: E402
from arc.run.runlog import RunLog  # noqa: E402
from arc.splits import Split  # noqa: E402
from arc.tasks import Task  # noqa: E402
from benchmarks.evidence import processor  # noqa: E402
from model_persistence import ModelPersistence, PersistenceError  # noqa: E402
from policy_refined import Feedback  # noqa: E402
from trainloop_complete_with_fixes import (  # noqa: E402
    Run,
    build_run,
    context_feedback,
    load_checkpoint,
    parse_arguments,
    read_prompt,
    restore,
    take_flags,
)

DEMONSTRATIONS = "demonstrations"
FIXED_STEPS = (0.1, 0.3, 1.0)
TRIES = (4, 16)
STEPS = (1, 4, 10)

Method = Callable[[PredictionBatch, Tensor], Tensor]  # a batch and its prompts (G, K, D) -> refined prompts


# --------------------------------------------------------------------------------------------------------------------
# a trained run, and tasks to score it on
# --------------------------------------------------------------------------------------------------------------------


def open_run(folder: str, which: str, flags: Sequence[str]) -> Run:
    """The run of a checkpoint, built and restored as the script does it for --eval_only; nothing is written. ValueError
    or PersistenceError, one line, where there is none."""
    args, given = parse_arguments(["--eval_only", "--resume", which, "--output_dir", folder, "--quiet", *flags])
    with ModelPersistence(folder, read_only=True) as persistence:
        checkpoint = load_checkpoint(persistence, which)
    take_flags(args, given, checkpoint)
    run = build_run(args, RunLog(quiet=True), time.monotonic(), checkpoint)
    restore(run, checkpoint)
    for module in run.modules.values():
        module.eval()
    return run


def chosen(split: Split, positions: Sequence[int]) -> Split:
    """The split's tasks at these positions."""
    return Split(split.name, tuple(split.tasks[i] for i in positions), tuple(split.numbers[i] for i in positions))


def split_named(run: Run, name: str) -> Split:
    """`demonstrations`: training tasks of three demonstrations or more, the last one as the only test pair. Otherwise
    one that the run validates on; ValueError if it does not."""
    if name == DEMONSTRATIONS:
        kept = tuple(number for number, task in enumerate(run.training) if len(task.train) > 2)
        held = (run.training[number] for number in kept)
        return Split(name, tuple(Task(f"{task.id}-last", task.train[:-1], task.train[-1:]) for task in held), kept)
    found = [split for split in run.splits if split.name == name]
    if not found:
        raise ValueError(f"--splits: the run has {DEMONSTRATIONS} and {', '.join(run.args.val_splits)}, no {name}")
    return found[0]


# --------------------------------------------------------------------------------------------------------------------
# the methods
# --------------------------------------------------------------------------------------------------------------------


class PassCounter:
    """Counts the agent's passes over single pairs: `forward`, and `backward` for those made with gradient."""

    def __init__(self, agent: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        self.handle = agent.register_forward_hook(self.count)

    def count(self, _: torch.nn.Module, inputs: tuple[Any, ...], __: object) -> None:
        self.forward += len(inputs[0])
        self.backward += len(inputs[0]) if torch.is_grad_enabled() else 0


class Methods:
    """Every way to refine, by name, on one run."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.generator = run, torch.Generator().manual_seed(seed)
        learned = float(run.policy.log_step.detach().exp().mean())
        self.by_name: dict[str, Method] = {}
        for steps in STEPS:
            self.by_name[f"gradient, learned step ({learned:.3f}), {steps}"] = self.repeated(self.learned_step, steps)
            for size in FIXED_STEPS:
                step = functools.partial(self.fixed_step, size)
                self.by_name[f"gradient, step {size:g}, {steps}"] = self.repeated(step, steps)
        for steps in STEPS[1:]:
            step = functools.partial(self.fixed_step, 0.3)
            self.by_name[f"gradient, step 0.3, up to {steps}, best on all"] = self.selected(step, steps)
        for tries in TRIES:
            self.by_name[f"random, best of {tries} on the context"] = functools.partial(self.random, tries)
        self.by_name["**policy**"] = self.repeated(self.policy, 1)
        for steps in STEPS[1:]:
            self.by_name[f"policy, up to {steps}, best on all"] = self.selected(self.policy, steps)
        self.by_name["policy, feedback from another task (control)"] = self.foreign

    def feedback(self, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Feedback:
        return context_feedback(self.run.agent, pairs, prompt)

    def policy(self, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        return self.run.policy.refine_prompt(prompt, self.feedback(prompt, pairs)).prompt

    def learned_step(self, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        gradient = self.run.policy.normalised_gradient(self.feedback(prompt, pairs))
        return prompt - self.run.policy.log_step.exp() * gradient

    def fixed_step(self, size: float, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        return prompt - size * self.run.policy.normalised_gradient(self.feedback(prompt, pairs))

    def repeated(self, step: Callable[[Tensor, Sequence[QueryBatch]], Tensor], steps: int) -> Method:
        def refine(batch: PredictionBatch, prompt: Tensor) -> Tensor:
            for _ in range(steps):
                prompt = step(prompt, batch.feedback)
            return prompt

        return refine

    def selected(self, step: Callable[[Tensor, Sequence[QueryBatch]], Tensor], steps: int) -> Method:
        def refine(batch: PredictionBatch, prompt: Tensor) -> Tensor:
            return farther(prompt, batch.trial, step, functools.partial(pairs_loss, self.run.agent), steps)

        return refine

    def random(self, tries: int, batch: PredictionBatch, prompt: Tensor) -> Tensor:
        """Gaussian deltas with a tenth of the prompt's root mean square; the unrefined prompt is a candidate too."""
        scale = 0.1 * prompt.square().mean((1, 2), keepdim=True).sqrt()
        tried = [
            prompt + scale * torch.randn(prompt.shape, generator=self.generator).to(prompt.device) for _ in range(tries)
        ]
        return best_first([prompt, *tried], batch.feedback, functools.partial(pairs_loss, self.run.agent))[0]

    def foreign(self, batch: PredictionBatch, prompt: Tensor) -> Tensor:
        """The policy's action on the feedback of the next task in the batch."""
        given = self.feedback(prompt, batch.feedback)
        other = Feedback(*(getattr(given, f.name).roll(1, 0) for f in dataclasses.fields(Feedback)))
        return self.run.policy.refine_prompt(prompt, other).prompt


# --------------------------------------------------------------------------------------------------------------------
# measuring
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one method did: per pair, cell accuracy and share of views exactly right before and after; its passes."""

    cells: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    exact: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    forward: int = 0
    backward: int = 0

    def add(self, pairs: Sequence[PairPrediction]) -> None:
        """Score: the only place where the outputs of the pairs that are predicted are read."""
        for pair in pairs:
            target = pair.task.test[pair.test_index].output
            if target is None:
                continue
            for index, grids in enumerate((pair.before, pair.after)):
                self.cells[index].append(float(np.mean([cell_accuracy(grid, target) for grid in grids])))
                self.exact[index].append(float(np.mean([np.array_equal(grid, target) for grid in grids])))

    def row(self, name: str, tasks: int) -> str:
        delta, error = paired_delta(*self.cells)
        before, after = (100 * float(np.mean(values)) for values in self.exact)
        moved = np.subtract(self.cells[1], self.cells[0])
        return (
            f"| {name} | {delta:+.4f} ± {error:.4f} | {before:.1f} → {after:.1f} | "
            f"{int((moved > 0).sum())} / {int((moved < 0).sum())} | "
            f"{self.forward / tasks:.1f} + {self.backward / tasks:.1f} |"
        )


def measure(
    run: Run, split: Split, *, views: int = 1, seed: int = 0, wanted: Sequence[str] = ("",)
) -> dict[str, Outcome]:
    """Every method that has one of `wanted` in its name, on every task, under the averaged weights where the run has
    them."""
    methods, counter = Methods(run, seed), PassCounter(run.agent)
    outcomes = {name: Outcome() for name in methods.by_name if any(part in name for part in wanted)}
    averaged = run.average.applied() if run.average else contextlib.nullcontext()
    with averaged, torch.no_grad(), run.precision.autocast(run.device):
        for batch in prediction_batches(run, split.tasks, views):
            positions = batch.task.tolist()
            batch.task = torch.tensor([split.numbers[i] for i in positions], device=run.device)
            prompt, _ = read_prompt(run, batch)
            before = [run.agent(query, prompt) for query in batch.query]
            for name, outcome in outcomes.items():
                counter.forward = counter.backward = 0
                refined = methods.by_name[name](batch, prompt)
                outcome.forward += counter.forward
                outcome.backward += counter.backward
                found: dict[tuple[int, int], PairPrediction] = {}
                for query, first in zip(batch.query, before, strict=True):
                    collect(query, first, run.agent(query, refined), positions, split.tasks, run.store, found)
                outcome.add(list(found.values()))
    counter.handle.remove()
    return outcomes


def prediction_batches(run: Run, tasks: Sequence[Task], views: int) -> Iterator[PredictionBatch]:
    """Tasks of similar size together, at least two in each batch, so that there is always another one's feedback."""
    data = PredictionData(
        tasks,
        run.store,
        run.qwen.encoder,
        views=evaluation_views(views),
        feedback_pairs=run.args.feedback_pairs,
    )
    order = [i for batch in prediction_order(tasks, views=views, max_cells=run.args.max_cells) for i in batch]
    size = math.ceil(len(order) / max(1, len(order) // TASKS_IN_A_BATCH))
    for start in range(0, len(order), size):
        yield data[tuple(order[start : start + size])].to(run.device)


TASKS_IN_A_BATCH = 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a trained run")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a checkpoint's folder")
    parser.add_argument("--splits", nargs="+", default=[DEMONSTRATIONS], help="demonstrations, or the run's own splits")
    parser.add_argument("--tasks", type=int, default=0, help="score every n-th task so that about N are left; 0: all")
    parser.add_argument("--max_cells", type=int, default=900, help="only tasks without a larger grid")
    parser.add_argument("--views", type=int, default=1, help="augmented views of each test input")
    parser.add_argument("--methods", nargs="+", default=[""], help="only those with one of these in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the random deltas")
    args, flags = parser.parse_known_args(argv)
    try:
        run = open_run(args.run, args.checkpoint, flags)
        if run.args.no_policy:
            raise ValueError(f"--run: {args.run} was trained without a policy")
        print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {run.precision.name}")
        print(f"run of seed {run.args.seed}, {run.state.step} batches; random deltas of seed {args.seed}")
        for split in args.splits:
            report(run, split, args)
    except (ValueError, PersistenceError) as problem:
        parser.error(str(problem))
    return 0


def report(run: Run, name: str, args: argparse.Namespace) -> None:
    """One split's table."""
    whole = split_named(run, name)
    fitting = [i for i, task in enumerate(whole.tasks) if task.test and largest_grid(task) <= args.max_cells]
    split = chosen(whole, fitting[:: max(1, len(fitting) // args.tasks)] if args.tasks else fitting)
    if len(split.tasks) < 2:
        raise ValueError(f"--splits {name}: {len(split.tasks)} tasks are too few to compare on")
    started = time.monotonic()
    outcomes = measure(run, split, views=args.views, seed=args.seed, wanted=args.methods)
    if not outcomes:
        raise ValueError(f"--methods: none is called like {', '.join(args.methods)}")
    first = next(iter(outcomes.values()))  # "before" is the same in all
    pairs, before, solved = len(first.cells[0]), float(np.mean(first.cells[0])), 100 * float(np.mean(first.exact[0]))
    print(f"\n### {name}: {len(split.tasks)} tasks, {pairs} pairs, cell accuracy before {before:.4f}\n")
    print("| method | cell accuracy after − before | exact % | better / worse | passes a task, forward + backward |")
    print("|---|---|---|---|---|")
    print(f"| none | 0 | {solved:.1f} | 0 / 0 | 0 |")
    for method, outcome in outcomes.items():
        print(outcome.row(method, len(split.tasks)))
    print(f"\n{time.monotonic() - started:.0f} s")


def largest_grid(task: Task) -> int:
    """Cells of the largest grid that a solver sees."""
    grids = [pair.input for pair in (*task.train, *task.test)] + [p.output for p in task.train if p.output is not None]
    return max(grid.size for grid in grids)


if __name__ == "__main__":
    sys.exit(main())
