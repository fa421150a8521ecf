"""Quantize and dequantize rows of any type: the one place that knows which types have which codec.

A row is cut into blocks, blocks are processed in chunks that stay in the second-level cache, and every large step is
one numpy call that releases the interpreter lock, so that callers may use threads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import (
    BFLOAT16,
    CHUNK,
    cast_float16,
    to_bfloat16,
    to_float32,
    widen,
)
from quantpress.quant.ggml import fp4, iq, k, legacy, ternary
from quantpress.quant.ggml.search import SEARCHED, Search, searcher
from quantpress.quant.ggml.types import GGMLType, ggml_type, row_bytes
from quantpress.quant.ggml.workspace import Workspace

__all__ = ["DECODERS", "ENCODERS", "PLAIN", "QUANTIZED", "beyond_half", "dequantize", "quantize", "quantize_rows"]

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Encoder: TypeAlias = Callable[[Floats, Bytes, Workspace], int]
Decoder: TypeAlias = Callable[[Bytes, Floats], None]

PLAIN: Final[MappingProxyType[str, np.dtype[Any]]] = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": BFLOAT16,
        "F64": np.dtype("<f8"),
        "I8": np.dtype("i1"),
        "I16": np.dtype("<i2"),
        "I32": np.dtype("<i4"),
        "I64": np.dtype("<i8"),
    }
)

ENCODERS: Final[MappingProxyType[str, Encoder]] = MappingProxyType(
    {
        "Q8_0": legacy.encode_q8_0,
        "Q4_0": legacy.encode_q4_0,
        "Q4_1": legacy.encode_q4_1,
        "Q5_0": legacy.encode_q5_0,
        "Q5_1": legacy.encode_q5_1,
    }
)

_SEARCHED_VALUES: Final = 1 << 16  # values that a search is given at once: 256 KB of float32

QUANTIZED: Final = (*ENCODERS, *(name for name in SEARCHED if name not in ENCODERS))
"""Block types that can be written."""

DECODERS: Final[MappingProxyType[str, Decoder]] = MappingProxyType(
    {
        "Q8_0": legacy.decode_q8_0,
        "Q4_0": legacy.decode_q4_0,
        "Q4_1": legacy.decode_q4_1,
        "Q5_0": legacy.decode_q5_0,
        "Q5_1": legacy.decode_q5_1,
        "Q2_K": k.decode_q2_k,
        "Q3_K": k.decode_q3_k,
        "Q4_K": k.decode_q4_k,
        "Q5_K": k.decode_q5_k,
        "Q6_K": k.decode_q6_k,
        "IQ4_NL": iq.decode_iq4_nl,
        "IQ4_XS": iq.decode_iq4_xs,
        "TQ1_0": ternary.decode_tq1_0,
        "TQ2_0": ternary.decode_tq2_0,
        "Q1_0": ternary.decode_q1_0,
        "Q2_0": ternary.decode_q2_0,
        "MXFP4": fp4.decode_mxfp4,
        "NVFP4": fp4.decode_nvfp4,
        **{name: iq.grid_decoder(name) for name in iq.GRID_TYPES},
    }
)


def quantize(kind: GGMLType | str, rows: Floats) -> Bytes:
    """Quantize float32 rows; `quantize_rows` without its other input types.

    Args:
        kind: target type, or its name.
        rows: (..., K) float32, finite, K a multiple of the block.

    Returns:
        (..., row bytes) uint8.

    Raises:
        LayoutError: as `quantize_rows`.
    """
    if rows.dtype != np.float32:
        raise LayoutError(f"float32 rows wanted, got {rows.dtype}; quantize_rows takes other types")
    return quantize_rows(kind, rows)


def quantize_rows(kind: GGMLType | str, array: NDArray[Any], importance: Floats | None = None) -> Bytes:
    """Quantize rows of any real number type by the fastest exact path.

    The result is that of the float32 values: F16 from bfloat16 is one rounding, from float64 it is two.

    Args:
        kind: target type, or its name; F32, F16, BF16, a key of `ENCODERS` or one of `search.SEARCHED`.
        array: (..., K), finite (see `floats.count_nonfinite`), K a multiple of the block.
        importance: (K,) float32, finite and not negative, what an error of a column costs; types that llama.cpp
            encodes without it (Q8_0, the ternary ones, MXFP4) do not look at it.

    Returns:
        (..., row bytes) uint8, C order; shares memory with `array` where nothing had to change.

    Raises:
        LayoutError: there is no quantizer for the type, K does not divide by its block, or values or block scales are
            beyond float16. The message does not name the tensor: the caller adds it.
    """
    kind = ggml_type(kind) if isinstance(kind, str) else kind
    if array.ndim == 0:
        raise LayoutError(f"{kind.name} stores rows, got a scalar")
    shape = (*array.shape[:-1], row_bytes(kind, array.shape[-1]))
    if kind.name in ("F32", "F16", "BF16"):
        return _cast(kind, array).reshape(-1).view(np.uint8).reshape(shape)
    search = searcher(kind.name, weighted=importance is not None, values=array.size)
    encode = ENCODERS.get(kind.name)
    if encode is None and search is None:
        raise LayoutError(f"no quantizer for {kind.name}; there are F32, F16, BF16, {', '.join(QUANTIZED)}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    blocks = np.ascontiguousarray(array).reshape(-1, kind.block_size)
    out = np.empty((len(blocks), kind.block_bytes), np.uint8)
    if search is not None:
        wild = _search(search, blocks, importance, out)
    else:
        assert encode is not None
        wild = _encode(encode, blocks, out)
    if wild:
        raise beyond_half(kind, wild, len(blocks))
    return out.reshape(shape)


def beyond_half(kind: GGMLType, wild: int, blocks: int) -> LayoutError:
    """Gives the error that says how many of so many blocks need a scale that float16 cannot hold."""
    return LayoutError(
        f"{kind.name} keeps scales as float16, and {wild} of {blocks} blocks need one beyond 65504; "
        "store this tensor as F32 or BF16"
    )


def dequantize(kind: GGMLType | str, data: Bytes, columns: int) -> Floats:
    """Dequantize rows to float32, as llama.cpp reads them.

    Args:
        kind: stored type, or its name; a key of `DECODERS` or of `PLAIN`.
        data: (..., row bytes) uint8.
        columns: weights per row, K.

    Returns:
        (..., K) float32. May share memory with `data` for F32.

    Raises:
        LayoutError: the type has no decoder, or `data` is not as wide as K weights of that type.
    """
    kind = ggml_type(kind) if isinstance(kind, str) else kind
    nbytes = row_bytes(kind, columns)
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] != nbytes:
        raise LayoutError(
            f"{columns} weights of {kind.name} are rows of {nbytes} bytes (uint8), got {data.dtype} {data.shape}"
        )
    shape = (*data.shape[:-1], columns)
    if kind.name in PLAIN:
        return to_float32(np.ascontiguousarray(data).reshape(-1).view(PLAIN[kind.name])).reshape(shape)
    decode = DECODERS.get(kind.name)
    if decode is None:
        raise LayoutError(f"no reader for {kind.name}; there are {', '.join((*PLAIN, *DECODERS))}")
    blocks = np.ascontiguousarray(data).reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_size), np.float32)
    step = CHUNK // kind.block_size
    with np.errstate(all="ignore"):  # a damaged scale may be infinite or NaN; the caller counts those in the result
        for start in range(0, len(blocks), step):
            decode(blocks[start : start + step], out[start : start + step])
    return out.reshape(shape)


def _cast(kind: GGMLType, array: NDArray[Any]) -> NDArray[Any]:
    if kind.name == "F32":
        return to_float32(array)
    if kind.name == "BF16":
        return to_bfloat16(array)
    half, lost = cast_float16(array)
    if lost:
        raise LayoutError(f"{lost} of {array.size} values are beyond 65504, F16's largest; use BF16 or F32")
    return half


def _encode(encode: Encoder, blocks: NDArray[Any], out: Bytes) -> int:
    """Run an encoder over all blocks, chunk by chunk; return how many cannot be stored."""
    step = min(CHUNK // blocks.shape[1], len(blocks))
    work = Workspace(step)
    wild = 0
    # Infinite inverses, underflow of scales and the codes of refused blocks are all expected, and handled or refused.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), max(step, 1)):
            chunk = blocks[start : start + step]
            if len(chunk) < step:
                work = Workspace(len(chunk))
            if chunk.dtype != np.float32:
                widen(chunk.reshape(-1), work.values.reshape(-1))
                chunk = work.values
            wild += encode(chunk, out[start : start + step], work)
    return wild


def _search(search: Search, blocks: NDArray[Any], importance: Floats | None, out: Bytes) -> int:
    """Run a search over all blocks, chunk by chunk; return how many cannot be stored."""
    size = blocks.shape[1]
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32).reshape(-1, size)
    step = max(1, _SEARCHED_VALUES // size)
    if weights is not None:  # a row is not cut: legacy types weigh errors by its mean square
        step = max(1, step // len(weights)) * len(weights)
    wild = 0
    for start in range(0, len(blocks), step):
        chunk = to_float32(blocks[start : start + step])
        wild += search(chunk, weights, start, out[start : start + step])
    return wild
