"""AWQ: scales input columns up before rounding where the inputs are large, so that their weights are rounded finer.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978), section 3.2. Candidates are s_j =
a_j^alpha and s_j = a_j^alpha / w_j^(1 - alpha), a_j the mean |x| and w_j the mean |W| / (largest |W| of the group) of
a column; the best has the least squared error of the outputs, tr(E H E^T) with E = Q(W s) / s - W, where the paper runs
the layer. The cost is bounded by looking at a sample of rows, evenly spaced over all matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.workers import Workers

__all__ = ["SearchedScale", "column_shares", "output_error", "scaled_power", "search_scale"]

Array = NDArray[Any]

_STEPS = 20  # alpha goes from 0 to 1 in so many
_WORK = 1 << 28  # rows * K^2 that one candidate may take
_FEWEST, _MOST = 32, 512  # rows of the sample, whatever that gives
_LEAST = 1e-4  # of a mean or of a scale
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False, slots=True)
class SearchedScale:
    """The scale of a site's inputs.

    Attributes:
        scale: (K,) float32; weights are multiplied by it and inputs divided.
        alpha: exponent of the inputs' means; 0 for no scaling.
        loss: squared error of the sampled rows' outputs, per token, with it; `unscaled` the same without.
    """

    scale: NDArray[np.float32]
    alpha: float
    loss: float
    unscaled: float


def scaled_power(hessian: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives the mean square of the columns of the scaled inputs, diag(H) / s^2, (K,), from H or its diagonal."""
    return np.divide(hessian if hessian.ndim == 1 else hessian.diagonal(), np.square(scale), dtype=np.float32)


def output_error(
    weight: NDArray[np.float32], grid: Grid, scale: NDArray[np.float32], hessian: NDArray[np.float32]
) -> float:
    """Gives tr(E H E^T) with E = Q(W s) / s - W, Q rounding to nearest on the grid; one thread of work.

    Args:
        weight: (n, K) float32.
        grid: what kind of grid; its clip search weighs squared errors by diag(H) / s^2.
        scale: (K,) float32.
        hessian: (K, K) float32, or its diagonal, (K,): then errors in different columns count as independent.
    """
    import torch

    quantized = round_to_nearest(weight * scale, grid, importance=scaled_power(hessian, scale))
    # copies by torch lie on 64-byte boundaries: how MKL sums depends on where a matrix begins
    error = torch.from_numpy(quantized.dequantize() / scale - weight).clone()
    if hessian.ndim == 1:
        return float((error.square() * torch.from_numpy(hessian)).sum(dtype=torch.float64))
    return float(((error @ torch.from_numpy(hessian).clone()) * error).sum(dtype=torch.float64))


def column_shares(weights: Sequence[NDArray[np.float32]], grids: Sequence[Grid]) -> NDArray[np.float32]:
    """Gives the mean over all rows of |W| / (largest |W| of the group), (K,) float32."""
    total, rows = np.zeros(weights[0].shape[1]), sum(len(weight) for weight in weights)
    for weight, grid in zip(weights, grids, strict=True):
        size, columns = grid.group(weight.shape[1]), weight.shape[1]
        for start in range(0, columns, size):
            part = np.abs(weight[:, start : start + size])
            largest = np.maximum(part.max(axis=1, keepdims=True), _TINY)
            total[start : start + size] += (part / largest).sum(axis=0, dtype=np.float64)
    return (total / rows).astype(np.float32)


def search_scale(
    weights: Sequence[NDArray[np.float32]],
    grids: Sequence[Grid],
    mean_abs: NDArray[np.float32],
    hessian: NDArray[np.float32],
    *,
    tie: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> SearchedScale:
    """Finds the scale of a site's inputs; it is 1 where none lowers the error.

    Args:
        weights: (N, K) float32, all that read the input.
        grids: one for each.
        mean_abs: (K,) float32 mean |x| of the input's columns.
        hessian: (K, K) float32, X^T X / tokens, or its diagonal, (K,).
        tie: (K,) number of the shared scale that each column has (a value head that several query heads read);
            columns of their own by default.
        threads: workers; the result does not depend on it.
    """
    import torch  # noqa: F401  (before the workers start: they set its threads)

    sample = _sample(weights)
    shares = column_shares(weights, grids)
    mean, share = _tied(mean_abs, tie), _tied(shares, tie)
    candidates = [(0.0, np.ones(len(mean), np.float32))]
    for alpha in (step / _STEPS for step in range(1, _STEPS + 1)):
        candidates += [(alpha, _candidate(mean, share, alpha, power)) for power in (0.0, 1.0 - alpha)]
    with Workers(threads) as workers:
        losses = workers.run(partial(_loss, sample, grids, scale, hessian) for _, scale in candidates)
    best = min(range(len(candidates)), key=lambda place: losses[place])
    return SearchedScale(candidates[best][1], candidates[best][0], losses[best], losses[0])


def _sample(weights: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    columns, rows = weights[0].shape[1], sum(len(weight) for weight in weights)
    wanted = min(max(_WORK // columns**2, _FEWEST), _MOST)
    step = max(1, -(-rows // wanted))
    return [np.ascontiguousarray(weight[::step]) for weight in weights]


def _tied(values: NDArray[np.float32], tie: NDArray[np.int64] | None) -> NDArray[np.float64]:
    wide = np.maximum(values.astype(np.float64), _LEAST * max(float(values.mean()), _TINY))
    if tie is None:
        return wide
    return (np.bincount(tie, wide) / np.bincount(tie))[tie]


def _candidate(mean: Array, share: Array, alpha: float, power: float) -> NDArray[np.float32]:
    scale: NDArray[np.float64] = mean**alpha / share**power
    scale /= np.sqrt(float(scale.max()) * float(scale.min()))
    return np.maximum(scale, _LEAST).astype(np.float32)


def _loss(
    sample: Sequence[NDArray[np.float32]], grids: Sequence[Grid], scale: NDArray[np.float32], hessian: Array
) -> float:
    return sum(
        output_error(weight, grid, scale, hessian) for weight, grid in zip(sample, grids, strict=True) if len(weight)
    )
