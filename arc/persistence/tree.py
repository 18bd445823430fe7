"""A state tree as JSON nodes and named tensors, and back; strict JSON.

None, bool, str, int and finite float are JSON literals and a list is a JSON array; everything else is an object with
exactly one key, so that no user dictionary can be mistaken for it:
  {"f": "nan" | "inf" | "-inf"}   {"t": [tuple items]}   {"d": {str keys}}   {"m": [[int or str key, value], …]}
  {"T": name} torch tensor        {"N": name} numpy array                    {"S": name} numpy scalar
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from arc.persistence.names import GROUPS, MAX_DEPTH, MAX_INT_BITS, Corrupt, PersistenceError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Encoded:
    """A state taken apart: `tree[group]` is a JSON node, `tensors[group]` what its names stand for, `aliases` maps
    "group/name" of a tied tensor to the "group/name" under which its bytes are stored."""

    tree: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


class Encoder:
    """Walks a state once. Two leaves are tied when they are the same memory seen through the same shape and strides
    (a parameter and its detached twin are); other views of one storage are stored as values of their own."""

    def __init__(self) -> None:
        self.out = Encoded()
        self._ids: dict[tuple[Any, ...], str] = {}

    def encode(self, state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None) -> Encoded:
        if not isinstance(state, Mapping) or not state or any(key not in GROUPS for key in state):
            raise PersistenceError(f"state: expected a mapping with some of the keys {', '.join(GROUPS)}")
        for name, tensor in (frozen or {}).items():
            if not isinstance(tensor, torch.Tensor):
                raise _refused("frozen", (name,), f"a {type(tensor).__qualname__}, not a tensor")
        everything = {**state, "frozen": dict(frozen)} if frozen else dict(state)
        for group in (g for g in (*GROUPS, "frozen") if g in everything):
            self.out.tensors[group] = {}
            self.out.tree[group] = self._node(group, everything[group], ())
        return self.out

    def _node(self, group: str, value: Any, path: tuple[str | int, ...]) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            if value.bit_length() > MAX_INT_BITS:
                raise _refused(group, path, f"an integer of more than {MAX_INT_BITS} bits")
            return value
        if type(value) is float:
            return float_node(value)
        if isinstance(value, torch.Tensor):
            return {"T": self._tensor(group, value, path)}
        if isinstance(value, np.ndarray):
            return {"N": self._array(group, value, path)}
        if isinstance(value, np.generic):
            return {"S": self._array(group, np.array(value), path, tie=False)}
        if len(path) >= MAX_DEPTH:
            raise _refused(group, path, f"nested deeper than {MAX_DEPTH} levels")
        if type(value) in (list, tuple):
            items = [self._node(group, item, (*path, i)) for i, item in enumerate(value)]
            return items if type(value) is list else {"t": items}
        if type(value) in (dict, OrderedDict):
            return self._mapping(group, value, path)
        raise _refused(group, path, f"a {type(value).__module__}.{type(value).__qualname__}")

    def _mapping(self, group: str, value: Mapping[Any, Any], path: tuple[str | int, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise _refused(group, path, f"a key of type {type(key).__qualname__}")
        pairs = [[key, self._node(group, item, (*path, key))] for key, item in value.items()]
        return {"d": dict(pairs)} if all(type(key) is str for key in value) else {"m": pairs}

    def _tensor(self, group: str, tensor: torch.Tensor, path: tuple[str | int, ...]) -> str:
        plain = tensor.detach()
        if type(plain) is not torch.Tensor or plain.layout is not torch.strided or plain.is_meta or plain.is_quantized:
            raise _refused(group, path, f"a {type(tensor).__qualname__} that is not a plain dense tensor")
        if plain.dtype not in DTYPE_NAMES:
            raise _refused(group, path, f"a tensor of dtype {plain.dtype}")
        lazy = (plain.is_conj(), plain.is_neg())
        where = ("T", plain.device, plain.data_ptr(), plain.dtype, plain.shape, plain.stride(), lazy)
        return self._name(group, plain, path, where if plain.numel() else ("T", id(tensor)))

    def _array(self, group: str, array: np.ndarray, path: tuple[str | int, ...], tie: bool = True) -> str:
        if type(array) not in (np.ndarray, np.memmap) or not array.dtype.isnative:
            raise _refused(group, path, f"a {type(array).__qualname__} of dtype {array.dtype}")
        where = ("N", array.__array_interface__["data"][0], array.dtype, array.shape, array.strides)
        try:
            # A copy only where torch can't look at the memory: read-only, or with strides it does not know.
            tensor = torch.from_numpy(array if array.flags.c_contiguous and array.flags.writeable else array.copy("C"))
            known = tensor.dtype in DTYPE_NAMES
        except TypeError:
            known = False
        if not known:
            raise _refused(group, path, f"a numpy array of dtype {array.dtype}")
        if not tie:  # made here, so its address may be used again
            return self._name(group, tensor, path, ("S", len(self._ids)))
        return self._name(group, tensor, path, where if array.size else ("N", id(array)))

    def _name(self, group: str, tensor: torch.Tensor, path: tuple[str | int, ...], where: tuple[Any, ...]) -> str:
        """Name of a leaf in its group's file, "a/0/b"; a leaf seen before becomes an alias of the first."""
        stem = "/".join(map(str, path)) or "value"
        name, n = stem, 1
        taken = self.out.tensors[group]
        while name in taken or f"{group}/{name}" in self.out.aliases or name == "__metadata__":
            n += 1
            name = f"{stem}~{n}"  # {0: …, "0": …} and {"a/b": …, "a": {"b": …}} have the same joined path
        if where in self._ids:
            self.out.aliases[f"{group}/{name}"] = self._ids[where]
        else:
            taken[name] = tensor
            self._ids[where] = f"{group}/{name}"
        return name


