"""What a training query costs, and where the time goes.

- full: queries a second of the real command's steps (`metrics.jsonl`, after a few batches; waiting for a batch is not
  in it), seconds from the start of the process to its first batch, and its largest resident memory, in this checkout
  and in those named by `--against`, taken in turn, several times, each with its own defaults;
- bare: the same step and update on batches that are ready, without loader, records, log and checkpoints: the floor;
- matmul: floating-point operations a second of a large product in the dtype used, and the share that the floor reaches;
- evidence: core-seconds a task with nothing cached, in each checkout;
- validation: test pairs a second with four views, evidence cached, as the difference of two commands that validate on
  few and on many tasks, in each checkout (arc only);
- waits: reads of single numbers from the device (`aten::_local_scalar_dense`) and host copies in a training step: on a
  GPU each is a stall.

    python benchmarks/speed.py [--against ../before] [--repeats 3] [--batches 30] [--regimes arc drawn] [-- FLAGS]

Prints markdown: means over the repeats [smallest, largest], and ratios of medians to this checkout's within the same
run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

from arc.episodes import epoch_order  # noqa: E402
from arc.run.files import default_cache  # noqa: E402
from arc.run.randomness import normal_noise  # noqa: E402
from arc.run.runlog import RunLog  # noqa: E402
from arc.steps import Step  # noqa: E402
from benchmarks.runs import ROOT, RunFailed, machine, parse, resident_mib, rows_of, spread, table  # noqa: E402
from trainloop_complete_with_fixes import (  # noqa: E402
    Run,
    build_run,
    parse_arguments,
    train_step,
    training_data,
    update,
)

REGIMES: dict[str, tuple[str, ...]] = {
    "arc": (),
    "drawn": ("--data", "generated", "--families", "basic", "--max_side", "6", "--no_evidence"),
}
SKIPPED = 5  # batches before anything is counted: allocations, caches, the workers' first tasks


@dataclass(frozen=True)
class Command:
    """One run of the real command."""

    queries_per_s: float
    first_batch_s: float
    peak_mib: float


def words(root: Path, folder: Path, cache: Path, batches: int, *flags: str) -> list[str]:
    """The command of the checkout `root`: one epoch of so many batches."""
    own = ["--quiet", "--no_tensorboard", "--cache_dir", str(cache), "--output_dir", str(folder)]
    own += ["--epochs", "1", "--max_batches", str(batches)]
    return [sys.executable, str(root / "trainloop_complete_with_fixes.py"), *own, *flags]


def run_command(root: Path, flags: Sequence[str], batches: int, cache: Path) -> Command:
    """The command in the checkout `root`, for `batches` batches. RunFailed if it fails; stderr says why."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        command = words(root, folder, cache, batches, "--val_every", "0", "--log_every", "1")
        command += ["--val_limit", "2", "--val_views", "1", *flags]
        started, first, peak = time.monotonic(), 0.0, 0.0
        with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if not first and has_rows(folder):
                    first = time.monotonic() - started
                peak = max(peak, resident_mib(process.pid))
                time.sleep(0.02)
            if process.returncode:
                raise RunFailed(f"{root}: exit code {process.returncode}")
        counted = [row for row in rows_of(folder) if "loss" in row][SKIPPED:]
        seconds = sum(row["queries"] / row["samples_per_s"] for row in counted)
        return Command(sum(row["queries"] for row in counted) / seconds, first, peak)


