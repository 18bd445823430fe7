"""Qwen as a trainable prompt encoder: demonstration pairs, written as text, become K prompt vectors.

Text of a context (`pair_text`): a header, then each pair's input (I) and output (O), one line of digits for a grid row:

    IO          header
    I           the pair's input, here 2 x 3
    012
    345
    O           its output, here 2 x 2
    66
    77

K learned query vectors follow the text; their last hidden states, projected, are the prompt. Gradient flows through the
whole model into the token embeddings at every step.

The built-in `tiny` model is written to disk once and then loaded by the same code as any other Qwen folder. Only
safetensors and JSON are read, and no code that a folder or the hub may carry is ever run. This is the only file that
imports transformers, and it does so inside functions: data workers that only write and tokenise text do not pay for it.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc.lora import Adapter, Base
from arc.tasks import Grid

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Tune = Literal["full", "lora", "frozen"]  # what of Qwen trains; the queries and the projection do in any case
AUTO_ON_CUDA = "Qwen/Qwen2.5-0.5B"
TEXT_TYPES = ("qwen2", "qwen3", "qwen3_5_text")
VISION_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # of these the language model is taken
WAYS_OUT = "use --qwen tiny (built in, nothing to download) or --qwen DIR (a local model folder)"

HEADER = "IO\n"
TINY_VERSION = 1  # changes when the tiny model or its tokenizer changes; part of its folder's name
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
_DIGESTS = "digests.json"
_PROBE_TEXT = "IO\nI\n0123456789\nO\n9\n"


# ----------------------------------------------------------------------------------------------------------------------
# Context -> text -> token ids


def grid_text(grid: Grid) -> str:
    """Rows of digits, each ended by a newline; grid: (H, W) with colours 0..9."""
    return "".join("".join(map(str, row)) + "\n" for row in grid.tolist())


def pair_text(pair: tuple[Grid, Grid]) -> str:
    """One demonstration pair (input, output) as text."""
    return f"I\n{grid_text(pair[0])}O\n{grid_text(pair[1])}"


class ContextEncoder:
    """Demonstration pairs -> token ids of at most `max_tokens`. Small and picklable, so data workers can hold one.

    Each pair is tokenised by itself, which makes a context's length the sum of its parts. Where not all pairs fit, the
    cheapest are kept (ties: the earlier), which is as many as can be, in their original order. A grid is never cut; if
    no pair fits, the header alone remains. `log` is told the first time that happens, by the main process only.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, log: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self.max_tokens, self._log = tokenizer, max_tokens, log
        self._header = self._ids(HEADER)
        if max_tokens < len(self._header):
            raise ValueError(f"--max_context_tokens {max_tokens}: the empty context alone takes {len(self._header)}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_log": None}

    def __call__(self, pairs: Sequence[tuple[Grid, Grid]]) -> list[int]:
        """Token ids of the context made of `pairs`, each (input, output)."""
        parts = [self._ids(pair_text(pair)) for pair in pairs]
        room, kept = self.max_tokens - len(self._header), []
        for index in sorted(range(len(parts)), key=lambda i: len(parts[i])):
            if (room := room - len(parts[index])) < 0:
                break
            kept.append(index)
        if len(kept) < len(parts):
            self._tell(len(parts) - len(kept), len(parts))
        return [*self._header, *itertools.chain.from_iterable(parts[i] for i in sorted(kept))]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _tell(self, dropped: int, total: int) -> None:
        if self._log is None or torch.utils.data.get_worker_info() is not None:
            return
        self._log(
            f"Context: {dropped} of {total} demonstration pairs of a task do not fit --max_context_tokens "
            f"{self.max_tokens}; the largest pairs are left out whole (said once)"
        )
        self._log = None


# ----------------------------------------------------------------------------------------------------------------------
# The module


