"""A tensor with adapters merged into it: read by rows, computed in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor
from quantpress.convert.lora.blocks import Block, BlockReader
from quantpress.convert.lora.changes import Add, Change
from quantpress.convert.lora.product import squares
from quantpress.quant.float64 import check_target, round_float64
from quantpress.quant.floats import BFLOAT16

__all__ = ["COMPILED_FROM", "MergedTensor"]

# Values of a merge from which numba is loaded: it takes half a second and 90 MB, and saves 4 ns of each value. That
# pays from about twice as many on; a lower limit gives all merges of models beyond toys the same memory.
COMPILED_FROM = 1 << 26


class MergedTensor:
    """A tensor of the base and the changes that adapters make to it, in order.

    Safe to read from several threads, in any pieces: a value does not depend on the rows it is read with.

    Args:
        name: the tensor's name.
        base: its values before any change, a float type.
        changes: applied in order, without rounding between them.
        dtype: type of the result, a key of `DTYPES`; the base's by default.
        compiled: let numba do what it can; worth its loading where `COMPILED_FROM` values are merged.

    Raises:
        InputError: the base's type or `dtype` is no float type.
    """

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        changes: tuple[Change, ...],
        dtype: str | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.base = base
        self.changes = changes
        self.dtype = dtype or base.dtype
        for kind in (base.dtype, self.dtype):
            check_target(DTYPES[kind])
        for change in changes:
            if change.shape not in (None, base.shape):
                raise ValueError(f"{name}: a change for shape {change.shape} of a tensor of shape {base.shape}")
        single = changes[0] if len(changes) == 1 else None
        self._added = single if compiled and isinstance(single, Add) and base.dtype == "BF16" else None
        self._reader = BlockReader(base)
        self._norms = _Norms(self._reader.lines, len(changes))
        self._lock = Lock()
        self._lines_since_release = 0

    def lazy(self) -> LazyTensor:
        """Gives the tensor for a checkpoint. Types narrower than float32 have `wide_rows`."""
        wide = self._wide_rows if DTYPES[self.dtype].itemsize < 4 else None
        return LazyTensor(self.name, self.base.shape, self.dtype, self.base.source, self._read_rows, wide)

    def delta_norms(self) -> tuple[float, ...]:
        """Gives Frobenius norms, for each change ||after - before|| / ||before||; infinite where before is 0.

        They are summed up while rows are read; this reads only what nobody has read.
        """
        return tuple(_ratio(before, moved) for before, moved in np.sqrt(self.squared_norms()).tolist())

    def squared_norms(self) -> NDArray[np.float64]:
        """Gives (changes, 2): for each change ||before||^2 and ||after - before||^2; reads as `delta_norms` does."""
        with np.errstate(all="ignore"):
            for start, stop in self._norms.missing():
                for _ in self._merged_blocks(start, stop):
                    pass
        return self._norms.sums()

    def _read_rows(self, start: int, stop: int) -> Array:
        return self._read(start, stop, DTYPES[self.dtype])

    def _wide_rows(self, start: int, stop: int) -> Array:
        return self._read(start, stop, np.dtype(np.float32))

    def _read(self, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        if not 0 <= start <= stop <= self.base.rows:
            raise IndexError(f"{self.name}: rows [{start}, {stop}) of {self.base.rows}")
        reader = self._reader
        first, last = start * reader.row_lines, stop * reader.row_lines
        out = np.empty((last - first, reader.width), dtype)
        # A NaN or an overflow is found by who writes the values.
        with np.errstate(all="ignore"):
            if self._added is not None and dtype in (BFLOAT16, np.float32):
                self._add_compiled(self._added, first, last, out)
                return out.reshape(stop - start, *self.base.shape[1:])
            for block in self._merged_blocks(first, last):
                target = out[block.start - first : block.stop - first]
                round_float64(block.values.reshape(-1), target.reshape(-1), block.spare)
        return out.reshape((stop - start, *self.base.shape[1:]) if self.base.shape else ())

    def _add_compiled(self, change: Add, start: int, stop: int, out: Array) -> None:
        """Fills `out` with lines [start, stop), as `_merged_blocks` and a rounding would."""
        from quantpress.quant.fused_add import add_to_bfloat16, add_to_float32

        add = add_to_float32 if out.dtype == np.float32 else add_to_bfloat16
        with self._reader.memory(start, stop) as memory:
            for begin, stored in self._reader.stored(start, stop):
                delta = memory[: stored.size].reshape(stored.shape)
                moved = change.delta.lines(begin, begin + len(stored), delta)
                moved = squares(delta) if moved is None else moved
                before = add(stored, delta, out[begin - start : begin - start + len(stored)])
                self._norms.record(begin, np.stack([before, moved])[None])
                self._count(len(stored))

    def _merged_blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Gives lines [start, stop) after all changes."""
        for block in self._reader.blocks(start, stop):
            norms = self._norms.wanted(block.start, block.stop)
            for number, change in enumerate(self.changes):
                if norms is not None:
                    norms[number, 0] = squares(block.values)
                moved = change.apply(block)
                block.changed = True
                if norms is not None:
                    norms[number, 1] = moved
            if norms is not None:
                self._norms.record(block.start, norms)
            self._count(block.stop - block.start)
            yield block

    def _count(self, lines: int) -> None:
        """Drops what the changes have loaded when as many lines were read as there are: tensors are read once."""
        with self._lock:
            self._lines_since_release += lines
            if self._lines_since_release < self._reader.lines:
                return
            self._lines_since_release = 0
        for change in self.changes:
            change.release()


class _Norms:
    """Squared norms, line by line until all lines are known, then their sums.

    The sums are of all lines in order, so they do not depend on who read what first.
    """

    def __init__(self, lines: int, changes: int) -> None:
        self._shape = changes, 2, lines
        self._lock = Lock()
        self._squares: NDArray[np.float64] | None = None
        self._known: NDArray[np.bool_] | None = None
        self._unknown = lines
        self._sums: NDArray[np.float64] | None = np.zeros((changes, 2)) if 0 in self._shape else None

    def wanted(self, start: int, stop: int) -> NDArray[np.float64] | None:
        """Gives room for (changes, 2, n): squared norm before a change and of the change; None if they are known."""
        if self._sums is not None:
            return None
        return np.empty((*self._shape[:2], stop - start))

    def record(self, start: int, norms: NDArray[np.float64]) -> None:
        """Keeps what `wanted` gave room for."""
        stop = start + norms.shape[-1]
        with self._lock:
            if self._sums is not None:
                return
            if self._squares is None or self._known is None:
                self._squares, self._known = np.empty(self._shape), np.zeros(self._shape[-1], np.bool_)
            self._squares[:, :, start:stop] = norms
            self._unknown -= stop - start - np.count_nonzero(self._known[start:stop])
            self._known[start:stop] = True
            if not self._unknown:
                self._sums = self._squares.sum(axis=-1)
                self._squares = self._known = None

    def missing(self) -> list[tuple[int, int]]:
        """Gives the runs of lines that nobody has read."""
        with self._lock:
            if self._sums is not None:
                return []
            if self._known is None:
                return [(0, self._shape[-1])]
            borders = np.flatnonzero(np.diff(np.pad(~self._known, 1).astype(np.int8)))
        return [(int(start), int(stop)) for start, stop in borders.reshape(-1, 2)]

    def sums(self) -> NDArray[np.float64]:
        """Gives the sums over all lines, which must be known."""
        assert self._sums is not None, "every line was read"
        return self._sums


def _ratio(before: float, moved: float) -> float:
    if before:
        return moved / before
    return math.inf if moved else 0.0
