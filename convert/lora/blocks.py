"""Reads a tensor in float64 as blocks of lines whose borders depend on its shape alone.

A line is one step of all dimensions but the last: the tensor seen as (lines, width). A vector has lines of one value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.lora.product import tile_lines
from quantpress.quant.float64 import widen_to_float64

__all__ = ["Block", "BlockReader", "lines_of"]

Float64 = NDArray[np.float64]

_BLOCK = 1 << 17  # values of a block: a megabyte of float64; with its scratch it stays in the second-level cache
_READ = 1 << 21  # values that are read from the file at a time


def lines_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Gives (lines, width) of a stored tensor."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


class Block:
    """Lines on their way through the changes of a tensor; valid until the next block is asked for.

    Attributes:
        start: number of the first line.
        stop: number of the line after the last.
        values: (n, width) as they are now; changes write here.
        scratch: (n, width) for the use of one change.
        changed: whether `values` are no longer the tensor's own.
        reader: reads other blocks of the same tensor.
    """

    __slots__ = ("_stored", "changed", "reader", "scratch", "start", "stop", "values")

    def __init__(self, start: int, stored: Array, values: Float64, scratch: Float64, reader: BlockReader) -> None:
        self.start = start
        self.stop = start + len(stored)
        self.values = values
        self.scratch = scratch
        self.changed = False
        self.reader = reader
        self._stored = stored
        self._widen(values)

    def original(self) -> Float64:
        """Gives (n, width) as they were before any change; not to be written."""
        if not self.changed:
            return self.values
        values = np.empty_like(self.values)
        self._widen(values)
        return values

    def _widen(self, values: Float64) -> None:
        # The scratch has room for the float32 that lies between.
        single = self.scratch.reshape(-1).view(np.float32)[: values.size]
        widen_to_float64(self._stored.reshape(-1), values.reshape(-1), single)


class BlockReader:
    """Cuts a tensor into blocks.

    Args:
        tensor: of a float type.
    """

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.lines, self.width = lines_of(tensor.shape)
        self.row_lines = self.lines // max(tensor.rows, 1)
        # Lines that blocks are counted from anew: those of a matrix, as tiles are, or of the tensor.
        self._period = self.row_lines if len(tensor.shape) > 2 else self.lines
        tile = tile_lines(self.width)
        self.most_lines = tile * max(1, _BLOCK // (tile * max(self.width, 1)))

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Gives lines [start, stop), block after block, as they are stored."""
        most = min(self.most_lines, self._period, stop - start)
        values, scratch = np.empty((most, self.width)), np.empty((most, self.width))
        for first, last in self._reads(start, stop):
            stored = self.tensor.read_rows(first, last).reshape(-1, self.width)
            before = first * self.row_lines
            for begin, end in self._cuts(max(start, before), min(stop, last * self.row_lines)):
                size = end - begin
                yield Block(begin, stored[begin - before : end - before], values[:size], scratch[:size], self)

    def _reads(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Gives the rows [first, last) to read one after the other; they end with blocks."""
        step = max(1, _READ // max(self.row_lines * self.width, 1))
        if self.row_lines == 1:
            step = max(1, step // self.most_lines) * self.most_lines
        first, end = start // max(self.row_lines, 1), -(-stop // max(self.row_lines, 1))
        while first < end:
            last = min(end, (first // step + 1) * step)
            yield first, last
            first = last

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Gives the lines [begin, end) of the blocks."""
        while start < stop:
            origin = start // self._period * self._period
            border = origin + ((start - origin) // self.most_lines + 1) * self.most_lines
            end = min(stop, border, origin + self._period)
            yield start, end
            start = end
