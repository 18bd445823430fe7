"""The same modules, batches and optimizer under four loops: bare, ours, Hugging Face Trainer, Lightning.

    python -m pip install -r benchmarks/requirements-frameworks.txt
    python benchmarks/frameworks.py [--repeats 5] [--batches 40] [-- FLAGS]

Every loop gets batches that are ready, in this process, and makes the training step of the script (`train_step`) with
the script's own optimizers. Bare: the script's step and update, and nothing else. Ours: `train_epoch`, with its
records, red flags, guarded step and progress bar. Trainer and Lightning: their own loops with a log entry a step, no
checkpoints, no bars. In turn, several times; seconds are those between the arrival of a batch and that of a later one.
Prints markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from arc.run.files import default_cache  # noqa: E402
from benchmarks.runs import machine, parse, spread, table  # noqa: E402
from benchmarks.speed import REGIMES, SKIPPED, build, forward_and_backward, one_step, ready_batches  # noqa: E402
from trainloop_complete_with_fixes import Run, train_epoch  # noqa: E402


class KeptLoss:
    """In the place of the gradient scaler: keeps the loss, whose backward pass is the framework's."""

    loss: Tensor

    def scale(self, loss: Tensor) -> KeptLoss:
        self.loss = loss
        return self

    def backward(self) -> None:
        """Not here."""


class Joint(nn.Module):
    """The script's modules as one, whose forward is its training step up to the loss."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(run.modules)
        self.kept = KeptLoss()
        self.run = dataclasses.replace(run, scaler=self.kept)  # type: ignore[arg-type]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        forward_and_backward(self.run, batch)
        return {"loss": self.kept.loss}


class AsOne(torch.optim.Optimizer):
    """The script's optimizers as the one that frameworks expect."""

    def __init__(self, run: Run) -> None:
        parameters = [p for module in run.modules.values() for p in module.parameters() if p.requires_grad]
        super().__init__(parameters, {"lr": 1.0})
        self.own = run.optimizer

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:  # Lightning makes the step's passes in here
            closure()
        self.own.step(torch.amp.GradScaler("cpu", enabled=False), finite=True)


class Arrivals(Sequence[Any]):
    """Batches, and when each was fetched."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self.batches):
            raise IndexError(index)
        self.times.append(time.perf_counter())
        return self.batches[index]

    def speed(self) -> float:
        """Queries a second between the batch after the first SKIPPED and the last: loops that fetch a batch ahead of
        its step do so all the way."""
        queries = sum(len(batch.query) for batch in self.batches[SKIPPED:-1])
        return queries / (self.times[len(self.batches) - 1] - self.times[SKIPPED])


def bare(run: Run, batches: Sequence[Any]) -> float:
    arrivals = Arrivals(batches)
    for batch in arrivals:
        one_step(run, batch)
    return arrivals.speed()


def ours(run: Run, batches: Sequence[Any]) -> float:
    arrivals = Arrivals(batches)
    run.state.batch = 0
    loader: Any = arrivals
    train_epoch(run, loader, len(batches))
    return arrivals.speed()


def hugging_face(run: Run, batches: Sequence[Any]) -> float:
    from transformers import Trainer, TrainingArguments

    arrivals, optimizer = Arrivals(batches), AsOne(run)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=len(batches),
            per_device_train_batch_size=1,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = Trainer(
            model=Joint(run),
            args=settings,
            train_dataset=arrivals,
            data_collator=lambda rows: {"batch": rows[0]},
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train()
    return arrivals.speed()


def lightning(run: Run, batches: Sequence[Any]) -> float:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.joint = Joint(run)

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = self.joint(batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return AsOne(run)

    arrivals = Arrivals(batches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=len(batches),
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: Any = torch.utils.data.DataLoader(arrivals, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(Module(), loader)
    return arrivals.speed()


LOOPS: dict[str, Callable[[Run, Sequence[Any]], float]] = {
    "bare": bare,
    "ours": ours,
    "Hugging Face Trainer": hugging_face,
    "Lightning": lightning,
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, frameworks do not chat on stdout, and advice about their data loaders is not shown."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each loop (5)")
    parser.add_argument("--batches", type=int, default=40, help="of a loop (40)")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES), help="all by default")
    parser.add_argument("--cache_dir", type=Path, default=Path(default_cache()), help="evidence and tiny Qwen")
    args, extra = parse(parser, argv)
    print(f"## Loops\n\n- machine: {machine()}\n")
    for name in args.regimes:
        flags = (*REGIMES[name], "--quiet", "--device", "cpu", *extra)
        found: dict[str, list[float]] = {loop: [] for loop in LOOPS}
        with tempfile.TemporaryDirectory() as scratch, quietly():
            run = build(flags, args.cache_dir, Path(scratch))
            batches = ready_batches(run, args.batches)
            for _ in range(args.repeats):
                for loop, measure in LOOPS.items():
                    found[loop].append(measure(run, batches))
            run.log.close()
        rows = []
        for loop, speeds in found.items():
            ratios = [own / other for own, other in zip(found["ours"], speeds, strict=True)]
            rows.append([loop, spread(speeds, "{:.1f}"), f"{statistics.median(ratios):.2f}"])
        print(f"### {name}\n\n{table(['loop', 'queries/s', 'ours against it'], rows)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
