"""`quantpress convert` from the command line to the proved file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantpress.pipelines.llama_cpp_find import find_llama_cpp

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
Run = Callable[..., Any]


def sidecar(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{output}.quantpress.json").read_text())
    return found


@needs_llama_cpp
def test_a_file_is_written_run_in_llama_cpp_and_proved(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    ended = quantpress("convert", tiny_model, out, "--outtype", "f16", "--text", text_file, "--chunks", 2, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["parity"]["passed"] is True
    assert report["parity"]["candidate"]["runtime"] == "llama.cpp"
    assert report["parity"]["baseline"]["runtime"] == "torch"
    assert sidecar(out)["parity"]["passed"] is True
    # the header is read by llama.cpp's own package, and values are the source's in float16
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    source = load_file(tiny_model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"].data, source.astype(np.float16))


def test_the_sidecar_holds_what_the_contract_names(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    assert quantpress("convert", tiny_model, out, "--outtype", "q8_0", "--no-verify").code == 0
    found = sidecar(out)
    keys = "schema created_by inputs adapters stages environment outputs tensors parity timings"
    assert set(keys.split()) <= set(found)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert found["outputs"] == [{"name": "tiny.gguf", "sha256": digest, "bytes": out.stat().st_size}]
    assert found["subject"] == [{"name": "tiny.gguf", "digest": {"sha256": digest}}]
    weights = next(item for item in found["inputs"] if item["name"] == "model.safetensors")
    assert weights["sha256"] == hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    up = next(item for item in found["tensors"] if item["name"] == "blk.0.ffn_up.weight")
    assert up["type"] == "Q8_0"
    assert up["bytes"] == 96 * 64 // 32 * 34
    assert 0 < up["relative_error"] < 0.01
    assert found["stages"][0]["options"]["outtype"] == "q8_0"
    assert found["parity"] is None
    assert set(found["timings"]) == {"open", "gguf"}


def test_a_second_run_gives_the_same_bytes_and_differs_in_timings_only(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    records = []
    for number, threads in enumerate((1, 3)):
        out = tmp_path / str(number) / "tiny.gguf"
        out.parent.mkdir()
        flags = ("--outtype", "q4_0", "--text", text_file, "--chunks", 1, "--threads", threads, "--max-kld", 5)
        loose = ("--max-ppl-change", 5, "--min-top1", 0)
        assert quantpress("convert", tiny_model, out, *flags, *loose).code == 0
        records.append((out.read_bytes(), {key: value for key, value in sidecar(out).items() if key != "timings"}))
    assert records[0] == records[1]


def test_an_existing_file_is_replaced_only_with_force(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    out.write_bytes(b"precious")
    ended = quantpress("convert", tiny_model, out, "--no-verify")
    assert ended.code == 2
    assert "--force" in ended.err
    assert out.read_bytes() == b"precious"
    assert quantpress("convert", tiny_model, out, "--no-verify", "--force").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


@needs_llama_cpp
def test_a_file_that_fails_its_limits_ends_with_4_and_says_so_in_the_sidecar(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    ended = quantpress("convert", tiny_model, out, "--outtype", "q4_0", "--text", text_file, "--max-kld", "1e-9")
    assert ended.code == 4
    assert ended.err.count("error:") == 1
    assert "mean KL divergence" in ended.err
    assert sidecar(out)["parity"]["passed"] is False
    assert "mean KL divergence" in sidecar(out)["parity"]["reason"]


def test_without_llama_cpp_the_gguf_package_and_torch_judge_and_the_report_says_so(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpress.pipelines.candidate.find_llama_cpp", lambda: None)
    out = tmp_path / "tiny.gguf"
    ended = quantpress("convert", tiny_model, out, "--outtype", "f32", "--text", text_file, "--json")
    assert ended.code == 0, ended.err
    parity = json.loads(ended.out)["parity"]
    assert parity["candidate"]["runtime"] == "torch"
    assert parity["mean_kld"] < 1e-9


def test_names_in_braces_are_filled_in(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    assert quantpress("convert", tiny_model, tmp_path / "{name}-{ftype}.gguf", "--no-verify").code == 0
    assert (tmp_path / "tiny-model-F16.gguf").is_file()


def test_a_dry_run_tells_the_exact_size_and_writes_nothing(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    ended = quantpress("convert", tiny_model, out, "--outtype", "q5_1", "--dry-run", "--json")
    assert ended.code == 0
    assert list(tmp_path.iterdir()) == []
    assert quantpress("convert", tiny_model, out, "--outtype", "q5_1", "--no-verify").code == 0
    plan = json.loads(ended.out)
    assert plan["bytes"] == out.stat().st_size
    written = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert {tensor["name"]: tensor["type"] for tensor in plan["tensors"]} == written


def test_a_dry_run_touches_no_weight(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in tensors.items()}, model / "model.safetensors")
    assert quantpress("convert", model, tmp_path / "out.gguf", "--dry-run").code == 0
    refused = quantpress("convert", model, tmp_path / "out.gguf", "--no-verify")
    assert refused.code == 3
    assert "NaN" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--outtype", "iq2_xxs"), "iq2_xxs"),
        (("--outtype", "banana"), "banana"),
        (("--tensor-type", "ffn_down"), "REGEX=TYPE"),
        (("--tensor-type", "nothing_like_it=q8_0"), "nothing_like_it"),
        (("--override-kv", "general.name"), "KEY=TYPE:VALUE"),
        (("--dtype", "f16"), "--outtype"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--to", "safetensors", "--pure"), "--pure"),
    ],
)
def test_a_wrong_flag_ends_with_2_one_line_and_no_file(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "out.gguf", "--no-verify", *flags)
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_types_and_metadata_that_were_asked_for_are_in_the_file(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    flags = ["--outtype", "q4_0", "--tensor-type", "ffn_down=q8_0", "--output-tensor-type", "f16"]
    flags += ["--override-kv", "general.author=str:someone", "--model-name", "Tiny", "--no-verify"]
    assert quantpress("convert", tiny_model, out, *flags).code == 0
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["output.weight"] == "F16"
    assert reader.fields["general.author"].contents() == "someone"
    assert reader.fields["general.name"].contents() == "Tiny"


def test_a_vocabulary_alone_holds_no_tensor(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "vocab.gguf"
    assert quantpress("convert", tiny_model, out, "--vocab-only").code == 0
    reader = gguf.GGUFReader(out)
    assert reader.tensors == []
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


def test_safetensors_in_another_type_are_proved_in_torch(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "half"
    ended = quantpress("convert", tiny_model, out, "--dtype", "bf16", "--text", text_file, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["parity"]["candidate"]["runtime"] == "torch"
    values = load_file(out / "model.safetensors")
    assert all(value.dtype.name == "bfloat16" for value in values.values())
    assert (out / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    record = json.loads((out / "quantpress.json").read_text())
    assert {item["name"] for item in record["outputs"]} == {path.name for path in out.iterdir()} - {"quantpress.json"}


def test_a_gguf_file_converted_back_and_forth_keeps_its_values(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    first, folder, second = tmp_path / "a.gguf", tmp_path / "folder", tmp_path / "b.gguf"
    assert quantpress("convert", tiny_model, first, "--outtype", "f32", "--no-verify").code == 0
    assert quantpress("convert", first, folder, "--to", "safetensors", "--no-verify").code == 0
    source, back = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert source.keys() == back.keys()
    for name, value in source.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert quantpress("convert", folder, second, "--outtype", "f32", "--no-verify").code == 0
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(first).tensors}
    for tensor in gguf.GGUFReader(second).tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name], err_msg=tensor.name)


def test_a_missing_model_ends_with_3_and_names_it(quantpress: Run, tmp_path: Path) -> None:
    ended = quantpress("convert", tmp_path / "nowhere", tmp_path / "out.gguf")
    assert ended.code == 3
    assert "nowhere" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_with_5(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = quantpress("convert", tiny_model, tmp_path / "file" / "out.gguf", "--no-verify")
    assert ended.code == 5, ended.err
    assert "file" in ended.err


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("two words", "tokens"), (None, "no such file")])
def test_a_text_that_cannot_judge_is_refused_before_anything_is_written(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    ended = quantpress("convert", tiny_model, tmp_path / "out" / "tiny.gguf", "--text", path)
    assert ended.code == 3
    assert words in ended.err
    assert not (tmp_path / "out").exists()
