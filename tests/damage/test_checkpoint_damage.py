"""Damaged checkpoint folders are noticed, good ones pass: merged weights and codes of every format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.checkpoint_proof import checkpoint_content
from quantpress.pipelines.cli import run
from tests.damage.onnx_damages import two_tokens
from tests.tiny import tiny_case, tiny_checkpoint

LONG = bool(os.environ.get("QUANTPRESS_LONG"))
Tensors = dict[str, torch.Tensor]
WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32, "format": "gptq", **WINDOWS},
    "rtn-3": {"method": "rtn", "bits": 3, "group_size": 32, "format": "gptq_v2"},
    "awq": {"method": "awq", "bits": 4, "group_size": 32, "format": "awq", **WINDOWS},
    "rtn-8": {"method": "rtn", "bits": 8, "group_size": 32, "format": "compressed-tensors"},
    "smoothquant": {"method": "smoothquant", "bits": 8, "format": "compressed-tensors", **WINDOWS},
    "int8": {"method": "llm_int8", "format": "bitsandbytes"},
}
MODELS = ("llama-bias", "gemma3-vision", "phi3", "gptneox", "qwen2") if LONG else ("llama-bias", "gemma")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def source(scratch: Path, name: str = "llama-bias") -> Path:
    if not (scratch / name).exists():
        case = tiny_case(name)
        tiny_checkpoint(scratch / name, case.family, **case.options)
    return scratch / name


def quantized(scratch: Path, kind: str, name: str = "llama-bias") -> Path:
    out = scratch / f"{name}-{kind}"
    if not out.exists():
        qp.quantize(source(scratch, name), out, verify=False, **KINDS[kind])
    return out


def found(model: Path, folder: Path) -> list[str]:
    return [str(each) for each in checkpoint_content(open_checkpoint(model), folder).findings]


def damaged(good: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(good, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def scaled(end: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = next(each for each in tensors if each.endswith(end))
        tensors[name] = (tensors[name] * factor).to(tensors[name].dtype)

    return change


def shifted(end: str, dim: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = next(each for each in tensors if each.endswith(end))
        tensors[name] = torch.roll(tensors[name], 1, dim).contiguous()

    return change


def exchanged(tensors: Tensors) -> None:
    for name in [each for each in tensors if "layers.0.mlp.gate_proj" in each]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_good_folders_pass(name: str, kind: str, scratch: Path) -> None:
    proof = checkpoint_content(open_checkpoint(source(scratch, name)), quantized(scratch, kind, name))
    assert [str(each) for each in proof.findings] == []
    assert proof.tensors > 20
    assert proof.settings > 20
    assert proof.tokens > 200


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gptq", scaled("up_proj.scales", 1.1)),
        ("gptq", scaled("up_proj.scales", 0.0)),
        ("gptq", shifted("up_proj.qweight", 1)),
        ("gptq", exchanged),
        ("gptq", scaled("input_layernorm.weight", 1.1)),
        ("rtn-3", scaled("down_proj.scales", 1.03)),
        ("rtn-3", scaled("embed_tokens.weight", 1.1)),
        ("awq", scaled("up_proj.scales", 1.1)),
        ("awq", scaled("input_layernorm.weight", 1.1)),
        ("rtn-8", scaled("up_proj.weight_scale", 1.1)),
        ("smoothquant", scaled("q_proj.weight_scale", 1.1)),
        ("int8", scaled("up_proj.SCB", 1.1)),
        ("int8", exchanged),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_damaged_codes_are_noticed(kind: str, change: Callable[[Tensors], None], scratch: Path, tmp_path: Path) -> None:
    assert found(source(scratch), damaged(quantized(scratch, kind), tmp_path / "bad", change))


@pytest.mark.parametrize(
    "change",
    [scaled("o_proj.weight", 1.0001), shifted("k_proj.weight", 0), exchanged, scaled("k_proj.bias", 0.0)],
    ids=["scaled", "shifted", "exchanged", "bias"],
)
def test_floats_are_compared_to_the_last_bit_but_rounding(
    change: Callable[[Tensors], None], scratch: Path, tmp_path: Path
) -> None:
    model = source(scratch)
    assert found(model, model) == []
    assert found(model, damaged(model, tmp_path / "bad", change))


def test_tokens_and_sizes_are_compared(scratch: Path, tmp_path: Path) -> None:
    model = source(scratch)
    bad = damaged(model, tmp_path / "tokens", lambda _tensors: None)
    two_tokens(bad)
    assert any(each.startswith("token ") for each in found(model, bad))
    bad = damaged(model, tmp_path / "config", lambda _tensors: None)
    config = json.loads((bad / "config.json").read_text())
    config["rms_norm_eps"] *= 10
    (bad / "config.json").write_text(json.dumps(config))
    assert any("norm_eps" in each for each in found(model, bad))


def test_verify_ends_with_4(scratch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = source(scratch)
    bad = damaged(quantized(scratch, "rtn-8"), tmp_path / "bad", scaled("up_proj.weight_scale", 1.02))
    given = ["-q", "verify", str(bad), "--against", str(model), "--json", "--chunks", "1", "--context", "32"]
    assert run(given) == 4
    assert "weights" in json.loads(capsys.readouterr().out)["failures"]
