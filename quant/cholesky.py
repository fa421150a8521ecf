"""The triangular factor that GPTQ needs, in place, in tiles: the same bytes for any number of threads.

GPTQ wants U with H^-1 = U^T U, U upper. With H = R R^T for an upper R, U = R^-1: one Cholesky from the last row upwards
and one triangular inverse, 2/3 K^3 operations, instead of inverting H and factorizing again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantpress.quant.workers import Workers, chunks

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = ["invert_upper", "upper_cholesky"]

_TILE = 256  # rows and columns: large enough for matrix products at full speed, small enough for many tasks


def upper_cholesky(matrix: torch.Tensor, workers: Workers) -> bool:
    """Replaces the upper triangle of H by an upper R with H = R R^T.

    Args:
        matrix: (K, K) float32, C order; only its upper triangle is read, what is below the diagonal is lost.
        workers: run the tiles.

    Returns:
        Whether H was positive definite; if not, the matrix is lost.
    """
    tiles = chunks(len(matrix), _TILE)
    for last in reversed(range(len(tiles))):
        own, above = tiles[last], tiles[:last]
        if not workers.run([partial(_factorize_corner, matrix, own)])[0]:
            return False
        workers.run(partial(_solve_tile, matrix, row, own) for row in above)
        workers.run(partial(_update_row, matrix, row, own) for row in above)
    return True


def _factorize_corner(matrix: torch.Tensor, own: slice) -> bool:
    """From the last row upwards: torch factorizes downwards, so the tile is turned by half a turn and back."""
    import torch

    turned, failed = torch.linalg.cholesky_ex(matrix[own, own].triu().flip(0, 1))
    matrix[own, own] = turned.flip(0, 1)
    # a Cholesky of values that are not numbers may end without a word
    return not failed.item() and bool(torch.isfinite(turned.diagonal()).all())


def _solve_tile(matrix: torch.Tensor, row: slice, own: slice) -> None:
    import torch

    matrix[row, own] = torch.linalg.solve_triangular(matrix[own, own].T, matrix[row, own], upper=False, left=False)


def _update_row(matrix: torch.Tensor, row: slice, own: slice) -> None:
    rest = slice(row.start, own.start)
    matrix[row, rest].addmm_(matrix[row, own], matrix[rest, own].T, alpha=-1)


def invert_upper(matrix: torch.Tensor, workers: Workers) -> None:
    """Replaces the upper triangle of an upper triangular matrix by that of its inverse.

    Args:
        matrix: (K, K) float32, C order; what is below the diagonal becomes 0.
        workers: run the tiles.
    """
    for own in chunks(len(matrix), _TILE):
        panel = matrix[: own.start, own].clone()
        workers.run([partial(_invert_corner, matrix, own)])
        workers.run(partial(_invert_tile, matrix, row, own, panel) for row in chunks(own.start, _TILE))
    matrix.triu_()


def _invert_corner(matrix: torch.Tensor, own: slice) -> None:
    import torch

    corner = matrix[own, own].triu()
    matrix[own, own] = torch.linalg.solve_triangular(corner, torch.eye(len(corner)), upper=True)


def _invert_tile(matrix: torch.Tensor, row: slice, own: slice, panel: torch.Tensor) -> None:
    product = matrix[row, row.start : own.start] @ panel[row.start :]
    matrix[row, own] = (product @ matrix[own, own]).neg_()
