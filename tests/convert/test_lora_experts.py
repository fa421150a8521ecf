"""Adapters of mixtures of experts against PEFT: fused parameters in the model, one tensor per expert on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from tests.peft_oracle import attach, differences, float64_of, merged, quiet, read_float64, train

TOLERANCE = 1e-6  # as in test_lora_peft_parity.py

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """A family with experts, and what of it is adapted."""

    family: str
    sizes: Mapping[str, Any]
    parameters: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj")
    id: str = ""

    def __str__(self) -> str:
        return self.id or self.family


MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3 = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
JAMBA = {
    "num_experts": 3,
    "num_experts_per_tok": 1,
    "expert_layer_offset": 0,
    "expert_layer_period": 1,
    "attn_layer_offset": 0,
    "attn_layer_period": 1,
    "use_mamba_kernels": False,
}
LLAMA4 = {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 24}
GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
CASES = (
    Case("mixtral", MIXTRAL),
    Case("mixtral", MIXTRAL, ("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"), "with-router"),
    Case("mixtral", MIXTRAL, ("experts.down_proj",), "only-down"),
    Case("mixtral", MIXTRAL, ("experts.gate_up_proj",), "only-gate_up"),
    Case("mixtral", {**MIXTRAL, "intermediate_size": 16}, id="mixtral-square"),
    Case("qwen3_moe", QWEN3),
    Case("qwen2_moe", {**QWEN3, "shared_expert_intermediate_size": 12}),
    Case("olmoe", {"num_experts": 3, "num_experts_per_tok": 2}),
    Case("jamba", JAMBA),
    Case("granitemoe", MIXTRAL),
    Case("gpt_oss", GPT_OSS),
    Case("gpt_oss", {**GPT_OSS, "intermediate_size": 16}, id="gpt_oss-square"),
    Case("gpt_oss", {**GPT_OSS, "intermediate_size": 16}, ("experts.down_proj",), "gpt_oss-only-square"),
    Case("llama4_text", {**LLAMA4, "moe_layers": [1]}),
    Case("llama4_text", {**LLAMA4, "moe_layers": [0, 1]}, ("gate_up_proj", "down_proj"), "llama4-short-names"),
)


def experts(folder: Path, case: Case) -> Path:
    """Writes a tiny model as its family stores it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        torch.manual_seed(0)
        config = AutoConfig.for_model(case.family, **{**SIZES, **case.sizes})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(0.0, 0.3)
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapted_experts_equal_pefts(case: Case, tmp_path: Path) -> None:
    base = experts(tmp_path / "base", case)
    with quiet():
        config = peft.LoraConfig(**LORA, target_parameters=list(case.parameters))
    adapter = train(tmp_path / "adapter", base, config)
    result = merge_lora(open_checkpoint(base), adapter)
    assert result.adapted is not None
    ours = float64_of(result)
    theirs = merged(tmp_path / "merged", attach(base, adapter))
    assert max(differences(ours, theirs).values()) <= TOLERANCE
    moved = differences(ours, read_float64(base))
    assert min(moved[name] for name in result.adapted.changed) > 1e-3
    entries = result.adapted.ledger()
    assert sorted(entry.name for entry in entries) == sorted(load_file(adapter / "adapter_model.safetensors"))
    assert {entry.kind for entry in entries} <= {"lora", "expert"}
    assert all(entry.delta_norm and entry.delta_norm > 1e-3 for entry in entries)


