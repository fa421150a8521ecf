"""The tiled product and dequantize on a real GPU, at the sizes of models: skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.dequantize import dequantize
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tiled import EXACT_ROWS, tiled, tiled_launch
from tests.kernels.packed_cases import dense, framed_inputs, product, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUT = 2.0**-23  # tensor cores cut sums where float32 rounds them
TYPES = [torch.float16, torch.bfloat16, torch.float32]
# rows, columns, bits, group: layers, and sizes that nothing divides
SIZES = [
    (512, 4096, 4, 128), (384, 1024, 4, 32), (257, 1000, 4, 1000), (130, 515, 4, 60), (512, 2048, 3, 128),
    (129, 333, 3, 333), (256, 1024, 8, 1024), (256, 1024, 8, 64), (192, 1040, 2, 16), (70, 95, 8, 7), (1, 1, 2, 1),
]  # fmt: skip


def _run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launch: Launch) -> torch.Tensor:
    out = torch.full((len(x), weight.rows), float("nan"), dtype=x.dtype, device="cuda")
    added = None if bias is None else bias.cuda()
    return tiled(x.cuda(), weight.to("cuda"), added, launch=launch, out=out).cpu()


def _launch(weight: PackedWeight, x: torch.Tensor) -> Launch:
    name = str(x.dtype).removeprefix("torch.")
    problem = Problem(len(x), weight.rows, weight.columns, weight.bits, weight.group_size, name)
    return tiled_launch(problem)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "bits", "group"), SIZES)
def test_the_product_is_that_of_float64_up_to_the_roundings(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype
) -> None:
    for rows_in, symmetric in ((1, True), (16, False), (33, True), (64, False), (65, True), (200, False)):
        scale = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        weight = random_weight(rows, columns, bits, group, symmetric=symmetric, ordered=not symmetric, scale=scale)
        x, bias = framed_inputs(rows_in, columns, dtype), torch.randn(rows).to(dtype)
        wanted, bound = product(x, weight, bias, rounded=rows_in > EXACT_ROWS, unit=CUT)
        found = _run(x, weight, bias, _launch(weight, x)).double()
        assert ((found - wanted).abs() <= bound).all(), (rows_in, float(((found - wanted).abs() / bound).max()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_summed_exactly_by_every_tile(bits: int, dtype: torch.dtype) -> None:
    # |sum| <= 1024 * 3 * 255 * 2 < 2^24: no operation rounds but the last
    weight = random_weight(200, 1024, bits, 64, symmetric=False, ordered=True, whole=True, scale=torch.float32)
    for rows_in in (5, 64, 130):
        x = framed_inputs(rows_in, 1024, dtype, whole=True)
        wanted = product(x, weight, None, rounded=False)[0].to(dtype)
        for block_m, block_n, block_k in ((16, 64, 64), (64, 128, 64), (32, 32, 32), (8, 16, 64), (128, 128, 64)):
            for split_k, warps in ((1, 4), (5, 4), (2, 8)):
                launch = Launch("tiled", block_m, block_n, block_k, split_k, warps)
                assert torch.equal(_run(x, weight, None, launch), wanted), launch


def test_the_same_launch_gives_the_same_bits_again_and_again() -> None:
    weight, x = random_weight(1024, 4096, 4, 128).to("cuda"), framed_inputs(16, 4096, torch.bfloat16).cuda()
    launch = replace(_launch(weight, x), split_k=8)
    first = tiled(x, weight, launch=launch)
    assert all(torch.equal(tiled(x, weight, launch=launch), first) for _ in range(200))


def test_a_captured_product_gives_the_same_bits() -> None:
    weight, x = random_weight(1024, 4096, 4, 128).to("cuda"), framed_inputs(16, 4096, torch.bfloat16).cuda()
    launch = replace(_launch(weight, x), split_k=8)
    first = tiled(x, weight, launch=launch)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(first)
    with torch.cuda.graph(graph):
        tiled(x, weight, launch=launch, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "bits", "group"), SIZES)
def test_a_dense_matrix_is_the_product_rounded_once(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype
) -> None:
    for ordered in (False, True):
        for scale in (torch.float16, torch.bfloat16, torch.float32):
            weight = random_weight(rows, columns, bits, group, symmetric=ordered, ordered=ordered, scale=scale)
            out = torch.full((rows, columns), float("nan"), dtype=dtype, device="cuda")
            wanted = dense(weight).float().to(dtype)
            assert torch.equal(dequantize(weight.to("cuda"), dtype, out=out).cpu(), wanted)
