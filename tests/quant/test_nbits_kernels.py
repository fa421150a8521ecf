"""One pass that rounds and packs blocks against the grids that the other formats are rounded to, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantpress.quant.grid import SCALE_ROUNDING, Grid, round_to_nearest
from quantpress.quant.nbits_kernels import round_blocks
from quantpress.quant.qtensor import group_count

Float = NDArray[np.float32]


def rounded(weight: Float, grid: Grid) -> tuple[NDArray[np.uint8], Float, NDArray[np.uint8]]:
    """Gives codes (N, blocks * size), one to a byte whatever their bits, scales and zeros."""
    rows, columns = weight.shape
    blocks = group_count(columns, grid.group_size)
    packed = np.full((rows, blocks * grid.group_size * grid.bits // 8), 0xA5, np.uint8)
    scale, zero = np.full((rows, blocks), np.nan, np.float32), np.full((rows, blocks), 0xA5, np.uint8)
    precision, least = SCALE_ROUNDING[grid.scale_type]
    round_blocks(weight, packed, scale, zero, grid.group_size, grid.bits, grid.symmetric, precision, least)
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(rows, -1, grid.bits)
    codes = (bits.astype(np.uint16) << np.arange(grid.bits)).sum(-1).astype(np.uint8)
    return codes, scale, zero


@st.composite
def weights(draw: st.DrawFn) -> Float:
    """Random weights; few different values make ties of the farthest, and tiny ones make scales subnormal."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    values = random.standard_normal((rows, columns)) * 2.0 ** draw(st.integers(-140, 60))
    kind = draw(st.sampled_from(["any", "few", "positive", "sparse"]))
    if kind == "few":
        values = np.sign(values) * random.integers(0, 3, values.shape)
    if kind == "positive":
        values = np.abs(values)
    if kind == "sparse":
        values *= random.random(values.shape) < 0.05
    return values.astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(
    weights(),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 128]),
    st.booleans(),
    st.sampled_from(["F32", "BF16"]),
)
def test_codes_scales_and_zeros_are_those_of_the_grids(
    weight: Float, bits: int, size: int, symmetric: bool, scale_type: str
) -> None:
    grid = Grid(bits, size, symmetric, scale_type)
    codes, scale, zero = rounded(weight, grid)
    wanted = round_to_nearest(weight, grid)
    columns = weight.shape[1]
    np.testing.assert_array_equal(codes[:, :columns], wanted.codes)
    assert scale.tobytes() == wanted.scale.astype(np.float32).tobytes()
    np.testing.assert_array_equal(zero, wanted.zeros())
    assert not codes[:, columns:].any()  # what fills the last block up is the same for any weights


def test_the_first_of_two_that_are_equally_far_gets_the_code_that_is_exact() -> None:
    weight = np.zeros((2, 16), np.float32)
    weight[0, 3:6], weight[1, 3:6] = (4, -4, 1), (-4, 4, 1)
    codes, scale, _ = rounded(weight, Grid(4, 16, True, "F32"))
    assert scale[:, 0].tolist() == [-0.5, 0.5]
    assert codes[0, 3:6].tolist() == [0, 15, 6]  # 4, -4 (which would be 16: cut off) and 1
    assert codes[1, 3:6].tolist() == [0, 15, 10]


@pytest.mark.parametrize("scale_type", ["F16", "F32"])
def test_scales_are_rounded_before_codes_are_chosen(scale_type: str) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    codes, scale, _ = rounded(weight, Grid(8, 32, True, scale_type))
    steps = weight.reshape(64, 2, 32).astype(np.float64) / scale[..., None]
    nearest = np.clip(np.rint(steps) + 128, 0, 255)
    # a quotient in float32 may fall on the other side of a tie that is nearer than its rounding, 128 * 2^-24
    unclear = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 128 * 2.0**-23
    assert ((codes.reshape(64, 2, 32) == nearest) | unclear).all()
    if scale_type == "F16":
        assert (scale.astype(np.float16).astype(np.float32) == scale).all()


@pytest.mark.parametrize("scale_type", ["F16", "F32"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_block_of_zeros_has_the_scale_0_whose_bits_are_0(zero: float, scale_type: str) -> None:
    codes, scale, zeros = rounded(np.full((1, 16), zero, np.float32), Grid(4, 16, True, scale_type))
    assert scale.tobytes() == bytes(4)
    assert (codes == zeros).all()