def float_node(value: float) -> Any:
    return value if math.isfinite(value) else {"f": str(value)}


def _refused(group: str, path: tuple[str | int, ...], what: str) -> PersistenceError:
    place = "/".join([group, *map(str, path)])
    return PersistenceError(f"state: {place} is {what}; a checkpoint holds tensors, numbers, strings and containers")


class Decoder:
    """Turns JSON nodes back into a state. Everything is checked: a manifest may have been written by anyone."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
        self._tensors = tensors  # "group/name" -> tensor
        self._aliases = aliases
        self._made: dict[tuple[str, str], Any] = {}
        self._used: set[str] = set()

    def decode(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        state = {group: self.value(group, node, 0) for group, node in tree.items()}
        unused = self._tensors.keys() - self._used
        if unused:
            raise Corrupt(f"tensor {min(unused)!r} belongs to nothing in the manifest")
        return state

    def value(self, group: str, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise Corrupt("manifest: nested too deeply")
        if node is None or type(node) in (bool, str, int, float):
            return node
        if type(node) is list:
            return [self.value(group, item, depth + 1) for item in node]
        if len(node) != 1:
            raise Corrupt("manifest: a node has more than one tag")
        ((tag, body),) = node.items()
        if tag in ("T", "N", "S") and type(body) is str:
            return self._leaf(tag, f"{group}/{body}")
        if tag == "f" and type(body) is str and body in ("nan", "inf", "-inf"):
            return float(body)
        if tag == "t" and type(body) is list:
            return tuple(self.value(group, item, depth + 1) for item in body)
        if tag == "d" and type(body) is dict:
            return {key: self.value(group, item, depth + 1) for key, item in body.items()}
        if tag == "m" and type(body) is list:
            return self._pairs(group, body, depth)
        raise Corrupt(f"manifest: unknown node {tag[:40]!r}")

    def _pairs(self, group: str, body: list[Any], depth: int) -> dict[int | str, Any]:
        out: dict[int | str, Any] = {}
        for pair in body:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (int, str) or pair[0] in out:
                raise Corrupt("manifest: a mapping with broken or repeated keys")
            out[pair[0]] = self.value(group, pair[1], depth + 1)
        return out

    def _leaf(self, tag: str, name: str) -> Any:
        stored = self._aliases.get(name, name)
        tensor = self._tensors.get(stored)
        if tensor is None:
            raise Corrupt(f"tensor {name!r} is in no file")
        self._used.add(stored)
        if (tag, stored) not in self._made:  # tied leaves come back as one object
            if tag != "T" and tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
                raise Corrupt(f"tensor {name!r} has no numpy type")
            self._made[tag, stored] = tensor if tag == "T" else tensor.numpy() if tag == "N" else tensor.numpy()[()]
        return self._made[tag, stored]


def dump_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def parse_json(data: bytes) -> Any:
    """Parses RFC 8259 JSON; repeated keys, NaN, numbers that overflow and deep nesting are refused.

    Raises: Corrupt.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"number {text[:20]} is out of range")
        return value

    def constant(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    try:
        text = data.decode("ascii")  # we write ASCII only
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not strict JSON: {str(error).splitlines()[0]}") from None
