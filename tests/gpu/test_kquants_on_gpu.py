"""The K-quant kernels on a real GPU, against their reference: skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.kquants.quantize import quantize
from quantpress.kernels.kquants.reference import reference_quantize
from quantpress.kernels.kquants.types import KQUANTS
from tests.kernels.kquants_cases import KINDS, NAMES, importance, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(values, name, important=None, **options):
    given = None if important is None else torch.from_numpy(important).cuda()
    shape = (len(values), values.shape[1] // 256 * KQUANTS[name].block_bytes)
    out = torch.full(shape, 0xAA, dtype=torch.uint8, device="cuda")
    return quantize(torch.as_tensor(values).cuda(), name, given, out=out, **options).cpu().numpy()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "overflowing"])  # NaN has other bits on a GPU
@pytest.mark.parametrize("important", [None, "smooth", "gaps"])
@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_that_of_the_reference(name, important, kind):
    values, weight = weights(kind, 64), importance(important)
    np.testing.assert_array_equal(on_gpu(values, name, weight), reference_quantize(values, name, weight))


@pytest.mark.parametrize("name", NAMES)
def test_any_tile_gives_the_same_bytes(name):
    values = weights("mixed", 33, 768)
    wanted = reference_quantize(values, name)
    for block in (32, 64, 128, 256):
        np.testing.assert_array_equal(on_gpu(values, name, block=block), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_matrix_of_16_bits_has_the_blocks_of_its_rows(name, dtype):
    values = (torch.randn(4099, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight = importance("smooth", 4096)
    found = on_gpu(values, name, weight)
    rows = [0, 1, 2047, 2048, 4097, 4098]
    np.testing.assert_array_equal(found[rows], reference_quantize(values[rows].float().numpy(), name, weight))
