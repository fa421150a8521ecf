"""Rounding to nearest on a device, here the processor: the bytes of the compiled loops, and the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.quant.errors import LayoutError, UsageError
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.packed import packed_weight
from quantpress.quant.rtn_cuda import packed_on_device, round_to_nearest_on_device
from tests.kernels.rtn_cases import bits_of, matrix


@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_matrix_is_that_of_the_processor_byte_for_byte(bits: int, symmetric: bool, scale_type: str) -> None:
    for rows, columns, group_size, dtype in ((9, 200, -1, torch.float32), (30, 129, 32, torch.bfloat16)):
        weight = matrix(rows, columns, dtype)
        grid = Grid(bits, group_size, symmetric, scale_type)
        found, wanted = round_to_nearest_on_device(weight, grid), round_to_nearest(weight.float().numpy(), grid)
        assert found.form == wanted.form
        assert found.codes.tobytes() == wanted.codes.tobytes()
        assert found.scale.tobytes() == wanted.scale.tobytes()
        assert found.zeros().tobytes() == wanted.zeros().tobytes()


def test_what_stays_on_the_device_is_what_the_products_read() -> None:
    weight, grid = matrix(6, 100, torch.float16), Grid(4, 32, symmetric=False)
    with np.errstate(over="ignore"):
        found = packed_on_device(weight, grid)
    wanted = packed_weight(round_to_nearest(weight.float().numpy(), grid))
    assert torch.equal(found.words, wanted.words)
    assert torch.equal(bits_of(found.scale), bits_of(wanted.scale))
    assert found.zero is not None
    assert wanted.zero is not None
    assert torch.equal(found.zero, wanted.zero)
    assert (found.columns, found.bits, found.group_size) == (100, 4, 32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("greatest", "scale_type"), [(1e7, "F16"), (3.4e38, "BF16"), (3.4e38, "F32")])
def test_scales_out_of_range_are_refused_with_the_processor_s_words(
    greatest: float, scale_type: str, symmetric: bool
) -> None:
    weight = torch.tensor([[-greatest, greatest, 0.0, 1.0]])
    for bits in (2, 8):
        grid = Grid(bits, 4, symmetric, scale_type)
        told = []
        for function in (round_to_nearest, round_to_nearest_on_device):
            try:
                told.append(function(weight.numpy() if function is round_to_nearest else weight, grid).codes.tobytes())
            except LayoutError as error:
                told.append(str(error))
        assert told[0] == told[1]


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UsageError, match="clip search"):
        round_to_nearest_on_device(torch.zeros(2, 8), Grid(4, 8, clip_search=True))
    with pytest.raises(LayoutError, match="no weights"):
        packed_on_device(torch.zeros(0, 8), Grid(4, 8))
