"""A matrix as the blocks of a ggml type: what a method that quantizes for GGUF leaves, and what the file will hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.codec import dequantize
from quantpress.quant.ggml.types import ggml_type

__all__ = ["BlockTensor"]


@dataclass(frozen=True, eq=False, slots=True)
class BlockTensor:
    """N output rows and K input columns of a type that stores blocks.

    Attributes:
        kind: name of the type, as ggml spells it.
        data: (N, row bytes) uint8, the rows as a GGUF file holds them.
    """

    kind: str
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        """Checks that the bytes are whole blocks.

        Raises:
            LayoutError: they are not.
            InputError: there is no such type.
        """
        kind = ggml_type(self.kind)
        if self.data.ndim != 2 or self.data.dtype != np.uint8 or self.data.shape[1] % kind.block_bytes:
            raise LayoutError(
                f"rows of {kind.name} are blocks of {kind.block_bytes} bytes, got {self.data.dtype} {self.data.shape}"
            )

    @property
    def rows(self) -> int:
        """N, the output rows."""
        return int(self.data.shape[0])

    @property
    def columns(self) -> int:
        """K, the input columns."""
        kind = ggml_type(self.kind)
        return int(self.data.shape[1]) // kind.block_bytes * kind.block_size

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows, self.columns

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Gives rows `[start, stop)` as llama.cpp reads them, (n, K) float32."""
        return dequantize(self.kind, self.data[start:stop], self.columns)

    def take_rows(self, order: NDArray[np.integer]) -> BlockTensor:
        """Gives the same matrix with row `order[i]` in the place of row i."""
        return BlockTensor(self.kind, self.data[order])
