"""The kernels of the other block types on a real GPU, against libggml: skipped without either."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert.gguf.encode import encode_rows
from quantpress.kernels.ggml.quantize import TYPES, quantize
from quantpress.kernels.kquants.types import KQUANTS
from quantpress.quant.ggml.on_device import quantize_rows_on_device
from quantpress.quant.ggml.types import ggml_type
from tests.kernels.kquants_cases import KINDS, importance, weights
from tests.quant.conftest import LibGGML, libggml  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(values, name, important=None, **options):
    kind = TYPES[name]
    given = None if important is None else torch.from_numpy(important).cuda()
    shape = (len(values), values.shape[1] // kind.size * kind.block_bytes)
    out = torch.full(shape, 0xAA, dtype=torch.uint8, device="cuda")
    return quantize(torch.as_tensor(values).cuda(), name, given, out=out, **options).cpu().numpy()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "overflowing"])  # NaN has other bits on a GPU
@pytest.mark.parametrize("important", [None, "smooth", "gaps"])
@pytest.mark.parametrize("name", TYPES)
def test_every_block_is_libggmls(name, important, kind, libggml: LibGGML):  # noqa: F811
    if important is None and TYPES[name].weighted == "needed":
        pytest.skip("the processor's")
    values, weight = weights(kind, 64), importance(important)
    np.testing.assert_array_equal(on_gpu(values, name, weight), libggml.quantize(ggml_type(name), values, weight))


@pytest.mark.parametrize("name", TYPES)
def test_any_tile_gives_the_same_bytes(name, libggml: LibGGML):  # noqa: F811
    values, weight = weights("mixed", 33, 768), importance("smooth", 768)
    wanted = libggml.quantize(ggml_type(name), values, weight)
    for block in (32, 64, 128, 256):
        np.testing.assert_array_equal(on_gpu(values, name, weight, block=block), wanted)


def test_exponents_are_those_of_log2f_beside_every_power_of_two(libggml: LibGGML):  # noqa: F811
    powers = np.ldexp(1.0, np.arange(-148, 128)).astype(np.float32)
    greatest = (powers.view(np.int32)[:, None] + np.arange(-60, 4)).reshape(-1)
    greatest = greatest[(greatest > 0) & (greatest < 0x7F800000)].astype(np.int32).view(np.float32)
    values = np.zeros((len(greatest), 32), np.float32)
    values[:, 3], values[:, 17] = -greatest, greatest / 3
    np.testing.assert_array_equal(on_gpu(values, "MXFP4"), libggml.quantize(ggml_type("MXFP4"), values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TYPES)
def test_a_large_matrix_of_16_bits_has_the_blocks_of_its_rows(name, dtype, libggml: LibGGML):  # noqa: F811
    values = (torch.randn(4099, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight = importance("smooth", 4096)
    found = on_gpu(values, name, weight)
    rows = [0, 1, 2047, 2048, 4097, 4098]
    wanted = libggml.quantize(ggml_type(name), values[rows].float().numpy(), weight)
    np.testing.assert_array_equal(found[rows], wanted)


@pytest.mark.parametrize("name", [*KQUANTS, *TYPES])
def test_rows_of_a_file_are_encoded_as_by_the_processor(name, libggml: LibGGML):  # noqa: F811
    values = weights("heavy-tailed", 40)
    weight = importance("smooth")
    assert weight is not None
    wanted = libggml.quantize(ggml_type(name), values, weight)
    np.testing.assert_array_equal(quantize_rows_on_device(name, values, weight, "cuda"), wanted)
    encoded = encode_rows(values, name, offset=0.0, sample=True, importance=weight[None], device="cuda")
    np.testing.assert_array_equal(encoded.data, wanted)
    assert 0 < encoded.squared_error < encoded.squared_values
