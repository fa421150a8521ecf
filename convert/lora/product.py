"""Products of thin matrices, tile by tile, so that each value depends on its place alone and BLAS starts no threads.

OpenBLAS starts threads of its own for all but small products. Where several workers multiply at once these wait for
each other: measured 2 to 100 times slower on two cores than the tiles here, which it computes in the calling thread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Product", "squares", "tile_lines"]

Float64 = NDArray[np.float64]

# Most multiplications that OpenBLAS does without threads: interface/gemm.c 65536 * GEMM_MULTITHREAD_THRESHOLD (4),
# interface/gemv.c 2304 times the same, kernel/x86_64/ddot.c 10000.
_GEMM_LIMIT = 1 << 18
_GEMV_LIMIT = 9216
_DOT_LIMIT = 8192

_TILE = 1 << 14  # values that a tile of short lines has at least
_WIDE_TILE = 3 << 16  # values that a tile of long lines has at most, if it has more than 8 lines
_PANEL = 1 << 11  # values of a panel, 16 KB: it stays in the first-level cache while a tile is computed


def tile_lines(width: int) -> int:
    """Gives how many lines of `width` values form a tile; tiles begin at multiples of it."""
    if width * 32 <= _WIDE_TILE:
        return min(512, max(32, _TILE // max(width, 1) // 32 * 32))
    return 16 if width * 16 <= _WIDE_TILE else 8


def squares(lines: Float64) -> Float64:
    """Gives the squared norm of each line of (n, width), (n,); a line's sum does not depend on the others."""
    total = np.zeros(len(lines))
    for start in range(0, lines.shape[1], _DOT_LIMIT):
        part = lines[:, start : start + _DOT_LIMIT]
        total += np.matmul(part[:, None, :], part[:, :, None]).reshape(-1)
    return total


class Product:
    """`left` (N, r) @ `right` (r, width), computed by lines; all float64.

    Each value comes out of the same call of BLAS, on the same numbers in the same places, whatever lines are asked for.
    """

    def __init__(self, left: Float64, right: Float64) -> None:
        rank, self.width = right.shape
        self._left = np.ascontiguousarray(left)
        self._tile = tile_lines(self.width)
        self._panel = min(_GEMM_LIMIT // (self._tile * max(rank, 1)), _GEMV_LIMIT // max(rank, 1))
        self._panel = max(1, min(self._panel, max(64, _PANEL // max(rank, 1))))
        whole = self.width // self._panel * self._panel
        panels = right[:, :whole].reshape(rank, whole // self._panel, self._panel).transpose(1, 0, 2)
        self._panels = np.ascontiguousarray(panels), np.ascontiguousarray(right[None, :, whole:])

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` (stop - start, width), C order; whole tiles are computed, so asking for such is cheaper."""
        tile = self._tile
        first, last = min(-(-start // tile) * tile, stop), stop // tile * tile
        if first > start:
            self._part(start, first, out[: first - start])
        if last > first:
            self._multiply(first, last, tile, out[first - start : last - start])
        if stop > max(first, last):
            self._part(max(first, last), stop, out[max(first, last) - start :])

    def squares(self) -> Float64 | None:
        """Gives squared norms of all lines, (N,), without computing the lines; None where BLAS might start threads.

        With G = right @ right.T, the norm of l @ right is l @ G @ l.T, for every line l of `left`. Where that is the
        small difference of large terms, the norm is wrong by up to 2^-26 of these.
        """
        rank = self._left.shape[1]
        if rank * rank * self._panel > _GEMM_LIMIT:
            return None
        gram = np.zeros((rank, rank))
        for part in self._panels:
            gram += np.matmul(part, part.transpose(0, 2, 1)).sum(axis=0)
        turned = np.empty_like(self._left)
        Product(self._left, gram).lines(0, len(turned), turned)
        total: Float64 = np.einsum("nr,nr->n", turned, self._left)
        return np.maximum(total, 0)

    def _part(self, start: int, stop: int, out: Float64) -> None:
        """Gives lines that all lie in one tile."""
        first = start // self._tile * self._tile
        last = min(first + self._tile, len(self._left))
        if (start, stop) == (first, last):
            self._multiply(first, last, last - first, out)
            return
        whole = np.empty((last - first, self.width))
        self._multiply(first, last, last - first, whole)
        np.copyto(out, whole[start - first : stop - first])

    def _multiply(self, first: int, last: int, tile: int, out: Float64) -> None:
        """Multiplies a multiple of `tile` lines, panel by panel."""
        rank = self._left.shape[1]
        if rank < 2:  # matmul has no BLAS for it
            row = np.concatenate(
                [part.transpose(1, 0, 2).reshape(rank, len(part) * part.shape[2]) for part in self._panels], axis=1
            )
            np.multiply(self._left[first:last], row, out=out) if rank else out.fill(0)
            return
        tiles = self._left[first:last].reshape((last - first) // tile, 1, tile, rank)
        column = 0
        for panels in self._panels:
            count, _, size = panels.shape
            # Splitting axes never copies, so this is a view of `out`.
            target = out[:, column : column + count * size].reshape(len(tiles), tile, count, size)
            if target.size:
                np.matmul(tiles, panels[None], out=target.transpose(0, 2, 1, 3))
            column += count * size
