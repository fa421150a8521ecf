"""Inner loops of the grids, compiled by numba; each works on one thread and row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = ["choose_codes", "fit_groups", "nearest_code", "round_scale"]

_STEPS = 40  # shrunk ranges that the clip search tries beside the full one
_SHRINK = 0.01  # how much each is smaller than the one before

Array = NDArray[Any]


@compiled()
def round_scale(value: float, precision: int, least: int) -> float:
    """Rounds to a binary type with so many significand bits whose least subnormal is 2^least; ties to even."""
    if value == 0.0:
        return 0.0
    _, exponent = math.frexp(value)
    quantum = math.ldexp(1.0, max(exponent - precision, least))
    rounded: float = np.rint(value / quantum) * quantum
    return rounded


@compiled()
def nearest_code(value: np.float32, scale: np.float32, zero: np.float32, top: np.float32) -> np.float32:
    """Gives the code whose value is nearest; 0 / 0 is the zero."""
    if scale == np.float32(0.0):
        return zero
    code = np.rint(value / scale) + zero
    return min(max(code, np.float32(0.0)), top)


@compiled("contract", "reassoc")
def _error(weight: Array, importance: Array, scale: np.float32, zero: np.float32, top: np.float32) -> np.float64:
    """Sums weighted squared errors; the quotient comes from a product, so near ties may count as the other code.

    It sums in steps of the scale, whose squares stay inside float32 however large or small the weights are. It gives no
    number for scales below 2^-128, whose inverse is infinite.
    """
    total, inverse = np.float32(0.0), np.float32(1.0) / scale
    for column in range(weight.size):
        steps = weight[column] * inverse
        code = min(max(np.rint(steps) + zero, np.float32(0.0)), top)
        difference = steps - (code - zero)
        total += importance[column] * difference * difference
    return np.float64(total) * np.float64(scale) * np.float64(scale)


@compiled()
def _signed_absmax(weight: Array) -> np.float32:
    greatest = np.float32(0.0)
    for column in range(weight.size):
        if abs(weight[column]) > abs(greatest):
            greatest = weight[column]
    return greatest


@compiled()
def _symmetric(weight: Array, importance: Array, bits: int, search: bool, precision: int, least: int) -> np.float32:
    half = np.float32(1 << (bits - 1))
    full = -np.float64(_signed_absmax(weight)) / np.float64(half)
    best = np.float32(round_scale(full, precision, least))
    if not search or best == 0.0:
        return best
    least_error = _error(weight, importance, best, half, np.float32(2) * half - np.float32(1))
    for step in range(-_STEPS, _STEPS + 1):
        # negative steps: the other sign, whose side has one code less
        shrunk = full * (1.0 - _SHRINK * abs(step))
        candidate = np.float32(round_scale(shrunk if step >= 0 else -shrunk, precision, least))
        if candidate == 0.0:
            continue
        error = _error(weight, importance, candidate, half, np.float32(2) * half - np.float32(1))
        if error < least_error:
            best, least_error = candidate, error
    return best


@compiled()
def _asymmetric(
    weight: Array, importance: Array, bits: int, search: bool, precision: int, least: int
) -> tuple[np.float32, np.float32]:
    low, high = np.float32(0.0), np.float32(0.0)
    for column in range(weight.size):
        low, high = min(low, weight[column]), max(high, weight[column])
    top = np.float32((1 << bits) - 1)
    best, best_zero, least_error = np.float32(0.0), np.float32(0.0), np.inf
    for step in range(_STEPS + 1 if search else 1):
        shrink = 1.0 - _SHRINK * step
        # numba's float() leaves float32 as it is
        span = (np.float64(high) - np.float64(low)) * shrink
        scale = np.float32(round_scale(span / np.float64(top), precision, least))
        if scale == 0.0:
            break
        zero = min(max(np.float32(np.rint(-np.float64(low) * shrink / np.float64(scale))), np.float32(0.0)), top)
        error = _error(weight, importance, scale, zero, top) if search else np.float64(0.0)
        if step == 0 or error < least_error:  # the full range stays where no error can be told
            best, best_zero, least_error = scale, zero, error
    return best, best_zero


@compiled()
def fit_groups(
    weight: Array, importance: Array, scale: Array, zero: Array, size: int, bits: int, symmetric: bool, search: bool,
    precision: int, least: int,
) -> None:  # fmt: skip
    """Fills `scale` (N, G) float32, rounded to the stored type, and `zero` (N, G) uint8 from `weight` (N, K)."""
    for row in range(weight.shape[0]):
        for group in range(scale.shape[1]):
            part = weight[row, group * size : (group + 1) * size]
            important = importance[group * size : (group + 1) * size]
            if symmetric:
                scale[row, group] = _symmetric(part, important, bits, search, precision, least)
                zero[row, group] = 1 << (bits - 1)
            else:
                scale[row, group], found = _asymmetric(part, important, bits, search, precision, least)
                zero[row, group] = np.uint8(found)


@compiled()
def choose_codes(weight: Array, scale: Array, zero: Array, codes: Array, size: int, top: int) -> None:
    """Fills `codes` (N, K) uint8 with the nearest ones; `scale` (N, G) float32, `zero` (N, G) uint8."""
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group = column // size
            code = nearest_code(weight[row, column], scale[row, group], np.float32(zero[row, group]), np.float32(top))
            codes[row, column] = np.uint8(code)
