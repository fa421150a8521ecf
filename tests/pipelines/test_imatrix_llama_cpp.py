"""Importance matrices against llama.cpp: its own graph's inputs, and its own quantizer with our numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.calibration.powers import measure_powers
from quantpress.pipelines.llama_cpp import LlamaCpp
from quantpress.pipelines.llama_cpp_find import ENVIRONMENT_VARIABLE, find_llama_cpp
from tests.tiny import tiny_case, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

ROOT = Path(__file__).parents[2]
CASES = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gptneox",
)
# llama.cpp computes GELU from a table of float16 inputs and outputs (ggml_vec_gelu_f32): a half step of float16 each,
# 2^-11, on what goes into ffn_down and, layer by layer, into all that follows; squares double it
TOLERANCE = {"gemma": 2e-2, "gpt2": 2e-2, "gptneox": 2e-2}


def theirs(library: LlamaCpp, model: Path, windows: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    np.save(folder / "tokens.npy", windows)
    command = [sys.executable, "-m", "tests.pipelines.llama_imatrix", str(library.path), str(model)]
    ended = subprocess.run(
        [*command, str(folder / "tokens.npy"), str(folder / "out.npz")], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_multiplies_the_same_weights_with_the_same_inputs(
    name: str, library: LlamaCpp, tmp_path: Path
) -> None:
    case = tiny_case(name)
    model = qp.open_checkpoint(tiny_checkpoint(tmp_path / "model", case.family, **case.options))
    qp.export_gguf(model, tmp_path / "model.gguf", outtype="f32")
    # the first ids are special
    windows = np.random.default_rng(1).integers(4, 320, (3, 48)).astype(np.int32)
    found = theirs(library, tmp_path / "model.gguf", windows, tmp_path)
    ours = measure_powers(model, list(windows), threads=1, folder=tmp_path)
    assert {weight for weight in found if not weight.startswith("counts of ")} == set(ours.sums)
    tolerance = next((value for family, value in TOLERANCE.items() if name.startswith(family)), 1e-4)
    for weight, values in ours.sums.items():
        assert found[f"counts of {weight}"] == ours.tokens
        scale = tolerance * values.mean() * 1e-2
        np.testing.assert_allclose(values[0], found[weight], rtol=tolerance, atol=scale, err_msg=weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("outtype", ["Q4_K_M", "Q2_K_S"])
def test_llama_quantize_with_our_matrix_writes_our_tensors(outtype: str, tied: bool, tmp_path: Path) -> None:
    """Names, sizes and means are right in every entry, or the bytes of a tensor would differ."""
    library = find_llama_cpp() if os.environ.get(ENVIRONMENT_VARIABLE) else None
    if library is None:
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no library with llama_model_quantize")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    model = qp.open_checkpoint(tiny_checkpoint(tmp_path / "model", "llama", **sizes))
    text = tmp_path / "text.txt"
    text.write_text("The press takes a model and gives a file. " * 30)
    matrix, plain = tmp_path / "imatrix.gguf", tmp_path / "plain.gguf"
    qp.imatrix(model, matrix, text=text, context=32)
    qp.export_gguf(model, plain, outtype="f32")
    qp.export_gguf(model, tmp_path / "ours.gguf", outtype=outtype, imatrix=matrix)
    program = [sys.executable, "benchmarks/llama_quantize.py", str(library.path), str(plain)]
    arguments = [str(tmp_path / "theirs.gguf"), outtype, "--imatrix", str(matrix)]
    ended = subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    ours, wanted = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("ours.gguf", "theirs.gguf")
    )
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        assert ours[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)
