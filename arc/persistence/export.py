"""The weights of a checkpoint for other programs, an adapter merged into its base."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from arc.persistence.files import image_of, read_safetensors, removed_on_error, stream, write_file
from arc.persistence.manifest import Checkpoint, check_spec
from arc.persistence.names import MANIFEST, Corrupt, PersistenceError
from arc.persistence.say import say
from arc.persistence.store import ModelPersistence


def export_best(
    run: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    log: Callable[[str], None] = say,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the weights of the best model (else the latest) of `run`, or of the checkpoint that `run` is the folder
    of, for other programs into the new folder `dest`.

    Each entry of state["model"] becomes `dest/<entry>/model.safetensors`: its tensors, nested keys joined by ".", ties
    written out, and the frozen tensors named "<entry>/…" (an entry may be frozen altogether). Where
    state["optim"]["average"] has an average of a tensor, that is written: it is what was validated. Entries of
    state["extra"]["export"][<entry>] = {file name: text} are written next to it (config.json, tokenizer.json …), after
    which `AutoModel.from_pretrained(dest/<entry>)` reads a Hugging Face model. An entry with a recipe in
    state["extra"]["lora"] is an adapter and is written merged (see `_merged`); its base is read from the folder that
    the recipe names, or from `base`.

    Raises: PersistenceError if there is no valid checkpoint or it can't be exported, ValueError if `dest` is not new.
    """
    target = Path(dest)
    try:
        if target.exists():
            raise ValueError(f"{target} exists: give a new folder")
    except OSError as error:  # too long a name, or below a folder where nobody may look
        raise ValueError(f"{str(target)[:60]!r}: {error.strerror or error}") from error
    place = Path(run).absolute()
    is_checkpoint = (place / MANIFEST).is_file()
    with ModelPersistence(place.parent if is_checkpoint else place, read_only=True, log=log) as persistence:
        checkpoint = persistence.load(str(place) if is_checkpoint else "best")
    tmp = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
    try:
        with _usable(checkpoint.path.name), removed_on_error(tmp):
            texts, recipes = _export_texts(checkpoint), _lora_recipes(checkpoint)
            trained = checkpoint.state.get("model", {})
            averages = _averages(checkpoint, log)
            for entry in [*trained, *sorted({name.partition("/")[0] for name in checkpoint.frozen} - trained.keys())]:
                folder = tmp / _safe_name(entry)
                folder.mkdir(parents=True)
                raw = dict(_flat_tensors(trained.get(entry), ""))
                tensors = {**_frozen_of(entry, checkpoint), **raw, **averages.get(entry, {})}
                if entry in recipes:
                    tensors = _merged(tensors, recipes[entry], base)
                write_file(folder / "model.safetensors", stream(image_of(tensors, {"format": "pt"})))
                for name, text in texts.get(entry, {}).items():
                    write_file(folder / _safe_name(name), [memoryview(text.encode())])
            os.rename(tmp, target)
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror or error}") from error
    log(f"step {checkpoint.step} of {checkpoint.path} -> {target}")
    return target


@contextlib.contextmanager
def _usable(name: str) -> Iterator[None]:
    """While a checkpoint's state is read: its bytes are as they were written, but whoever wrote them may have written
    anything, so what does not fit is the checkpoint's fault (PersistenceError)."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as problem:
        if isinstance(problem, PersistenceError):
            raise
        what = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        raise PersistenceError(f"{name} does not hold what a run of this version writes ({what})") from problem


def _export_texts(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    extra = checkpoint.state.get("extra")
    texts = extra.get("export", {}) if isinstance(extra, dict) else {}
    for entry, files in texts.items():
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise PersistenceError(f"extra/export/{entry} is not a mapping of file names to texts")
    return texts


def _frozen_of(entry: str, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    prefix = f"{entry}/"
    return {name[len(prefix) :]: t for name, t in checkpoint.frozen.items() if name.startswith(prefix)}


def _averages(checkpoint: Checkpoint, log: Callable[[str], None]) -> dict[str, dict[str, torch.Tensor]]:
    """The averaged weights by entry, and by the names of the raw ones there."""
    found = checkpoint.state.get("optim", {}).get("average") or {"names": {}}
    if "names" not in found:  # it cannot be told which average is which weight's
        log(f"{checkpoint.path.name} is of an older version: the weights as they train, not the averaged ones")
    names = found.get("names", {}).items()
    return {entry: {key: found["average"][name] for key, name in each.items()} for entry, each in names}


def _flat_tensors(tree: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield prefix or "value", tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _lora_recipes(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    extra = checkpoint.state.get("extra")
    recipes = extra.get("lora", {}) if isinstance(extra, dict) else {}
    fields = {"name", "revision", "folder", "files", "prefix", "tensors"}
    for entry, recipe in recipes.items():
        if recipe.keys() != {"base", "scale"} or recipe["base"].keys() != fields:
            raise PersistenceError(f"extra/lora/{entry} is not a recipe of this version")
    return recipes


def _merged(
    adapter: Mapping[str, torch.Tensor], recipe: Mapping[str, Any], folder: str | os.PathLike[str] | None
) -> dict[str, torch.Tensor]:
    """The weights of a base with a LoRA adapter added, in fp32: W + scale * B A for each layer that has
    "<layer>.lora_A.weight" (rank, in) and "<layer>.lora_B.weight" (out, rank), the base's own for all others.

    recipe: {"scale": float, "base": {"name", "revision", "folder", "files": {file: {"size", "sha256"}}, "prefix",
    "tensors": [name]}}; tensor `name` is stored as prefix + name. Raises: PersistenceError unless `folder` (by default
    the recipe's) holds exactly those files.
    """
    base = recipe["base"]
    where = Path(folder if folder is not None else base["folder"])
    wanted = {base["prefix"] + name: name for name in base["tensors"]}
    merged: dict[str, torch.Tensor] = {}
    for file, spec in base["files"].items():
        try:
            # Resolved: in the cache of the Hugging Face hub the files are symbolic links.
            stored = read_safetensors((where / _safe_name(file, _OF_A_BASE)).resolve(), check_spec(spec))
        except (Corrupt, OSError) as error:
            revision = f" (revision {base['revision']})" if base["revision"] else ""
            raise PersistenceError(
                f"the adapter's base {base['name']}{revision} is not in {where}: {error}; name its folder with --base"
            ) from error
        merged |= {wanted[name]: tensor.float() for name, tensor in stored.items() if name in wanted}
    if missing := set(base["tensors"]) - merged.keys():
        raise PersistenceError(f"the adapter's base {base['name']} has no tensor {min(missing)!r}")
    for name, down in adapter.items():
        layer, is_down, _ = name.partition(".lora_A.")
        if is_down:
            merged[f"{layer}.weight"] += (adapter[f"{layer}.lora_B.weight"] @ down) * recipe["scale"]
    return merged


# What a name may be, and what it is then: ours are plain; a base's are whatever people call their downloads.
_OURS = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", "the name of an exported file"
_OF_A_BASE = r"[^./\\\0][^/\\\0]{0,250}", "a file of the adapter's base"


def _safe_name(name: Any, kind: tuple[str, str] = _OURS) -> str:
    allowed, use = kind
    if type(name) is not str or not re.fullmatch(allowed, name):
        raise PersistenceError(f"{str(name)[:80]!r} can't be {use}")
    return name
