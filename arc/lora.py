"""LoRA (Hu et al. 2021) on Qwen: W x + SCALE * B (A x) with W frozen, A (rank, in) random and B (out, rank) zero.

A checkpoint holds A and B only and names the base: hub name and revision, and the SHA-256 of each weight file. The base
is large (2 GB in fp32 for 0.5 B parameters), never changes and can be fetched again by that name, so storing it would
cost every run and every backup more than all that the run learns. A resume and an export verify the digests.

This is the only file that imports peft, an optional package, and it does so inside functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from arc.optim import quiet_bitsandbytes
from arc.run.files import UserError

SCALE = 2.0  # alpha / rank: with the rank fixed by memory, the step is set by the learning rate, not by a second knob
_NAME = "default"  # peft's name of the adapter


def problem_with_peft() -> str | None:
    """One line that says how to get peft, or None if it can be used."""
    try:
        with quiet_bitsandbytes():
            import peft  # noqa: F401
    except ImportError as error:  # not there, or not made for the transformers that is there
        return f"--qwen_tune lora needs the package peft ({' '.join(str(error).split())}): pip install -U peft"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The base


@dataclass(frozen=True)
class Base:
    """The weights an adapter belongs to.

    name: as the user knows it.  revision: the hub's commit, "" for a folder.  folder: where it was read from.
    files: size and SHA-256 of each weight file.  prefix: in those files the model's `tensors` have it before their
    names ("model." where the file is that of a whole causal language model, which has more than we use).
    """

    name: str
    revision: str
    folder: str
    files: dict[str, dict[str, Any]]
    prefix: str
    tensors: list[str]

    def __post_init__(self) -> None:
        words = (self.name, self.revision, self.folder, self.prefix, *self.tensors, *self.files)
        if not all(isinstance(word, str) for word in words):
            raise TypeError("an adapter's base: not names")
        if not all(isinstance(file.get("sha256"), str) for file in self.files.values()):
            raise TypeError("an adapter's base: files without digests")

    @classmethod
    def of(cls, folder: Path, shards: Sequence[str], tensors: Iterable[str], *, name: str, revision: str) -> Self:
        """Read all of `shards`; UserError if they do not hold all of `tensors` under one common prefix."""
        tensors = sorted(tensors)
        return cls(
            name=name,
            revision=revision,
            folder=str(folder.absolute()),
            files={shard: _fingerprint(folder / shard) for shard in shards},
            prefix=_common_prefix([folder / shard for shard in shards], tensors, name),
            tensors=tensors,
        )

    def __str__(self) -> str:
        digests = ", ".join(file["sha256"][:12] for file in self.files.values())
        return f"{self.name} ({f'revision {self.revision[:12]}, ' if self.revision else ''}weights sha256 {digests})"

    def differs_from(self, saved: Base) -> str | None:
        """Why an adapter of `saved` cannot go on with this base, or None: weights count, not where they lie."""
        if self.files == saved.files:
            return None
        return f"the checkpoint's adapter was trained on {saved}, --qwen gives {self}"


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _common_prefix(paths: Iterable[Path], tensors: Sequence[str], name: str) -> str:
    from safetensors import safe_open

    stored: set[str] = set()
    for path in paths:
        with safe_open(path, "pt") as file:
            stored.update(file.keys())
    ends = [key for key in stored if key.endswith(tensors[0])]
    for prefix in sorted(key.removesuffix(tensors[0]) for key in ends):
        if all(prefix + tensor in stored for tensor in tensors):
            return prefix
    raise UserError(f"--qwen {name}: --qwen_tune lora cannot match the names in its weight files with the model's")


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


class Adapter:
    """The LoRA matrices of every linear layer inside a model, put there by `__init__`; all else in it is frozen.

    `state_dict` names them "<layer>.lora_A.weight" and "<layer>.lora_B.weight". A comes from torch's global generator
    (seed it); dropout is 0, so that a step is a function of weights and data.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        if problem := problem_with_peft():
            raise UserError(problem)
        import peft

        model.requires_grad_(False)
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        config = peft.LoraConfig(
            r=rank, lora_alpha=round(SCALE * rank), target_modules=linear, lora_dropout=0.0, bias="none"
        )
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
        self.description = f"lora of rank {rank}"
        self.parameters: dict[str, nn.Parameter] = {
            name.replace(f".{_NAME}.", "."): p for name, p in model.named_parameters() if p.requires_grad
        }

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As a module has it; no two are one."""
        return iter(self.parameters.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.parameters.keys():
            raise UserError("--resume: the checkpoint's adapter belongs to other layers")
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    @staticmethod
    def recipe(base: Base | None) -> dict[str, Any]:
        """What `model_persistence.py export` needs, besides the matrices, to write the merged model."""
        assert base is not None, "an adapter without a base"
        return {"base": dict(vars(base)), "scale": SCALE}


def saved_base(extra: Mapping[str, Any] | None) -> Base | None:
    """The weights that a checkpoint's adapter belongs to, if it has one. extra: the checkpoint's group of that name."""
    recipe = extra.get("lora", {}).get("qwen") if extra else None
    return Base(**recipe["base"]) if recipe else None
