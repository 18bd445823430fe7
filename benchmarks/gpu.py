"""What only a GPU shows, on the training step of `--recipe gpu` with batches that are ready.

For each precision, in the second round over the batches: queries a second, loss at the beginning and the end, the loss
scale and the steps that it skipped
(fp16), the largest allocated memory, and the share of the card's own matrix rate (bf16) that matrix products reach.
For the first precision, from torch's profiler: kernels a step, the share of the time in which one runs, the mean time
between two, and where the time goes.

    python benchmarks/gpu.py [--amp bf16 fp16 off] [--batches 30] [-- FLAGS]

FLAGS are the script's, for example `-- --qwen Qwen/Qwen2.5-0.5B --gradient_checkpointing`. Prints markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from arc.device import device_name  # noqa: E402
from arc.run.files import default_cache  # noqa: E402
from arc.run.randomness import normal_noise  # noqa: E402
from benchmarks.runs import machine, parse, table  # noqa: E402
from benchmarks.speed import Operations, build, matmul_peak, ready_batches, waits_of  # noqa: E402
from trainloop_complete_with_fixes import Run, train_step, update  # noqa: E402

SHOWN = 5  # batches whose mean loss is shown
PROFILED = 3


def step(run: Run, batch: Any) -> float:
    """One optimizer step; its loss, read when all is done."""
    shape = (run.args.policy_samples, len(batch.task), run.policy.log_std.numel())
    done = train_step(run, batch, normal_noise(shape, 0, 0, 0).to(run.device), 1)
    return float(update(run, [done], 1000)[0]["loss"])


def wait(run: Run) -> float:
    """The clock, when the device has done all that it was given."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(run: Run, batch: Any) -> int:
    """Floating-point operations of a step's matrix products, counted without compiled kernels, which hide them."""
    with Operations() as counter, torch.compiler.set_stance("force_eager"):
        step(run, batch)
    return counter.total


def precision(run: Run, batches: Sequence[Any], peak: float) -> list[str]:
    """One row of the table of precisions."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = wait(run)
    losses = [step(run, batch) for batch in batches]
    began = wait(run)
    losses += [step(run, batch) for batch in batches]
    seconds = wait(run) - began
    queries, cells = (sum(each) for each in zip(*((len(b.query), b.query.valid.numel()) for b in batches), strict=True))
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else 0.0
    rate = operations(run, batches[0]) / batches[0].query.valid.numel() * cells / seconds
    return [
        run.precision.name,
        f"{queries / seconds:.0f}",
        f"{1000 * seconds / len(batches):.0f}",
        f"{began - started:.0f}",
        f"{statistics.fmean(losses[:SHOWN]):.3f}",
        f"{statistics.fmean(losses[-SHOWN:]):.3f}",
        f"{run.scaler.get_scale():.0f}" if run.precision.scale_loss else "-",
        str(run.state.skipped_steps),
        f"{memory:.1f}",
        f"{rate / 1e12:.1f} ({100 * rate / peak:.1f} %)",
    ]


def kernels(run: Run, batches: Sequence[Any]) -> str:
    """What the device does in a few steps, as lines."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        started = wait(run)
        for batch in batches[:PROFILED]:
            step(run, batch)
        seconds = (wait(run) - started) / PROFILED
    time_of: Counter[str] = Counter()
    times = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us() > 0:
            times.append((event.time_range.start, event.time_range.end))
            time_of[event.name] += event.time_range.elapsed_us()
    if not times:
        return "- no kernels: not a GPU\n"
    busy, end = 0.0, 0.0
    for start, stop in sorted(times):  # what overlaps counts once
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    share, count = busy / 1e6 / (seconds * PROFILED), len(times) / PROFILED
    between = (seconds - busy / 1e6 / PROFILED) / count
    total = sum(time_of.values())
    rows = [[f"`{name[:90]}`", f"{100 * each / total:.1f} %"] for name, each in time_of.most_common(12)]
    return (
        f"- under the profiler: {1000 * seconds:.0f} ms a step, {count:.0f} kernels, one of them running "
        f"{100 * share:.0f} % of the time, {1e6 * between:.1f} us between two\n\n{table(['kernel', 'time'], rows)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amp", nargs="+", choices=["bf16", "fp16", "off"], default=["bf16", "fp16", "off"])
    parser.add_argument("--batches", type=int, default=30, help="of a run (30)")
    parser.add_argument("--cache_dir", type=Path, default=Path(default_cache()), help="evidence and tiny Qwen")
    args, extra = parse(parser, argv)
    if args.batches < SHOWN:
        parser.error(f"--batches must be at least {SHOWN}")
    rows: list[list[str]] = []
    told = ""
    for amp in args.amp:
        with tempfile.TemporaryDirectory() as scratch:
            flags = ("--recipe", "gpu", *extra, "--amp", amp)
            run = build(flags, args.cache_dir, Path(scratch))
            batches = ready_batches(run, args.batches)
            if not rows:
                size, native = (8192, torch.bfloat16) if run.device.type == "cuda" else (1536, torch.float32)
                peak = matmul_peak(native, run.device, size)
                print(f"## On a GPU\n\n- machine: {machine()}; {device_name(run.device)}, torch {torch.__version__}")
                print(f"- a matrix product of {size} x {size}: {peak / 1e12:.0f} TFLOP/s")
                print(f"- `{' '.join(flags[:-2])}`, {args.batches} batches", flush=True)
            rows.append(precision(run, batches, peak))
            if not told:
                waits = ", ".join(f"{what} {count}" for what, count in sorted(waits_of(run, batches[0]).items()))
                told = f"{kernels(run, batches)}- waits for the device in a step: {waits or 'none'}\n"
            run.log.close()
            del run, batches
    header = [
        "precision",
        "queries/s",
        "ms a step",
        "s warming up",
        "loss, first 5",
        "last 5",
        "loss scale",
        "skipped",
        "GiB",
    ]
    print(f"\n{table([*header, 'TFLOP/s of products'], rows)}\n{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
