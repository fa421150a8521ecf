"""GPTQ: rounds a matrix column by column and lets the columns to come make up for each error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), Algorithm 1. Scales and zeros are fixed before the first update, so columns may be visited in any
order and groups stay contiguous: every format can hold the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.cholesky import invert_upper, upper_cholesky
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.grid import Grid, fit, joined
from quantpress.quant.qtensor import QuantizedTensor
from quantpress.quant.workers import Workers, chunks

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = [
    "Factor", "GptqOptions", "GptqReport", "factorize", "gptq", "gptq_shared", "mean_diagonal", "more_damping",
]  # fmt: skip

Array = NDArray[Any]

_MOST_DAMPING = 1.0  # as large as the mean diagonal: more would be round to nearest by another name
_BLOCK = 64  # columns whose errors are passed on together
_ROWS = 128  # of a chunk: the lanes of the inner loop; block and rows fit the first two caches


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ works.

    Attributes:
        act_order: visit columns by falling diagonal of the Hessian instead of from left to right.
        damping: share of the mean diagonal that is added to the diagonal.
    """

    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: a damping that is no share.
        """
        if not 0 <= self.damping < math.inf:
            raise UsageError(f"damping {self.damping}: must be a number from 0 on")


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    """What all matrices with the same input share.

    Attributes:
        upper: (K, K) float32, U with H^-1 = U^T U, columns in the order of `order`; 0 below the diagonal.
        order: (K,) columns in the order they are visited.
        diagonal: (K,) float32 of the Hessian, in the columns' own order.
        damping: the share that was needed.
    """

    upper: NDArray[np.float32]
    order: NDArray[np.int64]
    diagonal: NDArray[np.float32]
    damping: float

    @property
    def dead(self) -> NDArray[np.bool_]:
        """Columns whose input was never anything but 0, (K,)."""
        return np.equal(self.diagonal, 0)

    @property
    def importance(self) -> NDArray[np.float32]:
        """What an error of a column costs when the others may make up for it, 1 / diag(H^-1), (K,)."""
        costs = np.empty_like(self.diagonal)
        # in float64: the squares of small inputs' factors leave float32
        costs[self.order] = 1 / np.einsum("ij,ij->j", self.upper, self.upper, dtype=np.float64)
        return costs

    @property
    def added(self) -> float:
        """What was added to the diagonal."""
        return self.damping * mean_diagonal(self.diagonal)


@dataclass(frozen=True, slots=True)
class GptqReport:
    """What a run did.

    Attributes:
        loss: tr((W - Q) H (W - Q)^T): with H = X^T X / tokens the squared error of the outputs, summed over them, per
            token. Columns without input count as if they were 0 in W.
        relative_loss: the same divided by sum over j of H_jj |W_j|^2, the power that the outputs would have if the
            inputs were uncorrelated (that of the outputs themselves would cost as much as quantizing).
        damping: share of the mean diagonal that was added.
        dead: columns without input.
    """

    loss: float
    relative_loss: float
    damping: float
    dead: int


def mean_diagonal(diagonal: NDArray[np.float32]) -> float:
    """Mean over all columns, where those without input count as the others do on average."""
    alive = diagonal[diagonal > 0]
    return float(alive.mean(dtype=np.float64)) if alive.size else 1.0


def more_damping(damping: float) -> float:
    """Gives the damping to try where this one was too little: tenfold, up to the mean diagonal.

    Raises:
        InputError: there is none.
    """
    if damping >= _MOST_DAMPING:
        raise InputError(f"the Hessian is not positive definite, even with a damping of {damping:g}")
    return min(max(10 * damping, 1e-4), _MOST_DAMPING)


def factorize(
    hessian: NDArray[np.float32], options: GptqOptions, threads: int = 1, *, order: NDArray[np.int64] | None = None
) -> Factor:
    """Inverts a Hessian into the triangular factor that the column loop needs.

    The damping grows tenfold up to the mean diagonal where the matrix is not positive definite in float32.

    Args:
        hessian: (K, K) float32, X^T X of the inputs; only its scale is free. Not changed; one matrix of its size and
            less than another is needed beside it.
        options: order and damping.
        threads: workers; the bytes do not depend on it.
        order: (K,) columns in the order they are to be visited, in the place of that of the options.

    Raises:
        InputError: it is not finite, or not positive definite whatever the damping.
    """
    import torch

    if not np.isfinite(hessian).all():
        raise InputError("the Hessian is not finite: the layer's inputs or their squares are beyond float32")
    diagonal = hessian.diagonal().copy()
    if order is None:
        order = np.argsort(-diagonal, kind="stable") if options.act_order else np.arange(len(diagonal))
    filled = np.where(diagonal == 0, np.float32(mean_diagonal(diagonal)), diagonal)[order]
    matrix, damping = torch.empty(hessian.shape), options.damping
    with Workers(threads) as workers:
        while True:
            workers.run(partial(_permute, hessian, order, matrix.numpy(), rows) for rows in chunks(len(order), _ROWS))
            matrix.diagonal().copy_(torch.from_numpy(filled) + damping * mean_diagonal(diagonal))
            if upper_cholesky(matrix, workers):
                break
            damping = more_damping(damping)
        invert_upper(matrix, workers)
    return Factor(matrix.numpy(), order, diagonal, damping)


def _permute(hessian: Array, order: Array, matrix: Array, rows: slice) -> None:
    """Fills rows of the permuted matrix from their diagonal on."""
    np.take(hessian[order[rows]], order[rows.start :], axis=1, out=matrix[rows, rows.start :])


def gptq(
    weight: NDArray[np.float32], factor: Factor, grid: Grid, threads: int = 1
) -> tuple[QuantizedTensor, GptqReport]:
    """Quantizes a matrix.

    Args:
        weight: (N, K) float32, finite; not changed.
        factor: of the inputs' Hessian.
        grid: what kind of grid; its clip search weighs squared errors by `Factor.importance`.
        threads: workers; the bytes do not depend on it.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    return gptq_shared([weight], factor, [grid], threads)[0]


