"""Adapters for cases: PEFT's own where transformers has the model, else written by hand in PEFT's form."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import Layout, Role

__all__ = ["RANK", "SCALE", "merged_logits", "merged_tensors", "written_by_hand"]

RANK, SCALE = 4, 2.0


def merged_logits(folder: Path, adapter: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives what transformers computes with an adapter that PEFT has merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
        found: NDArray[np.float32] = merged(torch.from_numpy(tokens[None])).logits[0].float().numpy()
    return found


def written_by_hand(folder: Path, adapter: Path) -> Path:
    """Writes an adapter on every stored linear weight of a layer; random, none of it zero."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(5), {}
    modules = {name.removesuffix(".weight"): shape for name, shape in _linears(folder).items()}
    for module, (rows, columns) in modules.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.normal(0, columns**-0.5, (RANK, columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.1, (rows, RANK)).astype(np.float32)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none",
        "base_model_name_or_path": "model",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter


def merged_tensors(folder: Path, adapter: Path) -> dict[str, NDArray[np.float64]]:
    """Gives every changed weight as the formula W + scale * B A has it, in float64."""
    from safetensors.numpy import load_file

    found, source = load_file(adapter / "adapter_model.safetensors"), _stored(folder)
    merged = {}
    for name in _linears(folder):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        first, second = (found[f"{prefix}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        merged[name] = source[name].astype(np.float64) + SCALE * (second @ first)
    return merged


def _stored(folder: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def _linears(folder: Path) -> dict[str, tuple[int, int]]:
    """Gives the stored linear weights of layers; those stored as (K, N) or as stacks are left out."""
    config = json.loads((folder / "config.json").read_text())
    spec, stored = find_arch(config), _stored(folder)
    rows = [
        (row, layer)
        for row, layer in spec.rows(spec.read_config(config))
        if row.role is Role.LINEAR and row.layout not in (Layout.TRANSPOSED, Layout.STACKED, Layout.STACKED_TRANSPOSED)
    ]
    names = (name for row, layer in rows for name in spec.names(row, layer) if name in stored)
    return {name: tuple(stored[name].shape) for name in dict.fromkeys(names)}
