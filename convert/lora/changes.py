"""Steps that a stored tensor goes through when adapters are merged: add, rescale (DoRA), overwrite rows.

A step works on blocks of lines (see blocks.py) in float64 and reports what it changed, line by line, for the ledger.
"""

from __future__ import annotations

from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantpress.convert.lora.blocks import Block
from quantpress.convert.lora.deltas import Delta
from quantpress.convert.lora.factors import FactorSource, as_factor
from quantpress.convert.lora.product import squares

__all__ = ["Add", "Change", "Dora", "SetRows"]

Float64 = NDArray[np.float64]


class Change(Protocol):
    """One step. Any thread may apply it to any block; numpy is silenced by the caller."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape that the tensor must have; None if only its width counts."""

    def apply(self, block: Block) -> Float64:
        """Changes `block.values`; returns the squared norm of the change of each line, (n,)."""

    def release(self) -> None:
        """Drops what was loaded; it is loaded again when needed."""


class Add:
    """Adds a delta."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta."""
        return self.delta.shape

    def apply(self, block: Block) -> Float64:
        """Adds; returns squared norms of the lines of the delta."""
        known = self.delta.lines(block.start, block.stop, block.scratch)
        np.add(block.values, block.scratch, out=block.values)
        return squares(block.scratch) if known is None else known

    def release(self) -> None:
        """Drops the delta's factors."""
        self.delta.release()


class SetRows:
    """Overwrites rows: trained tokens (PEFT: tuners/trainable_tokens/layer.py, TrainableTokensLayer.merge).

    Args:
        ids: numbers of the rows, in any order, each once.
        values: (len(ids), H), the new rows in the order of `ids`.
    """

    def __init__(self, ids: ArrayLike, values: FactorSource) -> None:
        numbers = np.asarray(ids, np.int64).reshape(-1)
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        self._values = as_factor(values)
        self._values.register(self)

    @property
    def shape(self) -> None:
        """Any number of rows."""
        return None

    def apply(self, block: Block) -> Float64:
        """Overwrites; returns squared norms of the differences."""
        changed = np.zeros(len(block.values))
        first, last = np.searchsorted(self._sorted, (block.start, block.stop))
        if last > first:
            lines = self._sorted[first:last] - block.start
            rows = self._values.values()[self._order[first:last]]
            changed[lines] = squares(rows - block.values[lines])
            block.values[lines] = rows
        return changed

    def release(self) -> None:
        """Drops the rows."""
        self._values.release(self)


class Dora:
    """Adds a delta and gives each output the trained norm: `m / norm(original + delta) * (values + delta)`.

    PEFT: tuners/lora/variants.py, DoraLinearVariant.merge_unsafe and DoraEmbeddingVariant.merge_unsafe; the norm is
    taken on the weight before any adapter and rounded to the weight's type there, not here. An output whose norm is 0
    becomes NaN or infinite, as in PEFT.

    Args:
        delta: with scale and weight inside.
        magnitude: the trained norms: one per line, or with `columns` one per column.
        columns: outputs are columns of the stored tensor: Conv1D, stored (K, N), and embeddings, where PEFT takes the
            norm of each feature over all tokens. Needs a pass over the whole tensor, made once.
    """

    def __init__(self, delta: Delta, magnitude: FactorSource, columns: bool = False) -> None:
        self.delta = delta
        self._magnitude = as_factor(magnitude)
        self._magnitude.register(self)
        self._columns = columns
        self._lock = Lock()
        self._norms: Float64 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta."""
        return self.delta.shape

    def apply(self, block: Block) -> Float64:
        """Adds and rescales; returns squared norms of the differences."""
        delta, magnitude = block.scratch, self._magnitude.values().reshape(-1)
        norms = self._column_norms(block) if self._columns else None
        self.delta.lines(block.start, block.stop, delta)
        if norms is None:
            norms = np.sqrt(squares(block.original() + delta))
            factor = (magnitude[block.start : block.stop] / norms)[:, None]
        else:
            factor = magnitude / norms
        np.add(delta, block.values, out=delta)
        np.multiply(delta, factor, out=delta)
        np.subtract(delta, block.values, out=block.values)
        changed = squares(block.values)
        np.copyto(block.values, delta)
        return changed

    def release(self) -> None:
        """Drops the factors; norms of columns are kept, they were dear."""
        self.delta.release()
        self._magnitude.release(self)

    def _column_norms(self, block: Block) -> Float64:
        """Gives (width,); other threads wait for the one that makes the pass."""
        with self._lock:
            if self._norms is None:
                total = np.zeros(block.reader.width)
                for piece in block.reader.blocks(0, block.reader.lines):
                    self.delta.lines(piece.start, piece.stop, piece.scratch)
                    np.add(piece.values, piece.scratch, out=piece.scratch)
                    total += np.einsum("ij,ij->j", piece.scratch, piece.scratch)
                self._norms = np.sqrt(total)
            return self._norms
