"""GPTQ against the paper's algorithm in float64, brute force on small cases, and RTN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantpress.quant.errors import InputError
from quantpress.quant.gptq import GptqOptions, factorize, gptq, gptq_shared
from quantpress.quant.grid import Grid, fit, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor


def _case(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    mixing = np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = rng.standard_normal((8 * columns, columns)) * rng.gamma(1, 1, columns) @ mixing
    return weight, (inputs.T @ inputs).astype(np.float32)


def _error(weight: np.ndarray, quantized: QuantizedTensor, hessian: np.ndarray) -> float:
    difference = quantized.dequantize().astype(np.float64) - weight
    return float(((difference @ hessian) * difference).sum())


def _paper(weight: np.ndarray, hessian: np.ndarray, grid: Grid, damping: float, order: np.ndarray) -> np.ndarray:
    """Algorithm 1 in float64, column by column, without blocks, with the inverse formed as the paper does."""
    scale, zero = fit(weight, grid)
    size = grid.group(weight.shape[1])
    wide = scale.astype(np.float64)
    zeros = np.full(scale.shape, 1 << (grid.bits - 1)) if zero is None else zero.astype(np.float64)
    matrix = hessian.astype(np.float64)[np.ix_(order, order)]
    matrix = matrix + damping * matrix.diagonal().mean() * np.eye(len(order))
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    work, codes = weight.astype(np.float64)[:, order], np.empty(weight.shape, np.uint8)
    for column, place in enumerate(order):
        step, middle = wide[:, place // size], zeros[:, place // size]
        code = np.clip(np.rint(work[:, column] / step) + middle, 0, (1 << grid.bits) - 1)
        codes[:, place] = code
        error = (work[:, column] - step * (code - middle)) / upper[column, column]
        work[:, column:] -= np.outer(error, upper[column, column:])
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_paper_in_float64(act_order: bool, symmetric: bool) -> None:
    weight, hessian = _case(24, 300)
    grid, options = Grid(4, 64, symmetric), GptqOptions(act_order=act_order)
    factor = factorize(hessian, options)
    quantized, _ = gptq(weight, factor, grid)
    wanted = _paper(weight, hessian, grid, options.damping, factor.order)
    # float32 against float64: once a near tie falls the other way, the columns after it in that row see another error
    assert (quantized.codes == wanted).all(axis=1).mean() > 0.8
    assert np.abs(quantized.codes.astype(int) - wanted).max() <= 2


def test_an_identity_hessian_gives_rtn_bit_for_bit() -> None:
    weight, _ = _case(40, 200)
    for grid in (Grid(4, 64), Grid(3, -1, False), Grid(2, 16), Grid(8, 32)):
        quantized, _ = gptq(weight, factorize(np.eye(200, dtype=np.float32), GptqOptions()), grid)
        assert (quantized.codes == round_to_nearest(weight, grid).codes).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_on_the_inputs_is_less_than_that_of_rtn(bits: int) -> None:
    weight, hessian = _case(64, 256)
    grid = Grid(bits, 64)
    quantized, report = gptq(weight, factorize(hessian, GptqOptions()), grid)
    assert _error(weight, quantized, hessian) < 0.7 * _error(weight, round_to_nearest(weight, grid), hessian)
    assert report.loss > 0


def test_it_is_near_the_best_of_all_codes_where_all_can_be_tried() -> None:
    grid, ratios = Grid(2, -1), []
    for seed in range(10):
        weight, hessian = _case(1, 6, seed)
        scale, _ = fit(weight, grid)
        quantized, _ = gptq(weight, factorize(hessian, GptqOptions()), grid)
        tries = (
            QuantizedTensor(np.array([codes], np.uint8), scale, None, 2, 6)
            for codes in itertools.product(range(4), repeat=6)
        )
        best = min(_error(weight, one, hessian) for one in tries)
        ratios.append(_error(weight, quantized, hessian) / best)
        assert ratios[-1] > 1 - 1e-6
    assert np.median(ratios) < 1.5


def test_rows_are_independent_so_shared_runs_equal_separate_ones() -> None:
    weight, hessian = _case(48, 256)
    factor, grid = factorize(hessian, GptqOptions()), Grid(4, 64)
    together, _ = gptq(weight, factor, grid)
    for part in (slice(0, 16), slice(16, 48)):
        assert (gptq(np.ascontiguousarray(weight[part]), factor, grid)[0].codes == together.codes[part]).all()


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight, hessian = _case(300, 600)  # several tiles and chunks, none of them whole
    found = set()
    for threads in (1, 2, 3):
        factor = factorize(hessian, GptqOptions(), threads)
        quantized, report = gptq(weight, factor, Grid(3, 64, clip_search=True), threads)
        found.add((factor.upper.tobytes(), quantized.codes.tobytes(), quantized.scale.tobytes(), report))
    assert len(found) == 1


def test_matrices_that_share_an_input_come_out_as_each_alone_whatever_their_grids() -> None:
    weight, hessian = _case(200, 256)
    factor, grids = factorize(hessian, GptqOptions()), [Grid(4, 64), Grid(3, -1, False), Grid(4, 64)]
    parts = [np.ascontiguousarray(weight[rows]) for rows in (slice(0, 130), slice(130, 140), slice(140, 200))]
    for (together, report), part, grid in zip(gptq_shared(parts, factor, grids, 2), parts, grids, strict=True):
        alone, own = gptq(part, factor, grid)
        assert (alone.codes == together.codes).all()
        assert own == report


@pytest.mark.parametrize("columns", [1, 5, 255, 256, 257, 600])
def test_the_factor_inverts_the_damped_hessian(columns: int) -> None:
    _, hessian = _case(1, columns)
    before = hessian.copy()
    for act_order in (True, False):
        factor = factorize(hessian, GptqOptions(act_order=act_order, damping=0.1))
        damped = hessian.astype(np.float64) + factor.added * np.eye(columns)
        upper = factor.upper.astype(np.float64)
        product = upper.T @ upper @ damped[np.ix_(factor.order, factor.order)]
        # float32: 2^-24 for each of K sums, times the condition that a damping of a tenth leaves
        assert np.abs(product - np.eye(columns)).max() < 1e-4
        assert not np.tril(upper, -1).any()
        costs = 1 / np.linalg.inv(damped).diagonal()
        assert np.allclose(factor.importance, costs, rtol=1e-4)
    assert (hessian == before).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_that_is_reported_is_that_of_the_hessian_without_damping(symmetric: bool) -> None:
    weight, hessian = _case(40, 200)
    hessian[[3, 70]] = hessian[:, [3, 70]] = 0
    quantized, report = gptq(weight, factorize(hessian, GptqOptions(damping=0.05)), Grid(3, 64, symmetric))
    loss = _error(weight, quantized, hessian)
    assert report.loss == pytest.approx(loss, rel=1e-3)
    power = float((weight.astype(np.float64) ** 2 @ hessian.diagonal()).sum())
    assert report.relative_loss == pytest.approx(loss / power, rel=1e-3)


def test_permuted_inputs_give_permuted_codes() -> None:
    weight, hessian = _case(16, 128)
    grid, places = Grid(4, -1), np.random.default_rng(1).permutation(128)
    plain, _ = gptq(weight, factorize(hessian, GptqOptions()), grid)
    moved, _ = gptq(
        np.ascontiguousarray(weight[:, places]), factorize(hessian[np.ix_(places, places)], GptqOptions()), grid
    )
    assert (moved.codes == plain.codes[:, places]).mean() > 0.99  # the order is the same, sums are rounded alike


def test_columns_without_input_are_counted_and_do_no_harm() -> None:
    weight, hessian = _case(16, 128)
    hessian[[3, 70]] = hessian[:, [3, 70]] = 0
    quantized, report = gptq(weight, factorize(hessian, GptqOptions()), Grid(4, 32))
    assert report.dead == 2
    assert not quantized.dequantize()[:, [3, 70]].any()


def test_a_singular_hessian_is_damped_until_it_works_and_the_report_says_so() -> None:
    weight, _ = _case(8, 64)
    one = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 1e3
    factor = factorize(np.outer(one, one).astype(np.float32), GptqOptions(damping=1e-9))
    assert factor.damping > 1e-9
    assert np.isfinite(gptq(weight, factor, Grid(4, 32))[0].dequantize()).all()


def test_what_is_not_a_hessian_is_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        factorize(np.full((4, 4), np.nan, np.float32), GptqOptions())
    with pytest.raises(InputError, match="positive definite"):
        factorize(np.array([[1, 1e9], [1e9, 1]], np.float32), GptqOptions())
