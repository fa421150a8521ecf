"""Reads a GGUF file back with llama.cpp's own Python package, for judging where no llama.cpp is installed.

Nothing here uses the exporter's reader, packer or row order: tensors are found, unpacked and named by the `gguf`
package, and the rotary rows are put back as llama.cpp's converter documents the order it writes (conversion/llama.py,
`permute`). Hyperparameters come from the file's metadata, so a wrong one shows. Activations are rounded as llama.cpp
rounds them, so that the figures are those llama.cpp would give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.gguf_writer import SHARD_NAME_FORMAT

from quantpress.convert.arch.registry import find_arch, find_gguf_arch
from quantpress.convert.arch.spec import GGUF_FACTORS, ArchSpec, Hyperparameters, Role
from quantpress.convert.files import inside
from quantpress.convert.weights import Weight, as_torch
from quantpress.quant.errors import InputError

_EXPERT = re.compile(r"(\w+)\.(\d+)(\.\w+)")
_K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1", "IQ2", "IQ3", "IQ4_XS", "TQ")  # in blocks of 256


@dataclass(frozen=True, slots=True)
class ReadBack:
    """A GGUF file as the `gguf` package reads it.

    Attributes:
        spec: the family.
        hyper: what the file's metadata say.
        weight: `(slot, layer) -> float32 tensor or None` in the decoder's form; `layer` is -1 outside layers.
        parameters: number of values.
        types: name of a tensor -> name of its ggml type.
        metadata: key -> value, as plain Python values.
        names: slot -> name of its tensor, `{layer}` in it, where it is not that of the slot.
    """

    spec: ArchSpec
    hyper: Hyperparameters
    weight: Weight
    parameters: int
    types: Mapping[str, str]
    metadata: Mapping[str, Any]
    names: Mapping[str, str]

    def name_of(self, slot: str, layer: int) -> str:
        """Gives the name of the tensor that holds a slot, which need not be there."""
        stack = _stack(slot)[0]
        if stack in self.names:
            return self.names[stack].format(layer=layer)
        return stack if layer < 0 else f"blk.{layer}.{stack}"

    def rounded_input(self, layer: int, slot: str, values: torch.Tensor) -> torch.Tensor:
        """Rounds a linear's input as llama.cpp does before it multiplies with a tensor of that type.

        Args:
            layer: its number, -1 for the head.
            slot: of the weight.
            values: (..., K) float32.
        """
        name = self.name_of(slot, layer)
        return round_activations(values, self.types.get(name) or self.types["token_embd.weight"])


def _stack(slot: str) -> tuple[str, int]:
    """Gives the tensor that holds a slot of one expert, and its place there; -1 for all others."""
    found = _EXPERT.fullmatch(slot)
    return (slot, -1) if found is None else (found[1] + found[3], int(found[2]))


def round_activations(values: torch.Tensor, weight_type: str) -> torch.Tensor:
    """Rounds activations to what llama.cpp multiplies with weights of a type (ggml-cpu.c: type_traits_cpu).

    F32 and F16: not at all (the usual builds multiply float16 weights with float32). BF16: to bfloat16. Blocks of 32:
    to 8 bit with a float16 scale per 32 values (quantize_row_q8_0). Blocks of 256: to 8 bit with a float32 scale per
    256 values (quantize_row_q8_K).

    Args:
        values: (..., K) float32.
        weight_type: name of the weight's ggml type.

    Returns:
        (..., K) float32.
    """
    if weight_type in ("F32", "F16"):
        return values
    if weight_type == "BF16":
        return values.bfloat16().float()
    size = 256 if weight_type.startswith(_K_TYPES) else 32
    blocks = values.reshape(*values.shape[:-1], -1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, torch.round(blocks / scale), torch.zeros_like(blocks))
    stored = scale.half().float() if size == 32 else scale
    return (codes * stored).reshape(values.shape)


def half_split_rows(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Turns interleaved rotary rows (heads, pairs, 2, ...) into half-split ones (heads, 2, pairs, ...)."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, pairs, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def read_back(path: Path) -> ReadBack:
    """Opens a GGUF file, or all parts of one, with the `gguf` package.

    Args:
        path: the file; of a split model the first part.

    Raises:
        InputError: the package cannot read the file.
    """
    readers = _readers(path)
    metadata = {name: field.contents() for name, field in readers[0].fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}

    def values(name: str, expert: int = -1) -> np.ndarray[Any, Any]:
        tensor = tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        data, shape = (tensor.data, shape) if expert < 0 else (tensor.data[expert], shape[1:])
        unpacked = gguf.quants.dequantize(data, tensor.tensor_type)
        return np.asarray(unpacked, dtype=np.float32).reshape(shape)

    first = find_gguf_arch(str(metadata["general.architecture"]), metadata)
    factors = {name: tuple(float(value) for value in values(name)) for name in GGUF_FACTORS if name in tensors}
    config = first.config_from_gguf(metadata, frozenset(tensors), factors)
    spec = find_arch(config)
    hyper = spec.read_config(config)
    rotary = {row.slot: row.rotary for row in spec.tensors if row.rotary and spec.gguf_rope == "norm"}
    vectors = {row.slot for row in spec.tensors if row.role is Role.ROUTER and row.shape[0] == "one"}
    heads = {"heads": hyper.heads, "kv_heads": hyper.kv_heads}
    called = {row.slot: row.gguf for row in spec.present(hyper) if row.place}

    def weight(slot: str, layer: int) -> torch.Tensor | None:
        slot, expert = _stack(slot)
        name = slot if layer < 0 else f"blk.{layer}.{slot}"
        name = called[slot].format(layer=layer) if slot in called else name
        if name not in tensors and slot == "output.weight":
            name = "token_embd.weight"
        if name not in tensors:
            return None
        found = values(name, expert)
        if slot in vectors:
            found = found.reshape(1, -1)
        if slot in rotary:
            found = half_split_rows(found, heads[rotary[slot]])
        return as_torch(np.ascontiguousarray(found))

    count = sum(int(tensor.n_elements) for tensor in tensors.values())
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    return ReadBack(spec, hyper, weight, count, types, metadata, called)


def _readers(path: Path) -> list[gguf.GGUFReader]:
    """Opens a file and, where it says that it is the first of several, the others by the names that llama.cpp gives."""
    first = _reader(path)
    field = first.fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    count = 1 if field is None else int(field.contents())
    if count <= 1:
        return [first]
    ending = SHARD_NAME_FORMAT.format("", 1, count)
    if not path.name.endswith(ending):
        raise InputError(f"{path}: the first of {count} parts, whose name must end in {ending}")
    stem = path.name.removesuffix(ending)
    others = [inside(path.parent, SHARD_NAME_FORMAT.format(stem, number, count)) for number in range(2, count + 1)]
    return [first, *map(_reader, others)]


def _reader(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InputError(f"{path}: the gguf package cannot read it: {error}") from error
