"""The order of rows in GGUF against the order in a Hugging Face checkpoint, both ways, without reading whole tensors.

llama.cpp's NORM rope turns neighbouring values (0, 1), (2, 3), ...; Hugging Face turns value i together with value
i + dim/2. A file for NORM therefore holds the rows of each head interleaved (llama.cpp, conversion/llama.py, permute).
GPT-NeoX fuses q, k and v head by head; llama.cpp wants all q, then all k, then all v (conversion/gptneox.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, TensorSpec
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.quant.errors import LayoutError

ReadRows = Callable[[int, int], Array]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """A permutation of rows that keeps blocks of rows together.

    Attributes:
        block: rows in a block; 1 where nothing moves.
        blocks: block b of the result is block `blocks[b]` of what is read; empty: blocks stay in place.
        within: row r of a block is row `within[r]` of the block that is read; empty: rows of a block stay in place.
    """

    block: int = 1
    blocks: tuple[int, ...] = ()
    within: tuple[int, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether any row changes its place."""
        return bool(self.blocks or self.within)

    def inverse(self) -> RowOrder:
        """Gives the order that undoes this one."""
        return RowOrder(self.block, _inverse(self.blocks), _inverse(self.within))

    def read(self, read_rows: ReadRows, start: int, stop: int) -> Array:
        """Gives rows `[start, stop)` of the result, reading whole blocks and as few calls as the blocks allow.

        Args:
            read_rows: gives rows of the tensor whose rows are to be reordered.
            start: first row; reading is cheapest at multiples of `block`.
            stop: row after the last one.
        """
        if not self.moves:
            return read_rows(start, stop)
        first, last = start // self.block, -(-stop // self.block)
        rows = self._read_blocks(read_rows, first, last)
        if self.within:
            shaped = rows.reshape(last - first, self.block, *rows.shape[1:])
            rows = np.take(shaped, self.within, axis=1).reshape(rows.shape)
        skip = start - first * self.block
        return rows[skip : skip + stop - start]

    def _read_blocks(self, read_rows: ReadRows, first: int, last: int) -> Array:
        size = self.block
        if not self.blocks:
            return read_rows(first * size, last * size)
        return np.concatenate([read_rows(block * size, (block + 1) * size) for block in self.blocks[first:last]])


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(place) for place in np.argsort(order))


IN_PLACE = RowOrder()


def row_order(arch: ArchSpec, row: TensorSpec, hyper: Hyperparameters) -> RowOrder:
    """Gives the order in which GGUF holds the rows of a tensor, as seen from the checkpoint.

    Raises:
        LayoutError: the table asks for two reorderings at once, which no family needs.
    """
    turned = row.rotary and arch.gguf_rope == "norm" and hyper.rope is not None
    if row.layout is Layout.HEADS_QKV:
        if turned:
            raise LayoutError(f"{row.hf}: rows fused head by head cannot be interleaved for llama.cpp as well")
        heads = hyper.heads
        return RowOrder(hyper.head_dim, tuple(head * 3 + part for part in range(3) for head in range(heads)))
    if not turned or hyper.rope is None:
        return IN_PLACE
    return RowOrder(hyper.head_dim, within=_interleaved(hyper.head_dim, hyper.rope.dim))


def _interleaved(head_dim: int, turned: int) -> tuple[int, ...]:
    """Row numbers 0, turned/2, 1, turned/2 + 1, ...; rows that no position turns keep their places."""
    pairs = np.arange(turned).reshape(2, turned // 2).T.reshape(-1)
    return (*(int(place) for place in pairs), *range(turned, head_dim))


@dataclass
class Transposed:
    """Rows of the transpose of a tensor, which has to be read whole; it is read once and let go with this object."""

    tensor: LazyTensor
    _whole: Array | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read_rows(self, start: int, stop: int) -> Array:
        """Gives rows `[start, stop)` of the transpose: columns of the tensor, C-contiguous."""
        with self._lock:
            if self._whole is None:
                self._whole = self.tensor.exact_rows(0, self.tensor.rows)
        return np.ascontiguousarray(self._whole[:, start:stop].T)