def has_rows(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def build(flags: Sequence[str], cache: Path, scratch: Path) -> Run:
    """A run as the command builds it."""
    args, _ = parse_arguments([*flags, "--output_dir", str(scratch), "--cache_dir", str(cache), "--no_tensorboard"])
    run = build_run(args, RunLog(quiet=True), time.monotonic())
    run.log.open(scratch, rows=0)
    return run


def ready_batches(run: Run, count: int) -> list[Any]:
    """The first batches of an epoch, as the loader would give them."""
    data, order = training_data(run), epoch_order(run.args, run.training, 0)
    return [data[0, episodes].to(run.device) for episodes in order[:count]]


def forward_and_backward(run: Run, batch: Any) -> Step:
    """The training step, with noise that is always the same."""
    shape = (run.args.policy_samples, len(batch.task), run.policy.log_std.numel())
    return train_step(run, batch, normal_noise(shape, 0, 0, 0).to(run.device), 1)


def one_step(run: Run, batch: Any) -> None:
    """Forward, backward and step: what a batch cannot do without."""
    update(run, [forward_and_backward(run, batch)], 1000)


class Operations(TorchDispatchMode):
    """Counts floating-point operations of matrix products. (torch's own FlopCounterMode hooks modules, which a pass
    under `autograd.grad`, as feedback is one, does not allow.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():  # torch counts only values as wide as keys
            back = "backward" in func.name()
            q, k, v = args[1:4] if back else args[:3]
            wide = (3 * q.shape[-1] + 2 * v.shape[-1]) if back else (q.shape[-1] + v.shape[-1])
            self.total += 2 * q.shape[:-1].numel() * k.shape[-2] * wide
        elif count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations_a_query(run: Run, batches: Sequence[Any]) -> float:
    """Floating-point operations of matrix products in the steps of `bare`, mean over the queries that it times: a query
    of one batch costs many times another's."""
    counted = batches[SKIPPED:]
    with Operations() as counter:
        for batch in counted:
            one_step(run, batch)
    return counter.total / sum(len(batch.query) for batch in counted)


def bare(run: Run, batches: Sequence[Any]) -> float:
    """Queries a second of the floor."""
    for batch in batches[:SKIPPED]:
        one_step(run, batch)
    started = time.perf_counter()
    for batch in batches[SKIPPED:]:
        one_step(run, batch)
    return sum(len(batch.query) for batch in batches[SKIPPED:]) / (time.perf_counter() - started)


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int = 1536) -> float:
    """Floating-point operations a second of a square product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[1:])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for `device`: reads of what lies elsewhere make nobody wait."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique_dim", "aten::equal")
        if name in names and args[0].device.type == self.device:
            self.seen[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_copies(waits: Waits) -> Iterator[None]:
    """Inside, tensors that are taken to Python or numpy are counted too."""
    names = ("cpu", "numpy", "tolist")
    kept = {name: getattr(torch.Tensor, name) for name in names}

    def counted(name: str) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.seen[name] += self.device.type == waits.device
            return kept[name](self, *args, **kwargs)

        return call

    for name in names:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(torch.Tensor, name, method)


def waits_of(run: Run, batch: Any) -> Counter[str]:
    """What one step waits for."""
    with Waits(run.device) as waits, host_copies(waits):
        one_step(run, batch)
    return waits.seen


# Of both houses that this program has lived in: evidence was one module, then a package.
EVIDENCE = """
import sys, time
try:
    from arc.datasets import load_dataset
except ImportError:
    from arc.tasks import load_dataset
