"""`quantpress quantize` from the command line to the proved folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantpress as qp
from tests.pipelines.commands.quantized_folders import JUDGE, WINDOWS, files, sidecar

Run = Callable[..., Any]
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gptq_weight(tensors: dict[str, np.ndarray], module: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight (N, K) and scale (N, G) of 4-bit GPTQ, version 1, in float64, after the format's own documentation."""
    shifts = np.arange(0, 32, 4)
    words = tensors[f"{module}.qweight"].view(np.uint32)
    codes = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1])
    zeros = (((tensors[f"{module}.qzeros"].view(np.uint32)[:, :, None] >> shifts) & 15) + 1).reshape(-1, words.shape[1])
    scales, groups = tensors[f"{module}.scales"].astype(np.float64), tensors[f"{module}.g_idx"]
    return (scales[groups] * (codes.astype(np.float64) - zeros[groups])).T, scales.T


def test_rounded_weights_are_the_nearest_on_their_grid_and_all_else_is_as_it_was(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int4"
    flags = ("--method", "rtn", "--group-size", 32, *JUDGE, "--max-kld", 1)
    ended = quantpress("quantize", tiny_model, out, *flags)
    assert ended.code == 0, ended.err
    source, found = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    linear = {name for name in source if name.removesuffix(".weight").endswith(PARTS)}
    assert len(linear) == 14
    for name in linear:
        weight, scale = gptq_weight(found, name.removesuffix(".weight"))
        steps = np.repeat(np.abs(scale), 32, axis=1)
        # full-range signed: the greatest weight is the code -8, so a weight beyond 7.5 steps on the other side is the
        # only one that may be further than half a step; the scale is float16, 2^-11 of itself off
        assert (np.abs(weight - source[name]) <= steps * (1 + 2**-8)).all()
        assert (np.abs(weight - source[name]) <= steps * (0.5 + 2**-7)).mean() > 0.98
    for name in source.keys() - linear:
        np.testing.assert_array_equal(found[name], source[name])
    assert len(found) == len(source) - len(linear) + 4 * len(linear)
    assert "verified in torch" in ended.out
    assert not [path for path in tmp_path.iterdir() if path != out]


def test_configurations_and_sidecar_say_what_was_done(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    ended = quantpress("quantize", tiny_model, out, "--method", "rtn", "--group-size", 32, "--no-verify", "--json")
    assert ended.code == 0, ended.err
    config, record = json.loads((out / "config.json").read_text()), sidecar(out)
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, 32)
    assert json.loads((out / "quantize_config.json").read_text()) == settings
    assert config["torch_dtype"] == "float32"
    stage = record["stages"][-1]
    assert stage["name"] == "quantize"
    assert stage["options"]["method"] == "rtn"
    assert (stage["options"]["bits"], stage["options"]["symmetric"], stage["options"]["format"]) == (4, True, "gptq")
    tensors = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert len(tensors) == len(load_file(tiny_model / "model.safetensors"))
    source = load_file(tiny_model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].astype(np.float64)
    weight, _ = gptq_weight(load_file(out / "model.safetensors"), "model.layers.1.mlp.down_proj")
    entry = tensors["model.layers.1.mlp.down_proj.weight"]
    assert entry["type"] == "int4 g32"
    assert entry["bytes"] == 64 * 96 // 2 + 3 * 64 * 2 + 3 * 64 // 2 + 96 * 4  # codes, scales, zeros, g_idx
    # the sidecar rounds to six digits; the error is summed from float32 differences, 2^-24 of the weights off
    assert entry["relative_error"] == pytest.approx(np.linalg.norm(weight - source) / np.linalg.norm(source), rel=1e-5)
    assert tensors["lm_head.weight"]["type"] == "F32"
    assert "calibration" not in record
    printed = json.loads(ended.out)
    assert printed["ftype"] == "int4"
    assert {row["name"] for row in printed["tensors"]} == {name for name in tensors if "proj" in name}


def test_calibrated_weights_come_with_the_text_and_the_loss_of_every_weight(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "gptq"
    flags = ("--calibration", text_file, *WINDOWS, "--seed", 3, "--group-size", 32, "--no-verify", "-v")
    ended = quantpress("quantize", tiny_model, out, *flags)
    assert ended.code == 0, ended.err
    record = sidecar(out)
    assert record["calibration"].items() >= {"samples": 4, "sequence_length": 64, "tokens": 256, "seed": 3}.items()
    assert record["calibration"]["text_sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert len(record["calibration"]["windows_sha256"]) == 64
    losses = {tensor["name"]: tensor for tensor in record["tensors"] if "loss" in tensor}
    assert len(losses) == 14
    assert all(tensor["damping"] == 0.01 and tensor["loss"] > 0 for tensor in losses.values())
    assert set(record["timings"]["quantize"]["parts"]) == {"layer 0", "layer 1"}
    assert record["stages"][-1]["options"]["sequence_length"] == 64
    rows = [line for line in ended.out.splitlines() if "self_attn.q_proj.weight" in line]
    assert len(rows) == 2
    assert "quantized 14 weights to int4 g32: relative loss" in ended.out


def test_gptq_is_closer_to_a_trained_model_than_rounding(quantpress: Run, shared: Path, tmp_path: Path) -> None:
    model, texts = shared / "models" / "stories260k-hf", shared / "text"
    flags = ("--format", "compressed-tensors", "--bits", 4, "--group-size", -1, "--max-kld", 9, "--max-ppl-change", 9)
    judge = ("--min-top1", 0, "--text", texts / "tinystories.test.txt", "--chunks", 4, "--context", 256)
    known = ("--calibration", texts / "tinystories.calib.txt", "--samples", 16, "--sequence-length", 256)
    kld = {}
    for method, more in (("rtn", ()), ("gptq", known)):
        ended = quantpress("quantize", model, tmp_path / method, "--method", method, *flags, *judge, *more)
        assert ended.code == 0, ended.err
        kld[method] = sidecar(tmp_path / method)["parity"]["mean_kld"]
    assert kld["gptq"] < 0.75 * kld["rtn"]  # 0.65 with these few tokens, 0.59 with eight times as many


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_threads_change_no_byte_and_sidecars_differ_in_times_only(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path, method: str
) -> None:
    known = ("--calibration", text_file, *WINDOWS) if method == "gptq" else ()
    flags = ("--method", method, *known, "--bits", 3, "--asymmetric", "--no-verify")
    found, records = [], []
    for threads in (1, 2, 3):
        out = tmp_path / str(threads) / "out"
        ended = quantpress("quantize", tiny_model, out, *flags, "--threads", threads)
        assert ended.code == 0, ended.err
        found.append(files(out))
        records.append({key: value for key, value in sidecar(out).items() if key != "timings"})
    assert found[0] == found[1] == found[2]
    assert records[0] == records[1] == records[2]


def test_codes_go_from_format_to_format_as_they_are(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    first = tmp_path / "gptq"
    assert quantpress("quantize", tiny_model, first, "--method", "rtn", "--group-size", 32, "--no-verify").code == 0
    wanted = qp.open_checkpoint(first)
    before = first
    for name in ("awq", "compressed-tensors", "gptq_v2", "gptq"):
        out = tmp_path / "round" / name
        ended = quantpress("quantize", before, out, "--format", name, *JUDGE)
        assert ended.code == 0, ended.err
        parity = sidecar(out)["parity"]
        assert parity["mean_kld"] == 0
        assert parity["limits"]["max_kld"] == 1e-5
        found = qp.open_checkpoint(out)
        for weight, lazy in wanted.quantized.items():
            one, other = lazy.read(), found.quantized[weight].read()
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.scale.astype(np.float32), other.scale.astype(np.float32))
        before = out
    one, other = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_an_adapter_is_merged_before_and_judged_unmerged(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out, merged = tmp_path / "int8", tmp_path / "merged"
    flags = ("--method", "rtn", "--bits", 8, "--group-size", 32)
    ended = quantpress("quantize", tiny_model, out, "--adapter", tiny_adapter, *flags, *JUDGE)
    assert ended.code == 0, ended.err
    record = sidecar(out)
    assert "unmerged" in record["parity"]["baseline"]["runtime"]
    assert [stage["name"] for stage in record["stages"]] == ["merge_lora", "quantize"]
    assert len(record["adapters"]) == 12
    assert quantpress("merge", tiny_model, tiny_adapter, merged, "--no-verify").code == 0
    assert quantpress("quantize", merged, tmp_path / "second", *flags, "--no-verify").code == 0
    one, other = load_file(out / "model.safetensors"), load_file(tmp_path / "second" / "model.safetensors")
    for name, values in one.items():
        # merged weights are quantized from float32, merged folders are rounded to float32: the same here
        np.testing.assert_array_equal(values, other[name])


def test_a_quantized_base_with_an_adapter_is_quantized_anew(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    flags = ("--method", "rtn", "--bits", 8, "--group-size", 32)
    assert quantpress("quantize", tiny_model, base, *flags, "--no-verify").code == 0
    ended = quantpress("quantize", base, out, "--adapter", tiny_adapter, *flags, *JUDGE)
    assert ended.code == 0, ended.err
    codes = [qp.open_checkpoint(folder).quantized["model.layers.0.self_attn.q_proj.weight"] for folder in (base, out)]
    assert not np.array_equal(codes[0].read().codes, codes[1].read().codes)


def test_the_library_writes_what_the_program_writes(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--calibration", text_file, *WINDOWS, "--bits", 4, "--group-size", 32)
    assert quantpress("quantize", tiny_model, tmp_path / "program" / "out", *flags, "--no-verify").code == 0
    pressed = qp.quantize(
        tiny_model,
        tmp_path / "library" / "out",
        method="gptq",
        bits=4,
        group_size=32,
        calibration=text_file,
        samples=4,
        sequence_length=64,
    )
    assert capsys.readouterr().out == ""
    assert pressed.artifact.ftype == "int4"
    assert files(tmp_path / "library" / "out") == files(tmp_path / "program" / "out")
    records = [sidecar(tmp_path / name / "out") for name in ("program", "library")]
    for record in records:
        del record["timings"]
    assert records[0] == records[1]


def test_inspect_tells_how_a_model_is_quantized(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--method", "rtn", "--group-size", 32, "--override", "down_proj=bits:8")
    assert quantpress("quantize", tiny_model, out, *flags, "--no-verify").code == 0
    report = json.loads(quantpress("inspect", out, "--json").out)
    assert report["quantization"] == {
        "format": "gptq",
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "scale_type": "F16",
        "weights": 14,
        "others": {"int8 g32": 2},
    }
    assert report["tensor_types"]["int4 g32"]["tensors"] == 12
    assert report["problem"] is None


def test_verify_knows_the_limits_of_a_quantized_folder(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    assert quantpress("quantize", tiny_model, out, "--method", "rtn", "--bits", 8, "--no-verify").code == 0
    judge = ("--text", text_file, *JUDGE)
    passed = quantpress("verify", out, "--against", tiny_model, *judge, "--json")
    assert passed.code == 0, passed.err
    assert json.loads(passed.out)["limits"]["max_kld"] > 1e-3
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.{}_proj.qweight"
    gate, up = (name.format(part) for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert quantpress("verify", out, "--against", tiny_model, *judge).code == 4
