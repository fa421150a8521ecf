"""Opens what bitsandbytes quantized: packed tensors become tensors of the values that a quantized model computes with.

transformers saves a 4-bit weight `X.weight` as bytes with two codes each, and beside it `X.weight.absmax` (float32, or
uint8 with `nested_absmax` and `nested_quant_map` where it is quantized too), `X.weight.quant_map` and the JSON text
`X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`). An 8-bit weight is int8 with `X.SCB`, float32, one per row, and
`X.weight_format` (bitsandbytes: nn/modules.py). Rows are dequantized when they are asked for, in any order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.linears import linear_weights
from quantpress.convert.quant_state import STATE_TYPES, QuantState, read_state
from quantpress.convert.recent import Recent
from quantpress.quant.bitsandbytes import block_count, dequantize_4bit, round_to
from quantpress.quant.bitsandbytes_levels import LEVELS
from quantpress.quant.dynamic_map import NestedAbsmax
from quantpress.quant.errors import InputError
from quantpress.quant.llm_int8 import dequantize_int8

__all__ = ["QUANTIZED_TYPES", "dequantized", "is_bitsandbytes", "transposed"]

QUANTIZED_TYPES = frozenset({"nf4", "fp4", "int8"})
"""What `Checkpoint.storage_types` says of tensors that were opened here."""

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)", re.DOTALL)
_PLAIN_PARTS = ("absmax", "quant_map")
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_CONFIG_KEY = "quantization_config"
_TABLE_TOLERANCE = 1e-6  # 16 levels that were computed in float32
_Rows = Callable[[int, int], Array]


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantized the weights."""
    settings = config.get(_CONFIG_KEY)
    if not isinstance(settings, Mapping):
        return False
    if "quant_method" in settings:
        return bool(settings["quant_method"] == "bitsandbytes")
    return settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True  # transformers before 4.33


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose bitsandbytes tensors are read as the numbers they stand for.

    Args:
        checkpoint: as its files say; any other checkpoint is returned as it is.

    Returns:
        Its config has no `quantization_config`, because the tensors are not quantized any more; `storage_types` says
        which were: "nf4", "fp4" or "int8". 4-bit weights have the type that bitsandbytes gives them, 8-bit weights the
        one of config.json (`dtype`), with `wide_rows` in float32.

    Raises:
        InputError: parts that are missing, unexpected or do not fit each other.
    """
    if not is_bitsandbytes(checkpoint.config):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    opened: dict[str, LazyTensor] = {}
    kinds: dict[str, str] = {}
    for name in checkpoint.tensors:
        if match := _STATE.fullmatch(name):
            weight, kind = match[1], match[2]
            opened[weight], kinds[weight] = _open_4bit(checkpoint.name, tensors, weight, kind), kind
    dtype = _config_dtype(checkpoint.config)
    for name in checkpoint.tensors:
        if name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            opened[weight], kinds[weight] = _open_int8(checkpoint.name, tensors, weight, dtype), "int8"
    merged = {
        name: opened.get(name) or tensors[name] for name in checkpoint.tensors if name in tensors or name in opened
    }
    config = {key: value for key, value in checkpoint.config.items() if key != _CONFIG_KEY}
    conv1d = [name for name, swapped in linear_weights(config, opened).items() if swapped]
    recent: Recent[Array] = Recent(2)
    merged.update({name: transposed(opened[name], recent) for name in conv1d})
    return replace(checkpoint, config=config, tensors=merged, storage_types={**checkpoint.storage_types, **kinds})


def transposed(tensor: LazyTensor, recent: Recent[Array]) -> LazyTensor:
    """Gives an (N, K) tensor as (K, N), as Conv1D stores it; the whole tensor is read and kept while it is recent."""
    columns, rows = tensor.shape

    def turn(read: _Rows, kind: str) -> _Rows:
        def read_rows(start: int, stop: int) -> Array:
            if not 0 <= start <= stop <= rows:
                raise IndexError(f"{tensor.name}: rows [{start}, {stop}) of {rows}")
            whole = recent.get((tensor.name, kind), lambda: read(0, columns))
            return np.ascontiguousarray(whole[:, start:stop].T)

        return read_rows

    wide = None if tensor.wide_rows is None else turn(tensor.wide_rows, "wide")
    return replace(tensor, shape=(rows, columns), read_rows=turn(tensor.read_rows, ""), wide_rows=wide)


def _config_dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype")
    return STATE_TYPES.get(dtype, "F16") if isinstance(dtype, str) else "F16"  # LLM.int8() computes in float16


def _take(model: str, tensors: dict[str, LazyTensor], name: str) -> LazyTensor:
    if (tensor := tensors.pop(name, None)) is None:
        raise InputError(f"{model}: tensor {shown(name)} is missing beside the other parts of a quantized weight")
    return tensor


def _expect(tensor: LazyTensor, dtype: str, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise InputError(
            f"{tensor.source}: tensor {shown(tensor.name)} is {tensor.dtype} of shape {tensor.shape}, wanted {dtype} of"
            f" shape {shape} for the quantized weight that it belongs to"
        )


def _open_4bit(model: str, tensors: dict[str, LazyTensor], name: str, kind: str) -> LazyTensor:
    weight = _take(model, tensors, name)
    state = read_state(_take(model, tensors, f"{name}.quant_state.bitsandbytes__{kind}"), kind)
    absmax, quant_map = (_take(model, tensors, f"{name}.{part}") for part in _PLAIN_PARTS)
    blocks = block_count(state.size, state.blocksize)
    _check_packed(weight, state)
    _expect(quant_map, "F32", (len(LEVELS[kind]),))
    if not np.allclose(quant_map.read(), LEVELS[kind], rtol=0, atol=_TABLE_TOLERANCE):
        raise InputError(f"{quant_map.source}: tensor {shown(quant_map.name)} has other levels than {kind}")
    if state.nested_blocksize:
        _expect(absmax, "U8", (blocks,))
        outer, levels = (_take(model, tensors, f"{name}.{part}") for part in _NESTED_PARTS)
        _expect(outer, "F32", (block_count(blocks, state.nested_blocksize),))
        _expect(levels, "F32", (256,))
        read_absmax = _nested_reader(absmax, outer, levels, state)
    else:
        _expect(absmax, "F32", (blocks,))
        read_absmax = absmax.read_rows
    if left := [part for part in _NESTED_PARTS if f"{name}.{part}" in tensors]:
        raise InputError(f"{weight.source}: tensor {shown(f'{name}.{left[0]}')} is there but {name} is not nested")
    return LazyTensor(name, state.shape, state.dtype, weight.source, _rows_4bit(weight, read_absmax, absmax, state))


def _check_packed(weight: LazyTensor, state: QuantState) -> None:
    """Two codes a byte, in a column of any type (`bnb_4bit_quant_storage`)."""
    wanted = (state.size + 1) // 2
    if len(weight.shape) != 2 or weight.shape[1] != 1 or weight.nbytes != wanted:
        raise InputError(
            f"{weight.source}: tensor {shown(weight.name)} is {weight.dtype} of shape {weight.shape}, wanted a column"
            f" of {wanted} bytes for {state.quant_type} of shape {state.shape}"
        )


def _nested_reader(absmax: LazyTensor, outer: LazyTensor, levels: LazyTensor, state: QuantState) -> _Rows:
    table = levels.read()
    if not (np.abs(table) <= 1).all():
        raise InputError(f"{levels.source}: tensor {shown(levels.name)} has levels outside [-1, 1]")
    step, offset = state.nested_blocksize, np.float32(state.offset)

    def read(start: int, stop: int) -> Array:
        first = start // step
        nested = NestedAbsmax(
            codes=absmax.read_rows(first * step, stop),
            absmax=outer.read_rows(first, block_count(stop, step)),
            offset=offset,
            levels=table,
            blocksize=step,
        )
        return nested.values(start - first * step, stop - first * step)

    return read


def _rows_4bit(weight: LazyTensor, read_absmax: _Rows, absmax: LazyTensor, state: QuantState) -> _Rows:
    row_shape, dtype = state.shape[1:], DTYPES[state.dtype]
    length, width = math.prod(row_shape), DTYPES[weight.dtype].itemsize
    rows = state.shape[0]

    def read_rows(start: int, stop: int) -> Array:
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"{weight.name}: rows [{start}, {stop}) of {rows}")
        first, last = start * length, stop * length
        if first == last:
            return np.empty((0, *row_shape), dtype)
        byte = first // 2 // width * width  # where the element of the stored type begins that holds the first code
        stored = weight.read_rows(byte // width, -(-last // (2 * width)))
        scales = read_absmax(first // state.blocksize, block_count(last, state.blocksize))
        if not np.isfinite(scales).all():
            count = int(np.count_nonzero(~np.isfinite(scales)))
            raise InputError(f"{absmax.source}: tensor {shown(absmax.name)} gives {count} values that are not finite")
        flat = dequantize_4bit(
            stored.reshape(-1).view(np.uint8)[first // 2 - byte :],
            scales,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            dtype=dtype,
            first=first,
            count=last - first,
        )
        return flat.reshape((stop - start, *row_shape))

    return read_rows


def _open_int8(model: str, tensors: dict[str, LazyTensor], name: str, dtype: str) -> LazyTensor:
    weight = _take(model, tensors, name)
    absmax = _take(model, tensors, name.removesuffix("weight") + "SCB")
    layout = tensors.pop(f"{name}_format", None)
    if len(weight.shape) != 2:
        raise InputError(f"{weight.source}: tensor {shown(name)} has shape {weight.shape}, wanted two dimensions")
    _expect(weight, "I8", weight.shape)
    _expect(absmax, "F32", weight.shape[:1])
    if layout is not None:
        _expect(layout, "U8", ())
        if (code := int(layout.read())) != 0:
            raise InputError(
                f"{layout.source}: tensor {shown(layout.name)} is {code}, wanted 0 (rows); save the weights again with"
                " a newer bitsandbytes"
            )

    def wide_rows(start: int, stop: int) -> Array:
        scales = absmax.read_rows(start, stop)
        if not np.isfinite(scales).all():
            count = int(np.count_nonzero(~np.isfinite(scales)))
            raise InputError(f"{absmax.source}: tensor {shown(absmax.name)} has {count} NaN or infinite values")
        return dequantize_int8(weight.read_rows(start, stop), scales)

    def read_rows(start: int, stop: int) -> Array:
        return round_to(wide_rows(start, stop), DTYPES[dtype])

    return LazyTensor(name, weight.shape, dtype, weight.source, read_rows, wide_rows)
