"""The column loop of GPTQ inside ggml's blocks, compiled by numba; rows lie side by side as in `gptq_kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = ["round_columns"]

Array = NDArray[Any]

_ZERO = np.float32(0)
_ONE = np.float32(1)


@compiled("contract")
def round_columns(
    work: Array, upper: Array, step: Array, offset: Array, groups: Array, levels: Array, codes: Array, errors: Array,
    even: bool,
) -> None:  # fmt: skip
    """Finds the codes of some columns and passes each error on to those of them that follow.

    Args:
        work: (B, R) float32, the columns in visiting order; changed.
        upper: (B, B) float32 diagonal block of U.
        step: (G, R) float32.
        offset: (G, R) float32.
        groups: (B,) group of each column.
        levels: (L,) float32 rising.
        codes: (B, R) uint8, filled.
        errors: (B, R) float32, filled with error / diagonal.
        even: whether levels are 1 apart.
    """
    lanes, low, top = work.shape[1], levels[0], np.float32(levels.size - 1)
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    for column in range(work.shape[0]):
        values, error, code = work[column], errors[column], codes[column]
        scale, shift, diagonal = step[groups[column]], offset[groups[column]], upper[column, column]
        for row in range(lanes):
            # a step of 0 stands for the offset, whatever the code: it takes the code whose level is nearest to 0
            divisor = _ONE if scale[row] == _ZERO else scale[row]
            wanted = (values[row] - shift[row]) / divisor if scale[row] != _ZERO else _ZERO
            if even:
                chosen = min(max(np.rint(wanted - low), _ZERO), top)
                code[row] = np.uint8(chosen)
                error[row] = (values[row] - (scale[row] * (chosen + low) + shift[row])) / diagonal
            else:
                place = 0
                for bound in bounds:
                    place += wanted > bound
                code[row] = np.uint8(place)
                error[row] = (values[row] - (scale[row] * levels[place] + shift[row])) / diagonal
        for later in range(column + 1, work.shape[0]):
            factor, target = upper[column, later], work[later]
            for row in range(lanes):
                target[row] -= error[row] * factor


@compiled("contract")
def refine_columns(
    error: Array, gradient: Array, metric: Array, step: Array, offset: Array, levels: Array, codes: Array, group: int,
    even: bool,
) -> None:  # fmt: skip
    """Moves each code of some columns to where it costs least while all others stay.

    Args:
        error: (B, R) float32, quantized minus wanted; changed.
        gradient: (B, R) float32, these columns of metric times error; kept up to date for columns that follow.
        metric: (B, B) float32, of these columns.
        step: (G, R) float32 of these columns' groups.
        offset: (G, R) float32.
        levels: (L,) float32 rising.
        codes: (B, R) uint8; changed.
        group: columns of a group.
        even: whether levels are 1 apart.
    """
    lanes, low, top = error.shape[1], levels[0], np.float32(levels.size - 1)
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    moved = np.empty(lanes, np.float32)
    for column in range(error.shape[0]):
        weight = metric[column, column]
        if weight <= _ZERO:
            continue
        scale, shift, code, off, slope = (
            step[column // group], offset[column // group], codes[column], error[column], gradient[column],
        )  # fmt: skip
        for row in range(lanes):
            before = scale[row] * levels[code[row]] + shift[row]
            if scale[row] == _ZERO:
                moved[row] = _ZERO
                continue
            wanted = (before - slope[row] / weight - shift[row]) / scale[row]
            if even:
                place = int(min(max(np.rint(wanted - low), _ZERO), top))
            else:
                place = 0
                for bound in bounds:
                    place += wanted > bound
            moved[row] = scale[row] * levels[place] + shift[row] - before
            code[row] = np.uint8(place)
            off[row] += moved[row]
        for later in range(column + 1, error.shape[0]):
            factor, target = metric[column, later], gradient[later]
            for row in range(lanes):
                target[row] += moved[row] * factor


@compiled("contract")
def refit_group(
    error: Array, gradient: Array, metric: Array, levels: Array, codes: Array, scales: Array, unit: Array,
    first: int, size: int, bounds: tuple[int, int], affine: bool,
) -> None:  # fmt: skip
    """Moves step and offset of a group to the multiples of their units that cost least while the codes stay.

    Args:
        error: (B, R) float32, quantized minus wanted, of a run of columns that the group is part of; changed.
        gradient: (B, R) float32, these columns of metric times error; kept up to date for all of them.
        metric: (B, B) float32, of these columns.
        levels: (L,) float32 rising.
        codes: (B, R) uint8.
        scales: (2, R) float32 step and offset of the group; changed.
        unit: (2, R) float32 what step and offset are multiples of.
        first: first column of the group among these.
        size: columns of the group.
        bounds: least and greatest multiple of a step; of an offset 0 and the greatest.
        affine: whether there is an offset.
    """
    lanes = error.shape[1]
    slope, level_slope = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    square, mixed, flat = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32), _ZERO
    values, row_sum = np.empty((size, lanes), np.float32), np.empty(lanes, np.float32)
    for column in range(size):
        for row in range(lanes):
            values[column, row] = levels[codes[first + column, row]]
    for column in range(size):
        row_sum[:] = _ZERO
        for other in range(size):
            factor = metric[first + column, first + other]
            flat += factor
            for row in range(lanes):
                row_sum[row] += factor * values[other, row]
        for row in range(lanes):
            level_slope[row] += values[column, row] * gradient[first + column, row]
            slope[row] += gradient[first + column, row]
            square[row] += values[column, row] * row_sum[row]
            mixed[row] += row_sum[row]
    moves = np.zeros((2, lanes), np.float32)
    for row in range(lanes):
        moves[0, row], moves[1, row] = _best_move(
            level_slope[row], slope[row], square[row], mixed[row], flat, scales[0, row], scales[1, row], unit[0, row],
            unit[1, row], bounds, affine,
        )  # fmt: skip
        scales[0, row] += moves[0, row]
        scales[1, row] += moves[1, row]
    change = np.empty(lanes, np.float32)
    for column in range(size):
        for row in range(lanes):
            change[row] = moves[0, row] * values[column, row] + moves[1, row]
            error[first + column, row] += change[row]
        for other in range(error.shape[0]):
            factor, target = metric[first + column, other], gradient[other]
            for row in range(lanes):
                target[row] += change[row] * factor


@compiled("contract")
def _best_move(
    level_slope: np.float32, slope: np.float32, square: np.float32, mixed: np.float32, flat: np.float32,
    step: np.float32, offset: np.float32, unit: np.float32, offset_unit: np.float32, bounds: tuple[int, int],
    affine: bool,
) -> tuple[np.float32, np.float32]:  # fmt: skip
    """Gives by how much step and offset should change; 0 and 0 where no change lowers the cost.

    The cost of changes a and b is 2 a level_slope + 2 b slope + a^2 square + 2 a b mixed + b^2 flat.
    """
    if unit == _ZERO or square <= _ZERO:
        return _ZERO, _ZERO
    least, most = np.float32(bounds[0]), np.float32(bounds[1])
    together = square * flat - mixed * mixed
    free = affine and offset_unit != _ZERO and together > np.float32(1e-3) * square * flat
    wanted = (mixed * slope - flat * level_slope) / together if free else -level_slope / square
    change = unit * min(max(np.rint((step + wanted) / unit), least), most) - step
    shift = _ZERO
    if affine and offset_unit != _ZERO and flat > _ZERO:
        best = offset - (slope + change * mixed) / flat
        shift = -(offset_unit * min(max(np.rint(-best / offset_unit), _ZERO), most)) - offset
    cost = (
        np.float32(2) * (change * level_slope + shift * slope)
        + change * change * square
        + np.float32(2) * change * shift * mixed
        + shift * shift * flat
    )
    if cost < _ZERO:
        return change, shift
    return _ZERO, _ZERO
