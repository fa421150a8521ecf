"""Products of thin matrices, tile by tile, so that each value depends on its place alone and BLAS starts no threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["multiply_into", "tile_lines"]

Float64 = NDArray[np.float64]

# Values of a tile that few columns leave small: enough work for one call.
_TILE = 1 << 14

# Multiplications that OpenBLAS does without its own threads (interface/gemm.c: 65536 * GEMM_MULTITHREAD_THRESHOLD, and
# interface/gemv.c: 2304 times the same). Two workers that both start threads wait for each other: measured 3 to 100
# times slower than tiles on two cores.
_GEMM_LIMIT = 1 << 18
_GEMV_LIMIT = 9216

_MOST_COLUMNS = 1 << 17  # wider lines are tiles of their own, to bound the memory of a tile


def tile_lines(width: int) -> int:
    """Gives how many lines of `width` values form a tile; tiles begin at multiples of it."""
    if width > _MOST_COLUMNS:
        return 1
    return max(16, _TILE // max(width, 1) // 16 * 16)


def multiply_into(left: Float64, right: Float64, start: int, stop: int, out: Float64) -> None:
    """Fill `out` (stop - start, width) with lines [start, stop) of `left` (N, r) @ `right` (r, width).

    All float64, C order. Each value comes out of the same call of BLAS whatever lines are asked for: tiles are computed
    whole, so asking for whole ones is cheaper.
    """
    rank, width = right.shape
    if rank < 2:
        np.multiply(left[start:stop], right, out=out) if rank else out.fill(0)
        return
    tile = tile_lines(width)
    first, last = -(-start // tile) * tile, stop // tile * tile
    if first > start:
        _multiply_part(left, right, start, min(first, stop), out[: first - start])
    if last > first:
        _multiply_tiles(left[first:last], right, out[first - start : last - start], tile)
    if stop > max(first, last):
        _multiply_part(left, right, max(first, last), stop, out[max(first, last) - start :])


def _multiply_part(left: Float64, right: Float64, start: int, stop: int, out: Float64) -> None:
    """Give lines that all lie in one tile."""
    tile = tile_lines(right.shape[1])
    first = start // tile * tile
    last = min(first + tile, len(left))
    whole = out if stop - start == last - first else np.empty((last - first, right.shape[1]))
    _multiply_tiles(left[first:last], right, whole, last - first)
    if whole is not out:
        np.copyto(out, whole[start - first : stop - first])


def _multiply_tiles(left: Float64, right: Float64, out: Float64, tile: int) -> None:
    """Multiply lines, a multiple of `tile`, in panels of columns."""
    rank, width = right.shape
    limit = _GEMV_LIMIT if tile == 1 else _GEMM_LIMIT
    panel = max(1, min(width, max(16, limit // (tile * rank))))
    whole = width // panel * panel
    tiles = left.reshape(-1, 1, tile, rank)
    for start, stop, size in ((0, whole, panel), (whole, width, width - whole)):
        if stop > start and len(tiles):
            count = (stop - start) // size
            panels = right[:, start:stop].reshape(rank, count, size).transpose(1, 0, 2)
            # Splitting axes never copies, so this is a view of `out`.
            target = out[:, start:stop].reshape(len(tiles), tile, count, size).transpose(0, 2, 1, 3)
            np.matmul(tiles, panels[None], out=target)
