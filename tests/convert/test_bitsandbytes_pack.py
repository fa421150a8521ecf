"""int8 rows in bitsandbytes' format are the bytes that transformers saves, and run in it as its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.bitsandbytes_pack import FORMAT
from quantpress.convert.checkpoint import Array
from quantpress.convert.open import open_checkpoint
from quantpress.convert.safetensors_reader import open_shard
from quantpress.quant.errors import LayoutError
from quantpress.quant.llm_int8 import dequantize_int8, quantize_int8
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor
from tests.packed_folder import write_packed
from tests.quantized_tensors import random_tensor
from tests.tiny import tiny_checkpoint

pytest.importorskip("bitsandbytes", reason="the oracle, bitsandbytes, is not installed")
transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to quantize")

TOKENS = torch.randint(4, 320, (2, 24), generator=torch.Generator().manual_seed(1))


def llm_int8(_name: str, weight: Array) -> QuantizedTensor:
    codes, absmax = quantize_int8(weight)
    scale = (absmax / np.float32(127))[:, None]
    return QuantizedTensor((codes.astype(np.int16) + 128).astype(np.uint8), scale, None, 8, weight.shape[1])


def load(folder: Path, **options: Any) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_tensors_are_those_that_transformers_saves_and_run_as_they_do(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", family, dtype="float16")
    model = load(source, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path / "theirs")
    made = write_packed(source, tmp_path / "ours", FORMAT, llm_int8)
    theirs = open_shard(tmp_path / "theirs" / "model.safetensors").tensors
    ours = open_shard(tmp_path / "ours" / "model.safetensors").tensors
    assert len([name for name in ours if name.endswith(".SCB")]) == len(made)
    assert {name: (each.dtype, each.shape) for name, each in ours.items() if name in theirs} == {
        name: (each.dtype, each.shape) for name, each in theirs.items()
    }
    for name, tensor in theirs.items():
        assert ours[name].read().tobytes() == tensor.read().tobytes(), name
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}  # a tied head need not be saved
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))
    wanted, found = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("theirs", "ours"))
    for key, value in found["quantization_config"].items():
        if key != "llm_int8_skip_modules":
            assert wanted["quantization_config"][key] == value
    opened = open_checkpoint(tmp_path / "ours")
    assert set(opened.storage_types) == set(made)


def test_what_is_left_alone_stays_so_in_transformers(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", dtype="float16")
    write_packed(source, tmp_path / "q", FORMAT, lambda name, weight: None if ".1." in name else llm_int8(name, weight))
    model = load(tmp_path / "q")
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert type(model.model.layers[2].mlp.up_proj).__name__ == "Linear8bitLt"
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.isfinite(logits(model)).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_greatest_magnitude_of_a_row_comes_back_from_its_scale(data: st.DataObject) -> None:
    """LLM.int8() has float16 numbers there, and either way of making a scale of one must not lose it."""
    exponent = data.draw(st.floats(-24, 15.9))
    absmax = np.full((9, 1), 2**exponent, np.float16).astype(np.float32)
    absmax[1:, 0] *= np.random.default_rng(data.draw(st.integers(0, 1 << 30))).uniform(0.1, 1, 8).astype(np.float16)
    absmax = absmax.astype(np.float16).astype(np.float32)
    codes = np.full((9, 4), 255, np.uint8)
    for scale in (absmax / np.float32(127), absmax * np.float32(1 / 127)):
        tensor = QuantizedTensor(codes, scale, None, 8, 4)
        stored = FORMAT.pack("a.weight", tensor, tensor.form)
        np.testing.assert_array_equal(stored["a.SCB"], absmax[:, 0])


@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
def test_other_int8_rows_are_what_bitsandbytes_dequantizes(scale_type: str) -> None:
    tensor = random_tensor(3, 40, 64, bits=8, group=-1, symmetric=True, scale_type=scale_type)
    stored = FORMAT.pack("a.weight", tensor, tensor.form)
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, absmax = torch.from_numpy(stored["a.weight"]), torch.from_numpy(stored["a.SCB"])
    theirs = functional.int8_vectorwise_dequant(weight, absmax).numpy()
    # SCB is 127 scales, exact for 16 bits and rounded once for 32; the library rounds 1/127 and two products
    np.testing.assert_allclose(theirs, tensor.dequantize(), rtol=4 * 2.0**-24)
    np.testing.assert_array_equal(theirs, dequantize_int8(stored["a.weight"], stored["a.SCB"]))
    planned = {each.name: each.shape for each in FORMAT.planned("a.weight", tensor.form)}
    assert planned == {name: values.shape for name, values in stored.items()}
    assert list(planned) == ["a.weight", "a.SCB", "a.weight_format"]


@pytest.mark.parametrize(
    "form",
    [
        QuantizedForm((8, 64), 4, 64, True),
        QuantizedForm((8, 64), 8, 32, True),
        QuantizedForm((8, 64), 8, 64, False),
        QuantizedForm((8, 64), 8, 64, True, "F32", False, 8),
        QuantizedForm((8, 64), 8, 64, True, "F32", True),
    ],
    ids=str,
)
def test_everything_else_is_refused(form: QuantizedForm) -> None:
    with pytest.raises(LayoutError, match=r"int8 with one scale per row, found .*--bits 8"):
        FORMAT.check(form)


def test_scales_beyond_its_range_are_refused() -> None:
    tensor = QuantizedTensor(np.full((1, 4), 255, np.uint8), np.full((1, 1), 3e38, np.float32), None, 8, 4)
    with pytest.raises(LayoutError, match="beyond float32"):
        FORMAT.pack("a.weight", tensor, tensor.form)
