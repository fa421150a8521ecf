"""`quantpress convert --to onnx` from the command line to the proved folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.pipelines.commands.quantized_folders import files, sidecar

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
Run = Callable[..., Any]
LOOSE = ("--max-kld", 5, "--max-ppl-change", 5, "--min-top1", 0)
JUDGE = ("--chunks", 2, "--context", 64)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_folder_is_written_run_in_onnxruntime_and_proved(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path, precision: str
) -> None:
    out = tmp_path / "out"
    flags = ("--to", "onnx", "--precision", precision, "--text", text_file, *JUDGE, "--json")
    ended = quantpress("convert", tiny_model, out, *flags, "--min-top1", 0.95)  # one token of 62 is 0.016
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["parity"]["passed"] is True
    assert report["parity"]["candidate"]["runtime"] == "onnxruntime"
    assert report["parity"]["baseline"]["runtime"] == "torch"
    assert report["ftype"] == precision.upper()
    assert sidecar(out)["parity"]["passed"] is True
    assert report["parity"]["mean_kld"] < {"fp32": 1e-9, "fp16": 1e-5, "bf16": 1e-4}[precision]


def test_the_sidecar_holds_what_the_contract_names(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--to", "onnx", "--precision", "int4", "--asymmetric", "--no-verify")
    assert quantpress("convert", tiny_model, out, *flags).code == 0
    found = sidecar(out)
    keys = "schema created_by inputs adapters stages environment outputs tensors parity timings"
    assert set(keys.split()) <= set(found)
    wanted = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in files(out).items()}
    assert {each["name"]: (each["sha256"], each["bytes"]) for each in found["outputs"]} == wanted
    assert {each["name"] for each in found["inputs"]} >= {"model.safetensors", "config.json", "tokenizer.json"}
    down = next(each for each in found["tensors"] if each["name"] == "model.layers.0.mlp.down_proj.weight")
    assert down["type"] == "INT4 g32 asym"
    assert down["bytes"] == 64 * (96 // 2 + 3 * 4 + 2)  # codes, three float32 scales, three 4-bit zeros
    (stage,) = found["stages"]
    assert (stage["name"], stage["options"]["precision"], stage["options"]["method"]) == ("onnx", "int4", "rtn")
    assert (stage["options"]["block_size"], stage["options"]["symmetric"]) == (32, False)
    assert found["parity"] is None
    assert set(found["timings"]) == {"open", "onnx"}


def test_a_second_run_gives_the_same_bytes_and_differs_in_timings_only(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    records = []
    for threads in (1, 3):
        out = tmp_path / str(threads) / "tiny"
        flags = ("--to", "onnx", "--precision", "int4", "--text", text_file, "--threads", threads, *JUDGE, *LOOSE)
        assert quantpress("convert", tiny_model, out, *flags).code == 0
        records.append((files(out), {key: value for key, value in sidecar(out).items() if key != "timings"}))
    assert records[0] == records[1]


def test_an_existing_folder_is_replaced_only_with_force_and_only_if_it_is_a_model(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert = ("convert", tiny_model, out, "--to", "onnx", "--no-verify")
    assert quantpress(*convert).code == 0
    (out / "stale").write_text("old")
    ended = quantpress(*convert)
    assert ended.code == 2
    assert "--force" in ended.err
    assert quantpress(*convert, "--force").code == 0
    assert not (out / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("kept")
    ended = quantpress("convert", tiny_model, other, "--to", "onnx", "--no-verify", "--force")
    assert ended.code == 2
    assert (other / "precious").read_text() == "kept"
    for name in ("genai_config.json", "model.onnx"):  # a folder of another exporter
        shutil.rmtree(out)
        out.mkdir()
        (out / name).write_text("{}")
        assert quantpress(*convert, "--force").code == 0


@pytest.mark.parametrize("flags", [(), ("--precision", "int4", "--block-size", 16), ("--precision", "int8")])
def test_a_dry_run_tells_the_exact_size_and_writes_nothing(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: Sequence[object]
) -> None:
    out = tmp_path / "out"
    ended = quantpress("convert", tiny_model, out, "--to", "onnx", *flags, "--dry-run", "--json")
    assert ended.code == 0
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(ended.out)
    assert quantpress("convert", tiny_model, out, "--to", "onnx", *flags, "--no-verify").code == 0
    assert plan["bytes"] == sum(map(len, files(out).values()))
    assert 100e6 < plan["peak_memory"] < 400e6
    written = {each["name"]: (each["type"], each["bytes"]) for each in sidecar(out)["tensors"]}
    assert {each["name"]: (each["type"], each["bytes"]) for each in plan["tensors"]} == written
    assert {*load_file(tiny_model / "model.safetensors")} <= set(written)


def test_a_dry_run_touches_no_weight(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in tensors.items()}, model / "model.safetensors")
    convert = ("convert", model, tmp_path / "out", "--to", "onnx")
    assert quantpress(*convert, "--dry-run").code == 0
    refused = quantpress(*convert, "--no-verify")
    assert refused.code == 3
    assert "NaN" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert quantpress(*convert, "--no-verify", "--allow-nonfinite").code == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--precision", "int3"), "int3"),
        (("--precision", "int4", "--block-size", "48"), "--block-size 48"),
        (("--precision", "fp32", "--block-size", "32"), "--block-size 32: is for --precision int4"),
        (("--precision", "int4", "--int8", "dynamic"), "--int8 dynamic is for --precision int8"),
        (("--precision", "fp32", "--method", "gptq"), "--method gptq: is for"),
        (("--precision", "int8", "--int8", "static", "--method", "gptq"), "--method gptq: is for"),
        (("--precision", "int8", "--int8", "dynamic", "--symmetric"), "--symmetric: is for"),
        (("--precision", "int4", "--calibration", "text.txt"), "--calibration text.txt: only"),
        (("--precision", "int4", "--accuracy-level", "9"), "--accuracy-level 9"),
        (("--precision", "fp16", "--compute-type", "fp32"), "computes in fp16"),
        (("--compute-type", "fp16"), "computes in fp32"),
        (("--opset", "20"), "--opset 20: wanted 21 to 26"),
        (("--opset", "22", "--standard-ops"), "--opset 22: wanted 23 to 26"),
        (("--outtype", "q4_0"), "--outtype is for GGUF outputs; ONNX takes --precision"),
        (("--dtype", "f16"), "--dtype is for safetensors outputs; ONNX takes --precision"),
        (("--pure",), "--pure is for GGUF"),
        (("--tensor-type", "a=q4_0"), "--tensor-type is for GGUF"),
        (("--token-embedding-type", "q4_0"), "--token-embedding-type q4_0: must be one of fp32"),
    ],
)
def test_flags_that_cannot_be_end_with_2_and_one_line(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "out", "--to", "onnx", *flags)
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "flags", "words"),
    [
        ("out.gguf", ("--precision", "int4"), "--precision is for ONNX outputs; GGUF takes --outtype"),
        ("out.gguf", ("--accuracy-level", "4"), "--accuracy-level is for ONNX outputs"),
        ("out", ("--to", "safetensors", "--asymmetric"), "--symmetric is for ONNX outputs; safetensors takes --dtype"),
        ("out", ("--standard-ops",), "give --to gguf, --to onnx or --to safetensors"),
    ],
)
def test_flags_of_onnx_are_refused_for_other_formats(
    quantpress: Run, tiny_model: Path, tmp_path: Path, out: str, flags: tuple[str, ...], words: str
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / out, *flags)
    assert ended.code == 2
    assert words in ended.err


def test_precision_alone_says_that_onnx_is_meant_and_braces_are_filled_in(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "{name}-{ftype}"
    assert quantpress("convert", tiny_model, out, "--precision", "INT8", "--no-verify").code == 0
    assert (tmp_path / "tiny-model-INT8" / "model.onnx").is_file()


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir"])
def test_without_the_extra_the_program_says_how_to_install_it(tiny_model: Path, tmp_path: Path, missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from quantpress.pipelines import cli; cli.main()"
    arguments = [sys.executable, "-c", script, "convert", tiny_model, tmp_path / "out", "--to", "onnx"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 5, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert f"the package {missing}, which is not installed: pip install 'quantpress[onnx]'" in line
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_merged_on_the_way_and_the_result_is_proved_against_both(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--to", "onnx", "--adapter", tiny_adapter, "--text", text_file, *JUDGE, "--json")
    ended = quantpress("convert", tiny_model, out, *flags)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["parity"]["passed"] is True
    assert sidecar(out)["adapters"]
    plan = json.loads(quantpress("convert", tiny_model, tmp_path / "other", *flags, "--dry-run").out)
    assert 0 < sum(each["merged"] for each in plan["tensors"]) < len(plan["tensors"])
    plain = quantpress("convert", tiny_model, tmp_path / "plain", "--to", "onnx", "--no-verify")
    assert plain.code == 0
    assert files(tmp_path / "plain")["model.onnx.data"] != files(out)["model.onnx.data"]


def test_a_quantized_model_keeps_its_codes_unless_another_precision_is_asked_for(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    packed = tmp_path / "packed"
    quantize = ("quantize", tiny_model, packed, "--method", "rtn", "--group-size", 32, "--no-verify")
    assert quantpress(*quantize).code == 0
    judge = ("--text", text_file, *JUDGE, "--json")
    ended = quantpress("convert", packed, tmp_path / "{ftype}", "--to", "onnx", *judge)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["ftype"], report["parity"]["limits"]["max_kld"]) == ("INT4", 1e-5), "codes are exact"
    assert sidecar(tmp_path / "INT4")["stages"][-1]["options"]["method"] is None
    ended = quantpress("convert", packed, tmp_path / "{ftype}", "--to", "onnx", "--precision", "fp32", *judge)
    assert ended.code == 0, ended.err
    assert (tmp_path / "FP32" / "model.onnx").is_file()
    for flag in (("--method", "rtn"), ("--block-size", 32), ("--symmetric",)):
        ended = quantpress("convert", packed, tmp_path / "refused", "--to", "onnx", *flag)
        assert ended.code == 2
        assert "is quantized already" in ended.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["int", "term", "kill"]
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_a_signal_leaves_the_old_folder_or_nothing_and_a_rerun_gives_the_same_bytes(
    quantpress: Run, tiny_model: Path, tmp_path: Path, number: signal.Signals, code: int, old: bool
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert quantpress("convert", tiny_model, whole, "--to", "onnx", "--no-verify").code == 0
    if old:
        shutil.copytree(whole, out)
        (out / "config.json").write_text("old")
    script = (
        "import sys, time, quantpress.convert.onnx.data_file as data_file\n"
        "from quantpress.pipelines import cli\n"
        "checked = data_file._checked\n"
        "data_file._checked = lambda *a: (time.sleep(0.1), checked(*a))[1]\n"
        "sys.argv = ['quantpress', 'convert', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    arguments = [sys.executable, "-c", script, str(tiny_model), str(out), "--to", "onnx", "--no-verify", "--force"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".quantpress-*.tmp/model.onnx.data")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - sent < 5
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert out.exists() is old
    if old:
        assert (out / "config.json").read_text() == "old"
    if number is not signal.SIGKILL:
        assert {path.name for path in tmp_path.iterdir()} <= {"out", "whole"}
    assert quantpress("convert", tiny_model, out, "--to", "onnx", "--no-verify", "--force").code == 0
    assert files(out) == files(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
