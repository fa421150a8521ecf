"""GPTQ's kernel and its wiring on a real GPU: skipped without one. Interpreted they are tested beside their modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.quant.gptq import GptqOptions, factorize, gptq
from quantpress.quant.gptq_cuda import DeviceFactor, factorize_on_device, gptq_on_device
from quantpress.quant.grid import Grid, round_to_nearest
from tests.kernels.gptq_block_cases import case, exact, extreme, outcome
from tests.quant.gptq_cuda_cases import layer, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# around tiles of 256 weights and blocks of 32, 64 and 128 columns; more rows than are in flight at once; the widest
SIZES = [(1, 1), (3, 31), (65, 32), (1000, 33), (131, 64), (257, 127), (20011, 128), (7, 129), (5, 1000), (2, 1024)]


@pytest.mark.parametrize(("rows", "count"), SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernel_gives_the_bits_of_the_reference_on_the_processor(rows: int, count: int, bits: int) -> None:
    one = case(rows, count, groups=count, bits=bits)
    wanted, found = outcome(one, "cpu", reference=True), outcome(one, "cuda")
    for part, values in wanted.items():
        np.testing.assert_array_equal(found[part], values, strict=True, err_msg=part)


@pytest.mark.parametrize("make", [exact, extreme])
def test_ties_overflows_and_subnormal_scales_are_those_of_the_reference(make: object) -> None:
    one = make(300, 32)  # type: ignore[operator]
    wanted, found = outcome(one, "cpu", reference=True), outcome(one, "cuda")
    for part, values in wanted.items():
        np.testing.assert_array_equal(found[part], values, strict=True, err_msg=part)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 128), Grid(3, 64, symmetric=False), Grid(8, -1), Grid(2, 32)])
def test_a_layer_is_quantized_as_on_the_processor_up_to_near_ties(grid: Grid, act_order: bool) -> None:
    weight, hessian = layer(384, 1000)
    options = GptqOptions(act_order=act_order)
    quantized, report = run(weight, hessian, grid, options, "cuda")
    factor = factorize(hessian, options)
    wanted, told = gptq(weight, factor, grid)
    assert (quantized.scale == wanted.scale).all()
    assert (quantized.codes == wanted.codes).mean() > 0.97
    assert report.loss == pytest.approx(told.loss, rel=1e-2)
    # with the processor's factor what is left are the sums of the products between blocks
    moved = [torch.from_numpy(values).cuda() for values in (factor.upper, factor.order, factor.diagonal)]
    shared = DeviceFactor(moved[0], moved[1], moved[2], factor.damping, factor.added)
    close, _ = gptq_on_device(torch.from_numpy(weight).cuda(), shared, grid, options)
    assert (close.codes == wanted.codes).mean() > 0.99


def test_an_identity_hessian_gives_rtn_bit_for_bit() -> None:
    weight, _ = layer(70, 300)
    quantized, _ = run(weight, np.eye(300, dtype=np.float32), Grid(4, 64), GptqOptions(), "cuda")
    assert (quantized.codes == round_to_nearest(weight, Grid(4, 64)).codes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_give_the_same_bytes_whatever_the_weights_are_stored_in(dtype: torch.dtype) -> None:
    weight, hessian = layer(512, 768)
    moved, matrix = torch.from_numpy(weight).cuda().to(dtype), torch.from_numpy(hessian).cuda()
    runs = [gptq_on_device(moved, matrix, Grid(4, 128), GptqOptions()) for _ in range(2)]
    wide = gptq_on_device(moved.float(), matrix, Grid(4, 128), GptqOptions())
    for quantized, report in (runs[1], wide):
        assert quantized.codes.tobytes() == runs[0][0].codes.tobytes()
        assert quantized.scale.tobytes() == runs[0][0].scale.tobytes()
        assert report == runs[0][1]


def test_the_factor_is_not_computed_in_tf32_even_where_the_user_allows_it() -> None:
    _, hessian = layer(1, 1024)
    matrix = torch.from_numpy(hessian).cuda()
    plain = factorize_on_device(matrix, GptqOptions())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        allowed = factorize_on_device(matrix, GptqOptions())
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain.upper, allowed.upper)


def test_a_hessian_that_needs_more_damping_gets_it() -> None:
    weight, _ = layer(8, 256)
    one = np.random.default_rng(0).standard_normal(256).astype(np.float32) * 1e3
    quantized, report = run(weight, np.outer(one, one), Grid(4, 64), GptqOptions(damping=1e-9), "cuda")
    assert report.damping > 1e-9
    assert np.isfinite(quantized.dequantize()).all()
