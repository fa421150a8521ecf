"""GPTQ: rounds a matrix column by column and lets the columns to come make up for each error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), Algorithm 1. Scales and zeros are fixed before the first update, so columns may be visited in any
order and groups stay contiguous: every format can hold the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid, fit
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["Factor", "GptqOptions", "GptqReport", "factorize", "gptq"]

Array = NDArray[Any]

_RETRIES = 6
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ works.

    Attributes:
        act_order: visit columns by falling diagonal of the Hessian instead of from left to right.
        damping: share of the mean diagonal that is added to the diagonal.
    """

    act_order: bool = True
    damping: float = 0.01


@dataclass(frozen=True, slots=True)
class Factor:
    """What all matrices with the same input share.

    Attributes:
        upper: (K, K) float32, U with H^-1 = U^T U, columns in the order of `order`.
        order: (K,) columns in the order they are visited.
        dead: (K,) bool, columns whose input was never anything but 0.
        damping: the share that was needed.
    """

    upper: NDArray[np.float32]
    order: NDArray[np.int64]
    dead: NDArray[np.bool_]
    damping: float


@dataclass(frozen=True, slots=True)
class GptqReport:
    """What a run did.

    Attributes:
        loss: sum over the columns of the squared errors that GPTQ minimizes.
        damping: share of the mean diagonal that was added.
        dead: columns without input.
    """

    loss: float
    damping: float
    dead: int


def factorize(hessian: NDArray[np.float32], options: GptqOptions) -> Factor:
    """Inverts a Hessian into the triangular factor that the column loop needs.

    One Cholesky of the reversed matrix and one triangular inverse give the same factor as inverting and factorizing
    again: with H = R R^T for an upper R, H^-1 = (R^-1)^T R^-1.

    Args:
        hessian: (K, K) float32, X^T X of the inputs; only its scale is free.
        options: order and damping.

    Raises:
        InputError: it is not finite, or not positive definite whatever the damping.
    """
    diagonal = hessian.diagonal().copy()
    if not np.isfinite(diagonal).all():
        raise InputError("the inputs of the layer are not finite")
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = np.argsort(-diagonal, kind="stable") if options.act_order else np.arange(len(diagonal))
    matrix = torch.from_numpy(np.ascontiguousarray(hessian[np.ix_(order[::-1], order[::-1])]))
    arranged = torch.from_numpy(np.ascontiguousarray(diagonal[order[::-1]]))
    damping = options.damping
    for _ in range(_RETRIES):
        matrix.diagonal().copy_(arranged + damping * arranged.mean())
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.item() and bool(torch.isfinite(lower.diagonal()).all()):
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(order)), upper=False)
            upper = np.ascontiguousarray(inverse.numpy()[::-1, ::-1])
            return Factor(upper, order, dead, damping)
        damping = max(10 * damping, 1e-4)
    raise InputError(f"the Hessian is not positive definite, even with a damping of {damping / 10:g}")


def gptq(
    weight: NDArray[np.float32], factor: Factor, grid: Grid, *, block: int = _BLOCK
) -> tuple[QuantizedTensor, GptqReport]:
    """Quantizes a matrix.

    Args:
        weight: (N, K) float32, finite; not changed.
        factor: of the inputs' Hessian.
        grid: what kind of grid.
        block: columns whose errors are passed on together.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    from quantpress.quant.gptq_kernels import quantize_block

    rows, columns = weight.shape
    clean = np.where(factor.dead, np.float32(0), weight) if factor.dead.any() else weight
    scale, zero = fit(clean, grid)
    size = grid.group(columns)
    wide = scale.astype(np.float32)
    zeros = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8) if zero is None else zero
    work = torch.from_numpy(np.ascontiguousarray(clean[:, factor.order]))
    upper = torch.from_numpy(factor.upper)
    codes = np.empty((rows, columns), np.uint8)
    errors = np.empty((rows, block), np.float32)
    losses = np.zeros(rows)
    groups = factor.order // size
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = slice(start, stop)
        quantize_block(
            work.numpy()[:, part], factor.upper[part, part], wide, zeros, groups[part], codes, factor.order[part],
            errors, losses, (1 << grid.bits) - 1,
        )  # fmt: skip
        if stop < columns:
            work[:, stop:].addmm_(torch.from_numpy(errors[:, : stop - start]), upper[part, stop:], alpha=-1)
    quantized = QuantizedTensor(codes, scale, zero, grid.bits, size)
    return quantized, GptqReport(float(losses.sum()), factor.damping, int(factor.dead.sum()))
