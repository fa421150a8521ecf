"""The little JSON text that bitsandbytes stores beside every 4-bit weight, checked before anything is built from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.json_reader import parse_json
from quantpress.quant.bitsandbytes import BLOCKSIZES
from quantpress.quant.errors import InputError

__all__ = ["STATE_TYPES", "QuantState", "read_state"]

STATE_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_MAX_STATE = 4096  # bytes; real ones have 170
_MAX_DIM = 1 << 47
_MAX_RANK = 4
_PLAIN = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


@dataclass(frozen=True, slots=True)
class QuantState:
    """What a 4-bit weight is (bitsandbytes: functional.py QuantState.as_dict).

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: values per block.
        dtype: type of the dequantized weight, a key of `DTYPES`.
        shape: of the weight, (N, K).
        nested_blocksize: absmax values per block if they are quantized too, else 0.
        offset: what was subtracted from them.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    offset: float = 0.0

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_state(tensor: LazyTensor, quant_type: str) -> QuantState:
    """Reads the text of a `quant_state` tensor.

    Args:
        tensor: (bytes,) uint8.
        quant_type: the type that its name ends with.

    Raises:
        InputError: too long, not JSON, keys missing or unknown, or a value that makes no sense.
    """
    where = f"{tensor.source}: tensor {shown(tensor.name)}"
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.size > _MAX_STATE:
        raise InputError(
            f"{where}: is {tensor.dtype} of shape {tensor.shape}, wanted U8 with at most {_MAX_STATE} bytes of JSON"
        )
    state = parse_json(tensor.read().tobytes(), name=where, max_depth=3, max_values=64)
    if not isinstance(state, dict) or state.keys() not in (_PLAIN, _PLAIN | _NESTED):
        raise InputError(f"{where}: wanted the keys {', '.join(sorted(_PLAIN | _NESTED))}, found {shown(state, 200)}")
    nested = "nested_offset" in state
    _check(where, "quant_type", state, state["quant_type"] == quant_type, quant_type)
    _check(where, "blocksize", state, _is_one_of(state["blocksize"], BLOCKSIZES), f"one of {BLOCKSIZES}")
    _check(where, "dtype", state, _is_one_of(state["dtype"], tuple(STATE_TYPES)), " or ".join(STATE_TYPES))
    _check(where, "shape", state, _is_shape(state["shape"]), f"1 to {_MAX_RANK} positive sizes")
    if nested:
        sizes = BLOCKSIZES[1:]  # dequantize_blockwise has no blocks of 32
        _check(where, "nested_blocksize", state, _is_one_of(state["nested_blocksize"], sizes), f"one of {sizes}")
        _check(where, "nested_dtype", state, state["nested_dtype"] == "float32", "float32")
        _check(where, "nested_offset", state, type(state["nested_offset"]) in (int, float), "a number")
        _check(where, "nested_offset", state, abs(state["nested_offset"]) < 3.4e38, "a number of float32's range")
    return QuantState(
        quant_type=quant_type,
        blocksize=state["blocksize"],
        dtype=STATE_TYPES[state["dtype"]],
        shape=tuple(state["shape"]),
        nested_blocksize=state["nested_blocksize"] if nested else 0,
        offset=float(state["nested_offset"]) if nested else 0.0,
    )


def _check(where: str, key: str, state: dict[str, Any], fine: bool, wanted: str) -> None:
    if not fine:
        raise InputError(f"{where}: {key} is {shown(state[key])}, wanted {wanted}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return type(value) is type(allowed[0]) and value in allowed


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_RANK:
        return False
    return all(type(dim) is int and 0 < dim <= _MAX_DIM for dim in value)
