"""Blocks taken apart and put together: the gguf package reads the bytes, and one block is checked by hand."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS, codes_of, parts, with_codes
from quantpress.quant.ggml.block_scales import SCALE_RANGES, units, with_scale_codes
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.types import ggml_type

KINDS = tuple(BLOCK_GRIDS)
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


def _blocks(kind: str, rows: int = 5, per_row: int = 3) -> np.ndarray:
    """Random bytes but for the float16 fields, which are of ordinary size."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows * per_row, ggml_type(kind).block_bytes), np.uint8)
    for place in HALVES.get(kind, (0,)):
        blocks[:, place : place + 2] = rng.standard_normal((len(blocks), 1)).astype("<f2").view(np.uint8)
    if kind == "Q8_0":
        blocks[:, 2:][blocks[:, 2:] == 128] = 0  # -128, which no quantizer writes
    return blocks.reshape(rows, -1)


def _read(kind: str, data: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def _values(kind: str, data: np.ndarray, codes: np.ndarray) -> np.ndarray:
    step, offset, group = parts(kind, data)
    return np.repeat(step, group, axis=1) * BLOCK_GRIDS[kind].levels[codes] + np.repeat(offset, group, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_step_times_level_and_offset_is_what_the_gguf_package_reads(kind: str) -> None:
    data = _blocks(kind)
    assert (_values(kind, data, codes_of(kind, data)) == _read(kind, data)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_put_into_blocks_are_read_with_the_same_steps(kind: str) -> None:
    data = _blocks(kind)
    levels = BLOCK_GRIDS[kind].levels.size
    codes = np.random.default_rng(1).integers(0, levels, codes_of(kind, data).shape, np.uint8)
    moved = with_codes(kind, data, codes)
    assert (codes_of(kind, moved) == codes).all()
    assert (_read(kind, moved) == _values(kind, data, codes)).all()
    assert (with_codes(kind, moved, codes_of(kind, data)) == data).all()


@pytest.mark.parametrize("kind", SCALE_RANGES)
def test_codes_of_steps_and_offsets_are_multiples_of_what_the_gguf_package_reads(kind: str) -> None:
    data, (least, most), grid = _blocks(kind), SCALE_RANGES[kind], BLOCK_GRIDS[kind]
    rng, shape = np.random.default_rng(1), parts(kind, data)[0].shape
    steps, offsets = rng.integers(least, most + 1, shape), rng.integers(0, most + 1, shape)
    moved, unit = with_scale_codes(kind, data, steps, offsets), units(kind, data)
    per_block = 256 // grid.group
    step = np.repeat(unit.step, per_block, axis=1) * steps.astype(np.float32)
    offset = np.repeat(unit.offset, per_block, axis=1) * offsets.astype(np.float32)
    values = np.repeat(step, grid.group, axis=1) * grid.levels[codes_of(kind, data)]
    assert (_read(kind, moved) == values - np.repeat(offset, grid.group, axis=1)).all()
    assert bool(unit.offset.any()) == grid.affine


def test_a_block_of_q4_k_by_hand() -> None:
    data = np.zeros((1, 144), np.uint8)
    data[0, :4] = np.array([0.5, 0.25], "<f2").view(np.uint8)
    data[0, 4], data[0, 8] = 3, 2  # of sub-block 0: step 0.5 * 3, offset -0.25 * 2
    codes = np.zeros((1, 256), np.uint8)
    codes[0, 1], codes[0, 32] = 5, 7
    moved = with_codes("Q4_K", data, codes)
    assert moved[0, 17] == 5
    assert moved[0, 16] == 7 << 4
    assert (moved[0, :16] == data[0, :16]).all()
    assert BlockTensor("Q4_K", moved).dequantize()[0, :3].tolist() == [-0.5, 7.0, -0.5]


def test_what_does_not_fit_is_refused() -> None:
    data = _blocks("Q4_0")
    with pytest.raises(LayoutError, match="F16 has no steps"):
        parts("F16", data)
    with pytest.raises(LayoutError, match=r"do not fit blocks of shape \(5, 54\)"):
        with_codes("Q4_0", data, np.zeros((5, 95), np.uint8))
    with pytest.raises(LayoutError, match="code 16, there are 16"):
        with_codes("Q4_0", data, np.full((5, 96), 16, np.uint8))
    with pytest.raises(LayoutError, match="blocks of 18 bytes"):
        BlockTensor("Q4_0", data[:, :-1])
    with pytest.raises(InputError, match="unknown ggml type"):
        BlockTensor("Q4_X", data)


def test_a_matrix_of_blocks_knows_its_shape_and_gives_rows() -> None:
    data = _blocks("Q5_K")
    tensor = BlockTensor("Q5_K", data)
    assert tensor.shape == (5, 768)
    assert (tensor.dequantize(1, 3) == _read("Q5_K", data)[1:3]).all()
    order = np.array([3, 0, 4, 1, 2])
    assert (tensor.take_rows(order).dequantize() == tensor.dequantize()[order]).all()
