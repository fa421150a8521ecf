"""`convert --to onnx --method gptq|awq|hqq`: the graph has the codes that `quantize` would have written.

Its folders are compared with other people's code elsewhere; here what MatMulNBits multiplies with, read by offsets, is
compared with what they hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from tests.onnx_exports import GPTQ, LAYERS, WINDOWS, export, files
from tests.tiny import tiny_checkpoint

pytest.importorskip("onnxruntime")
onnx_codes = pytest.importorskip("tests.onnx_codes")
assert_exact, matrices, stored = onnx_codes.assert_exact, onnx_codes.matrices, onnx_codes.stored


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("calibrated") / "model", "llama", dtype="bfloat16")


def quantized(model: Path, out: Path, **options: Any) -> qp.Checkpoint:
    """What `quantize` makes of the same options, opened."""
    form = options.pop("format", "compressed-tensors")
    scales = {} if form == "gptq" else {"scale_type": "F32"}
    qp.quantize(model, out, format=form, **scales, **options)
    return open_checkpoint(out)


@pytest.mark.parametrize(
    ("method", "symmetric", "bits"),
    [("gptq", True, 4), ("gptq", False, 8), ("awq", False, 4), ("awq", True, 8), ("hqq", False, 4), ("hqq", True, 8)],
)
def test_codes_are_those_that_quantize_finds(
    model: Path, tmp_path: Path, method: str, symmetric: bool, bits: int
) -> None:
    windows = {} if method == "hqq" else WINDOWS
    options = {"method": method, "symmetric": symmetric, **windows}
    wanted = quantized(model, tmp_path / "folder", bits=bits, group_size=32, **options)
    export(model, tmp_path / "onnx", precision=f"int{bits}", block_size=32, **options)
    found = matrices(tmp_path / "onnx")
    assert set(found) == set(wanted.quantized)
    for name, lazy in wanted.quantized.items():
        assert_exact(found[name], lazy.read())
    changed = 0
    constants = onnx_codes.initializers(tmp_path / "onnx")
    source = open_checkpoint(model)
    for name, tensor in wanted.tensors.items():
        if name.endswith("layernorm.weight"):
            values = tensor.read().astype(np.float32)
            np.testing.assert_array_equal(stored(tmp_path / "onnx", constants[name]), values)
            changed += not np.array_equal(values, source.tensors[name].read().astype(np.float32))
    assert bool(changed) == (method == "awq")  # it folds scales into the norms


def test_weights_of_conv1d_and_scales_in_float16_arrive_too(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "gpt2")
    wanted = quantized(model, tmp_path / "folder", method="gptq", group_size=32, format="gptq", **WINDOWS)
    export(model, tmp_path / "onnx", compute_type="fp16", **GPTQ)
    found = matrices(tmp_path / "onnx")
    assert len(wanted.quantized) == 4 * LAYERS
    for name, lazy in wanted.quantized.items():
        assert lazy.form.scale_type == "F16"
        assert found[name].scale.dtype == np.float16
        assert_exact(found[name], lazy.read())


def test_the_head_stays_as_it_is_unless_another_type_is_asked_for(model: Path, tmp_path: Path) -> None:
    pressed = export(model, tmp_path / "usual", **GPTQ)
    assert any("the head stays as it is" in note for note in pressed.notes)
    assert "lm_head.weight" not in matrices(tmp_path / "usual")
    pressed = export(model, tmp_path / "wide", **GPTQ, output_tensor_type="int8")
    assert any("the head is rounded to int8" in note for note in pressed.notes)
    assert matrices(tmp_path / "wide")["lm_head.weight"].bits == 8
    pressed = export(model, tmp_path / "exact", **GPTQ, output_tensor_type="bf16")
    assert not any("the head" in note for note in pressed.notes)
    assert "lm_head.weight" not in matrices(tmp_path / "exact")


def test_a_plan_reads_no_weight_and_leaves_nothing_and_says_what_is_written(model: Path, tmp_path: Path) -> None:
    stage = Onnx(output=tmp_path / "{name}-{ftype}", precision="int4", **GPTQ)
    plan = stage.plan(open_checkpoint(model))
    assert plan.output == tmp_path / "model-INT4"
    assert list(tmp_path.iterdir()) == []
    pressed = export(model, tmp_path / "{name}-{ftype}", **GPTQ)
    assert pressed.artifact.path == plan.output
    assert sum(out.nbytes for out in pressed.artifact.outputs) == plan.output_bytes
    assert [(t.name, t.type, t.nbytes) for t in plan.tensors] == [
        (t.name, t.type, t.nbytes) for t in pressed.artifact.tensors
    ]
    kept = sum(t.nbytes for t in plan.tensors if t.name.startswith("model.layers") and t.type.startswith("INT4"))
    assert plan.work_bytes >= kept  # the codes, beside what the next layer reads
    assert [path.name for path in tmp_path.iterdir()] == ["model-INT4"]


def test_the_sidecar_says_what_was_read_and_how_each_weight_went(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The press takes a model and gives a file. " * 100)
    export(model, tmp_path / "out", **GPTQ, calibration=text)
    found = json.loads((tmp_path / "out" / "quantpress.json").read_text())
    assert found["calibration"]["samples"] == 4
    assert found["calibration"]["tokens"] == 4 * 32
    options = found["stages"][-1]["options"]
    assert (options["method"], options["sequence_length"], options["drift"]) == ("gptq", 32, 1.0)
    losses = [tensor["loss"] for tensor in found["tensors"] if "loss" in tensor]
    assert len(losses) == 7 * LAYERS
    assert set(found["timings"]["onnx"]["parts"]) == {f"layer {layer}" for layer in range(LAYERS)}


def test_gptq_is_nearer_to_the_source_than_rounding_on_a_real_model(shared: Path, tmp_path: Path) -> None:
    """Half the divergence that the layers' rounding adds, by what the quantize benchmarks show; the head is kept."""
    model, text = shared / "models" / "stories260k-hf", shared / "text" / "tinystories.calib.txt"
    judge = qp.JudgeOptions(text=shared / "text" / "tinystories.test.txt", chunks=4, context=256, max_kld=9)
    options: dict[str, Any] = {"block_size": 32, "output_tensor_type": "fp32", "judge": judge}
    kld = {}
    for method in ("rtn", "gptq"):
        calibrated = {"calibration": text, "samples": 32} if method == "gptq" else {}
        parity = export(model, tmp_path / method, method=method, **options, **calibrated).parity
        assert parity is not None
        kld[method] = parity.mean_kld
    assert 0 < kld["gptq"] < 0.7 * kld["rtn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq", "precision": "bf16"}, "--method gptq"),
        ({"method": "awq", "precision": "int8", "int8": "dynamic"}, "--method awq"),
        ({"method": "smoothquant"}, "must be one of rtn, hqq, gptq, awq"),
        ({"method": "hqq", "calibration": Path("text.txt")}, "--calibration"),
        ({"method": "rtn", "calibration": Path("text.txt")}, "--calibration"),
        ({"method": "gptq", "sequence_length": 65}, "made for 64 tokens"),
        ({"method": "gptq", "drift": 2.0}, "drift"),
        ({"method": "gptq", "calibration_dtype": "f64"}, "f64"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(qp.UsageError, match=message):
        export(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_has_codes_is_not_quantized_anew(model: Path, tmp_path: Path) -> None:
    qp.quantize(model, tmp_path / "folder", method="rtn", group_size=32)
    with pytest.raises(qp.UsageError, match="is quantized already"):
        export(tmp_path / "folder", tmp_path / "out", **GPTQ)


def test_weights_that_are_not_finite_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for method in ("hqq", "gptq", "awq"):
        with pytest.raises(qp.InputError, match=f"{name}.*1 values are NaN or infinite"):
            export(broken, tmp_path / "out", method=method, **({} if method == "hqq" else WINDOWS))
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that nobody stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    export(model, out, **GPTQ)
    return files(out)


def test_the_bytes_do_not_depend_on_threads(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for threads in (1, 3):
        export(model, tmp_path / f"hqq-{threads}", method="hqq", threads=threads)
    assert files(tmp_path / "hqq-1") == files(tmp_path / "hqq-3")
    export(model, tmp_path / "gptq", **GPTQ, threads=3)
    assert files(tmp_path / "gptq") == undisturbed
