"""Where a Qwen comes from: finding a model, loading its folder, and the built-in tiny one.

Finding always ends in a folder, and every folder is loaded by the same code: the `tiny` model is written to disk once
and then read like any other. Only safetensors and JSON are read, and no code that a folder or the hub may carry is ever
run. This is the only file that imports transformers when it runs, and it does so inside functions: data workers that
only write and tokenise text do not pay for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import re
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from arc.run.files import UserError, describe, printable, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

AUTO_ON_CUDA = "Qwen/Qwen2.5-0.5B"
TEXT_TYPES = ("qwen2", "qwen3", "qwen3_5_text")
VISION_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # of these the language model is taken
WAYS_OUT = "use --qwen tiny (built in, nothing to download) or --qwen DIR (a local model folder)"

TINY_VERSION = 2  # changes when the tiny model or its tokenizer changes; part of its folder's name
TINY_WIDTH = 64
TINY_SHAPE = {
    "hidden_size": TINY_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 32768,
}
# At transformers' 0.02 the layers of so narrow a model add little to the residual stream, and different tasks get
# nearly the same prompt: 28 % of its second moment is variance across tasks, at 0.05 it is 49 %.
TINY_INITIAL_STD = 0.05

# Characters of the colours of a cell, and of none, where a context is written cell by cell (arc/qwen.py).
INPUTS, OUTPUTS = "0123456789.", "abcdefghij-"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SECONDS = 4.0  # how long the hub may take to say anything at all
_HUB_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
]
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DIGESTS = "digests.json"
_PROBE_TEXT = "IO\nI\n0123456789\nO\n9\n"


# ----------------------------------------------------------------------------------------------------------------------
# Finding a model: always ends in a folder


@dataclass(frozen=True)
class Source:
    """Where a model is read from: its name as the user knows it, the folder, where that came from, in words, and the
    hub's commit."""

    name: str
    folder: Path
    origin: str
    is_tiny: bool = False
    revision: str = ""


def locate(spec: str, device_type: str, cache_dir: Path, seed: int, revision: str = "") -> Source:
    """The folder that `spec` means (see `build_qwen`)."""
    if spec == "auto":
        spec = AUTO_ON_CUDA if device_type == "cuda" else "tiny"
    if spec == "tiny":
        folder = _tiny_folder(cache_dir, seed)
        return Source("tiny", folder, f"built in, random weights of seed {seed}", is_tiny=True)
    path = os.path.expanduser(spec)
    if spec and os.path.isdir(path):
        return Source(spec, Path(path), "local folder")
    if os.path.exists(path):
        raise UserError(f"--qwen {spec}: is a file; name the folder that holds config.json and model.safetensors")
    if _HUB_NAME.fullmatch(spec):
        folder = _hub_folder(spec, revision or None)
        return Source(spec, folder, "Hugging Face hub", revision=folder.name)  # a snapshot's folder is its commit
    if spec.startswith((".", "~")) or "/" in spec or os.sep in spec:
        raise UserError(f"--qwen {spec}: no such folder")
    raise UserError(f"--qwen {spec!r}: neither auto, tiny, a folder here nor a hub name (OWNER/NAME); {WAYS_OUT}")