class QwenPrompt(nn.Module):
    """A Qwen text model with K learned queries after the context and a projection of what they read.

    Public attributes: `backbone` (fp32 weights), `tokenizer`, `encoder` (a `ContextEncoder`), `query` (K, hidden),
    `project` (hidden -> prompt width), `name`, `is_tiny`, `tune`, `embedding_dim` (hidden), `description`, and with
    tune "lora" `adapter` and the `base` it belongs to, else None.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        origin: str,
        is_tiny: bool,
        prompt_len: int,
        prompt_dim: int,
        max_context_tokens: int,
        tune: Tune,
        gradient_checkpointing: bool,
        log: Callable[[str], None],
        base: Base | None = None,
        lora_rank: int = 16,
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.name, self.is_tiny, self.tune = backbone, tokenizer, name, is_tiny, tune
        self.encoder = ContextEncoder(tokenizer.backend_tokenizer, max_context_tokens, log)
        self._origin, self.base = origin, base
        self.embedding_dim: int = backbone.config.hidden_size
        # Queries of the size of a token's embedding, outputs of unit size.
        scale = _embedding(backbone).weight.std().item()
        self.query = nn.Parameter(torch.randn(prompt_len, self.embedding_dim) * scale)
        linear = nn.Linear(self.embedding_dim, prompt_dim)
        nn.init.normal_(linear.weight, std=self.embedding_dim**-0.5)
        nn.init.zeros_(linear.bias)
        self.project = nn.Sequential(nn.LayerNorm(self.embedding_dim), linear)
        # Only plain attention can be read in two steps (see `_read_frozen`): a recurrent layer would run over padding.
        kinds = getattr(backbone.config, "layer_types", None) or []
        self._all_attention = all(kind == "full_attention" for kind in kinds)
        self.adapter = Adapter(backbone, lora_rank) if tune == "lora" else None
        if tune == "frozen":
            backbone.requires_grad_(False)
        elif gradient_checkpointing:
            renamed = "activation_checkpointing_enable"  # in transformers 5.23; the old name warns there
            enable = getattr(backbone, renamed if hasattr(backbone, renamed) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})
        self.train()

    @property
    def description(self) -> str:
        """One line for the start-up log: which model, where from, how much of it trains."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.trainable_parameters().values())
        kind, tune = self.backbone.config.model_type, self.tune if self.adapter is None else self.adapter.description
        return (
            f"Qwen: {self.name} ({kind}, {self._origin}), {total / 1e6:.2f} M parameters, "
            f"{trainable / 1e6:.2f} M of them train ({tune})"
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name. Each of them, token embeddings included, gets a gradient at every step."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.tune == "frozen":
            self.backbone.eval()
        return self

    def encode_context(self, pairs: Sequence[tuple[Grid, Grid]]) -> list[int]:
        """Token ids, at most `max_context_tokens`, of a context of (input, output) pairs. See `ContextEncoder`."""
        return self.encoder(pairs)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read contexts: prompt (B, K, D) and task embedding (B, hidden), the mean of what the queries read; both fp32.

        ids: (B, L) int64 token ids, right-padded with any valid id.  lengths: (B,) int64, 1 <= lengths <= L. What lies
        behind a row's length has no influence on the result.
        """
        frozen = self.tune == "frozen" and self._all_attention
        states = self._read_frozen(ids, lengths) if frozen else self._read(ids, lengths)  # (B, K, hidden)
        # fp32 also under autocast: the steps that refine a prompt are smaller than bf16 resolves.
        return self.project(states).float(), states.float().mean(1)

    def _read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states (B, K, hidden) of the queries, with gradient through everything.

        Each row is laid out as content, queries, padding. Attention is causal, so nothing real sees the padding and no
        mask is needed, which keeps the fast attention kernels.
        """
        K, hidden = self.query.shape
        place = (lengths[:, None] + torch.arange(K, device=ids.device))[..., None]  # (B, K, 1)
        place = place.expand(-1, -1, hidden)
        embedded = _embedding(self.backbone)(F.pad(ids, (0, K)))  # (B, L + K, hidden)
        embedded = embedded.scatter(1, place, self.query.expand(len(ids), -1, -1))
        states = self.backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state  # (B, L + K, hidden)
        return states.gather(1, place)

    def _read_frozen(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The same numbers as `_read`, for a backbone that does not train: the content does not depend on the queries,
        so it is read first, without a graph; only the K queries, which look back at its keys and values, need one."""
        K, L = len(self.query), ids.shape[1]
        steps = torch.arange(K, device=ids.device)
        read = self.backbone(input_ids=ids, use_cache=True).past_key_values  # nothing in it asks for a gradient
        columns = torch.arange(L + K, device=ids.device)  # content and padding (L), then the queries (K)
        content = columns < lengths[:, None, None]  # (B, 1, L + K)
        queries = (columns >= L) & (columns - L <= steps[:, None])  # (K, L + K)
        return self.backbone(
            inputs_embeds=self.query.expand(len(ids), -1, -1),
            attention_mask=(content | queries)[:, None],
            position_ids=lengths[:, None] + steps,
            past_key_values=read,
            use_cache=True,
        ).last_hidden_state

    def export_files(self) -> dict[str, str]:
        """Texts of config.json, tokenizer.json and tokenizer_config.json (and what else the tokenizer needs), by name.

        Beside a safetensors file of `self.backbone.state_dict()` (with an adapter: of the merged weights) they make a
        folder that AutoModel and AutoTokenizer read.
        """
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            self.backbone.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def build_qwen(
    spec: str,
    *,
    device_type: str,
    prompt_len: int,
    prompt_dim: int,
    max_context_tokens: int,
    tune: Tune = "full",
    lora_rank: int = 16,
    gradient_checkpointing: bool = False,
    cache_dir: Path,
    seed: int,
    log: Callable[[str], None] = print,
    revision: str = "",
) -> QwenPrompt:
    """Find, load and wrap the model that --qwen names; on the CPU, in train mode. torch's random state is left alone.

    spec: "auto" (AUTO_ON_CUDA if device_type is "cuda", else "tiny"), "tiny", a folder, or a hub name OWNER/NAME.
    cache_dir: where the tiny model is kept (hub models stay in the Hugging Face cache).  log: told once if pairs do not
    fit.  revision: the commit of a hub model; "": the newest, or the one that is in the cache. Raises ValueError, one
    line, for anything that cannot be found or is not a usable Qwen, within about five seconds if the hub does not
    answer.
    """
    if tune not in get_args(Tune):
        raise ValueError(f"--qwen_tune {tune}: none of {', '.join(get_args(Tune))}")
    source = _locate(spec, device_type, Path(cache_dir), seed, revision)
    backbone = _load_backbone(source)
    base = _base_of(source, backbone) if tune == "lora" else None
    tokenizer = _load_tokenizer(source, _embedding(backbone).num_embeddings)
    positions = backbone.config.max_position_embeddings
    if max_context_tokens + prompt_len > positions:
        raise ValueError(
            f"--max_context_tokens {max_context_tokens}: with {prompt_len} prompt vectors more than the "
            f"{positions} positions of {source.name}"
        )
    with _seeded(seed):
        return QwenPrompt(
            backbone,
            tokenizer,
            name=source.name,
            origin=source.origin,
            is_tiny=source.is_tiny,
            prompt_len=prompt_len,
            prompt_dim=prompt_dim,
            max_context_tokens=max_context_tokens,
            tune=tune,
            gradient_checkpointing=gradient_checkpointing,
            log=log,
            base=base,
            lora_rank=lora_rank,
        )


def _base_of(source: _Source, backbone: PreTrainedModel) -> Base:
    whole = ["model.safetensors"]  # where a folder holds both forms, transformers reads this one
    shards = whole if (source.folder / whole[0]).is_file() else _shards(source.folder)
    return Base.of(source.folder, shards, backbone.state_dict(), name=source.name, revision=source.revision)


# ----------------------------------------------------------------------------------------------------------------------
# Finding a model: always ends in a folder


@dataclass(frozen=True)
class _Source:
    """Where a model is read from: its name as the user knows it, the folder, where that came from, in words, and the
    hub's commit."""

    name: str
    folder: Path
    origin: str
    is_tiny: bool = False
    revision: str = ""


def _locate(spec: str, device_type: str, cache_dir: Path, seed: int, revision: str = "") -> _Source:
    """The folder that `spec` means (see `build_qwen`)."""
    if spec == "auto":
        spec = AUTO_ON_CUDA if device_type == "cuda" else "tiny"
    if spec == "tiny":
        folder = _tiny_folder(cache_dir, seed)
        return _Source("tiny", folder, f"built in, random weights of seed {seed}", is_tiny=True)
    path = os.path.expanduser(spec)
    if spec and os.path.isdir(path):
        return _Source(spec, Path(path), "local folder")
    if os.path.exists(path):
        raise ValueError(f"--qwen {spec}: is a file; name the folder that holds config.json and model.safetensors")
    if _HUB_NAME.fullmatch(spec):
        folder = _hub_folder(spec, revision or None)
        return _Source(spec, folder, "Hugging Face hub", revision=folder.name)  # a snapshot's folder is its commit
    if spec.startswith((".", "~")) or "/" in spec or os.sep in spec:
        raise ValueError(f"--qwen {spec}: no such folder")
    raise ValueError(f"--qwen {spec!r}: neither auto, tiny, a folder here nor a hub name (OWNER/NAME); {WAYS_OUT}")


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
        raise ValueError(f"--qwen {name}: no such folder, not in the Hugging Face cache, and {problem}; {WAYS_OUT}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # network, disk, permissions: dozens of types from three libraries
        raise ValueError(f"--qwen {name}: the download failed ({_one_line(error)}); {WAYS_OUT}") from error


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


def _check_folder(source: _Source) -> None:
    """ValueError, one line, unless the folder holds a Qwen that this file can load. Nothing is loaded yet."""
    folder, where = source.folder, f"--qwen {source.name}"
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: no readable config.json with a model_type ({_one_line(error)})") from error
    known = TEXT_TYPES + VISION_TYPES
    if kind not in known:
        raise ValueError(f"{where}: model type {kind!r} is none of {', '.join(known)}")
    if "quantization_config" in config:
        raise ValueError(f"{where}: its weights are quantised and cannot train; use the unquantised model")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{where}: holds an adapter beside the model; merge it first")
    try:
        missing = _missing_weights(folder)
    except ValueError as error:
        raise ValueError(f"{where}: model.safetensors.index.json is damaged ({_one_line(error)})") from error
    if missing:
        pickled = any(folder.glob("pytorch_model*.bin"))
        remark = " (pytorch_model.bin is pickled, which may run code, and is never read)" if pickled else ""
        raise ValueError(f"{where}: no {missing[0]} in the folder{remark}")


def _missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that the folder should hold and does not. ValueError if its index is damaged."""
    return [shard for shard in _shards(folder) if not (folder / shard).is_file()]


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files that the folder should hold. ValueError if its index is damaged."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(_one_line(error)) from error
    return shards


def _load_backbone(source: _Source) -> PreTrainedModel:
    """The text model in fp32. ValueError if a weight is missing: transformers would make it up at random."""
    from transformers import AutoModel

    _check_folder(source)
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(
                str(source.folder),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # damaged files and foreign configurations fail in many ways
        raise ValueError(f"--qwen {source.name}: the model cannot be loaded ({_one_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"--qwen {source.name}: {len(missing)} weights are missing, {missing[0]} for one")
    return getattr(model, "language_model", model)


def _embedding(backbone: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, backbone.get_input_embeddings())


def _load_tokenizer(source: _Source, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer, checked to keep a context's text and to fit a model of `vocabulary` embeddings."""
    from transformers import AutoTokenizer

    where = f"--qwen {source.name}"
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(source.folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # as above
        raise ValueError(f"{where}: the tokenizer cannot be loaded ({_one_line(error)})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{where}: its tokenizer has no tokenizer.json form")
    tokenizer = cast("PreTrainedTokenizerFast", tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    ids = backend.encode(_PROBE_TEXT, add_special_tokens=False).ids
    # A folder without tokenizer files loads as a tokenizer of one token, without an error.
    if backend.decode(ids, skip_special_tokens=False) != _PROBE_TEXT:
        raise ValueError(f"{where}: its tokenizer ({len(tokenizer)} tokens) does not keep digits; are its files there?")
    if max(ids) >= vocabulary:
        raise ValueError(f"{where}: tokenizer and model do not belong together ({max(ids)} of {vocabulary} embeddings)")
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of `seed` inside, torch's state as before afterwards. Only the CPU's, where models are built:
    torch.manual_seed would reseed every GPU as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _one_line(error: Exception) -> str:
    """Type and first line of an error, short enough to stand inside a message."""
    text = next(iter(str(error).strip().splitlines()), "")
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
        raise ValueError(f"--qwen tiny: cannot write to {cache_dir} ({_one_line(error)})") from error
    if not _is_intact(target):
        raise ValueError(f"--qwen tiny: {target} is damaged and cannot be replaced; remove it")
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
    with _quiet():
        _tiny_tokenizer(vocabulary).save_pretrained(str(folder))
        _tiny_model(vocabulary, seed).save_pretrained(str(folder))
    (folder / _DIGESTS).write_text(json.dumps(_file_digests(folder)), encoding="utf-8")


def _tiny_vocabulary() -> dict[str, int]:
    """Every run of one to three digits and the letters I and O, each also with a line end behind it: a row of w cells
    costs ceil(w / 3) tokens. 2,227 tokens."""
    runs = ["".join(run) for length in (1, 2, 3) for run in itertools.product("0123456789", repeat=length)]
    tokens = ["<pad>", "<unk>", "\n", *(text + end for text in ("I", "O", *runs) for end in ("", "\n"))]
    return {token: index for index, token in enumerate(tokens)}


def _tiny_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{1,3}\n?|[IO]\n?|\n"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def _tiny_model(vocabulary: dict[str, int], seed: int) -> PreTrainedModel:
    """A Qwen3 of random weights, a pure function of `seed`."""
    from transformers import AutoConfig, AutoModel

    shape = TINY_SHAPE | {"vocab_size": len(vocabulary), "initializer_range": TINY_INITIAL_STD}
    with _seeded(seed):
        config = AutoConfig.for_model("qwen3", **shape)
        model = AutoModel.from_config(config, dtype=torch.float32)
        model.embed_tokens.weight.data.copy_(_tiny_embeddings(vocabulary))
    return model


def _tiny_embeddings(vocabulary: dict[str, int]) -> Tensor:
    """Random embeddings (V, hidden). A run of digits is the normalised sum of a vector for each digit at its place and
    one for the line end, so that runs which share digits start alike: without any training, a task is then found again
    by other pairs of itself in 43 of 100 cases among 250 tasks, against 35 with independent embeddings."""
    digits, line_end = torch.randn(3, 10, TINY_WIDTH), torch.randn(TINY_WIDTH)
    table = torch.randn(len(vocabulary), TINY_WIDTH)
    for token, index in vocabulary.items():
        if token[0].isdigit():
            run = token.rstrip("\n")
            parts = [digits[place, int(digit)] for place, digit in enumerate(run)] + [line_end] * token.endswith("\n")
            table[index] = torch.stack(parts).sum(0) / len(parts) ** 0.5
    return table * TINY_INITIAL_STD