def gptq_shared(
    weights: Sequence[NDArray[np.float32]], factor: Factor, grids: Sequence[Grid], threads: int = 1
) -> list[tuple[QuantizedTensor, GptqReport]]:
    """Quantizes matrices with the same input in one run, each as `gptq` would.

    Args:
        weights: (N, K) float32 each.
        factor: of the inputs' Hessian.
        grids: one for each matrix.
        threads: workers; the bytes do not depend on it.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    import torch

    parts = [(matrix, rows) for matrix, weight in enumerate(weights) for rows in chunks(len(weight), _ROWS)]
    upper = torch.from_numpy(factor.upper)
    importance = factor.importance if any(grid.clip_search for grid in grids) else None
    with Workers(threads) as workers:
        done = workers.run(
            partial(_quantize_chunk, weights[matrix][rows], factor, upper, grids[matrix], importance)
            for matrix, rows in parts
        )
    results = []
    for matrix, weight in enumerate(weights):
        own = [result for (which, _), result in zip(parts, done, strict=True) if which == matrix]
        results.append(_joined(weight, factor, grids[matrix], own))
    return results


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    codes: NDArray[np.uint8]
    scale: Array
    zero: NDArray[np.uint8] | None
    loss: float
    power: float


def _joined(
    weight: NDArray[np.float32], factor: Factor, grid: Grid, parts: Sequence[_Chunk]
) -> tuple[QuantizedTensor, GptqReport]:
    loss, power = sum(part.loss for part in parts), sum(part.power for part in parts)
    if not math.isfinite(loss):
        raise InputError("the errors of GPTQ are not finite: the weights or their errors are beyond float32")
    quantized = joined([(part.codes, part.scale, part.zero) for part in parts], grid, weight.shape[1])
    return quantized, GptqReport(loss, loss / power if power else 0.0, factor.damping, int(factor.dead.sum()))


def _quantize_chunk(
    weight: NDArray[np.float32], factor: Factor, upper: torch.Tensor, grid: Grid, importance: Array | None
) -> _Chunk:
    """Quantizes at most `_ROWS` rows (n, K); on one thread."""
    from quantpress.quant.gptq_kernels import error_and_power, scatter

    clean = np.ascontiguousarray(np.where(factor.dead, np.float32(0), weight) if factor.dead.any() else weight)
    size = grid.group(weight.shape[1])
    scale, zero = fit(clean, grid, importance)
    wide = scale.astype(np.float32)
    zeros = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8) if zero is None else zero
    found, losses = _visit_columns(clean, factor, upper, grid, wide, zeros)
    codes = np.empty(weight.shape, np.uint8)
    scatter(found, factor.order, codes)
    # the column loop minimizes the loss with the damped Hessian: what the damping adds is |W - Q|^2 times it
    square, power = error_and_power(clean, codes, wide, zeros, factor.diagonal, size)
    loss = float(losses[: len(weight)].sum()) - factor.added * square
    return _Chunk(codes, scale, zero, max(loss, 0.0), power)


def _visit_columns(
    clean: Array, factor: Factor, upper: torch.Tensor, grid: Grid, scale: Array, zero: Array
) -> tuple[Array, Array]:
    """Gives the codes of the columns in visiting order, (K, lanes), and the squared errors of the lanes."""
    import torch

    from quantpress.quant.gptq_kernels import gather, quantize_columns

    columns, groups = clean.shape[1], factor.order // grid.group(clean.shape[1])
    lanes = _ROWS  # always: each row then takes the same path through the kernels, wherever it stands
    work = torch.zeros((columns, lanes))
    gather(clean, factor.order, work.numpy())
    steps, middles = np.zeros((scale.shape[1], lanes), np.float32), np.zeros((scale.shape[1], lanes), np.float32)
    steps[:, : len(clean)], middles[:, : len(clean)] = scale.T, zero.T
    codes, errors, losses = np.empty((columns, lanes), np.uint8), torch.empty((_BLOCK, lanes)), np.zeros(lanes)
    for part in chunks(columns, _BLOCK):
        passed = errors[: part.stop - part.start]
        quantize_columns(
            work.numpy()[part], factor.upper[part, part], steps, middles, groups[part], codes[part], passed.numpy(),
            losses, np.float32((1 << grid.bits) - 1),
        )  # fmt: skip
        if part.stop < columns:
            work[part.stop :].addmm_(upper[part, part.stop :].T, passed, alpha=-1)
    return codes, losses
