"""What fewer bits do: onnxruntime computes with the stored weights just what transformers computes with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.stage import RunContext
from tests.onnx_runs import Array, OnnxRun
from tests.onnx_stored import Weight, stored_weights
from tests.tiny import VOCABULARY, tiny_case, tiny_checkpoint

# tied and untied, fused projections, transposed weights, heads in an order of their own, scaled embeddings
NAMES = ("llama-tied", "qwen3", "phi3", "gpt2", "gptneox", "gemma2-caps")
WEIGHT_ONLY: Mapping[str, Mapping[str, Any]] = {
    "int4": {"precision": "int4"},
    "int4-16": {"precision": "int4", "block_size": 16},
    "int4-asymmetric-64": {"precision": "int4", "symmetric": False, "block_size": 64},
    "int4-asymmetric-256": {"precision": "int4", "symmetric": False, "block_size": 256},
    "int8": {"precision": "int8"},
    "int8-asymmetric-128": {"precision": "int8", "symmetric": False, "block_size": 128},
    "bf16": {"precision": "bf16"},
    "standard-int4": {"precision": "int4", "standard_ops": True},
    "standard-int4-asymmetric": {"precision": "int4", "symmetric": False, "block_size": 16, "standard_ops": True},
    "standard-int8-asymmetric": {"precision": "int8", "symmetric": False, "standard_ops": True},
    "standard-bf16": {"precision": "bf16", "standard_ops": True},
    "types": {"precision": "int4", "output_tensor_type": "int8", "token_embedding_type": "bf16"},
}
TOKENS = np.random.default_rng(7).integers(1, VOCABULARY, 48)
LIMIT = 5e-5  # forty operators that round to 2^-24 of values below 16, as in test_onnx_families.py
TEXT = "The press takes a model and gives a file. The file is read, run and compared with the model. " * 40


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = tiny_case(request.param)
    return tiny_checkpoint(tmp_path_factory.mktemp(case.id) / "source", case.family, **case.options)


def export(source: Path, folder: Path, **options: Any) -> Path:
    return Onnx(output=folder, **options).run(open_checkpoint(source), RunContext(threads=1)).path


def source_weights(source: Path) -> dict[str, Array]:
    """The checkpoint's weights under the names and in the order that the ONNX file has them in."""
    from safetensors.numpy import load_file

    return {name: _turned(source, name, value) for name, value in load_file(source / "model.safetensors").items()}


def _turned(source: Path, name: str, value: Array, *, back: bool = False) -> Array:
    """GPT-2's Conv1D is (K, N), and GPT-NeoX has query, key and value of a head beside each other."""
    if source.parent.name.startswith("gpt2") and ".h." in name and value.ndim == 2:
        return np.ascontiguousarray(value.T)
    if "query_key_value" in name:
        heads = (3, 4) if back else (4, 3)
        return value.reshape(*heads, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    return value


@functools.lru_cache(maxsize=1)
def _model(source: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_with(source: Path, stored: Mapping[str, Weight], *, vectors: bool = False) -> Any:
    """Transformers' model with the matrices of an ONNX file, its vectors too where they are rounded."""
    import copy

    import torch

    model = copy.deepcopy(_model(source))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight and "lm_head.weight" in stored:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # a tied pair that was stored twice
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or vectors:
                name = name if name in stored else name.replace("lm_head", "embed_out")  # GPT-NeoX's in files
                values = _turned(source, name, stored[name].values, back=True)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def logits_of(model: Any, tokens: Array) -> Array:
    import torch

    with torch.no_grad():
        found: Array = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    return found


@pytest.fixture(scope="module", params=WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())
def pressed(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Weight]]:
    """A folder with weights of fewer bits, and what they stand for."""
    folder = export(source, tmp_path_factory.mktemp("pressed") / "onnx", **request.param)
    return folder, stored_weights(folder)


def test_stored_weights_give_the_same_logits_in_both(source: Path, pressed: tuple[Path, dict[str, Weight]]) -> None:
    folder, stored = pressed
    found = OnnxRun(folder).logits(TOKENS)
    np.testing.assert_allclose(found, logits_of(transformers_with(source, stored), TOKENS), rtol=0, atol=LIMIT)
    assert np.abs(found - logits_of(_model(source), TOKENS)).max() > 10 * LIMIT  # fewer bits were stored indeed
    onnx.checker.check_model(folder / "model.onnx", full_check=True)


def test_stored_weights_are_the_nearest_of_their_grid(source: Path, pressed: tuple[Path, dict[str, Weight]]) -> None:
    (_, stored), originals = pressed, source_weights(source)
    for name, weight in stored.items():
        original = originals.get(name, originals[_embedding(originals)] if "lm_head" in name else None)
        assert original is not None, name
        error = np.abs(weight.values - original)
        if weight.step is not None:
            # half a step inside the grid; a whole one at its ends, which a rounded zero moves by half a step, and which
            # a symmetric grid has on one side only
            assert (error <= weight.step * (1 + 1e-5)).all(), name
            inside = error <= weight.step * (0.5 + 1e-5)
            assert inside.mean() > 0.9, name
        elif original.ndim == 2:
            assert (error <= np.abs(original) * 2.0**-8).all(), name


def _embedding(names: Mapping[str, Array]) -> str:
    return next(name for name in names if "embed" in name or "wte" in name)


def test_head_and_embedding_have_the_types_that_were_asked_for(source: Path, tmp_path: Path) -> None:
    options = {"output_tensor_type": "int8", "token_embedding_type": "bf16"}
    stored = stored_weights(export(source, tmp_path / "onnx", precision="int4", **options))
    head = next(weight for name, weight in stored.items() if "lm_head" in name or "embed_out" in name)
    assert head.step is not None
    # 8 bits of both signs reach 127 or 128 steps from zero in some block, 4 bits eight at most
    assert np.abs(head.values / head.step).max() > 100
    embedding = stored[_embedding(stored)]
    assert embedding.step is None
    assert not (embedding.values.view(np.uint32) & 0xFFFF).any()


def test_fp16_rounds_as_often_as_it_computes(source: Path, tmp_path: Path) -> None:
    folder = export(source, tmp_path / "onnx", precision="fp16")
    vectors = not source.parent.name.startswith("gemma")  # whose norms are stored with 1 added
    wanted = logits_of(transformers_with(source, stored_weights(folder), vectors=vectors), TOKENS)
    run = OnnxRun(folder)
    assert run.session.get_outputs()[0].type == "tensor(float16)"
    # forty roundings to 2^-11 of values below 16, each of its own sign: sqrt(40) * 16 * 2^-12 = 0.025 at most in the
    # mean of squares, and five times that anywhere
    for found in (run.logits(TOKENS), run.in_chunks(TOKENS, [30, 10])):
        assert np.sqrt(np.square(found - wanted).mean()) < 0.025
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.125)


