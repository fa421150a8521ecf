"""Rounding to nearest on a real GPU: skipped without one. Interpreted it is tested beside its module."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.packed import packed_weight
from quantpress.quant.rtn_cuda import packed_on_device, round_to_nearest_on_device
from tests.kernels.rtn_cases import bits_of, matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(1, 1, -1), (67, 333, 7), (1030, 4096, 128), (40, 5000, -1)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_are_those_of_the_processor(
    bits: int, symmetric: bool, rows: int, columns: int, group_size: int, scale_type: str, dtype: torch.dtype
) -> None:
    weight, grid = matrix(rows, columns, dtype), Grid(bits, group_size, symmetric, scale_type)
    wanted = round_to_nearest(weight.float().numpy(), grid)
    found = round_to_nearest_on_device(weight.cuda(), grid)
    assert found.codes.tobytes() == wanted.codes.tobytes()
    assert found.scale.tobytes() == wanted.scale.tobytes()
    assert found.zeros().tobytes() == wanted.zeros().tobytes()
    packed, laid_out = packed_on_device(weight.cuda(), grid).to("cpu"), packed_weight(wanted)
    assert torch.equal(packed.words, laid_out.words)
    assert torch.equal(bits_of(packed.scale), bits_of(laid_out.scale))
    assert symmetric or torch.equal(packed.zero, laid_out.zero)
