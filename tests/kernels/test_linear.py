"""Packed weights and the operator on a processor, against the formula in float64 and GPTQ's own layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantpress.kernels.linear import linear, packed_linear, reference_linear
from quantpress.kernels.packed import PackedWeight, reference_dequantize
from quantpress.kernels.quant_linear import QuantLinear
from quantpress.quant.errors import LayoutError
from quantpress.quant.packed import packed_weight
from quantpress.quant.qtensor import QuantizedTensor
from tests.quantized_tensors import fields_of

EPS = 2.0**-24  # of float32
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def made(rows: int, columns: int, *, bits: int, group: int, symmetric: bool, ordered: bool = False) -> QuantizedTensor:
    """Random codes with random scales and zeros, every code among them where there is room."""
    random = np.random.default_rng(rows * columns * bits)
    groups = -(-columns // group)
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scale = random.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16)
    zero = None if symmetric else random.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
    g_idx = None
    if ordered:
        g_idx = random.permutation(np.arange(columns) // group).astype(np.int32)
    return QuantizedTensor(codes, scale, zero, bits, group, g_idx)


def formula(tensor: QuantizedTensor) -> np.ndarray:
    """scale * (code - zero) in float64, one element after the other."""
    weight = np.empty(tensor.codes.shape)
    for row in range(tensor.rows):
        for column in range(tensor.columns):
            group = column // tensor.group_size if tensor.g_idx is None else int(tensor.g_idx[column])
            zero = 1 << (tensor.bits - 1) if tensor.zero is None else int(tensor.zero[row, group])
            weight[row, column] = float(tensor.scale[row, group]) * (int(tensor.codes[row, column]) - zero)
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 1), (7, 31, 31), (33, 97, 32), (5, 128, 64), (13, 33, 7)]
)
def test_packed_and_unpacked_again_every_weight_is_the_same(
    rows: int, columns: int, group: int, bits: int, symmetric: bool
) -> None:
    for ordered in (False, True):
        tensor = made(rows, columns, bits=bits, group=group, symmetric=symmetric, ordered=ordered)
        packed = packed_weight(tensor)
        # float16 scales times whole numbers below 256 are exact in float64 and in float32
        wanted = formula(tensor)
        assert np.array_equal(reference_dequantize(packed, torch.float64).numpy(), wanted)
        assert np.array_equal(reference_dequantize(packed, torch.float32, 1).numpy(), wanted[1:])
        assert (packed.order is not None) == ordered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_product_on_a_processor_is_off_by_no_more_than_sums_in_float32(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpress.kernels.linear._BLOCK", 400)  # several blocks of outputs, the last one shorter
    for columns, group, symmetric in ((97, 32, False), (97, 97, True), (128, 64, False), (1, 1, True)):
        tensor = made(23, columns, bits=bits, group=group, symmetric=symmetric, ordered=symmetric)
        x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(bits)).to(dtype)
        bias = torch.randn(23).to(dtype)
        weight = torch.from_numpy(formula(tensor))
        wanted = torch.nn.functional.linear(x.double(), weight, bias.double())
        size = torch.nn.functional.linear(x.double().abs(), weight.abs(), bias.double().abs())
        found = linear(x, packed_weight(tensor), bias)
        assert found.dtype == dtype
        assert found.shape == (2, 3, 23)
        # K + 1 additions, and the rounding of the result
        assert ((found.double() - wanted).abs() <= (columns + 2) * EPS * size + ROUNDING[dtype] * wanted.abs()).all()
        assert torch.equal(reference_linear(x, packed_weight(tensor), bias), wanted.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_lie_as_the_qweight_of_a_gptq_checkpoint(bits: int) -> None:
    tensor = made(64, 96, bits=bits, group=32, symmetric=False)
    packed = packed_weight(tensor)
    assert packed.words.shape == (96 * bits // 32, 64)
    assert np.array_equal(fields_of(packed.words.numpy().T, bits), tensor.codes)
    assert np.array_equal(packed.scale.numpy(), tensor.scale.T)


def test_torch_knows_the_operator() -> None:
    for symmetric in (True, False):
        packed = packed_weight(made(24, 64, bits=4, group=32, symmetric=symmetric, ordered=True))
        x, bias = torch.randn(5, 64), torch.randn(24)
        fields = (packed.words, packed.scale, packed.zero, packed.order, bias)
        torch.library.opcheck(packed_linear, (x, *fields, 64, 4, 32, False))


def test_a_module_compiles_to_one_graph_and_keeps_its_state() -> None:
    packed = packed_weight(made(24, 64, bits=4, group=32, symmetric=False))
    module = QuantLinear(packed, torch.randn(24))
    x = torch.randn(3, 64)
    wanted = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)
    other = QuantLinear(packed_weight(made(24, 64, bits=4, group=32, symmetric=False)), torch.zeros(24))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), wanted)
    assert "in_features=64, out_features=24" in repr(module)


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    tensor = made(8, 32, bits=4, group=16, symmetric=False)
    packed = packed_weight(tensor)
    with pytest.raises(ValueError, match="32 columns"):
        linear(torch.randn(2, 31), packed)
    with pytest.raises(ValueError, match="float type"):
        linear(torch.ones(2, 32, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match="bias is"):
        linear(torch.randn(2, 32), packed, torch.randn(7))
    with pytest.raises(ValueError, match="words is"):
        PackedWeight(packed.words[:-1], packed.scale, packed.zero, None, 32, 4, 16)
    with pytest.raises(ValueError, match="gaps"):
        PackedWeight(packed.words, packed.scale.T.contiguous().T, packed.zero, None, 32, 4, 16)
    for wrong in (-1, 32):
        order = torch.arange(32)
        order[5] = wrong
        with pytest.raises(ValueError, match="order goes from"):
            QuantLinear(PackedWeight(packed.words, packed.scale, packed.zero, order, 32, 4, 16))
    with pytest.raises(LayoutError, match="g_idx goes from 0 to 2"):
        QuantizedTensor(tensor.codes, tensor.scale, None, 4, 16, np.arange(32, dtype=np.int32) // 12)
    uneven = (np.arange(32) >= 20).astype(np.int32)
    with pytest.raises(LayoutError, match="group 0 has 20 columns, wanted 16"):
        packed_weight(QuantizedTensor(tensor.codes, tensor.scale, None, 4, 16, uneven))
