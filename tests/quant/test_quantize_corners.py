"""Corners of the numbers: subnormal and huge weights, equal and empty groups, zeros of both signs, vanishing scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantpress.quant.errors import InputError, LayoutError, UsageError
from quantpress.quant.gptq import GptqOptions, factorize, gptq
from quantpress.quant.grid import SCALE_TYPES, Grid, round_to_nearest
from quantpress.quant.qtensor import BITS, QuantizedTensor

LEAST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}  # subnormal scales
PRECISION = {"F16": 11, "BF16": 8, "F32": 24}

grids = st.builds(
    Grid, bits=st.sampled_from(BITS), group_size=st.sampled_from([-1, 3, 8, 16]), symmetric=st.booleans(),
    scale_type=st.sampled_from(sorted(SCALE_TYPES)), clip_search=st.booleans(),
)  # fmt: skip


@st.composite
def matrices(draw: st.DrawFn, least: int = -149, most: int = 12) -> np.ndarray:
    """Groups that hide a corner: some values of any size, many repeated, zeros of both signs, whole rows of zeros."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 21)))
    top = math.ldexp(1.0, most)
    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, top, -top, 2.0**-149, -(2.0**-126), 2.0**-24, 3e-8, -6e-8]),
        st.floats(-top, top, width=32),
        st.builds(math.ldexp, st.floats(-1, 1, width=32), st.integers(least, most)),
    )
    weight = draw(hnp.arrays(np.float32, shape, elements=values.map(np.float32), fill=values.map(np.float32)))
    weight[: draw(st.integers(0, 1))] = draw(st.sampled_from([0.0, -0.0]))
    return weight


def _levels(quantized: QuantizedTensor, row: int, column: int) -> np.ndarray:
    """All values that a weight could have become, in float64."""
    group = column // quantized.group_size
    step, zero = float(quantized.scale[row, group]), int(quantized.zeros()[row, group])
    return step * (np.arange(1 << quantized.bits, dtype=np.float64) - zero)


@settings(max_examples=150, deadline=None)
@given(weight=matrices(), grid=grids)
@example(weight=np.full((1, 8), 2.0**-149, np.float32), grid=Grid(4, 8, True, "F32", True))
@example(weight=np.full((1, 8), -(2.0**-126), np.float32), grid=Grid(3, 8, False, "BF16", True))
def test_every_finite_matrix_becomes_the_nearest_values_of_a_finite_grid(weight: np.ndarray, grid: Grid) -> None:
    quantized = round_to_nearest(weight, grid)
    values = quantized.dequantize()
    assert quantized.codes.shape == weight.shape
    assert np.isfinite(quantized.scale.astype(np.float32)).all()
    assert np.isfinite(values).all()
    for (row, column), value in np.ndenumerate(weight):
        levels = _levels(quantized, row, column)
        distance, best = abs(values[row, column] - float(value)), np.abs(levels - float(value)).min()
        # float32 calls a quotient a tie that is off by half an ulp, of at most 2^bits; and rounds the value read back
        step = abs(levels[1] - levels[0])
        assert distance <= best + 2.0**-23 * (step * (1 << grid.bits) + abs(float(values[row, column]))) + 2.0**-149


@settings(max_examples=100, deadline=None)
@given(weight=matrices(), grid=grids)
def test_zeros_of_both_signs_stay_zero(weight: np.ndarray, grid: Grid) -> None:
    assert not round_to_nearest(weight, grid).dequantize()[weight == 0].any()


@settings(max_examples=100, deadline=None)
@given(value=st.floats(2.0**-126, 2.0**100, width=32), negative=st.booleans(), grid=grids)
def test_equal_weights_are_kept_to_the_precision_of_the_scale(value: float, negative: bool, grid: Grid) -> None:
    weight = np.full((2, 11), -value if negative else value, np.float32)
    top = (1 << (grid.bits - 1)) if grid.symmetric else (1 << grid.bits) - 1
    if value / top >= 65520 and grid.scale_type == "F16":  # rounds to 65536
        with pytest.raises(LayoutError, match="too large"):
            round_to_nearest(weight, grid)
        return
    difference = np.abs(round_to_nearest(weight, grid).dequantize().astype(np.float64) - weight).max()
    # a scale is off by half an ulp, or by half the least one, times the code; float32 rounds the value once more
    off = max(2.0 ** -PRECISION[grid.scale_type] * value, LEAST[grid.scale_type] / 2 * top)
    assert difference <= off * (1 + 2.0**-10) + 2.0**-23 * value


