"""What is written as compressed-tensors is what compressed-tensors unpacks, and what it packs opens exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.convert.compressed_tensors.reader import opened
from quantpress.quant.grid import SCALE_TYPES
from quantpress.quant.qtensor import BITS, QuantizedTensor
from tests.quantized_tensors import assert_same, random_tensor

NAME = "model.layers.0.mlp.down_proj.weight"
MODULE = NAME.removesuffix(".weight")


def lazy(name: str, values: Array) -> LazyTensor:
    dtype = next(key for key, kind in DTYPES.items() if kind == values.dtype)
    return LazyTensor(name, values.shape, dtype, "model.safetensors", lambda start, stop: values[start:stop])


def checkpoint_of(stored: dict[str, Array], quantization: dict[str, Any], **config: Any) -> Checkpoint:
    """A checkpoint of a family without a table, so that any names and shapes will do."""
    return Checkpoint(
        name="m",
        config={"model_type": "none-of-ours", "quantization_config": quantization, **config},
        tensors={name: lazy(name, values) for name, values in stored.items()},
    )


def packed(tensor: QuantizedTensor, *, input_bits: int | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
    """What is stored for one weight, and the config."""
    form = replace(tensor.form, input_bits=input_bits)
    FORMAT.check(form)
    stored = FORMAT.pack(NAME, tensor, form)
    planned = {each.name: (each.shape, DTYPES[each.dtype]) for each in FORMAT.planned(NAME, form)}
    assert planned == {name: (values.shape, values.dtype) for name, values in stored.items()}
    assert list(planned) == list(stored)
    return stored, FORMAT.settings({NAME: form}, ["lm_head.weight"], {})


def to_torch(values: Array) -> Any:
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def decompressed(stored: dict[str, Array], settings: dict[str, Any]) -> tuple[Array, str]:
    """What compressed-tensors makes of a weight, in float32, and the type it makes it in."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="the oracle is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization.QuantizationConfig.model_validate(settings)
    scheme = next(iter(config.config_groups.values()))
    compressor = compressors.BaseCompressor.get_value_from_registry(config.format)
    state = {name.removeprefix(f"{MODULE}."): to_torch(values) for name, values in stored.items()}
    weight = compressor.decompress(state, scheme)["weight"]
    return weight.float().numpy(), str(weight.dtype)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_packed_is_what_compressed_tensors_unpacks_and_what_opens_again(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    columns, group = data.draw(st.sampled_from([(64, 32), (96, 48), (50, 50), (37, 37), (48, 16), (128, 128), (5, 5)]))
    tensor = random_tensor(
        data.draw(st.integers(0, 1 << 30)),
        data.draw(st.integers(9, 40)),  # of up to 8, the library cannot unpack zeros: one word, which it cannot view
        columns,
        bits=bits,
        group=group,
        symmetric=data.draw(st.booleans()),
        scale_type=data.draw(st.sampled_from(list(SCALE_TYPES))),
    )
    input_bits = data.draw(st.sampled_from([None, 8]))
    stored, config = packed(tensor, input_bits=input_bits)
    theirs, dtype = decompressed(stored, config)
    with np.errstate(over="ignore"):
        ours = tensor.dequantize().astype(tensor.scale.dtype)  # the library computes in the type of the scales
    np.testing.assert_array_equal(theirs, ours.astype(np.float32))
    assert dtype == {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}[tensor.form.scale_type]
    back = opened(checkpoint_of(stored, config)).quantized[NAME]
    assert back.form == replace(tensor.form, input_bits=input_bits)
    assert_same(back.read(), tensor)
