"""Scratch arrays and the per-block reductions that the encoders of 32-weight blocks share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.layouts import BLOCK

__all__ = ["Workspace"]

Floats: TypeAlias = NDArray[np.float32]


class Workspace:
    """Buffers for a chunk of `blocks` blocks; one per thread and call, reused from chunk to chunk.

    Attributes:
        values: (blocks, 32) float32, the chunk when it had to be converted.
        steps: (blocks, 32) float32, the values in units of the scale.
        codes: (blocks, 32) uint8.
        words: (blocks * 4,) uint64, the same memory as `codes`: eight codes per word.
        packed: (blocks * 4,) uint64.
    """

    def __init__(self, blocks: int) -> None:
        self.values: Floats = np.empty((blocks, BLOCK), np.float32)
        self.steps: Floats = np.empty((blocks, BLOCK), np.float32)
        self.words: NDArray[np.uint64] = np.empty(blocks * BLOCK // 8, np.uint64)
        self.codes: NDArray[np.uint8] = self.words.view(np.uint8).reshape(blocks, BLOCK)
        self.packed: NDArray[np.uint64] = np.empty_like(self.words)
        self._halves: list[Floats] = [np.empty(blocks * width, np.float32) for width in (16, 8, 4, 2)]

    def reduce(self, operation: np.ufunc, values: Floats) -> Floats:
        """Reduce each block with a commutative operation.

        Neighbours are paired in five passes over the whole chunk: numpy vectorises that, while its own reduction along
        an axis of 32 starts a loop per block and is many times slower.

        Args:
            operation: np.maximum or np.minimum.
            values: (blocks, 32) float32, contiguous.

        Returns:
            (blocks,) float32, a new array.
        """
        flat = values.reshape(-1)
        for half in self._halves:
            operation(flat[0::2], flat[1::2], out=half)
            flat = half
        return np.asarray(operation(flat[0::2], flat[1::2]))

    def peak(self, values: Floats) -> Floats:
        """Largest magnitude of each block, (blocks,) float32."""
        np.absolute(values, out=self.steps)
        return self.reduce(np.maximum, self.steps)

    def signed_peak(self, values: Floats) -> Floats:
        """Value of the largest magnitude of each block, (blocks,) float32; of several, the first; +0 for zeros."""
        high = self.reduce(np.maximum, values)
        low = self.reduce(np.minimum, values)
        signed = np.where(high >= -low, high, low) + np.float32(0)  # -0 + 0 is +0
        tied = np.flatnonzero((high == -low) & (high > 0))
        if tied.size:
            rows = values[tied]
            first = np.argmax(np.absolute(rows) == high[tied, None], axis=1)
            signed[tied] = rows[np.arange(tied.size), first]
        return signed

    def minimum(self, values: Floats) -> Floats:
        """Smallest value of each block, (blocks,) float32; of -0 and +0, the first."""
        low = self.reduce(np.minimum, values)
        zeros = np.flatnonzero(low == 0)
        if zeros.size:
            rows = values[zeros]
            low[zeros] = rows[np.arange(zeros.size), np.argmax(rows == 0, axis=1)]
        return low

    def pack_nibbles(self, codes: Any) -> None:
        """Store the low halves of the first and the last 16 codes of each block side by side.

        Args:
            codes: (blocks,) records of 16 bytes to write; `words` must hold codes in [0, 16).
        """
        # A word moves by one nibble; the bytes hold at most 15, so nothing crosses. Only every second pair of words is
        # wanted, yet one pass over all of them is faster than two strided ones.
        np.left_shift(self.words, np.uint64(4), out=self.packed)
        np.bitwise_or(self.packed[2:], self.words[:-2], out=self.packed[:-2])
        codes[...] = self.packed.view("V16")[0::2]
