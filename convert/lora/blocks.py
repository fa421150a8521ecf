"""Reads a tensor in float64 as blocks of lines whose borders depend on its shape alone.

A line is one step of all dimensions but the last: the tensor seen as (lines, width). A vector has lines of one value.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.lora.factors import to_float64
from quantpress.convert.lora.product import tile_lines
from quantpress.quant.float64 import ROUNDING_SLACK, widen_to_float64

__all__ = ["Block", "BlockReader", "lines_of"]

Float64 = NDArray[np.float64]

_BLOCK = 1 << 17  # values of a block: a megabyte of float64; with its scratch it stays in the second-level cache
_READ = 1 << 21  # values that are read from the file at a time

# Memory for blocks that no thread uses now. Giving it back to the system after each read and getting it again, page by
# page, costs a third of the time of a merge. There are as many as threads that read at once.
_SPARE: list[NDArray[np.float64]] = []
_MOST_SPARE = 4 * _BLOCK  # values; what is larger is not kept


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
        spare: the memory of `scratch`, (n * width + ROUNDING_SLACK,).
        changed: whether `values` are no longer the tensor's own.
        reader: reads other blocks of the same tensor.
    """

    __slots__ = ("_stored", "changed", "reader", "scratch", "spare", "start", "stop", "values")

    def __init__(self, start: int, stored: Array, memory: Float64, reader: BlockReader) -> None:
        self.start = start
        self.stop = start + len(stored)
        self.values = memory[: stored.size].reshape(stored.shape)
        self.spare = memory[len(memory) // 2 :]
        self.scratch = self.spare[: stored.size].reshape(stored.shape)
        self.changed = False
        self.reader = reader
        self._stored = stored
        widen_to_float64(stored.reshape(-1), self.values.reshape(-1), self.spare)

    def original(self) -> Float64:
        """Gives (n, width) as they were before any change; not to be written."""
        return to_float64(self._stored) if self.changed else self.values


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
        with self.memory(start, stop) as memory:
            for begin, stored in self.stored(start, stop):
                yield Block(begin, stored, memory, self)

    def stored(self, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Gives lines [start, stop) as they are stored: number of the first line of a block, and its lines."""
        for first, last in self._reads(start, stop):
            stored = self.tensor.read_rows(first, last).reshape(-1, self.width)
            before = first * self.row_lines
            for begin, end in self._cuts(max(start, before), min(stop, last * self.row_lines)):
                yield begin, stored[begin - before : end - before]

    @contextlib.contextmanager
    def memory(self, start: int, stop: int) -> Iterator[Float64]:
        """Lends memory for any block of lines [start, stop), twice the block's values and some."""
        memory = _borrow(2 * (min(self.most_lines, self._period, stop - start) * self.width + ROUNDING_SLACK))
        try:
            yield memory
        finally:
            if memory.size <= _MOST_SPARE:
                _SPARE.append(memory)

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


def _borrow(size: int) -> Float64:
    """Gives memory that no other thread has, of at least `size` values."""
    try:
        memory = _SPARE.pop()
    except IndexError:
        return np.empty(size)
    return memory if memory.size >= size else np.empty(size)
