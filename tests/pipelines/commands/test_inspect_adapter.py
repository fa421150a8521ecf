"""`quantpress inspect` on adapters: settings, norms, and what strangers put into a folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pipelines.commands.peft_adapters import make_adapter

Run = Callable[..., Any]


def test_settings_and_the_norm_of_every_module_are_told_without_a_base(quantpress: Run, other_adapter: Path) -> None:
    ended = quantpress("inspect", other_adapter, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["format"], report["type"], report["rank"], report["alpha"]) == ("adapter", "LORA", 4, 8)
    assert report["rslora"] is True
    assert report["scale"] == 8 / math.sqrt(4)
    assert sorted(report["targets"]) == ["up_proj", "v_proj"]
    tensors = load_file(other_adapter / "adapter_model.safetensors")
    assert report["tensors"] == len(tensors) == 2 * len(report["modules"])
    for module in report["modules"]:
        first, second = (tensors[f"base_model.model.{module['path']}.lora_{part}.weight"] for part in "AB")
        wanted = 4 * np.linalg.norm(second.astype(np.float64) @ first.astype(np.float64))
        assert module["delta_norm"] == pytest.approx(wanted, rel=1e-9)


def test_the_table_has_a_row_for_each_kind_of_module_or_for_each_module(quantpress: Run, other_adapter: Path) -> None:
    ended = quantpress("inspect", other_adapter)
    rows = [line.split() for line in ended.out.splitlines()]
    row = next(words for words in rows if words and words[0] == "self_attn.v_proj")
    assert row[:6] == ["self_attn.v_proj", "lora", "4", "8", "4", "2"]
    assert ["│", "rslora", "│", "yes"] in [words[:4] for words in rows]
    every = quantpress("inspect", other_adapter, "-v")
    assert sum("model.layers." in line for line in every.out.splitlines()) == 4


def test_dora_and_modules_to_save_are_named(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    report = json.loads(quantpress("inspect", make_adapter(tiny_model, tmp_path / "dora", **settings), "--json").out)
    assert report["dora"] is True
    assert report["modules_to_save"] == ["lm_head"]
    assert {module["kind"] for module in report["modules"]} == {"dora", "whole"}


def test_an_adapter_of_a_quantized_base_says_so(quantpress: Run, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qlora"
    shutil.copytree(tiny_adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unsloth/tiny-bnb-4bit"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert json.loads(quantpress("inspect", folder, "--json").out)["base_quantization"] == "nf4"


def _empty(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": ')


def _list(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[1]")


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def _link(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/etc/passwd")


def _fifo(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def _rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": "many"}))


@pytest.mark.parametrize("spoil", [_empty, _cut, _no_json, _list, _pickle, _link, _fifo, _rank])
def test_a_damaged_or_hostile_folder_ends_with_3_and_one_line(
    quantpress: Run, tiny_adapter: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(tiny_adapter, folder)
    spoil(folder)
    ended = quantpress("inspect", folder)
    assert ended.code == 3, ended.err
    assert len(ended.err.splitlines()) == 1
    assert "adapter_" in ended.err
