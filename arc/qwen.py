"""Qwen as a trainable prompt encoder: demonstration pairs, written as text, become K prompt vectors.

Text of a context (`pair_text`): a header, then each pair's input (I) and output (O), one line of digits for a grid row:

    IO          header
    I           the pair's input, here 2 x 3
    012
    345
    O           its output, here 2 x 2
    66
    77

Or, with `--context_text cells`, cell by cell: a line for each row of the smallest rectangle that holds both grids, and
in it for each cell its input colour as a digit and its output colour as a letter, a for 0; . and - where there is none.
What becomes of a cell then stands in one place, which a small model finds much sooner (`cells_text`):

    I
    0g1g2-      the pair above
    3h4h5-

K learned query vectors follow the text; their last hidden states, projected, are the prompt. Gradient flows through the
whole model into the token embeddings at every step.

Finding and loading the model is arc/qwen_source.py's.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc.lora import Adapter, Base
from arc.qwen_source import (
    INPUTS,
    OUTPUTS,
    embedding_of,
    faults_of_the_disk,
    layers_of,
    load_backbone,
    load_tokenizer,
    locate,
    quiet,
    seeded,
    weight_files,
)
from arc.run.files import UserError, one_line
from arc.sharding import shard
from arc.tasks import Grid

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from arc.batches import Texts

Tune = Literal["full", "lora", "frozen"]  # what of Qwen trains; the queries and the projection do in any case

NO_CELL = 10  # the place of . and - in INPUTS and OUTPUTS
ContextText = Literal["grids", "cells"]

HEADER = "IO\n"

# ----------------------------------------------------------------------------------------------------------------------
# Context -> text -> token ids


def grid_text(grid: Grid) -> str:
    """Rows of digits, each ended by a newline; grid: (H, W) with colours 0..9."""
    return "".join("".join(map(str, row)) + "\n" for row in grid.tolist())


def pair_text(pair: tuple[Grid, Grid]) -> str:
    """One demonstration pair (input, output) as text, grid after grid."""
    return f"I\n{grid_text(pair[0])}O\n{grid_text(pair[1])}"


def cells_text(pair: tuple[Grid, Grid]) -> str:
    """One demonstration pair (input, output) as text, both grids cell by cell."""
    shape = tuple(max(sides) for sides in zip(*(grid.shape for grid in pair), strict=True))
    before, after = (np.full(shape, NO_CELL) for _ in pair)
    for whole, grid in zip((before, after), pair, strict=True):
        whole[: grid.shape[0], : grid.shape[1]] = grid
    rows = zip(before.tolist(), after.tolist(), strict=True)
    lines = ("".join(INPUTS[a] + OUTPUTS[b] for a, b in zip(*row, strict=True)) for row in rows)
    return "I\n" + "".join(f"{line}\n" for line in lines)


class ContextEncoder:
    """Demonstration pairs -> token ids of at most `max_tokens`. Small and picklable, so data workers can hold one.

    Each pair is tokenised by itself, which makes a context's length the sum of its parts. Where not all pairs fit, the
    cheapest are kept (ties: the earlier), which is as many as can be, in their original order. A grid is never cut; if
    no pair fits, the header alone remains. `log` is told the first time that happens, by the main process only. Raises
    UserError if not even the header fits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        log: Callable[[str], None] | None = None,
        text: ContextText = "grids",
    ) -> None:
        self._tokenizer, self.max_tokens, self._log = tokenizer, max_tokens, log
        self._text = {"grids": pair_text, "cells": cells_text}[text]
        self._header = self._ids(HEADER)
        if max_tokens < len(self._header):
            raise UserError(f"--max_context_tokens {max_tokens}: the empty context alone takes {len(self._header)}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_log": None}

    def __call__(self, pairs: Sequence[tuple[Grid, Grid]]) -> list[int]:
        """Token ids of the context made of `pairs`, each (input, output)."""
        parts = [self._ids(self._text(pair)) for pair in pairs]
        room, kept = self.max_tokens - len(self._header), []
        for index in sorted(range(len(parts)), key=lambda i: len(parts[i])):
            if (room := room - len(parts[index])) < 0:
                break
            kept.append(index)
        if len(kept) < len(parts):
            self._tell(len(parts) - len(kept), len(parts))
        return [*self._header, *itertools.chain.from_iterable(parts[i] for i in sorted(kept))]

    def _ids(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a bare Exception is what the library raises
            raise UserError(f"--qwen: the model's tokenizer cannot read a context ({one_line(str(error))})") from error

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
        context_text: ContextText = "grids",
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.name, self.is_tiny, self.tune = backbone, tokenizer, name, is_tiny, tune
        self.encoder = ContextEncoder(tokenizer.backend_tokenizer, max_context_tokens, log, context_text)
        self._origin, self.base, self.is_sharded = origin, base, False
        self.embedding_dim: int = backbone.config.hidden_size
        # Queries of the size of a token's embedding, outputs of unit size.
        scale = embedding_of(backbone).weight.std().item()
        self.query = nn.Parameter(torch.randn(prompt_len, self.embedding_dim) * scale)
        linear = nn.Linear(self.embedding_dim, prompt_dim)
        nn.init.normal_(linear.weight, std=self.embedding_dim**-0.5)
        nn.init.zeros_(linear.bias)
        self.project = nn.Sequential(nn.LayerNorm(self.embedding_dim), linear)
        # Only plain attention can be read in two steps (see `_read_frozen`): a recurrent layer would run over padding.
        kinds = getattr(backbone.config, "layer_types", None) or []
        self._all_attention = all(kind == "full_attention" for kind in kinds)
        # Said layer by layer that there is no mask, transformers does not look for packed rows, a wait for a GPU.
        by_layer = self._all_attention and backbone.config.model_type in ("qwen2", "qwen3")
        self._mask = {"full_attention": None} if by_layer else None
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

    def sharded(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        """This module divided among the processes, layer by layer (arc/sharding.py)."""
        shard(self, layers_of(self.backbone), device, dtype)
        self.is_sharded = True
        return self

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.tune == "frozen":
            self.backbone.eval()
        return self

    def forward(self, ids: Tensor, lengths: Tensor, reading: Sequence[Texts] = ()) -> tuple[Tensor, Tensor]:
        """Read contexts: prompt (B, K, D) and task embedding (B, hidden), the mean of what the queries read; both fp32.

        ids: (B, L) int64 token ids, right-padded with any valid id.  lengths: (B,) int64, 1 <= lengths <= L. What lies
        behind a row's length has no influence on the result.  reading: which rows are read together; by default all in
        one pass, and so they are where the backbone is divided among processes, which must all make the same passes.
        """
        frozen = self.tune == "frozen" and self._all_attention
        read = self._read_frozen if frozen else self._read
        # Layers as narrow as the tiny model's lose more by casting on a CPU than its bf16 products win, and the way
        # back through torch's attention takes three times as long in bf16.
        narrow = self.is_tiny and ids.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if narrow else contextlib.nullcontext():
            if len(reading) < 2 or self.is_sharded:
                states = read(ids, lengths)  # (B, K, hidden)
            else:
                parts = torch.cat([read(ids[t.which, : t.longest], lengths[t.which]) for t in reading])
                states = torch.empty_like(parts).index_copy(0, torch.cat([t.which for t in reading]), parts)
        # fp32 also under autocast: the steps that refine a prompt are smaller than bf16 resolves. A tensor of its own:
        # FSDP2 gathers the weights for the way back in a hook of what comes out here, which a view could lose.
        return self.project(states).float().clone(), states.float().mean(1)

    def _read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states (B, K, hidden) of the queries, with gradient through everything.

        Each row is laid out as content, queries, padding. Attention is causal, so nothing real sees the padding and no
        mask is needed, which keeps the fast attention kernels.
        """
        K, hidden = self.query.shape
        place = (lengths[:, None] + torch.arange(K, device=ids.device))[..., None]  # (B, K, 1)
        place = place.expand(-1, -1, hidden)
        embedded = embedding_of(self.backbone)(F.pad(ids, (0, K)))  # (B, L + K, hidden)
        embedded = embedded.scatter(1, place, self.query.expand(len(ids), -1, -1))
        states = self.backbone(inputs_embeds=embedded, attention_mask=self._mask, use_cache=False).last_hidden_state
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

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether no weight of the backbone trains, not even beside an adapter."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def saved_parts(self) -> dict[str, nn.Module | Adapter]:
        """What of this module is in every checkpoint. The backbone stands alone, so that `model_persistence.py export`
        can write it in the form that AutoModel reads. Where it does not train it is `frozen_state`; with an adapter
        only that is saved and the backbone is named (see arc/lora.py)."""
        head: dict[str, nn.Module | Adapter] = {
            "qwen_query": nn.ParameterDict({"query": self.query}),
            "qwen_project": self.project,
        }
        return head if self.backbone_is_frozen else {**head, "qwen": self.adapter or self.backbone}

    def frozen_state(self) -> dict[str, Tensor] | None:
        """The weights that do not train, stored once a run, by the names they have there; None if there are none."""
        if not self.backbone_is_frozen:
            return None
        return {f"qwen/{name}": tensor for name, tensor in self.backbone.state_dict().items()}

    def export_files(self) -> dict[str, str]:
        """Texts of config.json, tokenizer.json and tokenizer_config.json (and what else the tokenizer needs), by name.

        Beside a safetensors file of `self.backbone.state_dict()` (with an adapter: of the merged weights) they make a
        folder that AutoModel and AutoTokenizer read.
        """
        try:
            with quiet(), faults_of_the_disk(), tempfile.TemporaryDirectory() as folder:
                self.backbone.config.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
        except OSError as error:
            place = tempfile.gettempdir()
            raise UserError(f"cannot write to {place} ({error.strerror}); TMPDIR names another folder") from error


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
    context_text: ContextText = "grids",
) -> QwenPrompt:
    """Find, load and wrap the model that --qwen names; on the CPU, in train mode. torch's random state is left alone.

    spec: "auto" (AUTO_ON_CUDA if device_type is "cuda", else "tiny"), "tiny", a folder, or a hub name OWNER/NAME.
    cache_dir: where the tiny model is kept (hub models stay in the Hugging Face cache).  log: told once if pairs do not
    fit.  revision: the commit of a hub model; "": the newest, or the one that is in the cache. Raises UserError, one
    line, for anything that cannot be found or is not a usable Qwen, within about five seconds if the hub does not
    answer.
    """
    if tune not in get_args(Tune):
        raise UserError(f"--qwen_tune {tune}: none of {', '.join(get_args(Tune))}")
    source = locate(spec, device_type, Path(cache_dir), seed, revision)
    backbone = load_backbone(source)
    base = None
    if tune == "lora":
        files, names = weight_files(source.folder), backbone.state_dict()
        base = Base.of(source.folder, files, names, name=source.name, revision=source.revision)
    tokenizer = load_tokenizer(source, embedding_of(backbone).num_embeddings)
    positions = backbone.config.max_position_embeddings
    if max_context_tokens + prompt_len > positions:
        raise UserError(
            f"--max_context_tokens {max_context_tokens}: with {prompt_len} prompt vectors more than the "
            f"{positions} positions of {source.name}"
        )
    with seeded(seed):
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
            context_text=context_text,
        )


@torch.no_grad()
def context_codes(context_ids: Tensor) -> Tensor:
    """(G,) int64: a number for each of the texts (G, S), the same for the same text whatever its padding with 0."""
    return (context_ids * torch.arange(1, context_ids.shape[1] + 1, device=context_ids.device)).sum(1)


def prompt_spread(prompt: Tensor, contexts: Tensor) -> Tensor:
    """(): standard deviation of prompt (G, K, D) across tasks relative to the root mean square; near 0: all tasks get
    the same prompt. 1.0 where all contexts (G,) are the same, as those of tasks with a single demonstration are."""
    flat = prompt.float().flatten(1)
    if len(flat) == 1:
        return flat.new_ones(())
    spread = flat.std(0).square().mean().sqrt() / (flat.square().mean().sqrt() + 1e-12)
    return torch.where((contexts == contexts[0]).all(), torch.ones_like(spread), spread)  # waits for no device
