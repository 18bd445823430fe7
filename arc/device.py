"""Which device and which precision a run uses, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch

from arc.parallel import place
from arc.run.files import UserError

PASS_TOKENS = 400  # tokens that take a CPU as long as a pass of the agent takes it before its first


@dataclass(frozen=True)
class Precision:
    """dtype of autocast (None: off), whether the loss is scaled (fp16 only), and the reason in a few words."""

    dtype: torch.dtype | None
    scale_loss: bool
    reason: str

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[self.dtype]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Matrix products in bf16 or fp16; losses and log-probabilities are computed in fp32 all the same."""
        return torch.autocast(device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)


def resolve_device(choice: str) -> torch.device:
    """The device for --device auto|cpu|cuda|mps; of several processes on a machine each takes the GPU of its number.
    UserError, one line, if this machine does not have it."""
    here = place()
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if choice == "auto":
        choice = "cuda" if cuda else "mps" if mps and here.size == 1 else "cpu"
    if choice == "cuda" and cuda:
        # Batches are of many sizes: memory that grows in place is not left in pieces that none of them fits into. Read
        # at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if here.size > 1:
            if (cards := torch.cuda.device_count()) < here.local_size:
                raise UserError(f"--device cuda: {here.local_size} processes on this machine, which has {cards} GPUs")
            return torch.device("cuda", here.local_rank)
    if choice == "mps" and here.size > 1:
        raise UserError("--device mps: an Apple GPU is for one process; start it without torchrun")
    if choice == "cuda" and not cuda:
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no usable GPU"
        raise UserError(f"--device cuda: {built}; use --device cpu, or --device auto to take what is there")
    if choice == "mps" and not mps:
        raise UserError("--device mps: no Apple GPU here; use --device cpu, or --device auto to take what is there")
    return torch.device(choice)


def device_name(device: torch.device) -> str:
    """The device for people: "cpu", or "cuda (NVIDIA T4, 15 GiB)"."""
    if device.type != "cuda":
        return device.type
    card = torch.cuda.get_device_properties(device)
    return f"cuda ({card.name}, {card.total_memory / 2**30:.0f} GiB)"


def resolve_precision(choice: str, device: torch.device, narrow: bool = False) -> Precision:
    """The precision for --amp auto|bf16|fp16|off on `device`.

    auto: bf16 where the hardware computes it natively, else fp16 with a scaled loss on CUDA, else off. fp16 has a
    narrow range (largest 65504), which is why its loss is scaled; bf16 has fp32's range and needs no scaling. On a CPU
    it is off for `narrow` layers too: a product in bf16 is compiled for each new shape (by oneDNN), which takes ten
    times as long as a narrow product, and batches come in all sizes.
    """
    if choice == "off":
        return Precision(None, False, "asked for")
    if choice == "bf16":
        return Precision(torch.bfloat16, False, "asked for")
    if choice == "fp16":
        return Precision(torch.float16, True, "asked for; loss scaled")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, False, "the GPU computes it natively")
        return Precision(torch.float16, True, "the GPU has no native bf16; loss scaled")
    if device.type == "cpu":
        if narrow:
            return Precision(None, False, "layers as narrow as these take less time in fp32")
        if cpu_has_native_bf16():
            return Precision(torch.bfloat16, False, "the processor computes it natively")
        return Precision(None, False, "the processor has no native bf16")
    return Precision(None, False, f"not used on {device.type}")


def spare_tokens(device: torch.device) -> int:
    """How many tokens more one pass of the agent can take for what it costs to start another: on a GPU nearly all the
    time is that of starting kernels (on an H100 6,000 tokens took as long as 30,000)."""
    return 16384 if device.type == "cuda" else PASS_TOKENS


class Sizes(Protocol):
    """The flags on which time and memory of a training step depend."""

    agent_width: int
    qwen: str
    max_cells: int
    batch_size: int
    gradient_checkpointing: bool


def narrow_on_cpu(args: Sizes) -> bool:
    """Whether all layers on a CPU are narrow (`resolve_precision`): a step of agents of 128 takes 0.86 of the time in
    fp32, of 256 1.15 (benchmarks/RESULTS.md)."""
    return args.agent_width < 256 and args.qwen in ("auto", "tiny")


def too_little_memory(args: Sizes) -> str:
    """One line for a device whose memory a step does not fit into."""
    less = "" if args.gradient_checkpointing else "; --gradient_checkpointing for a large Qwen"
    return (
        f"the device's memory is too small for this: a new run with a smaller --max_cells (now {args.max_cells}) or "
        f"--batch_size (now {args.batch_size}) fits{less}"
    )


def matrix_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies matrices fastest without losing fp32's range: bf16 where it is native."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_has_native_bf16()
    return torch.bfloat16 if native else torch.float32


def describe_device(device: torch.device, precision: Precision) -> str:
    """One line of a run's opening."""
    here = place()
    processes = f", on each of {here.size} processes" if here.size > 1 else ""
    return (
        f"Device: {device_name(device)} | AMP: {precision.name} ({precision.reason}), {torch.get_num_threads()} "
        f"threads{processes}"
    )


def cpu_has_native_bf16() -> bool:
    """Whether matrix products in bf16 are native here (AVX512-BF16 or AMX); emulated ones are slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
