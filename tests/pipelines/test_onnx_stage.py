"""The stage that writes ONNX: what its options become, what it is judged by, and what it takes of memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_job import OnnxJob
from quantpress.pipelines.onnx_stage import Onnx
from tests.tiny import tiny_checkpoint

pytest.importorskip("onnxruntime")
WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("stage") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def source(model: Path) -> Checkpoint:
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def packed(model: Path) -> Checkpoint:
    """The same with codes of four bits."""
    out = model.parent / "packed"
    qp.quantize(model, out, method="rtn", bits=4, group_size=32)
    return open_checkpoint(out)


def stage(**options: Any) -> Onnx:
    return Onnx(output=Path("out"), **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"precision": "fp32", "compute_type": "fp32", "method": None, "block_size": None, "symmetric": None}),
        ({"precision": "fp16"}, {"compute_type": "fp16"}),
        ({"precision": "int4"}, {"method": "rtn", "block_size": 32, "symmetric": True, "compute_type": "fp32"}),
        ({"precision": "int4", "compute_type": "fp16"}, {"compute_type": "fp16"}),
        ({"precision": "int8", "method": "hqq"}, {"symmetric": False, "block_size": 32}),
        ({"precision": "int4", "method": "awq"}, {"symmetric": False, "sequence_length": 64}),
        ({"precision": "int4", "method": "gptq", "symmetric": False}, {"symmetric": False}),
        ({"precision": "int8", "int8": "dynamic"}, {"method": None, "block_size": None}),
        ({"precision": "int8", "int8": "static"}, {"method": None, "sequence_length": 64}),
    ],
)
def test_what_is_left_open_is_filled_in_once(
    options: dict[str, Any], wanted: dict[str, Any], source: Checkpoint
) -> None:
    filled = stage(**options).resolved(source)
    assert {name: getattr(filled, name) for name in wanted} == wanted
    assert filled.resolved(source) == filled


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "F32"),
        ({"precision": "fp16"}, "F16"),
        ({"precision": "bf16"}, "BF16"),
        ({"precision": "int8"}, "INT8"),
        ({"precision": "int8", "accuracy_level": 4}, "W8A8"),
        ({"precision": "int8", "int8": "dynamic"}, "W8A8"),
        ({"precision": "int8", "int8": "static"}, "W8A8"),
        ({"precision": "int4"}, "INT4"),
        ({"precision": "int4", "compute_type": "fp16", "accuracy_level": 4}, "INT4"),
        ({"precision": "fp32", "token_embedding_type": "int4"}, "INT4"),
        ({"precision": "int8", "output_tensor_type": "int4"}, "INT4"),
        ({"precision": "int4", "output_tensor_type": "fp32"}, "INT4"),
    ],
)
def test_the_coarsest_of_what_is_rounded_sets_the_limits(
    options: dict[str, Any], wanted: str, source: Checkpoint
) -> None:
    assert OnnxJob(stage(**options).resolved(source), source).judged_as == wanted


@pytest.mark.parametrize(
    ("options", "ftype", "judged"),
    [
        ({}, "INT4", "F32"),
        ({"precision": "int8"}, "INT4", "F32"),  # both words mean the codes there are
        ({"compute_type": "fp16"}, "INT4", "F16"),
        ({"accuracy_level": 4}, "INT4", "W8A8"),
        ({"precision": "fp32"}, "FP32", "F32"),
        ({"precision": "bf16"}, "BF16", "BF16"),
        ({"output_tensor_type": "int4"}, "INT4", "INT4"),
    ],
)
def test_codes_of_a_quantized_model_are_judged_as_exact(
    options: dict[str, Any], ftype: str, judged: str, packed: Checkpoint
) -> None:
    job = OnnxJob(stage(**options).resolved(packed), packed)
    assert (job.ftype, job.judged_as) == (ftype, judged)


def test_codes_that_an_adapter_was_merged_into_are_made_anew(packed: Checkpoint) -> None:
    merged = dataclasses.replace(packed, adapted=object())  # type: ignore[arg-type]
    filled = stage(precision="int4").resolved(merged)
    assert filled.method == "rtn"
    job = OnnxJob(filled, merged)
    assert not job.source.quantized
    assert job.judged_as == "INT4"


@pytest.mark.parametrize("int8", ["dynamic", "static"])
def test_inputs_are_not_rounded_beside_codes_that_are_kept(int8: str, packed: Checkpoint) -> None:
    with pytest.raises(qp.UsageError, match=f"--int8 {int8}: .* is quantized already"):
        stage(precision="int8", int8=int8).resolved(packed)


def test_static_int8_runs_the_model_first_and_says_on_what(model: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = [
        qp.export_onnx(
            model, tmp_path / str(threads), precision="int8", int8="static", threads=threads, **WINDOWS,
            progress=lambda phase, _done, _total: told.append(phase),
        )
        for threads in (1, 3)
    ]  # fmt: skip
    assert list(dict.fromkeys(told)) == ["calibrate", "write"]
    record = json.loads(done[0].sidecar.read_text())
    assert record["calibration"]["samples"] == 4
    assert "built-in text" in record["notes"][0]
    written = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("model.*")} for name in ("1", "3")]
    assert written[0] == written[1]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}, "activations are removed"


def test_a_text_that_is_too_short_for_static_int8_leaves_nothing(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(qp.InputError):
        qp.export_onnx(model, tmp_path / "out", precision="int8", int8="static", calibration=text, **WINDOWS)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qp.InputError, match=r"lm_head\.weight"):
        qp.export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verdicts_of_every_precision_pass_and_a_wrong_weight_does_not(model: Path, tmp_path: Path) -> None:
    judge = qp.JudgeOptions(chunks=2, context=64, min_top1=0.0, max_ppl_change=1.0)
    for options in ({}, {"precision": "fp16"}, {"precision": "int8"}, {"precision": "int8", "int8": "dynamic"}):
        out = tmp_path / "-".join(options.values() or ["fp32"])
        assert qp.export_onnx(model, out, verify=True, judge=judge, **options).parity is not None
    data = tmp_path / "fp32" / "model.onnx.data"
    values = np.fromfile(data, np.float32)
    data.write_bytes((values * np.float32(1.1)).tobytes())
    assert not qp.verify(tmp_path / "fp32", against=model, options=judge).passed


def test_a_plan_needs_no_torch_and_a_folder_is_written_without_it(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['onnxruntime'] = None\n"
        "import quantpress as qp; qp.export_onnx(sys.argv[1], sys.argv[2], precision='int4')"
    )
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "model.onnx").is_file()


PEAK = """
import sys
import quantpress as qp
qp.export_onnx(sys.argv[1], sys.argv[2], precision=sys.argv[3], threads=2)
# not ru_maxrss: that is also the peak of the process this one was forked from
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_peak_memory_does_not_grow_with_the_model(precision: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "dtype": "bfloat16"}
    layer = 4 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048)  # bytes in float32: 15 MB
    peaks = []
    for layers in (6, 18):  # with six the bytes that wait to be hashed are at their most already
        folder = tiny_checkpoint(tmp_path / str(layers), "llama", num_hidden_layers=layers, **sizes)
        script = [sys.executable, "-c", PEAK, folder, tmp_path / f"out-{layers}", precision]
        peaks.append(1024 * int(subprocess.run(script, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 2 * layer  # of 12 more layers; two are what an allocator may keep
    assert peaks[1] < 300e6


@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({"precision": "int8"}, True),
        ({"precision": "int4", "output_tensor_type": "int8"}, True),
        ({"precision": "int8", "accuracy_level": 4}, False),
        ({"precision": "int8", "standard_ops": True}, False),
        ({"precision": "int4"}, False),
    ],
)
def test_eight_bit_blocks_that_are_slow_on_a_cpu_are_told(
    source: Checkpoint, tmp_path: Path, options: dict[str, Any], slow: bool
) -> None:
    plan = Onnx(output=tmp_path / "out", **options).plan(source)
    assert any("slower on a CPU at accuracy level 0" in note for note in plan.notes) == slow
