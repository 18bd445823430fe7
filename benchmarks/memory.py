"""Which Qwen fits which Colab card, and how --qwen_tune, --optim_qwen and --gradient_checkpointing change that.

    python benchmarks/memory.py [--contexts 8] [--tokens 1536]

Needs neither network nor GPU. Parameters are counted in models of the published shapes on torch's meta device. What a
training step keeps for its backward pass is measured: autograd reports each tensor it saves in one and in two layers
of the real widths, at two lengths, under bf16 autocast on the CPU; the differences are bytes a token and layer.

Bytes a parameter:
    weights                      4   of all (fp32 masters; autocast computes in bf16 or fp16)
    copies that autocast makes   2   of the linear layers, alive from forward to backward (a frozen layer under
                                     gradient checkpointing: one layer's at a time)
    gradient                     4   of what trains
    AdamW's two moments          8   of what trains; adamw8bit: 2 + 8 / 256 in linear layers, 8 in embeddings
The optimizer's own temporaries (4 more of what trains) come when copies and activations are gone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arc.lora import Adapter, problem_with_peft  # noqa: E402

GIB = 2**30
CARDS = {"T4": 15.0, "L4": 22.5, "A100": 40.0}  # GiB that Colab's cards offer
# The agent (about 1 M parameters), its activations at the default --max_cells, CUDA's context, fragmentation: assumed.
ALLOWANCE = 2 * GIB
RANK = 16
# As in the config.json of each model on the hub; all four tie the output layer to the embeddings.
QWEN2: dict[str, Any] = {"model_type": "qwen2", "num_key_value_heads": 2}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": QWEN2
    | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "Qwen3-0.6B": QWEN3 | {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072},
    "Qwen2.5-1.5B": QWEN2
    | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "Qwen3-1.7B": QWEN3 | {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144},
}
VOCABULARY = 151936
MODES = {"full": "full, AdamW", "full8": "full, adamw8bit", "lora": f"lora, rank {RANK}", "frozen": "frozen"}


def make(shape: dict[str, Any], device: str, **changes: Any) -> PreTrainedModel:
    """A random model of that shape, without the language-model head."""
    settings = {"vocab_size": VOCABULARY, **shape, **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        return AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: all, in linear layers, in embeddings, and in an adapter of RANK."""

    all: int
    linear: int
    embedding: int
    adapter: int

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return cls(
            all=sum(p.numel() for p in model.parameters()),
            linear=sum(layer.weight.numel() for layer in layers),
            embedding=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)),
            adapter=sum(RANK * (layer.in_features + layer.out_features) for layer in layers),
        )


def static_bytes(counts: Counts, mode: str) -> dict[str, float]:
    """Weights, gradients and moments, in bytes."""
    trained = {"full": counts.all, "full8": counts.all, "lora": counts.adapter, "frozen": 0}[mode]
    moments = 8.0 * trained
    if mode == "full8":
        moments = 8 * counts.embedding + (2 + 8 / 256) * (counts.all - counts.embedding)
    weights = 4 * (counts.all + (counts.adapter if mode == "lora" else 0))
    return {"weights": weights, "copies": 2 * counts.linear, "gradients": 4 * trained, "moments": moments}


def saved_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that autograd keeps after a forward pass over one context of `tokens`, parameters themselves excepted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    embedded = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)  # the queries' place in it trains
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(inputs_embeds=embedded, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def bytes_a_token(shape: dict[str, Any], mode: str, short: int = 64) -> float:
    """Bytes that one layer keeps for each token, without gradient checkpointing."""
    kept = []
    for layers in (1, 2):
        model = make(shape, "cpu", num_hidden_layers=layers, vocab_size=16)
        if mode == "lora":
            Adapter(model, RANK)
        kept.append(saved_bytes(model, 2 * short) - saved_bytes(model, short))
    return (kept[1] - kept[0]) / short


def activation_bytes(shape: dict[str, Any], mode: str, a_token: float, tokens: int) -> tuple[float, float]:
    """(plain, with gradient checkpointing) for all layers. Checkpointing keeps each layer's input in fp32 and one layer
    whole. A frozen model reads without a graph: its keys (fp32) and values (16 bits) stay, and one layer's workings."""
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    if mode == "frozen":
        width = shape["num_key_value_heads"] * shape.get("head_dim", shape["hidden_size"] // heads)
        held = tokens * (layers * width * (4 + 2) + a_token)
        return held, held
    return tokens * layers * a_token, tokens * (layers * 4 * shape["hidden_size"] + a_token)


def verdict(plain: float, checkpointed: float, card: float) -> str:
    if plain <= card * GIB:
        return "yes"
    return "with checkpointing" if checkpointed <= card * GIB else "no"


def rows(name: str, tokens: int) -> list[str]:
    """The table's lines of one model, one for each mode."""
    shape = SHAPES[name]
    counts = Counts.of(make(shape, "meta"))
    layers = shape["num_hidden_layers"]
    lines = [
        f"{name}: {counts.all:,} parameters, {counts.linear:,} of them in linear layers, {counts.embedding:,} in "
        f"embeddings; {counts.adapter:,} in an adapter"
    ]
    a_token = {mode: bytes_a_token(shape, mode) for mode in ("full", "lora")}
    for mode, label in MODES.items():
        static = static_bytes(counts, mode)
        each = a_token["lora" if mode == "lora" else "full"]
        plain, checkpointed = activation_bytes(shape, mode, each, tokens)
        # Only weights that train keep their copies (autocast's cache) while layers are computed anew one by one.
        lean = dict(static) if mode.startswith("full") else static | {"copies": static["copies"] / layers}
        totals = sum(static.values()) + plain + ALLOWANCE, sum(lean.values()) + checkpointed + ALLOWANCE
        if mode == "frozen":
            totals = totals[0], totals[0]  # gradient checkpointing has nothing to save there
        parts = [*static.values(), sum(static.values()), plain, checkpointed]
        fits = [verdict(*totals, card) for card in CARDS.values()]
        lines.append(
            "| ".join([f"{label:<16}", *(f"{part / GIB:6.2f} " for part in parts), *(f"{f:<19}" for f in fits)])
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--contexts", type=int, default=8, help="tasks in a batch: --batch_size / --views")
    parser.add_argument("--tokens", type=int, default=1536, help="the longest context: --max_context_tokens")
    args = parser.parse_args()
    if problem := problem_with_peft():
        sys.exit(problem)
    torch.manual_seed(0)
    tokens = args.contexts * args.tokens
    print(
        f"GiB; at most {args.contexts} contexts x {args.tokens} tokens; fits = static + activations + 2 GiB assumed\n"
    )
    titles = ["mode", "weights", "copies", "grads", "moments", "static", "activ.", "checkpt."]
    print("| ".join([f"{titles[0]:<16}", *(f"{t:<7}" for t in titles[1:]), *(f"{c:<19}" for c in CARDS)]))
    for name in SHAPES:
        print("\n".join(["", *rows(name, tokens)]), flush=True)


if __name__ == "__main__":
    main()
