"""Opens experts that are stored in MXFP4 (gpt-oss): stacks of 4-bit floats with a power of two for each 32 of them.

A stack `X` is stored as `X_blocks`, uint8 (experts, N, K / 32, 16), two codes to a byte, the lower four bits first, and
`X_scales`, uint8 (experts, N, K / 32), exponents with a bias of 127 (OCP Microscaling Formats v1.0, 5.2 and 6.3;
transformers: integrations/mxfp4.py, convert_moe_packed_tensors). transformers computes with (experts, K, N): that is
what is opened here, in bfloat16, which holds every such number exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.recent import Recent
from quantpress.quant.errors import InputError

__all__ = ["is_mxfp4", "opened"]

_KEY, _BLOCKS, _SCALES = "quantization_config", "_blocks", "_scales"
_LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BIAS, _BLOCK, _BYTES = 127, 32, 16
_LARGEST = 252  # 6 * 2**(252 - 127) is the greatest that bfloat16 has room for; 255 stands for NaN
_KEPT = 4  # experts kept while their rows are asked for


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are in MXFP4."""
    settings = config.get(_KEY)
    return isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose stacks are read as the numbers they stand for, and a config that says nothing of MXFP4.

    Raises:
        InputError: blocks without scales or scales without blocks, of other types, or of shapes that do not fit.
    """
    tensors, recent = dict[str, LazyTensor](), Recent[Array](_KEPT)
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(_BLOCKS):
            stack = name.removesuffix(_BLOCKS)
            scales = checkpoint.tensors.get(stack + _SCALES)
            tensors[stack] = _stack(stack, tensor, scales, recent)
        elif not name.endswith(_SCALES):
            tensors[name] = tensor
        elif name.removesuffix(_SCALES) + _BLOCKS not in checkpoint.tensors:
            raise InputError(f"{tensor.source}: {shown(name)} has no blocks beside it")
    config = {key: value for key, value in checkpoint.config.items() if key != _KEY}
    types = dict.fromkeys((name for name in tensors if name not in checkpoint.tensors), "mxfp4")
    return replace(checkpoint, tensors=tensors, config=config, storage_types={**checkpoint.storage_types, **types})


def _stack(name: str, blocks: LazyTensor, scales: LazyTensor | None, recent: Recent[Array]) -> LazyTensor:
    """Gives (experts, K, N), an expert of which is decoded at a time."""
    if scales is None:
        raise InputError(f"{blocks.source}: {shown(blocks.name)} has no scales beside it")
    fits = len(blocks.shape) == 4 and blocks.shape[3] == _BYTES and scales.shape == blocks.shape[:3]
    if not fits or blocks.dtype != "U8" or scales.dtype != "U8":
        raise InputError(
            f"{blocks.source}: {shown(blocks.name)} is {blocks.dtype} {blocks.shape} and its scales {scales.dtype}"
            f" {scales.shape}, wanted U8 (experts, N, blocks, {_BYTES}) and (experts, N, blocks)"
        )
    experts, rows, count, _ = blocks.shape

    def whole(expert: int) -> Array:
        return recent.get((name, expert), partial(_decoded, name, blocks, scales, expert))

    def read(start: int, stop: int) -> Array:
        return np.stack([whole(expert) for expert in range(start, stop)])

    def inner(expert: int) -> LazyTensor:
        shape = (count * _BLOCK, rows)
        return LazyTensor(name, shape, "BF16", blocks.source, lambda start, stop: whole(expert)[start:stop])

    return LazyTensor(name, (experts, count * _BLOCK, rows), "BF16", blocks.source, read, inner=inner)


def _decoded(name: str, blocks: LazyTensor, scales: LazyTensor, expert: int) -> Array:
    """Gives one expert, (K, N) bfloat16."""
    codes, exponents = blocks.read_rows(expert, expert + 1)[0], scales.read_rows(expert, expert + 1)[0]
    if int(exponents.max(initial=0)) > _LARGEST:
        raise InputError(
            f"{scales.source}: {shown(name + _SCALES)}: a scale is {exponents.max()}, no finite power of two"
        )
    signed = np.concatenate((_LEVELS, -_LEVELS))
    values = np.empty((*codes.shape[:2], _BLOCK), np.float32)
    values[..., 0::2], values[..., 1::2] = signed[codes & 15], signed[codes >> 4]
    scaled = np.ldexp(values, exponents.astype(np.int32)[..., None] - _BIAS)
    return np.ascontiguousarray(scaled.reshape(len(codes), -1).T.astype(ml_dtypes.bfloat16))
