"""Rows of a weight as the codes, scales and zeros that MatMulNBits and GatherBlockQuantized read."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.onnx.exact_codes import column_order, exact_scale, with_columns
from quantpress.convert.onnx.linear import LinearWeight
from quantpress.convert.onnx.matmul_nbits import matmul_nbits, pack_bits
from quantpress.convert.onnx.stored import Piece
from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import count_nonfinite, to_float32
from quantpress.quant.grid import SCALE_ROUNDING, SCALE_TYPES
from quantpress.quant.qtensor import QuantizedTensor, group_count

__all__ = ["CodePieces", "round_rows"]

_SCALE_TYPES = {"FLOAT": "F32", "FLOAT16": "F16"}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def round_rows(rows: Array, bits: int, size: int, *, symmetric: bool, compute: str) -> Piece:
    """Rounds rows to the nearest codes of blocks; the codes are those of `quant.grid.round_to_nearest`.

    Args:
        rows: (n, K) of any float type.
        bits: 2, 4 or 8.
        size: columns of a block.
        symmetric: no zeros are given.
        compute: "FLOAT" or "FLOAT16", the type of the scales.

    Returns:
        Codes (n, blocks, size * bits / 8) uint8, scales (n, blocks), and zeros (n, ceil(blocks * bits / 8)) uint8
        where they are not symmetric.

    Raises:
        LayoutError: values that are not finite, or a scale that its type cannot hold.
    """
    from quantpress.quant.nbits_kernels import round_blocks

    if bad := count_nonfinite(rows):
        raise LayoutError(f"{bad} of these {rows.size} values are NaN or infinite, which no code stands for")
    count, columns = rows.shape
    blocks, kind = group_count(columns, size), _SCALE_TYPES[compute]
    packed = np.empty((count, blocks * size * bits // 8), np.uint8)
    scale, zero = np.empty((count, blocks), np.float32), np.empty((count, blocks), np.uint8)
    round_blocks(to_float32(rows), packed, scale, zero, size, bits, symmetric, *SCALE_ROUNDING[kind])
    with np.errstate(over="ignore"):
        stored = scale.astype(SCALE_TYPES[kind])
    if not np.isfinite(stored).all():
        raise LayoutError(f"scales up to {float(np.abs(scale).max()):.3g} are too large for {kind}")
    farthest = np.abs(scale, dtype=np.float64) * np.maximum(zero, (1 << bits) - 1 - zero)
    if farthest.max(initial=0) > _FLOAT32_MAX:
        raise LayoutError(f"values of codes up to {float(farthest.max()):.3g} are too large for float32")
    codes = packed.reshape(count, blocks, size * bits // 8)
    return (codes, stored) if symmetric else (codes, stored, pack_bits(zero, bits))


class CodePieces:
    """Gives rows of a weight that has codes; they are read once and let go with this object."""

    def __init__(self, weight: LinearWeight, dtype: np.dtype[Any], greatest_block: int, *, ordered: bool) -> None:
        """Reads nothing yet.

        Args:
            weight: has `codes`.
            dtype: of the stored scales.
            greatest_block: as for `matmul_nbits`.
            ordered: the order of columns is wanted.
        """
        self._weight, self._dtype, self._greatest, self._ordered = weight, dtype, greatest_block, ordered
        self._lock = threading.Lock()
        self._whole: tuple[QuantizedTensor, Array | None] | None = None

    def piece(self, start: int, stop: int) -> Piece:
        """Gives codes, scales, zeros if there are any, and the order of columns, whole with row 0.

        Raises:
            LayoutError: scales that the activations' type does not hold, or groups of different sizes.
        """
        try:
            whole, order = self._read()
            zero = None if whole.zero is None else whole.zero[start:stop]
            codes = with_columns(_rows(whole, zero, start, stop), order)
            packed, scales, zeros, _ = matmul_nbits(codes, greatest_block=self._greatest)
            parts = [packed, exact_scale(scales, self._dtype)] + ([] if zeros is None else [zeros])
        except LayoutError as error:
            raise LayoutError(f"{self._weight.source}: {shown(self._weight.name)}: {error}") from error
        if self._ordered:
            columns = np.arange(whole.columns) if order is None else order
            parts.append(columns.astype(np.int32)[: None if start == 0 else 0])
        return tuple(parts)

    def _read(self) -> tuple[QuantizedTensor, Array | None]:
        with self._lock:
            if self._whole is None:
                if self._weight.codes is None:
                    raise TypeError(f"{self._weight.name} has no codes")
                whole = self._weight.codes.read()
                self._whole = whole, column_order(whole)
            return self._whole


def _rows(whole: QuantizedTensor, zero: Array | None, start: int, stop: int) -> QuantizedTensor:
    return QuantizedTensor(
        whole.codes[start:stop], whole.scale[start:stop], zero, whole.bits, whole.group_size, whole.g_idx
    )