@settings(max_examples=60, deadline=None)
@given(weight=matrices(-20, 4), grid=grids)
def test_a_symmetric_grid_of_the_negated_matrix_is_the_negated_grid(weight: np.ndarray, grid: Grid) -> None:
    grid = Grid(grid.bits, grid.group_size, True, grid.scale_type, grid.clip_search)
    plain, turned = round_to_nearest(weight, grid), round_to_nearest(-weight, grid)
    assert (plain.codes == turned.codes).all()
    assert (plain.scale == -turned.scale).all()


def _heavy(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("power", [-110, -70, -40, 40, 70, 110])
@pytest.mark.parametrize("scale_type", ["F32", "BF16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_size_of_the_weights_changes_scales_and_nothing_else(power: int, scale_type: str, symmetric: bool) -> None:
    weight, grid = _heavy(6, 64), Grid(4, 32, symmetric, scale_type, clip_search=True)
    plain, scaled = round_to_nearest(weight, grid), round_to_nearest(np.ldexp(weight, power), grid)
    assert (plain.codes == scaled.codes).all()
    assert (np.ldexp(plain.scale.astype(np.float64), power) == scaled.scale).all()
    assert (plain.zeros() == scaled.zeros()).all()


@settings(max_examples=100, deadline=None)
@given(weight=matrices(-149, 100), grid=grids, seed=st.integers(0, 9))
def test_a_clip_search_has_never_a_greater_error_than_the_full_range(weight: np.ndarray, grid: Grid, seed: int) -> None:
    importance = np.exp2(np.random.default_rng(seed).integers(-60, 60)) * np.random.default_rng(seed).random(
        weight.shape[1]
    ).astype(np.float32)
    scale_type = "F32" if grid.scale_type == "F16" else grid.scale_type  # these weights are too large for float16
    errors = []
    for search in (True, False):
        chosen = Grid(grid.bits, grid.group_size, grid.symmetric, scale_type, search)
        quantized = round_to_nearest(weight, chosen, importance=importance.astype(np.float32))
        difference = quantized.dequantize().astype(np.float64) - weight
        starts = np.arange(0, weight.shape[1], quantized.group_size)
        errors.append(np.add.reduceat(importance * difference**2, starts, axis=1))
    # the search's sums are float32 in steps of the scale: each place is off by 2^-23 of at most 2^bits steps, which
    # matters where the error itself is that small
    reach = np.add.reduceat(importance * weight.astype(np.float64) ** 2, starts, axis=1)
    assert (errors[0] <= errors[1] * (1 + 1e-4) + reach * (4 * 2.0**-23) ** 2 + 2.0**-290).all()


@pytest.mark.parametrize("scale_type", ["BF16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_that_leaves_float32_is_refused(scale_type: str, symmetric: bool) -> None:
    greatest = float(np.finfo(np.float32).max)
    for values in ([greatest, greatest], [-greatest, greatest], [-greatest, greatest / 2]):
        for bits in BITS:
            weight = np.array([values * 4], np.float32)
            try:
                quantized = round_to_nearest(weight, Grid(bits, 8, symmetric, scale_type))
            except LayoutError as error:
                assert "too large" in str(error)  # noqa: PT017 - some of these grids fit
                continue
            assert np.isfinite(quantized.dequantize()).all()


def test_a_short_last_group_and_whole_rows_of_odd_lengths_have_scales_of_their_own() -> None:
    weight = _heavy(5, 37)
    weight[:, 32:] *= 50
    for size, groups in ((16, 3), (-1, 1), (37, 1), (64, 1), (36, 2), (1, 37)):
        quantized = round_to_nearest(weight, Grid(4, size))
        assert quantized.groups == groups
        for group in range(groups):
            part = slice(group * quantized.group_size, min((group + 1) * quantized.group_size, 37))
            alone = round_to_nearest(np.ascontiguousarray(weight[:, part]), Grid(4, -1))
            assert (quantized.codes[:, part] == alone.codes).all()
            assert (quantized.scale[:, group] == alone.scale[:, 0]).all()


def test_groups_of_one_weight_are_the_weight() -> None:
    weight = _heavy(3, 20)
    for symmetric in (True, False):
        values = round_to_nearest(weight, Grid(4, 1, symmetric, "F32")).dequantize()
        # asymmetric: |w| / 15 * 15, rounded twice
        assert (np.abs(values - weight) <= (0 if symmetric else 2.0**-23) * np.abs(weight)).all()


# GPTQ


def _hessian(columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((3 * columns, columns)) * rng.gamma(1, 1, columns)
    inputs += 0.5 * inputs[:, rng.permutation(columns)]
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


@pytest.mark.parametrize("power", [-50, -20, 20, 50])
def test_the_size_of_the_inputs_changes_nothing_but_the_loss(power: int) -> None:
    weight, hessian = _heavy(9, 70), _hessian(70)
    grid = Grid(3, 32, clip_search=True)
    plain, first = gptq(weight, factorize(hessian, GptqOptions()), grid)
    # a power of 4: its root is a power of 2, so no operation rounds differently
    scaled, second = gptq(weight, factorize(np.ldexp(hessian, 2 * power), GptqOptions()), grid)
    assert (plain.codes == scaled.codes).all()
    assert (plain.scale == scaled.scale).all()
    assert second.loss == pytest.approx(math.ldexp(first.loss, 2 * power), rel=1e-9)
    assert second.relative_loss == pytest.approx(first.relative_loss, rel=1e-6)


def test_permuted_rows_give_permuted_codes_bit_for_bit() -> None:
    weight, places = _heavy(300, 64), np.random.default_rng(0).permutation(300)
    factor, grid = factorize(_hessian(64), GptqOptions()), Grid(4, 24, symmetric=False, clip_search=True)
    plain, moved = gptq(weight, factor, grid)[0], gptq(weight[places], factor, grid)[0]
    assert (moved.codes == plain.codes[places]).all()
    assert (moved.scale == plain.scale[places]).all()


@settings(max_examples=60, deadline=None)
@given(weight=matrices(-40, 10), grid=grids, act_order=st.booleans(), seed=st.integers(0, 5))
@example(weight=np.full((1, 1), 2.0**-149, np.float32), grid=Grid(2, -1, False, "F16"), act_order=False, seed=0)
@example(weight=np.full((1, 1), 2.0**-149, np.float32), grid=Grid(4, 8, True, "F16"), act_order=True, seed=1)
@example(weight=np.full((1, 1), -(2.0**-126), np.float32), grid=Grid(2, -1, False, "BF16"), act_order=False, seed=0)
@example(weight=np.full((1, 1), -(2.0**-126), np.float32), grid=Grid(2, -1, False, "BF16"), act_order=False, seed=1)
def test_gptq_gives_finite_values_and_its_loss_is_that_of_the_formula(
    weight: np.ndarray, grid: Grid, act_order: bool, seed: int
) -> None:
    columns = weight.shape[1]
    hessian = _hessian(columns, seed)
    quantized, report = gptq(weight, factorize(hessian, GptqOptions(act_order)), grid)
    values = quantized.dequantize().astype(np.float64)
    assert np.isfinite(values).all()
    assert not values[~weight.any(axis=1)].any()  # rows of zeros stay zeros
    difference = values - weight
    loss = float(((difference @ hessian.astype(np.float64)) * difference).sum())
    damped = report.damping * float(hessian.diagonal().mean(dtype=np.float64)) * float((difference**2).sum())
    # the loop sums squares of float32 errors, and the damping's part is taken off again; the errors themselves come
    # from weights to which up to K updates were rounded
    power = float((weight.astype(np.float64) ** 2 @ hessian.diagonal()).sum())
    # a float32 error may be off by half a subnormal step whatever its size, that of a weight (d) and what the loop
    # squares (e, d over the factor's diagonal): the relative part is enough for either above 4000 steps; below, a row
    # has d^T H d <= |d|^2 trace(H), and a sum of e^2
    least = weight.size * (4000 * 2.0**-149) ** 2 * (1 + float(hessian.trace(dtype=np.float64)))
    assert abs(report.loss - loss) <= 1e-3 * (loss + damped) + 1e-9 * power + least


def test_one_column_and_one_row_work() -> None:
    one = np.array([[0.3]], np.float32)
    quantized, report = gptq(one, factorize(np.array([[2.0]], np.float32), GptqOptions()), Grid(4, 128))
    assert quantized.dequantize()[0, 0] == pytest.approx(0.3, rel=2.0**-11)
    assert report.loss == pytest.approx(2 * (quantized.dequantize()[0, 0] - np.float64(one[0, 0])) ** 2, abs=1e-9)


def test_inputs_that_were_never_seen_give_zeros_and_no_error() -> None:
    quantized, report = gptq(_heavy(3, 16), factorize(np.zeros((16, 16), np.float32), GptqOptions()), Grid(4, 8))
    assert report.dead == 16
    assert report.loss == report.relative_loss == 0
    assert not quantized.dequantize().any()


@pytest.mark.parametrize("damping", [math.nan, math.inf, -0.01])
def test_damping_that_is_no_share_is_refused(damping: float) -> None:
    with pytest.raises(UsageError, match="damping"):
        GptqOptions(damping=damping)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_gptq(bad: float) -> None:
    weight = _heavy(3, 16)
    weight[1, 5] = bad
    with pytest.raises(InputError):
        gptq(weight, factorize(_hessian(16), GptqOptions()), Grid(4, 8))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_matrices_without_weights_are_refused(shape: tuple[int, int]) -> None:
    for size in (-1, 4):
        with pytest.raises(LayoutError, match="no weights"):
            round_to_nearest(np.zeros(shape, np.float32), Grid(4, size))
