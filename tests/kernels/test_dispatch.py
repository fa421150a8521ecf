"""Every product of packed weights ends in a kernel, and whichever it is, the result is the formula's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels import dispatch
from quantpress.kernels.launch import Launch
from quantpress.kernels.linear import reference_linear
from quantpress.kernels.packed import reference_dequantize
from quantpress.quant.packed import packed_weight
from tests.kernels.test_linear import EPS, made


@pytest.mark.parametrize("rows_in", [1, 5, 70])
@pytest.mark.parametrize(("bits", "columns", "group"), [(4, 256, 64), (3, 96, 32), (8, 100, 100), (2, 33, 7)])
def test_the_kernel_that_is_chosen_gives_the_formula(rows_in: int, bits: int, columns: int, group: int) -> None:
    for symmetric in (True, False):
        weight = packed_weight(made(40, columns, bits=bits, group=group, symmetric=symmetric, ordered=symmetric))
        x = torch.randn(rows_in, columns, generator=torch.Generator().manual_seed(bits))
        bias = torch.randn(40)
        found = dispatch.matmul(x, weight, bias, deterministic=True)
        wanted = reference_linear(x.double(), weight, bias.double())
        dense = reference_dequantize(weight, torch.float64).abs()
        size = torch.nn.functional.linear(x.double().abs(), dense, bias.double().abs())
        assert ((found.double() - wanted).abs() <= (columns + 4) * EPS * size).all()


def test_each_kernel_can_be_asked_for() -> None:
    weight = packed_weight(made(40, 128, bits=4, group=64, symmetric=False))
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    wanted = reference_linear(x.double(), weight)
    for launch in (Launch("gemv", 1, 32, 64, 2), Launch("tiled", 16, 32, 64, 2), Launch("dense")):
        found = dispatch.run(x, weight, launch=launch)
        assert torch.allclose(found.double(), wanted, rtol=0, atol=132 * EPS * 128 * 15 * 0.1), launch.kernel


def test_no_rows_need_no_kernel() -> None:
    weight = packed_weight(made(40, 128, bits=4, group=64, symmetric=False))
    assert dispatch.matmul(torch.empty(0, 128), weight).shape == (0, 40)
