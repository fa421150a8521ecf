"""The half-quadratic solver's inner loops, compiled by numba; each works on one group of one row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.grid_kernels import round_scale

__all__ = ["improve_groups"]

Array = NDArray[Any]

_ROUNDS = 20  # of the solver, and the growth of its penalty in each: HQQ's own defaults
_PENALTY = np.float32(10.0)
_GROWTH = np.float32(1.01)
_REFITS = 3  # least-squares rounds of the scale
_ZERO = np.float32(0)
_ONE = np.float32(1)
_SMALL = np.float32(1e-4)  # of a step: keeps the weights of exact hits finite


@compiled("contract", "reassoc")
def _norm(weight: Array, scale: np.float32, zero: np.float32, top: np.float32) -> np.float32:
    """Sums |error / step|^(3/4) for a code that is nearest, times |step|^(3/4)."""
    total, inverse = _ZERO, _ONE / scale
    for column in range(weight.size):
        code = min(max(np.rint(weight[column] * inverse) + zero, _ZERO), top)
        root = np.sqrt(abs(weight[column] - scale * (code - zero)))
        total += root * np.sqrt(root)
    return total


@compiled("contract", "reassoc")
def _solve_zero(weight: Array, scale: np.float32, zero: np.float32, top: np.float32) -> np.float32:
    """Gives the zero, not yet an integer, that the alternation ends with; the scale stays."""
    inverse, penalty = _ONE / scale, _PENALTY
    for _ in range(_ROUNDS):
        total = _ZERO
        for column in range(weight.size):
            place = weight[column] * inverse
            code = min(max(np.rint(place + zero), _ZERO), top)
            error = place - (code - zero)
            size = abs(error)
            # proximal step of |.|^(3/4): |e| - |e|^(-1/4) / penalty, not below 0
            kept = max(size - _ONE / (penalty * np.sqrt(np.sqrt(size + _SMALL))), _ZERO)
            total += code - (place - (kept if error > _ZERO else -kept))
        zero = total / np.float32(weight.size)
        penalty *= _GROWTH
    return zero


@compiled("contract", "reassoc")
def _refit(weight: Array, scale: np.float32, zero: np.float32, top: np.float32) -> np.float32:
    """Gives the scale of the weighted least squares whose weights |e|^(3/4 - 2) make them the norm's; codes stay."""
    above, below, inverse = _ZERO, _ZERO, _ONE / scale
    for column in range(weight.size):
        place = weight[column] * inverse
        code = min(max(np.rint(place) + zero, _ZERO), top) - zero
        size = abs(place - code) + np.float32(0.01)
        share = _ONE / (size * np.sqrt(np.sqrt(size)))
        above += share * weight[column] * code
        below += share * code * code
    return above / below if below > _ZERO else scale


@compiled()
def _improve(
    weight: Array, scale: np.float32, zero: np.float32, start: np.float32, bits: int, symmetric: bool, precision: int,
    least: int,
) -> tuple[np.float32, np.float32]:  # fmt: skip
    """Gives scale and zero of the least norm that is found from the scale `start`, or those that were given."""
    top = np.float32((1 << bits) - 1)
    best, best_zero, least_norm = scale, zero, _norm(weight, scale, zero, top)
    solved = zero if symmetric else _solve_zero(weight, start, zero, top)
    for side in range(1 if symmetric else 2):
        candidate = min(max(np.float32(math.floor(solved)) + np.float32(side), _ZERO), top)
        current = start
        for _ in range(_REFITS + 1):
            rounded = np.float32(round_scale(float(current), precision, least))
            if rounded == _ZERO:
                break
            norm = _norm(weight, rounded, candidate, top)
            if norm < least_norm:
                best, best_zero, least_norm = rounded, candidate, norm
            current = _refit(weight, rounded, candidate, top)
    return best, best_zero


@compiled()
def improve_groups(
    weight: Array, scale: Array, zero: Array, starts: Array, size: int, bits: int, symmetric: bool, precision: int,
    least: int,
) -> None:  # fmt: skip
    """Improves `scale` and `zero` (N, G) of `weight` (N, K) in place, trying scales `starts` (N, G) too."""
    for row in range(weight.shape[0]):
        for group in range(scale.shape[1]):
            part = weight[row, group * size : (group + 1) * size]
            for start in (scale[row, group], starts[row, group]):
                if scale[row, group] == _ZERO or start == _ZERO:
                    continue
                found, middle = _improve(
                    part, scale[row, group], np.float32(zero[row, group]), start, bits, symmetric, precision, least
                )
                scale[row, group], zero[row, group] = found, np.uint8(middle)
