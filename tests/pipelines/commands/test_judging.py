"""`quantpress verify` and `quantpress perplexity`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantpress.pipelines.llama_cpp_find import find_llama_cpp

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
Run = Callable[..., Any]
PARITY_KEYS = {
    "text_sha256", "tokens", "context", "baseline", "candidate", "ppl_ratio", "mean_kld", "kld_p99", "max_kld",
    "top1_agreement", "limits", "passed", "reason", "failures", "content",
}  # fmt: skip
PERPLEXITY_KEYS = {"model", "runtime", "perplexity", "stderr", "tokens", "context", "chunks", "seconds"}


@pytest.fixture
def pressed(quantpress: Run, tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in float16."""
    out = tmp_path / "pressed.gguf"
    assert quantpress("convert", tiny_model, out, "--outtype", "f16", "--no-verify").code == 0
    return out


@pytest.mark.parametrize("runtime", ["torch", pytest.param("llama.cpp", marks=needs_llama_cpp)])
def test_a_good_file_passes_in_every_runtime(
    quantpress: Run, pressed: Path, tiny_model: Path, text_file: Path, runtime: str
) -> None:
    ended = quantpress(
        "verify", pressed, "--against", tiny_model, "--text", text_file, "--runtime", runtime, "--context", 64, "--json"
    )
    assert ended.code == 0, ended.err
    parity = json.loads(ended.out)
    assert set(parity) == PARITY_KEYS
    assert parity["passed"] is True
    assert parity["candidate"]["runtime"] == runtime
    assert parity["context"] == 64


def test_a_file_of_other_weights_fails_with_4(
    quantpress: Run, pressed: Path, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: np.float32(1.1) * tensors[name]}, other / "model.safetensors")
    ended = quantpress("verify", pressed, "--against", other, "--text", text_file, "--json")
    assert ended.code == 4
    assert json.loads(ended.out)["passed"] is False


def test_a_text_that_is_too_short_or_empty_is_bad_input(
    quantpress: Run, pressed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    for text, words in (("two words", "tokens"), ("  \n", "empty")):
        short.write_text(text)
        ended = quantpress("verify", pressed, "--against", tiny_model, "--text", short)
        assert ended.code in (3, 4)
        assert words in ended.err


def test_a_text_that_is_no_utf8_is_bad_input(quantpress: Run, pressed: Path, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 500)
    ended = quantpress("verify", pressed, "--against", tiny_model, "--text", text)
    assert ended.code == 3
    assert "UTF-8" in ended.err


@needs_llama_cpp
def test_a_damaged_file_is_bad_input(quantpress: Run, pressed: Path, tiny_model: Path, text_file: Path) -> None:
    pressed.write_bytes(pressed.read_bytes()[:5000])
    ended = quantpress("verify", pressed, "--against", tiny_model, "--text", text_file)
    assert ended.code == 3
    assert "pressed.gguf" in ended.err


@pytest.mark.parametrize("runtime", ["torch", pytest.param("llama.cpp", marks=needs_llama_cpp)])
def test_perplexity_is_the_same_in_every_runtime(
    quantpress: Run, pressed: Path, tiny_model: Path, text_file: Path, runtime: str
) -> None:
    flags = ("--text", text_file, "--context", 64, "--chunks", 3, "--json")
    source = json.loads(quantpress("perplexity", tiny_model, *flags).out)
    found = json.loads(quantpress("perplexity", pressed, "--runtime", runtime, *flags).out)
    assert set(found) == PERPLEXITY_KEYS
    assert found["runtime"] == runtime
    assert found["tokens"] == 3 * 31
    # float16 weights: each value is off by at most 2^-11 of itself, which moved no perplexity seen by more than 1e-3
    assert math.isclose(found["perplexity"], source["perplexity"], rel_tol=1e-3)


def test_perplexity_of_a_folder_in_llama_cpp_is_a_usage_error(
    quantpress: Run, tiny_model: Path, text_file: Path
) -> None:
    ended = quantpress("perplexity", tiny_model, "--text", text_file, "--context", 64, "--runtime", "llama.cpp")
    assert ended.code == 2
    assert "GGUF" in ended.err


@needs_llama_cpp
def test_a_wrong_pre_tokenizer_fails_though_every_logit_is_right(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "wrong.gguf"
    flags = ("--outtype", "f32", "--override-kv", "tokenizer.ggml.pre=str:deepseek-coder", "--text", text_file)
    ended = quantpress("convert", tiny_model, out, *flags)
    assert ended.code == 4
    assert "tokenizer.ggml.pre" in ended.err
    assert json.loads(Path(f"{out}.quantpress.json").read_text())["parity"]["mean_kld"] < 1e-6
