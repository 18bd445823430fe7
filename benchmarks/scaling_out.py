"""What several processes cost and bring: throughput against one process, and what an update sends.

- throughput: queries a second of the real command on one process with `--cores` threads, and by torchrun on each number
  of `--processes` with one thread each, taken in turn, several times; ratios within a repeat, medians over them. More
  processes than cores show what oversubscribing costs, not what more cores would bring;
- volume: bytes that one process hands to the sums of an update, counted at `torch.distributed`, beside what the size
  of the model predicts;
- a calculation for GPUs: how long the sum of the gradients takes over links of published speeds.

    python benchmarks/scaling_out.py [--processes 2 4] [--repeats 3] [--batches 40] [-- FLAGS]

Prints markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.runs import RunFailed, machine, parse, rows_of, spread, table  # noqa: E402
from trainloop_complete_with_fixes import main as train  # noqa: E402

DRAWN = ("--data", "generated", "--families", "basic", "--max_side", "6", "--no_evidence")
SKIPPED = 5  # batches before anything is counted
COUNTED = "ARC_COUNT_BYTES"  # set: this file is what torchrun starts, and counts what is sent
# Bytes a second and direction that a ring of such links moves, as their makers publish them.
LINKS = {
    "NVLink 4 (H100, in one machine)": 450e9,
    "InfiniBand NDR, 400 Gbit/s a GPU": 50e9,
    "25 Gbit/s Ethernet": 3.1e9,
}


def run_command(processes: int, threads: int, flags: Sequence[str], batches: int) -> tuple[float, dict[str, float]]:
    """Queries a second of the command, and bytes an update by operation (of several processes). RunFailed if it fails;
    stderr says why."""
    with tempfile.TemporaryDirectory() as scratch:
        own = [*flags, "--threads", str(threads), "--workers", "1", "--output_dir", str(Path(scratch, "run"))]
        own += ["--quiet", "--no_tensorboard", "--epochs", "1", "--val_every", "0", "--max_batches", str(batches)]
        own += ["--val_limit", "2", "--val_views", "1"]
        alone = [sys.executable, str(ROOT / "trainloop_complete_with_fixes.py")]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = alone if processes == 1 else [*launch, str(Path(__file__).resolve())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), COUNTED: str(Path(scratch, "bytes.json"))}
        if subprocess.run([*command, *own], env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise RunFailed(f"{processes} processes: the command failed")
        counted = [row for row in rows_of(Path(scratch, "run")) if "loss" in row][SKIPPED:]
        seconds = sum(row["queries"] / row["samples_per_s"] for row in counted)
        sent = json.loads(Path(environment[COUNTED]).read_text("utf-8")) if processes > 1 else {}
        return sum(row["queries"] for row in counted) / seconds, {name: n / batches for name, n in sent.items()}


def count_and_train() -> int:
    """The command, as torchrun starts it: what the first process hands to the sums of the training is counted."""
    sent: Counter[str] = Counter()
    reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        kind = "gradients" if tensor.numel() > 10_000 and tensor.dtype == torch.float32 else "everything else"
        sent[kind] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **options)

    dist.all_reduce = counting
    code = train(sys.argv[1:])
    if os.environ["RANK"] == "0":
        Path(os.environ[COUNTED]).write_text(json.dumps(sent), encoding="utf-8")
    return code


def trained_bytes(flags: Sequence[str]) -> int:
    """What the gradients of a run with these flags take in fp32, from its checkpoint's shapes."""
    from benchmarks.speed import build

    with tempfile.TemporaryDirectory() as scratch:
        run = build([*flags, "--device", "cpu"], Path(scratch, "cache"), Path(scratch))
        return 4 * sum(p.numel() for module in run.modules.values() for p in module.parameters() if p.requires_grad)


def calculation(bytes_of_gradients: float) -> str:
    """The table for GPUs. A ring sum of n bytes over N processes moves 2 n (N - 1) / N through each link."""
    rows = []
    for name, speed in LINKS.items():
        for what, size in (("this model", bytes_of_gradients), ("with Qwen2.5-0.5B, fp32 gradients", 4 * 0.494e9)):
            cells = [f"{1e3 * 2 * size * (n - 1) / n / speed:.2f} ms" for n in (8, 64, 512)]
            rows.append([name, what, *cells])
    return table(["link", "model", "8 GPUs", "64", "512"], rows)


def options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The benchmark's own flags, and those for every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="by torchrun (2 4)")
    parser.add_argument("--cores", type=int, default=2, help="threads of the one process (2)")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is run (3)")
    parser.add_argument("--batches", type=int, default=40, help="of a run (40)")
    return parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    args, extra = options(argv)
    flags = (*DRAWN, *extra)
    try:
        speeds: dict[int, list[float]] = {1: [], **{processes: [] for processes in args.processes}}
        sent: dict[str, float] = {}
        for _ in range(args.repeats):
            for processes, found in speeds.items():
                speed, counted = run_command(processes, args.cores if processes == 1 else 1, flags, args.batches)
                found.append(speed)
                sent = counted or sent
    except RunFailed as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    rows = [
        [
            f"{processes}, {args.cores if processes == 1 else 1} thread(s) each",
            spread(found, "{:.1f}"),
            f"{statistics.median(ours / one for ours, one in zip(found, speeds[1], strict=True)):.2f}",
        ]
        for processes, found in speeds.items()
    ]
    predicted = trained_bytes(flags)
    print(f"## Several processes\n\n- {machine()}; {args.batches} batches, {args.repeats} repeats\n")
    print(table(["processes", "queries/s", "against one"], rows))
    print("\nMiB that one process hands to the sums of an update:\n")
    shown = [[name, f"{number / 2**20:.3f}"] for name, number in sent.items()]
    print(table(["what", "MiB"], [*shown, ["gradients, predicted from the model's size", f"{predicted / 2**20:.3f}"]]))
    print("\nA calculation, not a measurement: the sum of the gradients over a ring, 2 n (N - 1) / N bytes a link:\n")
    print(calculation(predicted))
    return 0


if __name__ == "__main__":
    sys.exit(count_and_train() if COUNTED in os.environ and "RANK" in os.environ else main())
