"""GPTQ inside ggml's blocks: the algorithm in float64 with libggml's scales, plain rounding, and brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantpress.quant.block_gptq import block_gptq_shared
from quantpress.quant.block_gptq_kernels import refit_group
from quantpress.quant.drift import made_up
from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS, codes_of, parts
from quantpress.quant.ggml.block_scales import SCALE_RANGES
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.codec import quantize_rows
from quantpress.quant.ggml.types import ggml_type
from quantpress.quant.gptq import GptqOptions, factorize
from tests.quant.conftest import LibGGML

KINDS = tuple(BLOCK_GRIDS)


def _case(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    mixing = np.eye(columns) + 0.5 * rng.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = rng.standard_normal((4 * columns, columns)) * rng.gamma(1, 1, columns) @ mixing
    return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def _error(weight: np.ndarray, tensor: BlockTensor, hessian: np.ndarray, added: float = 0.0) -> np.ndarray:
    """Errors of rows in float64."""
    off = tensor.dequantize().astype(np.float64) - weight
    return ((off @ (hessian + added * np.eye(len(hessian)))) * off).sum(axis=1)


def _in_float64(weight: np.ndarray, hessian: np.ndarray, kind: str, damping: float, libggml: LibGGML) -> np.ndarray:
    """Blocks by falling power, inside of each columns by falling power, scales by libggml, the rest in float64."""
    stored, grid = ggml_type(kind), BLOCK_GRIDS[kind]
    size, diagonal = stored.block_size, hessian.diagonal().astype(np.float64)
    blocks = sorted(range(len(diagonal) // size), key=lambda block: -diagonal[block * size : (block + 1) * size].sum())
    order = [
        block * size + place
        for block in blocks
        for place in np.argsort(-hessian.diagonal()[block * size : (block + 1) * size], kind="stable")
    ]
    damped = hessian.astype(np.float64) + damping * diagonal.mean() * np.eye(len(diagonal))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper, importance = np.linalg.cholesky(inverse).T, np.empty(len(order))
    importance[order] = 1 / inverse.diagonal()
    work, codes = weight.astype(np.float64), np.empty(weight.shape, np.uint8)
    for place, column in enumerate(order):
        if place % size == 0:
            block = slice(column // size * size, (column // size + 1) * size)
            found = libggml.quantize(stored, work[:, block], importance[block])
            step, offset, group = parts(kind, found)
        scale, shift = (part[:, column % size // group].astype(np.float64) for part in (step, offset))
        level = (work[:, column] - shift) / np.where(scale == 0, 1, scale)
        code = np.abs(level[:, None] - grid.levels).argmin(axis=1)
        codes[:, column] = code
        error = (work[:, column] - (scale * grid.levels[code] + shift)) / upper[place, place]
        work[:, order[place:]] -= np.outer(error, upper[place, place:])
    return codes


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "Q2_K", "Q6_K", "IQ4_XS", "Q4_0", "Q5_1", "IQ4_NL", "Q8_0"])
def test_codes_are_those_of_the_algorithm_in_float64(kind: str, libggml: LibGGML) -> None:
    weight, hessian = _case(16, 512)
    ((tensor, _),) = block_gptq_shared([weight], hessian, [kind], sweeps=0)
    wanted = _in_float64(weight, hessian, kind, GptqOptions().damping, libggml)
    found = codes_of(kind, tensor.data)
    # float32 against float64: once a near tie falls the other way, the columns after it in that row see another error
    assert (found == wanted).mean() > 0.9
    assert (found == wanted).all(axis=1).mean() > (0.4 if kind in ("Q8_0", "Q6_K") else 0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_hessian_gives_what_plain_rounding_gives(kind: str, libggml: LibGGML) -> None:
    weight, _ = _case(24, 512)
    identity, options = np.eye(512, dtype=np.float32), GptqOptions(damping=0.0)
    ((tensor, _),) = block_gptq_shared([weight], identity, [kind], options, sweeps=0)
    plain = libggml.quantize(ggml_type(kind), weight, np.ones(512, np.float32))
    same = tensor.data == plain
    # other searches keep codes of a scale before its last rounding, or take the upper of two levels at a tie
    assert same.mean() > (0.999 if kind.endswith("_K") else 0.9)
    worse = BlockTensor(kind, tensor.data).dequantize() - weight
    assert (worse**2).sum() <= ((BlockTensor(kind, plain).dequantize() - weight) ** 2).sum() * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_on_the_inputs_is_less_than_that_of_the_plain_search(kind: str) -> None:
    weight, hessian = _case(32, 512)
    ((tensor, report),) = block_gptq_shared([weight], hessian, [kind])
    for importance in (None, hessian.diagonal().copy()):
        plain = BlockTensor(kind, quantize_rows(kind, weight, importance))
        assert _error(weight, tensor, hessian).sum() < 0.6 * _error(weight, plain, hessian).sum()
    assert report.loss == pytest.approx(_error(weight, tensor, hessian).sum(), rel=1e-3)
    power = float((weight.astype(np.float64) ** 2 @ hessian.diagonal()).sum())
    assert report.relative_loss == pytest.approx(report.loss / power, rel=1e-3)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_XS", "Q4_1"])
def test_refining_lowers_the_error_of_every_row(kind: str) -> None:
    weight, hessian = _case(32, 512)
    added, losses = GptqOptions().damping * float(hessian.diagonal().mean()), []
    for sweeps in (0, 1, 4):
        ((tensor, _),) = block_gptq_shared([weight], hessian, [kind], sweeps=sweeps)
        losses.append(_error(weight, tensor, hessian, added))
    # a move that does not pay in float32 may cost a rounding of the sum in float64
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-5)).all()
    assert losses[2].sum() < 0.97 * losses[0].sum()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_0", "IQ4_XS"])
def test_no_other_code_of_a_weight_is_better_once_refining_has_come_to_rest(kind: str) -> None:
    weight, hessian = _case(4, 256)
    ((tensor, _),) = block_gptq_shared([weight], hessian, [kind], sweeps=60)
    damped = hessian + GptqOptions().damping * hessian.diagonal().mean() * np.eye(256)
    off = tensor.dequantize().astype(np.float64) - weight
    step, offset, group = parts(kind, tensor.data)
    tried = np.repeat(step, group, 1)[..., None] * BLOCK_GRIDS[kind].levels + np.repeat(offset, group, 1)[..., None]
    move = tried - tensor.dequantize()[..., None]  # (rows, columns, levels)
    gain = 2 * (off @ damped)[..., None] * move + move**2 * damped.diagonal()[:, None]
    assert gain.min() > -1e-5 * _error(weight, tensor, hessian).min()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K"])
def test_steps_and_offsets_of_a_group_move_to_the_best_multiples_or_near(kind: str) -> None:
    grid, limits, rng, lanes = BLOCK_GRIDS[kind], SCALE_RANGES[kind], np.random.default_rng(0), 128
    size, levels = grid.group, grid.levels
    _, metric = _case(1, size)
    wanted = rng.standard_normal((size, lanes)).astype(np.float32)
    unit = np.stack([np.full(lanes, 3 / limits[1] / levels.size * 2), np.full(lanes, 2 / limits[1])]).astype(np.float32)
    steps, offsets = rng.integers(0, limits[1] + 1, lanes), rng.integers(0, limits[1] + 1, lanes) * grid.affine
    scales = np.stack([unit[0] * steps, -unit[1] * offsets]).astype(np.float32)
    codes = rng.integers(0, levels.size, (size, lanes)).astype(np.uint8)
    order = np.argsort(np.argsort(wanted, axis=0), axis=0)
    codes = (order * levels.size // size).astype(np.uint8)
    before = scales[0] * levels[codes] + scales[1] - wanted
    error, gradient = before.copy(), metric @ before
    refit_group(error, gradient, metric, levels, codes, scales, unit, 0, size, limits, grid.affine)
    assert np.allclose(error, scales[0] * levels[codes] + scales[1] - wanted, atol=1e-5)
    assert np.allclose(gradient, metric @ error, atol=1e-4)
    multiples = np.arange(limits[0], limits[1] + 1)
    shifts = np.arange(limits[1] + 1) if grid.affine else np.zeros(1)
    for lane in range(0, lanes, 8):
        tried = unit[0, lane] * multiples[:, None, None] * levels[codes[:, lane]] - unit[1, lane] * shifts[:, None]
        off = tried - wanted[:, lane]
        costs = np.einsum("abi,ij,abj->ab", off, metric, off)
        own = float(error[:, lane] @ metric @ error[:, lane])
        old = float(before[:, lane] @ metric @ before[:, lane])
        assert own <= old * (1 + 1e-5)
        assert own <= costs.min() + 0.1 * max(old - costs.min(), 0) + 0.05 * old


def test_matrices_that_share_an_input_come_out_as_each_alone_whatever_their_types() -> None:
    weight, hessian = _case(160, 256)
    kinds = ["Q4_K", "Q6_K", "Q4_0", "Q2_K"]
    split = [
        np.ascontiguousarray(weight[rows])
        for rows in (slice(0, 131), slice(131, 140), slice(140, 150), slice(150, 160))
    ]
    for (together, report), part, kind in zip(block_gptq_shared(split, hessian, kinds), split, kinds, strict=True):
        ((alone, own),) = block_gptq_shared([part], hessian, [kind])
        assert (alone.data == together.data).all()
        assert own == report


def test_rows_are_independent_of_each_other_and_of_the_number_of_threads() -> None:
    weight, hessian = _case(150, 512)
    ((whole, report),) = block_gptq_shared([weight], hessian, ["Q3_K"])
    for threads in (2, 3):
        ((again, other),) = block_gptq_shared([weight], hessian, ["Q3_K"], threads=threads)
        assert (again.data == whole.data).all()
        assert other == report
    ((some, _),) = block_gptq_shared([np.ascontiguousarray(weight[7:140])], hessian, ["Q3_K"])
    assert (some.data == whole.data[7:140]).all()


def test_drift_is_made_up_for_before_anything_is_rounded() -> None:
    weight, hessian = _case(20, 256)
    moved = (np.random.default_rng(1).standard_normal((256, 256)) * 0.01).astype(np.float32)
    ((tensor, _),) = block_gptq_shared([weight], hessian, ["Q6_K"], drift=moved, share=1.0)
    target = weight + weight.astype(np.float64) @ moved @ np.linalg.inv(
        hessian + GptqOptions().damping * hessian.diagonal().mean() * np.eye(256)
    )
    # what is left is the rounding to some 60 levels; the weights move by two of their deviations
    assert _error(target, tensor, hessian).sum() < 0.05 * _error(weight, tensor, hessian).sum()
    made = made_up([weight], factorize(hessian, GptqOptions()), moved, 1.0)[0]
    ((same, _),) = block_gptq_shared([made], hessian, ["Q6_K"])
    assert np.abs(same.dequantize() - tensor.dequantize()).mean() < 0.01 * weight.std()  # the order of sums differs


def test_columns_without_input_are_rounded_to_nothing_and_counted() -> None:
    weight, hessian = _case(16, 256)
    hessian[[3, 70]] = hessian[:, [3, 70]] = 0
    ((tensor, report),) = block_gptq_shared([weight], hessian, ["Q6_K"])
    assert report.dead == 2
    assert not tensor.dequantize()[:, [3, 70]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_strange_weights_come_out_finite(kind: str) -> None:
    weight, hessian = _case(6, 256)
    weight[0] = 0
    weight[1] = 0.5
    weight[2] = -1e-20
    weight[3, :] = 0
    weight[3, 5] = 30.0
    weight[4] *= 1e3
    ((tensor, report),) = block_gptq_shared([weight], hessian, [kind])
    values = tensor.dequantize()
    assert np.isfinite(values).all()
    assert np.isfinite(report.loss)
    assert not values[0].any()


def test_without_act_order_columns_are_visited_from_left_to_right() -> None:
    weight, hessian = _case(8, 512)
    found: list[Any] = [
        block_gptq_shared([weight], hessian, ["Q4_K"], GptqOptions(act_order=order), sweeps=0)[0][0].data
        for order in (True, False)
    ]
    assert (found[0] != found[1]).any()
    # the first block's scales come from the weights as they are
    importance = factorize(hessian, GptqOptions(act_order=False)).importance
    plain = quantize_rows("Q4_K", np.ascontiguousarray(weight[:, :256]), importance[:256])
    assert (found[1][:, :16] == plain[:, :16]).all()


def test_what_has_no_codes_or_does_not_divide_is_refused() -> None:
    weight, hessian = _case(4, 288)
    with pytest.raises(LayoutError, match="GPTQ finds no codes of TQ2_0"):
        block_gptq_shared([weight[:, :256]], hessian[:256, :256], ["TQ2_0"])
    with pytest.raises(LayoutError, match="a row of 288 does not divide"):
        block_gptq_shared([weight], hessian, ["Q4_K"])
