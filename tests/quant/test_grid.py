"""Grids and RTN against float64 brute force and against ggml's own Q4_0 and Q8_0 quantizers."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.errors import LayoutError, UsageError
from quantpress.quant.grid import SCALE_TYPES, Grid, fit, round_to_nearest
from quantpress.quant.qtensor import BITS, QuantizedTensor


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.sampled_from(BITS), group=st.sampled_from([-1, 16, 32]),
    symmetric=st.booleans(), scale=st.sampled_from(sorted(SCALE_TYPES)), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_code_is_the_nearest_value_of_the_stored_grid(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, scale: str, seed: int
) -> None:
    weight = _weights(rows, columns, seed)
    quantized = round_to_nearest(weight, Grid(bits, group, symmetric, scale))
    size = quantized.group_size
    for row in range(rows):
        for column in range(columns):
            step = float(quantized.scale[row, column // size])
            zero = int(quantized.zeros()[row, column // size])
            levels = step * (np.arange(1 << bits) - zero)
            best = np.abs(levels - float(weight[row, column])).min()
            chosen = abs(float(levels[quantized.codes[row, column]]) - float(weight[row, column]))
            # a tie may go either way, and float32 division can call a near tie one: half an ulp of the quotient
            assert chosen <= best + abs(step) * 2.0**-14


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_of_a_group_is_covered(symmetric: bool) -> None:
    weight = _weights(8, 128)
    quantized = round_to_nearest(weight, Grid(4, 32, symmetric))
    step = np.abs(np.repeat(quantized.scale.astype(np.float64), 32, axis=1))
    # half a step, and one step at the end of a symmetric range that lacks a code; float16 scales are off by 2^-11,
    # which the greatest of 15 codes multiplies
    allowed = step * ((1.0 if symmetric else 0.5) + 16 * 2.0**-11)
    assert (np.abs(quantized.dequantize() - weight) <= allowed).all()


def test_symmetric_groups_of_32_are_ggml_q4_0_and_the_codes_are_its_own() -> None:
    weight = _weights(64, 256)
    quantized = round_to_nearest(weight, Grid(4, 32))
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    blocks = packed.reshape(64, 8, 18)
    scale = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
    assert (scale == quantized.scale).all()
    nibbles = np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=-1).reshape(64, 256)
    # ggml rounds w / d + 8.5 downwards with the scale before it was rounded to float16: ties and near ties differ
    assert (nibbles != quantized.codes).mean() < 0.01


def test_clip_search_never_has_a_greater_error_than_the_full_range() -> None:
    weight = _weights(32, 256)
    for bits in BITS:
        for symmetric in (True, False):
            plain = round_to_nearest(weight, Grid(bits, 64, symmetric)).dequantize() - weight
            clipped = round_to_nearest(weight, Grid(bits, 64, symmetric, clip_search=True)).dequantize() - weight
            errors = [np.square(e.reshape(32, 4, 64), dtype=np.float64).sum(-1) for e in (plain, clipped)]
            assert (errors[1] <= errors[0] * (1 + 1e-6)).all()  # sums of 64 float32 squares in another order
            assert bits == 8 or errors[1].sum() < 0.98 * errors[0].sum()


def test_importance_moves_the_clip_search_towards_what_matters() -> None:
    weight, importance = _weights(64, 128), np.ones(128, np.float32)
    importance[::2] = 100
    plain = round_to_nearest(weight, Grid(3, 128, clip_search=True))
    scale, _ = fit(weight, Grid(3, 128, clip_search=True), importance)
    weighted = np.clip(np.rint(weight / scale.astype(np.float32)) + 4, 0, 7)
    values = scale.astype(np.float32) * (weighted - 4)
    assert (((values - weight) ** 2) @ importance).sum() < (((plain.dequantize() - weight) ** 2) @ importance).sum()


@pytest.mark.parametrize("name", sorted(SCALE_TYPES))
def test_scales_are_rounded_as_the_type_is_by_numpy(name: str) -> None:
    from quantpress.quant.grid_kernels import round_scale

    precision, least = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}[name]
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-9, 4, 500), [0.0, 6e-8, 2.0**-24, 1.5]])
    for value in values.astype(np.float32):
        assert round_scale(float(value), precision, least) == float(SCALE_TYPES[name].type(value))


def test_groups_of_zeros_give_zeros_and_no_warning() -> None:
    for symmetric in (True, False):
        quantized = round_to_nearest(np.zeros((2, 64), np.float32), Grid(4, 32, symmetric))
        assert not quantized.dequantize().any()


def test_scales_beyond_the_stored_type_are_refused() -> None:
    with pytest.raises(LayoutError, match="too large for F16"):
        round_to_nearest(np.full((1, 32), 1e7, np.float32), Grid(4, 32))
    assert np.isfinite(
        round_to_nearest(np.full((1, 32), 1e7, np.float32), Grid(4, 32, scale_type="BF16")).dequantize()
    ).all()


def test_a_shorter_last_group_has_a_scale_of_its_own() -> None:
    weight = _weights(3, 40)
    weight[:, 32:] *= 100
    quantized = round_to_nearest(weight, Grid(4, 32))
    alone = round_to_nearest(np.ascontiguousarray(weight[:, 32:]), Grid(4, 32))
    assert quantized.groups == 2
    assert (quantized.dequantize()[:, 32:] == alone.dequantize()).all()


def test_wrong_options_and_parts_are_refused() -> None:
    for bad in ({"bits": 5}, {"group_size": 0}, {"scale_type": "F64"}):
        with pytest.raises(UsageError):
            Grid(**bad)  # type: ignore[arg-type]
    codes, scale = np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float16)
    with pytest.raises(LayoutError, match="scale has shape"):
        QuantizedTensor(codes, scale, None, 4, 16)
    with pytest.raises(LayoutError, match="a code of 16"):
        QuantizedTensor(codes + 16, scale, None, 4, 32)
    with pytest.raises(LayoutError, match="a zero of 16"):
        QuantizedTensor(codes, scale, np.full((2, 1), 16, np.uint8), 4, 32)


def test_dequantize_is_the_formula_in_float64_rounded_once() -> None:
    rng = np.random.default_rng(0)
    scale = rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
    codes, zero = rng.integers(0, 256, (4, 40), np.uint8), rng.integers(0, 256, (4, 3), np.uint8)
    wide = np.repeat(scale.astype(np.float64), 16, 1)[:, :40] * (
        codes - np.repeat(zero.astype(np.float64), 16, 1)[:, :40]
    )
    assert (QuantizedTensor(codes, scale, zero, 8, 16).dequantize() == wide.astype(np.float32)).all()
