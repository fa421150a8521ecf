"""Products with 4-bit levels on a real GPU: skipped without one. Interpreted they are tested beside their modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch
from quantpress.kernels.nf4.linear import Nf4Linear
from quantpress.kernels.nf4.matmul import nf4_dequantize, nf4_matmul, reference_nf4_dequantize
from tests.kernels.nf4_cases import Case, case, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


def _product(one: Case, launch: Launch | None, rounding: torch.dtype | None = None) -> torch.Tensor:
    return nf4_matmul(one.x, *one.weight, one.bias, launch=launch, rounding=rounding, out=one.poison())


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 4096), (1024, 4096), (4096, 14336), (3584, 3584), (257, 1056), (101, 333)]
)
@pytest.mark.parametrize("rows_in", [1, 2, 3, 4, 5, 16, 33, 64, 65, 300])
def test_products_are_the_formula(rows_in: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    one = case(rows_in, rows, columns, 64, dtype, bias=rows % 2 == 0, device="cuda")
    exact = rows_in <= 4 or columns % 32 != 0
    # cuBLAS may add parts of a sum in the type of the result where it splits it
    split = 2 * 2.0**-8 if rows_in > 256 and dtype != SINGLE else 0.0
    check(_product(one, None), one, None if exact else dtype, weights=split)


@pytest.mark.parametrize("block_n", [1, 2, 4, 8])
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_launch_of_the_vector_kernel_is_right(block_n: int, warps: int, split_k: int) -> None:
    for rows_in, rounding in ((1, None), (4, BRAIN)):
        one = case(rows_in, 515, 7168, 64, BRAIN, bias=True, device="cuda")
        launch = Launch("gemv", block_n=block_n, warps=warps, split_k=split_k)
        found = _product(one, launch, rounding)
        check(found, one, rounding)
        assert torch.equal(found, _product(one, launch, rounding))


@pytest.mark.parametrize("stages", [1, 3, 4])
@pytest.mark.parametrize("blocks", [(16, 64, 64), (16, 64, 128), (64, 64, 64), (64, 128, 64), (128, 128, 64)])
@pytest.mark.parametrize("split_k", [1, 4])
def test_every_tile_is_right(blocks: tuple[int, int, int], split_k: int, stages: int) -> None:
    one = case(70, 515, 2080, 64, BRAIN, bias=True, device="cuda")
    launch = Launch("tiled", *blocks, split_k, 8 if blocks[0] == 128 else 4, stages)
    found = _product(one, launch)
    check(found, one, BRAIN)
    assert torch.equal(found, _product(one, launch))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 127), (4096, 4096)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_the_dense_matrix_has_the_bits_of_torch(rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    one = case(1, rows, columns, blocksize, dtype, device="cuda")
    found = nf4_dequantize(*one.weight, dtype, out=torch.full((rows, columns), torch.nan, dtype=dtype, device="cuda"))
    assert torch.equal(found, reference_nf4_dequantize(*one.weight, dtype))


def test_the_module_runs_compiled_and_in_a_graph() -> None:
    one = case(2, 512, 1024, 64, BRAIN, bias=True, device="cuda")
    module = Nf4Linear(*one.weight, one.bias)
    wanted = module(one.x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(one.x), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(one.x)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def test_offsets_beyond_32_bits_are_right() -> None:
    rows, columns = 70_000, 32_768  # 2.3e9 values
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda", generator=generator)
    absmax = torch.rand(rows * columns // 64, device="cuda", generator=generator)
    levels = torch.linspace(-1, 1, 16, device="cuda")
    x = torch.randn(2, columns, device="cuda", generator=generator)
    found = nf4_matmul(x, packed, absmax, levels, rows, columns, 64)
    last = reference_nf4_dequantize(packed, absmax, levels, rows, columns, 64, torch.float64, rows - 8)
    wanted, total = x.double() @ last.T, x.double().abs() @ last.abs().T
    assert ((found[:, -8:].double() - wanted).abs() <= total * (columns + 8) * 2.0**-24).all()
    assert np.isfinite(found.cpu().numpy()).all()