def _adapter(folder: Path, tensors: Mapping[str, tuple[int, ...]], **config: Any) -> Path:
    """Writes an adapter of random tensors."""
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    values = {f"base_model.model.{name}": 0.3 * torch.randn(shape, generator=random) for name, shape in tensors.items()}
    save_file(values, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
def test_adapters_of_single_experts_from_older_transformers_merge_as_peft_converts_them(
    tmp_path: Path, block: str
) -> None:
    case = CASES[0]
    base = experts(tmp_path / "base", case)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        for expert in range(3):
            for name, rows, width in (("w1", 24, 16), ("w2", 16, 24), ("w3", 24, 16)):
                path = f"model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors |= {f"{path}.lora_A.weight": (3, width), f"{path}.lora_B.weight": (rows, 3)}
    adapter = _adapter(tmp_path / "adapter", tensors, target_modules=["w1", "w2", "w3"])
    ours = float64_of(merge_lora(open_checkpoint(base), adapter))
    theirs = merged(tmp_path / "merged", attach(base, adapter))
    assert max(differences(ours, theirs).values()) <= TOLERANCE
    assert differences(ours, read_float64(base))["model.layers.1.block_sparse_moe.experts.2.w3.weight"] > 1e-2


def test_experts_that_were_trained_whole_are_cut_into_those_of_the_base(tmp_path: Path) -> None:
    base = experts(tmp_path / "base", CASES[0])
    with quiet():
        config = peft.LoraConfig(**LORA, modules_to_save=["mlp.experts"])
    adapter = train(tmp_path / "adapter", base, config)
    ours = float64_of(merge_lora(open_checkpoint(base), adapter))
    theirs = merged(tmp_path / "merged", attach(base, adapter))
    assert max(differences(ours, theirs).values()) <= TOLERANCE


def test_a_square_expert_is_turned_as_the_other_parameter_of_its_module(tmp_path: Path) -> None:
    # PEFT 0.17 took every fused parameter for (E, in, out): lora_A of gate_up then has its 2 * I columns.
    base = experts(tmp_path / "base", Case("qwen3_moe", {**QWEN3, "moe_intermediate_size": 16}))
    path = "model.layers.0.mlp.experts"
    tensors = {
        f"{path}.base_layer.lora_A.weight": (9, 32),
        f"{path}.base_layer.lora_B.weight": (16, 9),
        f"{path}.lora_A.weight": (9, 16),
        f"{path}.lora_B.weight": (16, 9),
    }
    adapter = _adapter(tmp_path / "adapter", tensors, target_parameters=[f"mlp.{name}" for name in FUSED])
    ours = float64_of(merge_lora(open_checkpoint(base), adapter))
    before = read_float64(base)
    values = {name.removeprefix("base_model.model."): v for name, v in read_float64(adapter).items()}
    for part, rows in (("gate_proj", slice(0, 16)), ("up_proj", slice(16, 32)), ("down_proj", slice(None))):
        at = path if part == "down_proj" else f"{path}.base_layer"
        a, b = (values[f"{at}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        for expert in range(3):
            # (PEFT: "o r e, e r i -> e i o")
            delta = np.einsum("or,ri->io", b.reshape(-1, 3, 3)[:, :, expert], a.reshape(3, 3, -1)[expert]) * 5 / 3
            name = f"{path}.{expert}.{part}.weight"
            assert np.abs(ours[name] - before[name] - delta[rows]).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "parameters", "said"),
    [
        ({"mlp.experts.lora_A.weight": (9, 24), "mlp.experts.lora_B.weight": (16, 9)}, FUSED, "is one of 1"),
        ({"mlp.experts.lora_A.weight": (9, 25), "mlp.experts.lora_B.weight": (16, 9)}, FUSED[1:], "another model"),
        ({"mlp.experts.lora_A.weight": (6, 24), "mlp.experts.lora_B.weight": (16, 6)}, FUSED[1:], "wanted rank 3"),
        ({"mlp.experts.lora_A.weight": (9, 24)}, FUSED[1:], "no lora_B"),
        ({"mlp.expert.lora_A.weight": (9, 24), "mlp.expert.lora_B.weight": (16, 9)}, FUSED[1:], "rank"),
    ],
)
def test_what_does_not_fit_the_experts_is_refused(
    tmp_path: Path, tensors: Mapping[str, tuple[int, ...]], parameters: list[str], said: str
) -> None:
    base = open_checkpoint(experts(tmp_path / "base", CASES[0]))
    placed = {f"model.layers.0.{name}": shape for name, shape in tensors.items()}
    adapter = _adapter(tmp_path / "adapter", placed, target_parameters=parameters)
    with pytest.raises(InputError, match=said):
        merge_lora(base, adapter)
