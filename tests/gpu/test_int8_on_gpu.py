"""The int8 kernels on a real GPU: skipped without one. Interpreted they are tested beside their modules."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.int8 import linear as int8_linear
from quantpress.kernels.int8 import llm_int8
from quantpress.kernels.int8 import plain as int8_plain
from quantpress.kernels.int8 import w8a8 as int8
from quantpress.kernels.int8.product import int8_launch
from quantpress.kernels.launch import Launch, Problem
from tests.kernels.int8_cases import LAUNCHES, inputs, poisoned, product, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# around tiles; primes; sizes that are no multiple of 16; layers of Llama-3-8B
SIZES = [(1, 1, 1), (3, 257, 131), (17, 129, 4099), (65, 255, 1000), (257, 511, 96), (1, 6144, 4096), (16, 4096, 14336)]
SIZES += [(64, 4096, 4096), (1000, 4096, 4096)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_the_processor(dtype: torch.dtype) -> None:
    for rows_in, columns in ((1, 1), (1, 14336), (300, 131), (4097, 4096), (5, 16384), (5, 16385), (7, 50001)):
        x = inputs(rows_in, columns, dtype)
        if dtype != torch.float16:
            x[-1] *= 1e-37  # a scale whose reciprocal overflows
        codes, scale = int8.quantize_tokens(x.cuda())
        wanted, token_scale = int8_plain.reference_quantize_tokens(x)
        assert torch.equal(codes.cpu(), wanted)
        assert torch.equal(scale.cpu(), token_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_have_the_bits_of_the_formula_whatever_the_launch(dtype: torch.dtype) -> None:
    for rows_in, rows, columns in SIZES:
        weight, scale, bias = weights(rows, columns)
        codes, token_scale = int8_plain.reference_quantize_tokens(inputs(rows_in, columns, dtype))
        wide = int8_plain.reference_int8_matmul(codes, token_scale, weight, scale, bias.to(dtype), dtype)
        if rows_in * rows * columns < 1 << 24:
            assert torch.equal(wide, product(codes, token_scale, weight, scale, bias.to(dtype), dtype))
        moved = [tensor.cuda() for tensor in (codes, token_scale, weight, scale, bias.to(dtype))]
        wider = Launch("tiled", 128, 256, 128, 2, 8, 3), Launch("tiled", 128, 128, 128, 1, 8, 3)
        fits = torch.cuda.get_device_capability()[0] >= 9
        for launch in (None, *LAUNCHES, *(wider if fits else wider[1:])):
            for _ in range(2):  # the second launch finds the counters as the first left them
                out = poisoned(rows_in, rows, dtype, "cuda")
                int8.int8_matmul(*moved, dtype, launch=launch, out=out)
                assert torch.equal(out.cpu(), wide), launch


@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_splits_as_the_processor_and_multiplies_within_the_roundings(dtype: torch.dtype) -> None:
    for rows_in, rows, columns in SIZES:
        for kept in (0, 3, 300):
            x = inputs(rows_in, columns, dtype).clamp(-5, 5)
            x[:: max(rows_in // 3, 1), : min(kept, columns)] *= 40
            weight, scale, bias = weights(rows, columns)
            wanted, token_scale, flags = int8_plain.reference_quantize_split(x)
            codes, found_scale, listed = llm_int8.quantize_split(x.cuda())
            assert torch.equal(codes.cpu(), wanted)
            assert torch.equal(found_scale.cpu(), token_scale)
            assert torch.equal(listed[1 : 1 + int(listed[0])].cpu().long(), flags.nonzero().view(-1))
            moved = [tensor.cuda() for tensor in (x, weight, scale, bias.to(dtype))]
            first, second = llm_int8.llm_int8(*moved), llm_int8.llm_int8(*moved)
            assert torch.equal(first, second)
            dense = weight.cuda().double() * scale.cuda().double()[:, None]
            rounded = torch.where(flags, x.double(), wanted.double() * token_scale.double()[:, None]).cuda()
            exact = rounded @ dense.T + moved[3].double()
            size = rounded.abs() @ dense.abs().T + moved[3].double().abs()
            # each kept column adds once in float32, six more roundings of it, and the result's
            unit = (int(flags.sum()) + 6) * 2.0**-24 + torch.finfo(dtype).eps / 2
            assert ((first.double() - exact).abs() <= unit * size).all()


def test_operators_are_captured_and_replayed_with_other_inputs() -> None:
    weight, scale, bias = (tensor.cuda() for tensor in weights(515, 4096))
    for kind in (int8_linear.W8A8Linear, int8_linear.LlmInt8Linear):
        module = kind(weight, scale, bias.half())
        for rows_in in (1, 40):
            x = inputs(rows_in, 4096, torch.float16).cuda() * 3
            module(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = module(x)
            for shift in (1, 2):
                x.copy_(x.roll(shift, 1) * 1.5)
                graph.replay()
                assert torch.equal(result, module(x))


def test_torch_knows_the_operators_on_the_device() -> None:
    weight, scale, bias = (tensor.cuda() for tensor in weights(24, 64))
    x = inputs(6, 64, torch.float16).view(2, 3, 64).cuda()
    torch.library.opcheck(int8_linear.w8a8_linear, (x, weight, scale, bias))
    torch.library.opcheck(int8_linear.llm_int8_linear, (x * 3, weight, scale, None, 6.0))


def test_offsets_beyond_32_bits_are_right() -> None:
    rows, columns = 140_000, 16_384  # 2.3e9 weights
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of the device's memory")
    weight = torch.zeros((rows, columns), dtype=torch.int8, device="cuda")
    weight[-1, -1], weight[0, 0] = 3, 5
    x = torch.zeros((1, columns), device="cuda")
    x[0, 0], x[0, -1] = 1, 1
    launch = int8_launch(Problem(1, rows, columns, 8, columns, "float32", kind="w8a8"))
    found = int8.w8a8(x, weight, torch.ones(rows, device="cuda"), launch=launch)
    wanted = int8_plain.reference_w8a8(x.cpu(), weight[[0, -1]].cpu(), torch.ones(2))
    assert torch.equal(found[0, [0, -1]].cpu(), wanted[0])
    assert int(found.count_nonzero()) == 2
