"""A packed matrix made dense in Triton's interpreter: bit for bit what single bits, float32 and one rounding give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.dequantize import dequantize
from tests.kernels.packed_cases import dense, random_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself here")

# rows, columns, group: tiles of 64 outputs that are full and that are not; tiles in one group and in several
SIZES = [(64, 256, 128), (65, 130, 130), (64, 64, 64), (3, 100, 10), (70, 96, 32), (1, 1, 1)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_every_value_is_the_product_rounded_once(rows: int, columns: int, group: int, ordered: bool, bits: int) -> None:
    for symmetric, dtype in ((True, torch.float16), (False, torch.float32)):
        scale = torch.float16 if symmetric != ordered else torch.float32
        weight = random_weight(rows, columns, bits, group, symmetric=symmetric, ordered=ordered, scale=scale)
        out = torch.full((rows, columns), float("nan"), dtype=dtype)
        assert dequantize(weight, dtype, out=out) is out
        assert torch.equal(out, dense(weight).float().to(dtype))


def test_places_can_be_left_where_they_are() -> None:
    weight = random_weight(40, 96, 4, 32, ordered=True)
    found = dequantize(weight, torch.float16, ordered=False)
    assert torch.equal(found, dense(weight).to(torch.float16)[:, weight.order])


def test_subnormal_and_overflowing_weights_are_rounded_as_float32_products() -> None:
    weight = random_weight(64, 128, 4, 128)
    weight.scale[:, :32] = 2.0**-24
    weight.scale[:, 32:] = 60000
    with np.errstate(over="ignore"):
        assert torch.equal(dequantize(weight, torch.float16), dense(weight).float().half())


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight = random_weight(8, 32, 4, 32)
    with pytest.raises(ValueError, match="float64"):
        dequantize(weight, torch.float64)
    with pytest.raises(ValueError, match="out is"):
        dequantize(weight, torch.float16, out=torch.empty(8, 31, dtype=torch.float16))
    with pytest.raises(ValueError, match="out is"):
        dequantize(weight, torch.float16, out=torch.empty(32, 8, dtype=torch.float16).T)
