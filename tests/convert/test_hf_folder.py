"""A model folder opens with everything that later stages need, and with the weights unread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from quantpress.convert.hf_folder import open_folder


def test_a_real_folder_opens_with_config_tokenizer_and_every_tensor(shared: Path) -> None:
    folder = shared / "models" / "stories260k-hf"
    checkpoint = open_folder(folder)
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.generation_config == json.loads((folder / "generation_config.json").read_text())
    assert {name: len(data) for name, data in checkpoint.tokenizer_files.items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".safetensors"
    }
    assert checkpoint.parameters == 260_032
    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name, tensor in checkpoint.tensors.items():
            assert np.array_equal(tensor.read(), file.get_tensor(name))
            assert tensor.source == str(folder / "model.safetensors")


def test_sharded_bin_files_open_through_their_index(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    weight_map = {}
    for number, (name, tensor) in enumerate(state.items(), 1):
        weight_map[name] = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_folder(tmp_path)
    assert checkpoint.format == "torch"
    assert {name: tensor.read().tolist() for name, tensor in checkpoint.tensors.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


def test_named_chat_templates_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("one")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("two")
    files = open_folder(tmp_path).tokenizer_files
    assert files["chat_template.jinja"] == b"one"
    assert files["additional_chat_templates/tool.jinja"] == b"two"
