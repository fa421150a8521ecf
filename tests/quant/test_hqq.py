"""HQQ against a solver in float64, and against the clip search in its own norm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantpress.quant.grid import SCALE_TYPES, Grid, round_to_nearest
from quantpress.quant.hqq import half_quadratic

_POWER = 0.75


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (rows, columns)) * 0.02 + 0.003).astype(np.float32)


def _norms(weight: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    error = np.abs(values.astype(np.float64) - weight.astype(np.float64)) ** _POWER
    return error.reshape(len(weight), -1, size).sum(-1)


def _solve(group: np.ndarray, bits: int) -> float:
    """The paper's alternation in float64 from the full range; the norm of the best integer zero, scale in float16."""
    values, top = group.astype(np.float64), (1 << bits) - 1
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    step = (high - low) / top
    zero, penalty = -low / step, 10.0
    for _ in range(20):
        codes = np.clip(np.rint(values / step + zero), 0, top)
        error = values / step - (codes - zero)
        size = np.abs(error)
        shrunk = np.sign(error) * np.maximum(size - np.maximum(size, 1e-9) ** (_POWER - 1) / penalty, 0)
        zero = (codes - (values / step - shrunk)).mean()
        penalty *= 1.01
    stored = float(np.float16(step))
    norms = []
    for candidate in (np.floor(zero), np.ceil(zero)):
        middle = np.clip(candidate, 0, top)
        codes = np.clip(np.rint(values / stored) + middle, 0, top)
        norms.append((np.abs(values - stored * (codes - middle)) ** _POWER).sum())
    return min(norms)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_no_worse_than_the_alternation_in_float64(bits: int) -> None:
    weight = _weights(24, 128)
    quantized = half_quadratic(weight, Grid(bits, 64, symmetric=False))
    found = _norms(weight, quantized.dequantize(), 64)
    wanted = np.array([[_solve(part, bits) for part in row.reshape(-1, 64)] for row in weight])
    # float32 against float64: a group whose alternation ends beside an integer may end on its other side
    assert (found <= wanted * 1.0001).mean() > 0.95


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_is_worse_in_its_norm_than_with_the_clip_search(bits: int, symmetric: bool) -> None:
    weight, grid = _weights(32, 192), Grid(bits, 64, symmetric)
    found = _norms(weight, half_quadratic(weight, grid).dequantize(), 64)
    clipped = _norms(weight, round_to_nearest(weight, replace(grid, clip_search=True)).dequantize(), 64)
    assert (found <= clipped * (1 + 1e-5)).all()  # norms of 64 float32 values, compared in float32
    assert bits == 8 or found.sum() < 0.995 * clipped.sum()


@pytest.mark.parametrize("scale_type", sorted(SCALE_TYPES))
def test_scales_are_of_the_stored_type_and_zeros_whole(scale_type: str) -> None:
    quantized = half_quadratic(_weights(4, 96), Grid(3, 32, symmetric=False, scale_type=scale_type))
    assert quantized.scale.dtype == SCALE_TYPES[scale_type]
    assert quantized.zero is not None
    assert quantized.form.scale_type == scale_type


def test_codes_are_the_nearest_ones() -> None:
    weight = _weights(8, 96)
    quantized = half_quadratic(weight, Grid(3, 32, symmetric=False))
    step = np.repeat(quantized.scale.astype(np.float64), 32, 1)
    zero = np.repeat(quantized.zeros().astype(np.float64), 32, 1)
    nearest = np.abs(step[..., None] * (np.arange(8) - zero[..., None]) - weight[..., None]).min(-1)
    assert (np.abs(quantized.dequantize() - weight) <= nearest + np.abs(step) * 2.0**-14).all()


def test_the_bytes_do_not_depend_on_the_number_of_threads_and_odd_shapes_work() -> None:
    weight = _weights(600, 40)
    results = [half_quadratic(weight, Grid(3, 32, symmetric=False), threads) for threads in (1, 2, 3)]
    assert len({result.codes.tobytes() + result.scale.tobytes() for result in results}) == 1
    assert results[0].groups == 2


def test_groups_of_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        assert not half_quadratic(np.zeros((2, 64), np.float32), Grid(4, 32, symmetric)).dequantize().any()
