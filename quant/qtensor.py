"""The one form of an affine quantized matrix: `weight = scale * (codes - zero)`, for every method and every format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32

__all__ = ["BITS", "QuantizedTensor", "group_count"]

BITS = (2, 3, 4, 8)

Array = NDArray[Any]


def group_count(columns: int, group_size: int) -> int:
    """Number of groups of a row; the last one may be shorter."""
    return -(-columns // group_size) if columns else 0


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A matrix of N output rows and K input columns in integer codes.

    Attributes:
        codes: (N, K) uint8, each in [0, 2^bits).
        scale: (N, G) in the type it is stored in: float16, bfloat16 or float32. Negative scales are allowed.
        zero: (N, G) uint8, each in [0, 2^bits); None for symmetric codes, whose zero is 2^(bits - 1).
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; K for one group per row. The last group of a row may be shorter.
    """

    codes: NDArray[np.uint8]
    scale: Array
    zero: NDArray[np.uint8] | None
    bits: int
    group_size: int

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
        if self.zero is not None and (self.zero.shape != wanted or self.zero.dtype != np.uint8):
            raise LayoutError(f"zero is {self.zero.dtype} of shape {self.zero.shape}, wanted uint8 of {wanted}")
        for name, values in (("code", self.codes), ("zero", self.zero)):
            if values is not None and values.size and int(values.max()) >> self.bits:
                raise LayoutError(f"a {name} of {int(values.max())} does not fit {self.bits} bits")

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

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Gives rows `[start, stop)` as float32 (n, K): scale * (codes - zero), one rounding."""
        chosen = slice(start, stop)
        scale, zero = to_float32(self.scale[chosen]), self.zeros()[chosen].astype(np.float32)
        values = self.codes[chosen].astype(np.float32)
        for group in range(self.groups):
            part = values[:, group * self.group_size : (group + 1) * self.group_size]
            part -= zero[:, group : group + 1]
            part *= scale[:, group : group + 1]
        return values
