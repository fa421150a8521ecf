"""`quantpress convert` to GGUF: the flags that choose types, methods, importance matrices and several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.importance_file import write_importance
from quantpress.pipelines.llama_cpp_find import find_llama_cpp

Run = Callable[..., Any]
WINDOWS = ("--method", "gptq", "--samples", 2, "--sequence-length", 32)


@pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
def test_blocks_are_found_on_a_text_and_the_file_is_proved(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "{name}-{ftype}.gguf"
    loose = ("--text", text_file, "--chunks", 1, "--max-kld", 9, "--max-ppl-change", 9, "--min-top1", 0)
    method = ("--outtype", "q4_0", *WINDOWS, "--calibration", text_file, "--seed", 3, "--damping", 0.05)
    ended = quantpress("convert", tiny_model, out, *method, "--no-act-order", "--json", *loose)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert Path(report["output"]).name == "tiny-model-Q4_0.gguf"
    assert report["parity"]["candidate"]["runtime"] == "llama.cpp"
    record = json.loads(Path(report["sidecar"]).read_text())
    options = record["stages"][0]["options"]
    wanted = {"method": "gptq", "samples": 2, "seed": 3, "damping": 0.05, "act_order": False, "calibration": "text.txt"}
    assert {name: options[name] for name in wanted} == {**wanted, "calibration": text_file.name}
    assert record["calibration"]["tokens"] == 64


def test_a_dry_run_says_what_a_calibration_takes(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "x.gguf", "--outtype", "q4_0", *WINDOWS, "--dry-run", "--json")
    plain = quantpress("convert", tiny_model, tmp_path / "x.gguf", "--outtype", "q4_0", "--dry-run", "--json")
    assert (ended.code, plain.code) == (0, 0)
    found, without = json.loads(ended.out), json.loads(plain.out)
    assert found["bytes"] == without["bytes"]
    assert found["disk_needed"] > without["disk_needed"]
    assert list(tmp_path.iterdir()) == []


def test_several_files_and_an_importance_matrix(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    entry = Importance(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    write_importance(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.ffn_up.weight": entry}))
    flags = ("--outtype", "q4_0", "--imatrix", tmp_path / "i.gguf", "--split-max-size", "50K", "--no-verify", "--json")
    ended = quantpress("convert", tiny_model, tmp_path / "out" / "m.gguf", *flags)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) > 1
    assert report["output"] == str(files[0])
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert any(note.startswith("i.gguf has no entry for") for note in report["notes"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--outtype", "f16", *WINDOWS), "become F16 with --outtype f16"),
        (("--outtype", "q4_0", "--method", "hqq"), "--method hqq: GGUF takes one of rtn, gptq"),
        (("--outtype", "q4_0", "--calibration", "x.txt"), "only --method gptq reads a text"),
        (("--to", "onnx", "--imatrix", "x.gguf"), "--imatrix is for GGUF outputs"),
        (("--to", "onnx", "--split-max-tensors", 3), "--split-max-tensors is for GGUF outputs"),
        (("--to", "safetensors", "--method", "gptq"), "--method is for GGUF and ONNX outputs"),
        (("--outtype", "q4_k_x"), "q4_k_x"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[Any, ...], said: str
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "x.gguf", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_importance_matrix_that_is_none_is_bad_input(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(b"GGUF, or so")
    ended = quantpress("convert", tiny_model, tmp_path / "x.gguf", "--outtype", "q4_0", "--imatrix", tmp_path / "i.dat")
    assert ended.code == 3
    assert "i.dat" in ended.err
    missing = quantpress("convert", tiny_model, tmp_path / "x.gguf", "--outtype", "q4_0", "--imatrix", tmp_path / "no")
    assert missing.code == 3
    assert not (tmp_path / "x.gguf").exists()
