"""Codes of a fused projection are those of the same model with q, k and v apart, in the order of the stored rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from tests.families.cases import write_checkpoint
from tests.families.remote import CASES, internlm2_as_llama
from tests.tiny import write_tokenizer

LAYERS, HEADS, KV_HEADS = 3, 4, 2
CALIBRATED: dict[str, Any] = {"samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """InternLM2, and Llama with the same weights."""
    folder = tmp_path_factory.mktemp("models")
    fused = write_checkpoint(next(case for case in CASES if case.id == "internlm2"), folder / "fused")
    settings, tensors = internlm2_as_llama(fused)
    apart = folder / "apart"
    apart.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 0, **settings}
    (apart / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, apart / "model.safetensors")
    write_tokenizer(apart)
    return fused, apart


def fused_by_group(query: NDArray[Any], key: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
    """Rows as InternLM2 stores them: for each key head the queries that look at it, itself, its values."""
    size = len(query) // HEADS
    parts = (each.reshape(KV_HEADS, -1, size, each.shape[1]) for each in (query, key, value))
    return np.concatenate(list(parts), axis=1).reshape(-1, query.shape[1])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", **CALIBRATED},
        {"method": "gptq", "act_order": False, "group_size": -1, **CALIBRATED},
        {"method": "gptq", "format": "gptq", **CALIBRATED},
        {"method": "awq", **CALIBRATED},
        {"method": "rtn"},
    ],
    ids=str,
)
def test_codes_are_those_of_separate_projections(
    models: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    written = []
    for name, model in zip(("fused", "apart"), models, strict=True):
        settings = {"bits": 4, "group_size": 32, "verify": False, "threads": 1, **options}
        qp.quantize(model, tmp_path / name, **settings)
        written.append(open_checkpoint(tmp_path / name).tensors)
    fused, apart = written
    for layer in range(LAYERS):
        parts = [apart[f"model.layers.{layer}.self_attn.{part}_proj.weight"].read() for part in "qkv"]
        found = fused[f"model.layers.{layer}.attention.wqkv.weight"].read()
        np.testing.assert_array_equal(found, fused_by_group(*parts))
        for theirs, ours in (("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm")):
            left, right = fused[f"model.layers.{layer}.{ours}.weight"], apart[f"model.layers.{layer}.{theirs}.weight"]
            np.testing.assert_array_equal(left.read(), right.read())
