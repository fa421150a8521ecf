"""What `quantpress quantize` plans without doing it, and what it refuses to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantpress.convert.atomic import held_output
from tests.pipelines.commands.quantized_folders import WINDOWS, sidecar

Run = Callable[..., Any]


def test_a_dry_run_plans_all_and_reads_no_weight(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, :5] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    flags = ("--method", "rtn", "--group-size", 32, "--override", "layers.0.*down_proj=bits:8", "--skip", "k_proj")
    planned = quantpress("quantize", model, tmp_path / "out", *flags, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    types = {tensor["name"]: tensor["type"] for tensor in plan["tensors"]}
    assert types["model.layers.0.mlp.down_proj.weight"] == "int8 g32"
    assert types["model.layers.1.mlp.down_proj.weight"] == "int4 g32"
    assert types["model.layers.1.self_attn.k_proj.weight"] == "F32"
    assert plan["disk_needed"] > plan["bytes"] > 0
    assert not (tmp_path / "out").exists()
    refused = quantpress("quantize", model, tmp_path / "out", *flags, "--no-verify")
    assert refused.code == 3
    assert "model.layers.1.mlp.up_proj.weight" in refused.err
    assert "5 values" in refused.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".quantpress")] in (
        [],
        [".quantpress-out.work"],  # the layer before is finished, and kept for a run that leaves the weight out
    )
    left = quantpress("quantize", model, tmp_path / "out", *flags, "--no-verify", "--skip", "up_proj")
    assert left.code == 3  # NaN is not passed on either
    assert quantpress("quantize", model, tmp_path / "out", *flags, "--no-verify", "--skip", "up_proj",
                      "--allow-nonfinite").code == 0  # fmt: skip


def test_the_size_of_the_plan_is_the_size_of_the_file(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("gptq", "gptq_v2", "awq", "compressed-tensors"):
        out, flags = tmp_path / name, ("--method", "rtn", "--group-size", 32, "--format", name)
        plan = json.loads(quantpress("quantize", tiny_model, out, *flags, "--dry-run", "--json").out)
        assert quantpress("quantize", tiny_model, out, *flags, "--no-verify").code == 0
        assert plan["bytes"] == sum(values.nbytes for values in load_file(out / "model.safetensors").values())
        assert sum(tensor["bytes"] for tensor in plan["tensors"]) == plan["bytes"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--format", "ggml"), 2, "ggml"),
        (("--bits", 5), 2, "5"),
        (("--group-size", -2), 2, "group size -2"),
        (("--skip", "no_such_proj"), 2, "no_such_proj"),
        (("--override", "q_proj=bits:9"), 2, "bits 9"),
        (("--override", "q_proj"), 2, "REGEX=KEY:VALUE"),
        (("--method", "gptq", "--sequence-length", 4096), 2, "made for 128 tokens"),
        (("--method", "gptq", "--calibration", "missing.txt"), 3, "missing.txt"),
        (("--method", "rtn", "--calibration", "text.txt"), 2, "reads no text"),
        (("--format", "awq", "--bits", 8), 3, "none of the weights can be stored"),
        (("--method", "llm_int8", "--format", "gptq"), 2, "llm_int8"),
    ],
)
def test_what_cannot_be_done_ends_with_its_code_and_leaves_nothing(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[Any, ...], code: int, message: str
) -> None:
    method = () if "--method" in flags else ("--method", "rtn")
    ended = quantpress("quantize", tiny_model, tmp_path / "out", *method, *flags, "--no-verify")
    assert ended.code == code, ended.err
    assert message in ended.err
    assert ended.err.splitlines()[-1].startswith("error:")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty, there is nothing to {} on"),
        (b" \n", "the text is empty, there is nothing to {} on"),
        (b"caf\xe9", "not UTF-8 at byte 3; give a plain text to {} on"),
    ],
)
def test_a_text_that_cannot_be_used_is_told_by_what_it_is_for(
    quantpress: Run, tiny_model: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(content)
    for flag, use in (("--calibration", "calibrate"), ("--text", "judge")):
        ended = quantpress("quantize", tiny_model, out, "--group-size", 32, *WINDOWS, flag, text)
        assert ended.code == 3, ended.err
        assert ended.err.splitlines()[-1] == f"error: {text}: {message.format(use)}"
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_help_says_what_memory_is_for(quantpress: Run) -> None:
    told = " ".join(quantpress("quantize", "--help").out.split())
    assert "Memory for weights while proving, and for activations while quantizing" in told


def test_what_a_format_cannot_hold_stays_as_it_is_and_is_told(
    quantpress: Run, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--method", "rtn", "--format", "compressed-tensors", "--group-size", 64)
    ended = quantpress("quantize", tiny_model, out, *flags, "--no-verify")
    assert ended.code == 0, ended.err
    assert "2 weights stay as they are, first model.layers.0.mlp.down_proj.weight" in ended.err  # 96 columns
    assert any("down_proj" in note for note in sidecar(out)["notes"])
    found = load_file(out / "model.safetensors")
    source = load_file(tiny_model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(found[name], source[name])
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", name.removesuffix(".weight")} <= set(ignored)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--format", "awq", "--method", "rtn"), 2, "quantized already"),
        (("--format", "awq", "--bits", 4), 2, "--bits"),
        (("--format", "awq", "--skip", "q_proj"), 2, "--skip"),
        ((), 2, "--format"),
        (("--format", "bitsandbytes"), 3, "model.layers.0"),
    ],
)
def test_a_quantized_model_is_not_quantized_again(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[Any, ...], code: int, message: str
) -> None:
    first = tmp_path / "gptq"
    assert quantpress("quantize", tiny_model, first, "--method", "rtn", "--group-size", 32, "--no-verify").code == 0
    ended = quantpress("quantize", first, tmp_path / "out", *flags, "--no-verify")
    assert ended.code == code, ended.err
    assert message in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path, method: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    known = () if method == "rtn" else ("--calibration", text_file, *WINDOWS)
    flags = ("--method", method, *known, "--group-size", 32, "--no-verify")
    ended = quantpress("quantize", model, tmp_path / "out", *flags)
    assert ended.code == 3, ended.err
    assert "'model.layers.1.mlp.up_proj.weight': 1 values are NaN or infinite" in ended.err
    assert not (tmp_path / "out").exists()


def test_the_program_finds_its_options_without_torch() -> None:
    code = (
        "import sys, quantpress.pipelines.commands.quantize as c; "
        "heavy = {'torch', 'transformers', 'numba', 'scipy', 'numpy'} & set(sys.modules); assert not heavy, heavy; "
        "import quantpress.pipelines.quantize_stage; "
        "heavy = {'torch', 'transformers', 'numba', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_run_on_one_output_ends_with_6(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_output(out):
        ended = quantpress("quantize", tiny_model, out, "--method", "rtn", "--no-verify")
        assert ended.code == 6, ended.err
        assert "another run" in ended.err
    assert quantpress("quantize", tiny_model, out, "--method", "rtn", "--no-verify").code == 0


def test_an_existing_output_is_replaced_with_force_only(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "{name}-{ftype}"
    flags = ("--method", "rtn", "--no-verify")
    assert quantpress("quantize", tiny_model, out, *flags).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-model-int4"]
    assert quantpress("quantize", tiny_model, out, *flags).code == 2
    assert quantpress("quantize", tiny_model, out, *flags, "--force").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-model-int4"]
