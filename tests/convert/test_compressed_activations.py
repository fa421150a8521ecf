"""Inputs are rounded bit for bit as compressed-tensors' quantized layers round them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.compressed_tensors.activations import round_inputs
from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.quant.qtensor import QuantizedForm

quantization: Any = pytest.importorskip("compressed_tensors.quantization", reason="the oracle is not installed")

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def inputs_of(seed: int, shape: tuple[int, ...], dtype: Any, spread: float) -> Any:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.exp(spread * torch.randn((*shape[:-1], 1), generator=random))
    return x.clamp(-6e4, 6e4).to(dtype)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_inputs_of_a_layer_are_rounded_as_compressed_tensors_rounds_them(data: st.DataObject) -> None:
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70)))
    x = inputs_of(data.draw(st.integers(0, 1 << 30)), shape, dtype, data.draw(st.sampled_from([0.0, 1.0, 4.0])))
    if data.draw(st.booleans()):
        x[0, 0] = 0  # a token of zeros
    if data.draw(st.booleans()):
        x = x.abs()  # no negative value
    if data.draw(st.booleans()):
        x[..., 0] = -x.abs().amax(-1)  # the code -128
    config = FORMAT.settings({"a.weight": QuantizedForm((8, shape[-1]), 8, shape[-1], True, "F16", False, 8)}, [], {})
    args = next(iter(quantization.QuantizationConfig.model_validate(config).config_groups.values())).input_activations
    module = torch.nn.Linear(shape[-1], 8)
    module.quantization_status = quantization.QuantizationStatus.COMPRESSED
    theirs = quantization.forward_quantize(module, x, "input", args)
    before = x.clone()
    ours = round_inputs(x)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)
    assert torch.equal(x, before)
    assert torch.equal(round_inputs(x[0]), ours[0])  # a token does not know its neighbours


def test_an_empty_batch_stays_empty() -> None:
    assert round_inputs(torch.empty(0, 3, 8)).shape == (0, 3, 8)
