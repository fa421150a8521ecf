"""Experts in MXFP4 are opened as the numbers that transformers computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantpress as qp
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights
from tests.families.cases import Case, transformers_logits, write_checkpoint

SIZES = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "attention_bias": True}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
TOKENS = np.arange(1, 33)


def packed(folder: Path, plain: Path) -> None:
    """Turns the experts of a checkpoint into random MXFP4, and writes the numbers they stand for beside it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    meant = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        assert meant[name].shape == (experts, columns, rows)
    plain.mkdir()
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("mxfp4")
    folder = write_checkpoint(Case("gpt_oss", "gpt_oss", SIZES), root / "packed")
    packed(folder, root / "plain")
    return folder, root / "plain"


def test_stacks_are_the_numbers_that_transformers_makes_of_them(folders: tuple[Path, Path]) -> None:
    packed_folder, plain = folders
    checkpoint, wanted = open_checkpoint(packed_folder), load_file(plain / "model.safetensors")
    assert set(checkpoint.tensors) == set(wanted)
    for name, values in wanted.items():
        found = checkpoint.tensors[name].read().astype(np.float32)
        np.testing.assert_array_equal(found, values.numpy(), err_msg=name)
        if found.ndim == 3:
            inner = checkpoint.tensors[name].inner
            assert inner is not None
            np.testing.assert_array_equal(inner(2).read_rows(3, 9).astype(np.float32), values[2, 3:9].numpy())


def test_a_model_with_packed_experts_speaks_like_transformers(folders: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(folders[0])
    checked = preflight(checkpoint)
    weights = CheckpointWeights(checkpoint, checked.spec, checked.hyper)
    with torch.no_grad():
        found = Decoder(weights, checked.spec, checked.hyper).logits(torch.from_numpy(TOKENS[None]))[0]
    np.testing.assert_allclose(found.numpy(), transformers_logits(folders[1], TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["no scales", "no blocks", "shape", "scale"])
def test_what_does_not_fit_together_is_refused(damage: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    tensors: dict[str, Any] = load_file(folders[0] / "model.safetensors")
    stack = "model.layers.1.mlp.experts.down_proj"
    if damage == "no scales":
        del tensors[f"{stack}_scales"]
    elif damage == "no blocks":
        del tensors[f"{stack}_blocks"]
    elif damage == "shape":
        tensors[f"{stack}_scales"] = tensors[f"{stack}_scales"][:, 1:].contiguous()
    else:
        tensors[f"{stack}_scales"][2, 1, 0] = 255
    for file in folders[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qp.InputError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        open_checkpoint(tmp_path).tensors[stack].read()


def test_a_file_in_mxfp4_holds_the_same_numbers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle is not installed")
    path = tmp_path / "out.gguf"
    qp.export_gguf(folders[0], path, outtype="mxfp4_moe", verify=False)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    wanted = load_file(folders[1] / "model.safetensors")
    for layer in range(3):
        stacks = {
            part: wanted[f"model.layers.{layer}.mlp.experts.{part}"].numpy() for part in ("gate_up_proj", "down_proj")
        }
        parts = {"gate": stacks["gate_up_proj"][..., ::2], "up": stacks["gate_up_proj"][..., 1::2]}
        for name, values in (parts | {"down": stacks["down_proj"]}).items():
            tensor = found[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(numbers, values.transpose(0, 2, 1), err_msg=name)