from arc.evidence import EvidenceStore
tasks = int(sys.argv[1])
chosen = load_dataset("arcagi2").training[:: max(1, 1000 // tasks)][:tasks]
store, started = EvidenceStore(None), time.process_time()
for task in chosen:
    store.get(task)
print((time.process_time() - started) / len(chosen))
"""


def evidence_seconds(root: Path, tasks: int) -> float:
    """Seconds of one core for a task's evidence, in the checkout `root`."""
    command = [sys.executable, "-c", EVIDENCE, str(tasks)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"{root}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def pairs_per_second(root: Path, flags: Sequence[str], cache: Path, tasks: tuple[int, int]) -> float:
    """Test pairs predicted a second, in the checkout `root`."""
    seconds, pairs = [], []
    for limit in tasks:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            command = words(root, folder, cache, 1, "--val_limit", str(limit), "--val_views", "4", *flags)
            started = time.monotonic()
            if code := subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=False).returncode:
                raise RunFailed(f"{root}: exit code {code}")
            seconds.append(time.monotonic() - started)
            pairs.append(rows_of(folder)[-1]["val.pairs"])
    return (pairs[1] - pairs[0]) / (seconds[1] - seconds[0])


def others(args: argparse.Namespace, extra: Sequence[str]) -> str:
    """The table of evidence and validation."""
    rows = []
    roots = [ROOT, *args.against]
    found: dict[Path, tuple[list[float], list[float]]] = {root: ([], []) for root in roots}
    for root in roots:  # evidence of the pairs to be predicted is cached by then
        pairs_per_second(root, extra, args.cache_dir, args.val_tasks)
    for _ in range(args.repeats):
        for root, (evidence, validation) in found.items():
            evidence.append(evidence_seconds(root, args.evidence_tasks))
            validation.append(pairs_per_second(root, extra, args.cache_dir, args.val_tasks))
    own = [statistics.median(values) for values in found[ROOT]]
    for root, (evidence, validation) in found.items():
        rows.append(
            [
                "this checkout" if root == ROOT else root.name,
                spread(evidence, "{:.3f}"),
                f"{statistics.median(evidence) / own[0]:.2f}",
                spread(validation, "{:.2f}"),
                f"{statistics.median(validation) / own[1]:.2f}",
            ]
        )
    header = [
        "code",
        "evidence, core-seconds a task",
        "times this checkout",
        "validated pairs/s",
        "times this checkout's",
    ]
    return table(header, rows)


def measure(name: str, args: argparse.Namespace, extra: Sequence[str]) -> str:
    """One regime's tables."""
    flags, roots = (*REGIMES[name], *extra), [ROOT, *args.against]
    found: dict[Path, list[Command]] = {root: [] for root in roots}
    floors, shares = [], []
    with tempfile.TemporaryDirectory() as scratch:
        run = build(flags, args.cache_dir, Path(scratch))
        batches = ready_batches(run, args.batches)
        operations = operations_a_query(run, batches)
        for _ in range(args.repeats):
            for root in list(found):
                try:
                    found[root].append(run_command(root, flags, args.batches, args.cache_dir))
                except RunFailed as error:
                    if root == ROOT:
                        raise
                    print(f"- left out: {error} (it may not know these flags)\n")
                    del found[root]
            floors.append(bare(run, batches))
            peak = matmul_peak(run.precision.dtype or torch.float32, run.device)
            shares.append(operations * floors[-1] / peak)
        waits = waits_of(run, batches[0])
        run.log.close()
    ours = statistics.median(one.queries_per_s for one in found[ROOT])
    rows = []
    for root, runs in found.items():
        speed = [one.queries_per_s for one in runs]
        rows.append(
            [
                "this checkout" if root == ROOT else root.name,
                spread(speed, "{:.1f}"),
                f"{statistics.median(speed) / ours:.2f}",
                spread([one.first_batch_s for one in runs], "{:.1f}"),
                spread([one.peak_mib for one in runs], "{:.0f}"),
            ]
        )
    header = ["code", "queries/s", "median against this checkout", "seconds to the first batch", "peak MiB"]
    told = ", ".join(f"{what} {count}" for what, count in sorted(waits.items())) or "none"
    return (
        f"### {name}: `{' '.join(flags) or 'the defaults'}`\n\n{table(header, rows)}\n"
        f"- bare loop {spread(floors, '{:.1f}')} queries/s: the full loop reaches "
        f"{ours / statistics.median(floors):.2f} of it\n"
        f"- matrix products of the bare loop at {spread(shares, '{:.2f}')} of the machine's peak\n"
        f"- waits for the device in a step: {told}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], help="other checkouts, run in turn with this one"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of everything (3)")
    parser.add_argument("--batches", type=int, default=30, help="of a run (30)")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES), help="all by default")
    parser.add_argument("--evidence_tasks", type=int, default=20, help="tasks to time the evidence on (20); 0: none")
    parser.add_argument(
        "--val_tasks", type=int, nargs=2, default=(4, 64), help="few and many tasks to validate on (4 64)"
    )
    parser.add_argument("--cache_dir", type=Path, default=Path(default_cache()), help="evidence and tiny Qwen")
    args, extra = parse(parser, argv)
    if args.batches <= SKIPPED + 1 or args.repeats < 1:
        parser.error(f"--batches must be more than {SKIPPED + 1}, --repeats at least 1")
    args.against = [root.resolve() for root in args.against]
    print(f"## Speed\n\n- machine: {machine()}\n")
    if args.evidence_tasks:
        print(others(args, extra), flush=True)
    for name in args.regimes:
        print(measure(name, args, extra), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