def _hub_folder(name: str, revision: str | None = None) -> Path:
    """The local snapshot of hub model `name`: the cached one if it is complete, else downloaded.

    A cached model is taken as it is, without asking for news, so that runs repeat. The hub is asked once, briefly,
    before anything that retries: huggingface_hub spends up to a minute on an unreachable network.
    """
    from huggingface_hub import snapshot_download

    with contextlib.suppress(OSError, ValueError):
        cached = snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True)
        folder = Path(cached)
        tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        if tokenizer and (folder / "config.json").is_file() and not _missing_weights(folder):
            return folder
    if problem := _ask_hub(name, revision or "main"):
        raise UserError(f"--qwen {name}: no such folder, not in the Hugging Face cache, and {problem}; {WAYS_OUT}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # network, disk, permissions: dozens of types from three libraries
        raise UserError(f"--qwen {name}: the download failed ({_one_line(error)}); {WAYS_OUT}") from error


@contextlib.contextmanager
def quiet_downloads() -> Iterator[None]:
    """No bars from the hub's client inside; as they were afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _ask_hub(name: str, revision: str) -> str | None:
    """Why the hub cannot deliver `name`, as the end of a sentence; None if it can. Takes at most _HUB_SECONDS."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    answers: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()

    def ask() -> None:
        url = f"{constants.ENDPOINT}/{name}/resolve/{revision}/config.json"
        try:
            answers.put(get_session().head(url, headers=build_hf_headers(), timeout=_HUB_SECONDS).status_code)
        except Exception as error:  # httpx, httpx2 or requests, by version
            answers.put(error)

    # In a thread, because no timeout covers a name server that does not answer.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_HUB_SECONDS)
    except queue.Empty:
        return f"the hub did not answer within {_HUB_SECONDS:.0f} s"
    if isinstance(answer, Exception):
        return f"the hub cannot be reached ({_one_line(answer)})"
    if answer in (401, 403, 404):
        return f"the hub has no public model of that name (HTTP {answer})"
    return f"the hub is not working (HTTP {answer})" if answer >= 400 else None


# ----------------------------------------------------------------------------------------------------------------------
# Loading a folder


def _check_folder(source: Source) -> None:
    """UserError, one line, unless the folder holds a Qwen that this file can load. Nothing is loaded yet."""
    folder, where = source.folder, f"--qwen {source.name}"
    try:
        # A pipe would be waited for without end, by transformers too.
        paths = [path for path in sorted(folder.iterdir()) if path.exists()]
        odd = [path.name for path in paths if not (path.is_file() or path.is_dir())]
    except OSError as error:
        raise UserError(f"{where}: the folder cannot be looked into ({error.strerror or error})") from error
    if odd:
        raise UserError(f"{where}: {odd[0]} is not a regular file")
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        raise UserError(f"{where}: holds an adapter alone, of {_base_of(adapter)}; merge it into its base first")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: no readable config.json with a model_type ({_one_line(error)})") from error
    known = TEXT_TYPES + VISION_TYPES
    if kind not in known:
        raise UserError(f"{where}: model type {kind!r} is none of {', '.join(known)}")
    if "quantization_config" in config:
        raise UserError(f"{where}: its weights are quantised and cannot train; use the unquantised model")
    if adapter.exists():
        raise UserError(f"{where}: holds an adapter beside the model; merge it first")
    try:
        missing = _missing_weights(folder)
    except ValueError as error:
        raise UserError(f"{where}: {_INDEX} is damaged ({_one_line(error)})") from error
    if missing:
        pickled = any(folder.glob("pytorch_model*.bin"))
        remark = " (pytorch_model.bin is pickled, which may run code, and is never read)" if pickled else ""
        raise UserError(f"{where}: no {missing[0]} in the folder{remark}")


def _base_of(adapter: Path) -> str:
    """The model that an adapter's configuration names, for a message."""
    content = read_json(adapter)
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return printable(name) if isinstance(name, str) and name else "a base that it does not name"


def _missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that the folder should hold and does not. ValueError if its index is damaged."""
    return [shard for shard in _shards(folder) if not (folder / shard).is_file()]


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that are read: where a folder holds both forms, transformers reads the whole."""
    return [_WHOLE] if (folder / _WHOLE).is_file() else _shards(folder)


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files that the folder should hold. ValueError if its index is damaged."""
    index = folder / _INDEX
    if not index.is_file():
        return [_WHOLE]
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error
    for name in names:  # another folder's files are not the model's, and others than safetensors may be pickled
        if not isinstance(name, str) or not re.fullmatch(r"[^./\\][^/\\]*\.safetensors", name):
            raise ValueError(f"its weight_map names {describe(name)}, which is no .safetensors file beside it")
    return sorted(set(names))


def load_backbone(source: Source) -> PreTrainedModel:
    """The text model in fp32. UserError if a weight is missing: transformers would make it up at random."""
    from transformers import AutoModel

    _check_folder(source)
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                str(source.folder),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
            )
    except Exception as error:  # damaged files and foreign configurations fail in many ways
        raise UserError(f"--qwen {source.name}: the model cannot be loaded ({_one_line(error)})") from error
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, wanted = wrong[0]
        raise UserError(
            f"--qwen {source.name}: {len(wrong)} weights have other shapes than its config.json says, {name} for one: "
            f"{list(stored)}, not {list(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--qwen {source.name}: {len(missing)} weights are missing, {missing[0]} for one")
    model = getattr(model, "language_model", model)
    model.config.return_dict = True  # whatever whoever saved it wanted
    if bad := [name for name, weight in model.state_dict().items() if not bool(torch.isfinite(weight).all())]:
        raise UserError(f"--qwen {source.name}: {bad[0]} holds numbers that are not finite; the model is damaged")
    try:  # some configurations are refused only when they are computed with
        with torch.no_grad(), seeded(0):
            model.train()(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:
        raise UserError(f"--qwen {source.name}: the model cannot be computed with ({_one_line(error)})") from error
    return model.eval()


def layers_of(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers that are computed one after the other, each of which can be read again for the way back."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in backbone.modules() if isinstance(part, GradientCheckpointingLayer)]


def embedding_of(backbone: PreTrainedModel) -> nn.Embedding:
    """The token embeddings, (vocabulary, hidden)."""
    return cast(nn.Embedding, backbone.get_input_embeddings())


def load_tokenizer(source: Source, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer, checked to keep a context's text and to fit a model of `vocabulary` embeddings."""
    from transformers import AutoTokenizer

    where = f"--qwen {source.name}"
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(source.folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # as above
        raise UserError(f"{where}: the tokenizer cannot be loaded ({_one_line(error)})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{where}: its tokenizer has no tokenizer.json form")
    tokenizer = cast("PreTrainedTokenizerFast", tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    try:
        ids = backend.encode(_PROBE_TEXT, add_special_tokens=False).ids
        kept = backend.decode(ids, skip_special_tokens=False) == _PROBE_TEXT
    except Exception as error:  # a bare Exception is what the library raises, for a vocabulary with a gap for one
        raise UserError(f"{where}: its tokenizer cannot read a context ({_one_line(error)})") from error
    # A folder without tokenizer files loads as a tokenizer of one token, without an error.
    if not kept:
        raise UserError(f"{where}: its tokenizer ({len(tokenizer)} tokens) does not keep digits; are its files there?")
    if max(ids) >= vocabulary:
        raise UserError(f"{where}: tokenizer and model do not belong together ({max(ids)} of {vocabulary} embeddings)")
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers while loading; as it was afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def faults_of_the_disk() -> Iterator[None]:
    """What safetensors and tokenizers raise where a file cannot be written, as an OSError: neither of theirs is one,
    and that of tokenizers is a bare Exception."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of `seed` inside, torch's state as before afterwards. Only the CPU's, where models are built:
    torch.manual_seed would reseed every GPU as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _one_line(error: Exception) -> str:
    """Type and text of an error, short enough to stand inside a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {textwrap.shorten(text, 200, placeholder=' ...')}".removesuffix(": ")


# ----------------------------------------------------------------------------------------------------------------------
# The built-in tiny Qwen


def _tiny_folder(cache_dir: Path, seed: int) -> Path:
    """The folder of the tiny model of `seed`, written if it is not there or damaged. Safe among several processes:
    a folder appears by one rename, and whoever comes second uses the first one's."""
    target = cache_dir / f"tiny-qwen3-{TINY_VERSION}-{seed}"
    if _is_intact(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache_dir) as scratch:
            fresh = Path(scratch, "fresh")
            _write_tiny(fresh, seed)
            if not _is_intact(target):
                with contextlib.suppress(OSError):  # most often nothing is there to move away
                    target.rename(Path(scratch, "damaged"))
                with contextlib.suppress(OSError):  # another process was faster, which the check below settles
                    fresh.rename(target)
    except OSError as error:
        raise UserError(f"--qwen tiny: cannot write to {cache_dir} ({error.strerror or _one_line(error)})") from error
    if not _is_intact(target):
        raise UserError(f"--qwen tiny: {target} is damaged and cannot be replaced; remove it")
    return target


def _is_intact(folder: Path) -> bool:
    """Whether the folder holds exactly the files that `_write_tiny` recorded, byte for byte."""
    try:
        recorded = json.loads((folder / _DIGESTS).read_bytes())
        return recorded == _file_digests(folder)
    except (OSError, ValueError, RecursionError):
        return False


def _file_digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if path.name != _DIGESTS]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_tiny(folder: Path, seed: int) -> None:
    """Write the tiny model, its tokenizer and the digests of all files into the new `folder`."""
    vocabulary = _tiny_vocabulary()
    with quiet(), faults_of_the_disk():
        _tiny_tokenizer(vocabulary).save_pretrained(str(folder))
        _tiny_model(vocabulary, seed).save_pretrained(str(folder))
    (folder / _DIGESTS).write_text(json.dumps(_file_digests(folder)), encoding="utf-8")


def _tiny_vocabulary() -> dict[str, int]:
    """Every run of one to three digits, every cell as an input and an output colour, and the letters I and O, each also
    with a line end behind it: a row of w cells costs ceil(w / 3) tokens, or w cell by cell. 2,469 tokens."""
    runs = ["".join(run) for length in (1, 2, 3) for run in itertools.product("0123456789", repeat=length)]
    runs += [before + after for before in INPUTS for after in OUTPUTS]
    tokens = ["<pad>", "<unk>", "\n", *(text + end for text in ("I", "O", *runs) for end in ("", "\n"))]
    return {token: index for index, token in enumerate(tokens)}


def _tiny_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[0-9.][a-j-]\n?|[0-9]{1,3}\n?|[IO]\n?|\n"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def _tiny_model(vocabulary: dict[str, int], seed: int) -> PreTrainedModel:
    """A Qwen3 of random weights, a pure function of `seed`."""
    from transformers import AutoConfig, AutoModel

    shape = TINY_SHAPE | {"vocab_size": len(vocabulary), "initializer_range": TINY_INITIAL_STD}
    with seeded(seed):
        config = AutoConfig.for_model("qwen3", **shape)
        model = AutoModel.from_config(config, dtype=torch.float32)
        model.embed_tokens.weight.data.copy_(_tiny_embeddings(vocabulary))
    return model


def _tiny_embeddings(vocabulary: dict[str, int]) -> Tensor:
    """Random embeddings (V, hidden). A run of digits is the normalised sum of a vector for each digit at its place and
    one for the line end, a cell that of its input and its output colour, so that runs which share digits start alike:
    without any training, a task is then found again by other pairs of itself in 43 of 100 cases among 250 tasks,
    against 35 with independent embeddings."""
    digits, line_end = torch.randn(3, 10, TINY_WIDTH), torch.randn(TINY_WIDTH)
    table = torch.randn(len(vocabulary), TINY_WIDTH)
    cells = torch.randn(2, len(INPUTS), TINY_WIDTH)
    for token, index in vocabulary.items():
        run = token.rstrip("\n")
        if run[-1:] in OUTPUTS and run:
            parts = [cells[0, INPUTS.index(run[0])], cells[1, OUTPUTS.index(run[1])]] + [line_end] * (run != token)
            table[index] = torch.stack(parts).sum(0) / len(parts) ** 0.5
        elif token[0].isdigit():
            parts = [digits[place, int(digit)] for place, digit in enumerate(run)] + [line_end] * token.endswith("\n")
            table[index] = torch.stack(parts).sum(0) / len(parts) ** 0.5
    return table * TINY_INITIAL_STD
