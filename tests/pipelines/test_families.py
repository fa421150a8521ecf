"""Every family and option, from transformers' own random checkpoint to the logits of llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError
from tests.tiny import FAMILIES, Tiny, tiny_checkpoint

pytestmark = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")

TOKENS = np.random.default_rng(7).integers(1, 320, 64).astype(np.int32)


def press(case: Tiny, folder: Path, outtype: str) -> Path:
    source = tiny_checkpoint(folder / "model", case.family, **case.options)
    stage = Gguf(output=folder / "model.gguf", outtype=outtype)
    return stage.run(open_checkpoint(source), RunContext(threads=1)).path


def transformers_logits(folder: Path, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = (folder / "config.json").read_text()
    loader = AutoModelForImageTextToText if "ForConditionalGeneration" in config else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0]
    found: np.ndarray[Any, Any] = logits.float().numpy()
    return found


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize("case", [case for case in FAMILIES if case.gguf], ids=str)
def test_llama_cpp_speaks_like_transformers(case: Tiny, tmp_path: Path) -> None:
    path = press(case, tmp_path, "f32")
    with LlamaCppRuntime(path, context=64, threads=1) as runtime:
        # where llama.cpp's graph cannot express a window, the file says a shorter context and is right up to there
        tokens = TOKENS[: min(len(TOKENS), runtime.info.n_ctx_train)]
        found = runtime.logits(tokens, 0)
    wanted = transformers_logits(tmp_path / "model", tokens)
    source, file = log_softmax(wanted), log_softmax(found[:, : wanted.shape[1]])
    divergence = (np.exp(source) * (source - file)).sum(axis=-1)
    assert divergence.mean() <= 1e-4
    assert divergence.max() <= 1e-3


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.gguf], ids=str)
def test_what_llama_cpp_cannot_compute_is_refused_and_nothing_is_written(case: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        press(case, tmp_path, "f32")
    assert not (tmp_path / "model.gguf").exists()
