"""Every family is quantized by every kind of method, runs, and takes no more memory for more layers."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantpress as qp
from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import Role
from tests.tiny import tiny_case, tiny_checkpoint

KINDS = (
    "llama-bias", "llama-tied", "llama-bare", "mistral-window", "qwen2", "qwen3-head_dim", "gemma", "gemma2",
    "gemma3-vision", "phi3", "gpt2", "gpt2-bare", "gptneox", "gptneox-sequential",
)  # fmt: skip
# int8 with a group of 32: a weight is off by 1/510 of the greatest of 32 at most, so logits hardly change; a weight
# that is packed in another order, transposed or in another place would change them beyond these limits
CLOSE = qp.JudgeOptions(chunks=1, context=32, max_kld=4e-3, max_ppl_change=0.5, min_top1=0.8)
ROUNDED = dataclasses.replace(CLOSE, max_kld=1e-2)  # inputs in int8 too
WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}


@pytest.mark.parametrize("name", KINDS)
def test_every_family_is_quantized_and_says_the_same(name: str, tmp_path: Path) -> None:
    case = tiny_case(name)
    model = tiny_checkpoint(tmp_path / "model", case.family, **case.options)
    source = qp.open_checkpoint(model)
    arch = find_arch(source.config)
    rows = [row for row, _ in arch.rows(arch.read_config(source.config)) if row.role is Role.LINEAR]
    form = "gptq" if case.family == "gpt2" else "compressed-tensors"  # whose readers know no Conv1D
    for method, options in (("rtn", {}), ("gptq", WINDOWS)):
        out = tmp_path / method
        pressed = qp.quantize(
            model, out, method=method, bits=8, group_size=32, format=form, verify=True, judge=CLOSE, **options,
        )  # fmt: skip
        assert pressed.parity is not None
        assert len(qp.open_checkpoint(out).quantized) == len(rows)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "phi3", "gptneox"])
def test_scales_that_are_folded_into_other_tensors_change_no_output(name: str, method: str, tmp_path: Path) -> None:
    case = tiny_case(name)
    model = tiny_checkpoint(tmp_path / "model", case.family, **case.options)
    pressed = qp.quantize(
        model, tmp_path / "out", method=method, bits=8, format="compressed-tensors", verify=True, **WINDOWS,
        judge=CLOSE if method == "awq" else ROUNDED, **({"group_size": 32} if method == "awq" else {}),
    )  # fmt: skip
    assert pressed.parity is not None
    figures = [tensor.figures for tensor in pressed.artifact.tensors if tensor.figures]
    assert any(each["folded"] for each in figures)


def test_other_parts_of_a_larger_model_stay_as_they_are(tmp_path: Path) -> None:
    case = tiny_case("gemma3-vision")
    model = tiny_checkpoint(tmp_path / "model", case.family, **case.options)
    qp.quantize(model, tmp_path / "out", method="rtn", bits=8, group_size=32, format="compressed-tensors")
    source, found = qp.open_checkpoint(model), qp.open_checkpoint(tmp_path / "out")
    others = [name for name in source.tensors if "vision" in name or "projector" in name]
    assert others
    for name in others:
        np.testing.assert_array_equal(found.tensors[name].read(), source.tensors[name].read())
        assert name not in found.quantized
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    linear = [name for name in others if name.endswith("proj.weight")]
    assert {name.removesuffix(".weight") for name in linear} <= set(ignored)


def test_an_unknown_family_is_rounded_by_its_names_and_not_calibrated(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(qp.UnknownFamilyError, match=r"Novel.*rtn"):
        qp.quantize(model, tmp_path / "gptq", method="gptq")
    pressed = qp.quantize(model, tmp_path / "out", method="rtn", group_size=32)
    assert len(qp.open_checkpoint(tmp_path / "out").quantized) == 7 * 3
    assert any("Novel" in note for note in pressed.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.filterwarnings("ignore")  # of the library
def test_routers_of_an_unknown_family_are_not_taken_for_quantized(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the oracle is not installed")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = tiny_checkpoint(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    plain = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("gate", "shared_expert_gate")]
    plain += ["model.audio_embedder", "score", "lm_head"]  # as they would be called where they are linear layers
    tensors |= {f"{module}.weight": torch.ones(8, 64) for module in plain}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    qp.quantize(model, tmp_path / "out", method="rtn", group_size=32, format="compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    tree = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, module, _ = name.split(".")
        place = tree
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        if tensor.ndim == 2 and module != "embed_tokens":
            place.add_module(module, torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False))
    apply_quantization_config(tree, QuantizationConfig.model_validate(settings))
    taken = {name for name, module in tree.named_modules() if hasattr(module, "quantization_scheme")}
    assert taken == {name.removesuffix(".weight") for name in qp.open_checkpoint(tmp_path / "out").quantized}
    assert len(taken) == 7 * 3
    assert not taken & set(plain)


def test_gpt2_is_scaled_and_rounded_in_a_format_that_knows_conv1d(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "gpt2")
    for form in ("awq", "compressed-tensors"):
        with pytest.raises(qp.LayoutError, match="Conv1D"):
            qp.quantize(model, tmp_path / form, method="awq", format=form, group_size=32)
    pressed = qp.quantize(
        model, tmp_path / "out", method="awq", bits=8, format="gptq_v2", group_size=32, verify=True, judge=CLOSE,
        **WINDOWS,
    )  # fmt: skip
    assert pressed.parity is not None


def peak(model: Path, out: Path, *options: str) -> int:
    command = [sys.executable, "-m", "quantpress", "quantize", str(model), str(out), *options, "--no-verify"]
    # by way of a shell: Linux counts what a process had in memory before it became another program
    subprocess.run(f"{shlex.join([*command, '--threads', '1'])}; exit $?", shell=True, check=True, capture_output=True)
    timings = json.loads((out / "quantpress.json").read_text())["timings"]
    return int(timings["quantize"]["peak_rss"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_more_layers_take_no_more_memory(method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    options = ("--method", method, "--samples", "4", "--sequence-length", "64")
    peaks = []
    for layers in (2, 14):
        model = tiny_checkpoint(tmp_path / f"model-{layers}", "llama", num_hidden_layers=layers, **sizes)
        peaks.append(peak(model, tmp_path / f"out-{layers}", *options))
    layer = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)  # bytes in float32: 9.4 MB
    assert peaks[1] - peaks[0] < 2 * layer  # of 12 more layers; two are what an allocator may keep