def rounded_inputs(source: Path, model: Any, stored: Mapping[str, Weight]) -> Any:
    """Rounds what goes into the linears of the layers to uint8, by their grid or by the range of the moment."""
    import torch

    def rounding(weight: Weight) -> Any:
        def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            (values,), size = given, 1.0
            if weight.input_grid is not None:
                scale, zero = np.float32(weight.input_grid[0]), weight.input_grid[1]
            else:
                size = values.abs().amax(dim=-1, keepdim=True)  # tokens are brought to one size first
                values = values / size
                low, high = float(values.min().clamp(max=0)), float(values.max().clamp(min=0))
                scale = np.float32(np.float32(high - low) / 255)  # DynamicQuantizeLinear, ONNX's operator list
                zero = int(np.clip(np.rint(-low / scale), 0, 255))
            codes = torch.clamp(torch.round(values / float(scale)) + zero, 0, 255)
            return ((codes - zero) * float(scale) * size,)

        return hook

    for name, module in model.named_modules():
        layers = any(part in name for part in (".layers.", ".h."))
        if layers and hasattr(module, "weight") and module.weight.ndim == 2:
            module.register_forward_pre_hook(rounding(stored[f"{name}.weight"]))
    return model


@pytest.mark.parametrize("style", ["dynamic", "static"])
def test_int8_rounds_inputs_as_its_operators_say(source: Path, style: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "int8", "int8": style}
    if style == "static":
        text = tmp_path / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        options |= {"calibration": text, "samples": 8, "sequence_length": 48}
    folder = export(source, tmp_path / "onnx", **options)
    stored = stored_weights(folder)
    rounded = [weight for weight in stored.values() if weight.input_grid is not None]
    assert bool(rounded) == (style == "static")
    found, tokens = OnnxRun(folder).logits(TOKENS[:6]), TOKENS[:6]
    plain = logits_of(transformers_with(source, stored), tokens)
    wanted = logits_of(rounded_inputs(source, transformers_with(source, stored), stored), tokens)
    # a value that lies within float32's rounding of the middle between two codes may fall to either, which moves what
    # comes after it by a hundredth: rare among 6 tokens. All others agree as floats do
    errors = np.abs(found - wanted)
    assert np.median(errors) < 1e-4
    assert errors.max() < 0.1 * max(1.0, float(np.abs(plain - wanted).max()))
    assert np.abs(found - plain).max() > 10 * np.median(errors)
