"""Products of few input rows on a real GPU, at the sizes of models: skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.gemv import gemv, gemv_launch
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight, reference_dequantize
from quantpress.kernels.workspace import counters
from tests.kernels.packed_cases import framed_inputs, product, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TYPES = [torch.float16, torch.bfloat16, torch.float32]
# rows, columns, bits, group: layers, and sizes that nothing divides
SIZES = [
    (512, 4096, 4, 128), (384, 1024, 4, 32), (257, 1000, 4, 1000), (130, 515, 4, 60), (512, 2048, 3, 128),
    (129, 333, 3, 333), (256, 1024, 8, 1024), (256, 1024, 8, 64), (192, 1040, 2, 16), (70, 95, 8, 7), (1, 1, 2, 1),
    (1, 8192, 4, 64), (4099, 1, 8, 1), (128, 4095, 2, 128),
]  # fmt: skip
# outputs and places of layers of Llama-3-8B and 70B and of Qwen2.5-7B
LAYERS = [(28672, 4096), (4096, 14336), (4608, 3584), (37888, 3584), (8192, 28672)]


def _launch(weight: PackedWeight, x: torch.Tensor) -> Launch:
    name, symmetric = str(x.dtype).removeprefix("torch."), weight.zero is None
    return gemv_launch(
        Problem(len(x), weight.rows, weight.columns, weight.bits, weight.group_size, name, symmetric=symmetric)
    )


def _run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launch: Launch) -> torch.Tensor:
    out = torch.full((len(x), weight.rows), float("nan"), dtype=x.dtype, device="cuda")
    return gemv(x.cuda(), weight.to("cuda"), None if bias is None else bias.cuda(), launch=launch, out=out).cpu()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "bits", "group"), SIZES)
def test_the_product_is_that_of_float64_up_to_the_roundings(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype
) -> None:
    for rows_in, symmetric in ((1, True), (1, False), (2, True), (3, False), (4, True)):
        scale = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        weight = random_weight(rows, columns, bits, group, symmetric=symmetric, ordered=not symmetric, scale=scale)
        x, bias = framed_inputs(rows_in, columns, dtype), torch.randn(rows).to(dtype)
        wanted, bound = product(x, weight, bias, rounded=False)
        assert ((_run(x, weight, bias, _launch(weight, x)).double() - wanted).abs() <= bound).all(), rows_in


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_summed_exactly_by_every_launch(bits: int, dtype: torch.dtype) -> None:
    # |sum| <= 1024 * 3 * 255 * 2 < 2^24: no operation rounds but the last
    weight = random_weight(200, 1024, bits, 64, symmetric=False, ordered=True, whole=True, scale=torch.float32)
    for rows_in in (1, 3):
        x = framed_inputs(rows_in, 1024, dtype, whole=True)
        wanted = product(x, weight, None, rounded=False)[0].to(dtype)
        for block_n, block_k, warps in ((128, 128, 4), (64, 64, 4), (16, 64, 1), (256, 128, 8), (32, 256, 2)):
            for split_k, stages in ((1, 1), (5, 1), (4, 3), (16, 2)):
                launch = Launch("gemv", 1, block_n, block_k, split_k, warps, stages)
                assert torch.equal(_run(x, weight, None, launch), wanted), launch


@pytest.mark.parametrize(("rows", "columns"), LAYERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_of_models_are_multiplied_right_in_bfloat16(rows: int, columns: int, bits: int) -> None:
    random = torch.Generator("cuda").manual_seed(rows + bits)
    shape = (columns * bits // 32, rows)
    words = torch.randint(-(1 << 31), 1 << 31, shape, generator=random, device="cuda", dtype=torch.int32)
    scale = torch.rand((columns // 128, rows), generator=random, device="cuda").bfloat16()
    zero = torch.randint(0, 1 << bits, scale.shape, generator=random, device="cuda", dtype=torch.uint8)
    for rows_in, middle in ((1, None), (1, zero), (4, None)):
        weight = PackedWeight(words, scale, middle, None, columns, bits, 128)
        x = torch.randn((rows_in, columns), generator=random, device="cuda").bfloat16()
        found = gemv(x, weight, launch=_launch(weight, x)).double()
        for start in range(0, rows, 4096):
            matrix = reference_dequantize(weight, torch.float64, start, start + 4096)
            wanted, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
            # K products and K sums in float32, then half a step of bfloat16
            bound = size * 2 * (columns + 32) * 2.0**-24
            bound += (wanted.abs() + bound) * 2.0**-8
            assert ((found[:, start : start + 4096] - wanted).abs() <= bound).all()


def test_the_same_launch_gives_the_same_bits_again_and_again_and_leaves_the_counters_at_zero() -> None:
    weight, x = random_weight(1024, 4096, 4, 128).to("cuda"), framed_inputs(2, 4096, torch.bfloat16).cuda()
    launch = replace(_launch(weight, x), split_k=16)
    first = gemv(x, weight, launch=launch)
    assert all(torch.equal(gemv(x, weight, launch=launch), first) for _ in range(500))
    assert not counters(x.device, 8).any()


def test_a_captured_product_gives_the_same_bits() -> None:
    weight, x = random_weight(1024, 4096, 4, 128).to("cuda"), framed_inputs(1, 4096, torch.bfloat16).cuda()
    launch = replace(_launch(weight, x), split_k=8)
    first = gemv(x, weight, launch=launch)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(first)
    with torch.cuda.graph(graph):
        gemv(x, weight, launch=launch, out=out)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


def test_streams_do_not_share_counters() -> None:
    weight, x = random_weight(1024, 4096, 4, 128).to("cuda"), framed_inputs(1, 4096, torch.bfloat16).cuda()
    launch = replace(_launch(weight, x), split_k=16)
    first = gemv(x, weight, launch=launch)
    streams = [torch.cuda.Stream() for _ in range(4)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    found: list[torch.Tensor] = []
    for number in range(200):
        with torch.cuda.stream(streams[number % 4]):
            found.append(gemv(x, weight, launch=launch))
    torch.cuda.synchronize()
    assert all(torch.equal(each, first) for each in found)


def test_a_matrix_of_more_than_2_to_the_31_words_is_read_to_its_end() -> None:
    rows, columns = 1 << 20, 33024  # 2064 words of 16 codes for each output, 8.1 GiB
    words = torch.zeros((columns // 16, rows), dtype=torch.int32, device="cuda")
    words[-1] = -1  # the last 16 places have code 3, the others 0
    scale = torch.ones((1, rows), dtype=torch.float16, device="cuda")
    weight = PackedWeight(words, scale, None, None, columns, 2, columns)
    x = torch.zeros((1, columns), dtype=torch.float32, device="cuda")
    x[0, -16:] = 1
    x[0, 0] = 3
    found = gemv(x, weight, launch=_launch(weight, x))
    assert (found == 16 - 6).all()
