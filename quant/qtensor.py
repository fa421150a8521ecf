"""The one form of an affine quantized matrix: `weight = scale * (codes - zero)`, for every method and every format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32

__all__ = ["BITS", "QuantizedForm", "QuantizedTensor", "group_count"]

BITS = (2, 3, 4, 8)

Array = NDArray[Any]

_SCALE_NAMES = {np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float32): "F32"}


def group_count(columns: int, group_size: int) -> int:
    """Number of groups of a row; the last one may be shorter."""
    return -(-columns // group_size) if columns else 0


@dataclass(frozen=True, slots=True)
class QuantizedForm:
    """What a quantized matrix is made of, known without its values: what a format needs to say whether it can hold it.

    Attributes:
        shape: (N, K).
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; K for one group per row.
        symmetric: no zero is stored, it is 2^(bits - 1).
        scale_type: "F16", "BF16" or "F32".
        ordered: columns belong to groups in an order of their own (`g_idx`), as GPTQ's act-order without static groups
            leaves them.
        input_bits: 8 where the inputs are rounded to int8 too while the model runs, a scale per token; else None.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    scale_type: str = "F16"
    ordered: bool = False
    input_bits: int | None = None

    @property
    def per_row(self) -> bool:
        """Whether a row is one group."""
        return self.group_size >= self.shape[1]

    def __str__(self) -> str:
        """A short name: `int4 g128`, `int8 row asym`."""
        group = "row" if self.per_row else f"g{self.group_size}"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asym'}{' act8' if self.input_bits else ''}"


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A matrix of N output rows and K input columns in integer codes.

    Attributes:
        codes: (N, K) uint8, each in [0, 2^bits).
        scale: (N, G) in the type it is stored in: float16, bfloat16 or float32. Negative scales are allowed.
        zero: (N, G) uint8, each in [0, 2^bits); None for symmetric codes, whose zero is 2^(bits - 1).
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; K for one group per row. The last group of a row may be shorter.
        g_idx: (K,) int32 group of each column, where columns are not in the order of their groups; else None. Only
            checkpoints of others have it: what is made here has groups of neighbours.
    """

    codes: NDArray[np.uint8]
    scale: Array
    zero: NDArray[np.uint8] | None
    bits: int
    group_size: int
    g_idx: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        """Checks that the parts fit each other.

        Raises:
            LayoutError: shapes, types or ranges that do not.
        """
        if self.bits not in BITS or self.group_size < 1:
            raise LayoutError(f"{self.bits} bits in groups of {self.group_size}: bits must be 2, 3, 4 or 8")
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise LayoutError(f"codes must be a uint8 matrix, found {self.codes.dtype} of shape {self.codes.shape}")
        wanted = (self.rows, group_count(self.columns, self.group_size))
        if self.scale.shape != wanted:
            raise LayoutError(f"scale has shape {self.scale.shape}, wanted {wanted}")
        if self.scale.dtype not in _SCALE_NAMES:
            raise LayoutError(f"scale is {self.scale.dtype}, wanted float16, bfloat16 or float32")
        if self.zero is not None and (self.zero.shape != wanted or self.zero.dtype != np.uint8):
            raise LayoutError(f"zero is {self.zero.dtype} of shape {self.zero.shape}, wanted uint8 of {wanted}")
        for name, values in (("code", self.codes), ("zero", self.zero)):
            if values is not None and values.size and int(values.max()) >> self.bits:
                raise LayoutError(f"a {name} of {int(values.max())} does not fit {self.bits} bits")
        if self.g_idx is not None:
            self._check_g_idx(self.g_idx)

    def _check_g_idx(self, g_idx: NDArray[np.int32]) -> None:
        if g_idx.shape != (self.columns,) or g_idx.dtype != np.int32:
            raise LayoutError(f"g_idx is {g_idx.dtype} of shape {g_idx.shape}, wanted int32 of {(self.columns,)}")
        if g_idx.size and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < self.groups:
            raise LayoutError(f"g_idx goes from {g_idx.min()} to {g_idx.max()}, there are {self.groups} groups")

    @property
    def form(self) -> QuantizedForm:
        """What it is made of, without the values."""
        scale_type = _SCALE_NAMES[self.scale.dtype]
        ordered = self.g_idx is not None
        shape = (self.rows, self.columns)
        return QuantizedForm(shape, self.bits, self.group_size, self.symmetric, scale_type, ordered)

    @property
    def rows(self) -> int:
        """N, the output rows."""
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        """K, the input columns."""
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return int(self.scale.shape[1])

    @property
    def symmetric(self) -> bool:
        """Whether the zero is 2^(bits - 1) everywhere because the form says so."""
        return self.zero is None

    def zeros(self) -> NDArray[np.uint8]:
        """Gives the zero of every group, (N, G)."""
        return np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8) if self.zero is None else self.zero

    def take_rows(self, order: NDArray[np.integer]) -> QuantizedTensor:
        """Gives the same matrix with row `order[i]` in the place of row i."""
        zero = None if self.zero is None else self.zero[order]
        return replace(self, codes=self.codes[order], scale=self.scale[order], zero=zero)

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Gives rows `[start, stop)` as float32 (n, K): scale * (codes - zero), one rounding."""
        chosen = slice(start, stop)
        scale, zero = to_float32(self.scale[chosen]), self.zeros()[chosen].astype(np.float32)
        values = self.codes[chosen].astype(np.float32)
        if self.g_idx is not None:
            values -= zero[:, self.g_idx]
            values *= scale[:, self.g_idx]
            return values
        for group in range(self.groups):
            part = values[:, group * self.group_size : (group + 1) * self.group_size]
            part -= zero[:, group : group + 1]
            part *= scale[:, group : group + 1]
        return values
