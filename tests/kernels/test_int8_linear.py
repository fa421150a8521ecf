"""Operators and modules in int8 on a processor, against bitsandbytes and the rounding of compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from quantpress.convert.compressed_tensors.activations import round_inputs
from quantpress.kernels.int8.linear import LlmInt8Linear, W8A8Linear, llm_int8_linear, w8a8_linear
from quantpress.pipelines.rounded_inputs import llm_int8_inputs
from tests.kernels.int8_cases import ROUNDING, inputs, weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_w8a8_layer_is_a_linear_on_rounded_inputs(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (23, 131), (64, 2500)):
        weight, scale, bias = weights(rows, columns)
        x = inputs(6, columns, dtype).view(2, 3, columns)
        bias = bias.to(dtype)
        found = W8A8Linear(weight, scale[:, None], bias)(x)
        assert found.dtype == dtype
        assert found.shape == (2, 3, rows)
        dense = weight.double() * scale.double()[:, None]
        # compressed-tensors also rounds code * scale to the type of x, which counts as one more rounding of an input
        rounded = round_inputs(x).double()
        wanted = torch.nn.functional.linear(rounded, dense, bias.double())
        size = torch.nn.functional.linear(rounded.abs(), dense.abs(), bias.double().abs())
        assert ((found.double() - wanted).abs() <= (2.01 * ROUNDING[dtype] + 4 * 2.0**-24) * size).all()


@pytest.mark.parametrize("together", [True, False])
def test_an_llm_int8_layer_is_a_linear_on_the_inputs_of_the_judge(together: bool) -> None:
    weight, scale, bias = weights(23, 131)
    x = inputs(8, 131, torch.float32).view(2, 4, 131)
    x[0, 1, 7], x[1, 3, 100] = 9.0, -6.0
    found = LlmInt8Linear(weight, scale, bias, together=together)(x)
    texts = x.view(1, 8, 131) if together else x
    rounded = llm_int8_inputs(texts).double().view_as(x)
    dense = weight.double() * scale.double()[:, None]
    wanted = torch.nn.functional.linear(rounded, dense, bias.double())
    size = torch.nn.functional.linear(rounded.abs(), dense.abs(), bias.double().abs())
    # code * scale in float32, the sum and its scale, two kept columns, the weight's scale, bias, result
    assert ((found.double() - wanted).abs() <= 8 * 2.0**-24 * size).all()
    alone = LlmInt8Linear(weight, scale, bias, together=together)(x[:1])
    assert torch.equal(alone, found[:1]) == (not together)


def test_a_layer_of_bitsandbytes_gives_the_same_up_to_its_roundings() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(96, 40, bias=True, has_fp16_weights=False, threshold=6.0)
    random = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(40, 96, generator=random) * 0.05, "bias": torch.randn(40, generator=random),
    }  # fmt: skip
    layer.load_state_dict(state)
    layer = layer.to("cpu")
    x = inputs(7, 96, torch.float16)
    x[3, 11] = 8.0
    wanted = layer(x)
    codes, absmax = layer.state.CB, layer.state.SCB
    found = LlmInt8Linear(codes, absmax / 127, layer.bias.detach())(x)
    dense = codes.double() * absmax.double()[:, None] / 127
    size = x.double().abs() @ dense.abs().T + layer.bias.detach().double().abs()
    # bitsandbytes divides in float16 on a processor: two roundings move a quotient up to 127 by 127 * 2^-10, and a code
    # whose quotient lies as near to a tie may be the next one
    within = x.double().masked_fill(x.abs() >= 6.0, 0.0)
    step = within.abs().amax(dim=1, keepdim=True) / 127
    quotient = within / step
    ties = ((quotient - quotient.floor() - 0.5).abs() <= 127 * 2.0**-10).double() * step @ dense.abs().T
    # the kept column's weights, both products and their sum are rounded to float16, each by 2^-11 of what is added up
    assert found.dtype == wanted.dtype
    assert ((found.double() - wanted.double()).abs() <= 5 * 2.0**-11 * size + ties).all()


def test_torch_knows_the_operators() -> None:
    weight, scale, bias = weights(24, 64)
    for x in (inputs(5, 64, torch.float32), inputs(6, 64, torch.float16).view(2, 3, 64), torch.zeros(0, 64)):
        torch.library.opcheck(w8a8_linear, (x, weight, scale, bias))
        torch.library.opcheck(llm_int8_linear, (x * 3, weight, scale, None, 6.0))


@pytest.mark.parametrize("kind", [W8A8Linear, LlmInt8Linear])
def test_a_module_compiles_to_one_graph_and_keeps_its_state(kind: type[W8A8Linear]) -> None:
    module = kind(*weights(24, 64))
    x = inputs(3, 64, torch.float32) * 4
    wanted = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)
    other = kind(torch.zeros(24, 64, dtype=torch.int8), torch.zeros(24), torch.zeros(24))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), wanted)
    assert "in_features=64, out_features=24, bias=True" in repr(module)


def test_what_does_not_fit_is_refused() -> None:
    weight, scale, bias = weights(24, 64)
    layer = W8A8Linear(weight, scale, bias)
    with pytest.raises(ValueError, match="64 columns"):
        layer(torch.zeros(2, 63))
    with pytest.raises(ValueError, match="wanted a float type"):
        layer(torch.zeros(2, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weight is torch\.uint8"):
        W8A8Linear(weight.view(torch.uint8), scale)
    with pytest.raises(ValueError, match="scale is"):
        LlmInt8Linear(weight, scale[:23])
    with pytest.raises(ValueError, match="bias is"):
        LlmInt8Linear(weight, scale, bias.double())
    with pytest.raises(ValueError, match=r"K from 1 to 131071"):
        W8A8Linear(torch.zeros(1, 131072, dtype=torch.int8), scale[:1])
