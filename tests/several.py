"""What tests/test_parallel.py starts by torchrun: the real program on several processes, several times in one start.

    torchrun --nproc_per_node N tests/several.py JOBS.json OUT

JOBS: a list of {"flags": [...], "trip": null or [text, occurrence]} (main with these flags; a SIGTERM when the first
process prints `text` for the so-manieth time) or {"step": flags, "batches": n} (n batches, one optimizer step, and its
gradients). Each process writes OUT/<rank>.json (exit codes); the first OUT/<job>.safetensors (gradients before, weights
after the step).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import train_batches, train_on
from helpers import Tripwire, run_into
from safetensors.torch import save_file

from arc.parallel import Team, join
from arc.run.runlog import RunLog
from trainloop_complete_with_fixes import Run, build_run, main, parse_arguments


def one_step(flags: list[str], batches: int, team: Team) -> dict[str, torch.Tensor]:
    """Gradients (as they are clipped) and weights of one optimizer step over so many batches."""
    args, _ = parse_arguments(flags)
    run = build_run(args, RunLog(mute=True), time.monotonic(), team=team)
    run.team.same_weights(run.modules.values())
    found: dict[str, torch.Tensor] = {}
    clip = run.optimizer.clip

    def seen(max_norm: float) -> dict[str, torch.Tensor]:
        found.update({f"gradient.{name}": p.grad.clone() for name, p in parameters(run) if p.grad is not None})
        return clip(max_norm)

    run.optimizer.clip = seen  # type: ignore[method-assign]  # looks on
    train_on(run, train_batches(run, batches))
    assert found and run.state.updates == 1
    return found | {f"weight.{name}": p.detach().clone() for name, p in parameters(run)}


def parameters(run: Run) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{part}.{name}", p) for part, module in run.modules.items() for name, p in module.named_parameters()]


def do(job: dict[str, Any], out: Path) -> int:
    """One job; its exit code."""
    if "step" in job:
        team = join(torch.device("cpu"))
        found = one_step(job["step"], job["batches"], team)
        team.leave(orderly=True)
        if team.is_first:
            save_file(found, out / f"{job['name']}.safetensors")
        return 0
    if job["trip"] and os.environ.get("RANK", "0") == "0":
        text, occurrence = job["trip"]
        return run_into(Tripwire(text, occurrence, signal.SIGTERM), job["flags"])
    with contextlib.redirect_stdout(io.StringIO()):
        return main(job["flags"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    codes = [do(job, out) for job in jobs]
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(codes))
