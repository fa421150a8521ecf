"""Made-up adapters and settings of quantizers, beside good weights: all that happens before a weight is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.gptq.pack import GPTQ_V1
from quantpress.convert.lora.adapter import open_adapter
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.quant.grid import Grid
from tests.fuzz.config_targets import parse_model
from tests.fuzz.table_folder import llama_config, llama_folder
from tests.fuzz.target import Target
from tests.packed_folders import pack_folder

__all__ = ["TARGETS"]

_Q, _DOWN, _EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"
_LORA: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
    "base_model_name_or_path": "org/base", "target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": False,
}  # fmt: skip
_WORDS = (
    b'"use_dora": true', b'"use_rslora": true', b'"rank_pattern": {"(a+)+$": 2}', b'"alpha_pattern": {".*": 1e308}',
    b'"modules_to_save": ["lm_head"]', b'"target_modules": "(.*)*x"', b'"layers_to_transform": [0, -1]',
    b'"all-linear"',
    b'"layers_pattern": "layers"', b'"target_parameters": ["weight"]', b'"trainable_token_indices": [999999999]',
    b'"peft_type": "IA3"', b'"peft_type": "LOHA"', b'"peft_type": "LOKR"', b'"peft_type": "ADALORA", "init_r": 2',
    b'"bias": "all"', b'"exclude_modules": ["q_proj"]', b'"lora_alpha": -1', b'"r": 0', b'"r": 2147483648', b"null",
    b'"peft_type": "TRAINABLE_TOKENS", "token_indices": [0, 0]', b'"revision": "../../x"',
    b'"auto_mapping": {"a": "b"}',
)  # fmt: skip


def _parse_adapter(folder: Path) -> object:
    """Merges the adapter into the base, lazily, and plans a file of what comes of it."""
    merged = merge_lora(open_checkpoint(folder / "base"), open_adapter(folder / "adapter"))
    return Gguf(output=Path("x.gguf"), outtype="Q8_0").resolved(merged).plan(merged)


def _prepare(folder: Path) -> None:
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    llama_folder(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(_LORA))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(save(_tensors()))


def _tensors(rank: int = 2, *, prefix: str = "base_model.model.") -> dict[str, np.ndarray[Any, Any]]:
    """Two modules of the base of `llama_folder`: 64 x 64 and 64 x 96."""
    found = {}
    for path, rows, columns in ((_Q, 64, 64), (_DOWN, 64, 96)):
        found[f"{prefix}{path}.lora_A.weight"] = np.zeros((rank, columns), np.float32)
        found[f"{prefix}{path}.lora_B.weight"] = np.zeros((rows, rank), np.float32)
    return found


def _config_seeds() -> Mapping[str, bytes]:
    changes: dict[str, dict[str, Any]] = {
        "good": {}, "pattern": {"target_modules": ".*(q_proj|down_proj)"}, "rank": {"r": 4}, "dora": {"use_dora": True},
        "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 0.5}, "use_rslora": True},
        "backtrack": {"target_modules": "(a|a?)+" * 8 + "$"}, "deep": {"target_modules": "(" * 90 + "q" + ")" * 90},
        "wide": {"target_modules": "q{1,60000}"}, "saved": {"modules_to_save": ["lm_head"]}, "kind": {"peft_type": 5},
        "layers": {"layers_to_transform": [0], "layers_pattern": "layers"}, "long": {"bias": "x" * 9000},
        "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}}, "names": {"target_modules": [["q_proj"]]},
        "many": {"target_modules": [f"m{number}" for number in range(3000)]},
        "parameters": {"target_parameters": ["x"]},
        "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}, "alpha": {"lora_alpha": 1e308},
        "adalora": {"peft_type": "ADALORA", "init_r": 2, "rank_pattern": {f"{_Q}.lora_E": [True, False]}},
        "runtime": {"runtime_config": {"ephemeral": 1}, "megatron_config": {"a": [1]}, "loftq_config": {"b": 2}},
    }  # fmt: skip
    return {name: json.dumps({**_LORA, **change}).encode() for name, change in changes.items()}


def _weight_seeds() -> Mapping[str, bytes]:
    good = _tensors()
    a, b = f"base_model.model.{_Q}.lora_A.weight", f"base_model.model.{_Q}.lora_B.weight"
    changes: dict[str, dict[str, Any]] = {
        "good": good, "bare": _tensors(prefix=""), "rank": _tensors(3), "empty": {},
        "half": {**good, a: good[a][:, :16]},
        "flat": {**good, a: np.zeros(128, np.float32)}, "numbers": {**good, a: np.zeros((2, 64), np.int32)},
        "deep": {**good, "base_layer." * 300 + b: good[b]}, "no-rank": {**good, a: np.zeros((0, 64), np.float32)},
        "unknown": {**good, "base_model.model.visual.lora_A.weight": good[a]}, "long": {**good, "x" * 5000: good[a]},
        "layer": {key.replace("layers.0", "layers.7"): value for key, value in good.items()},
        "digits": {key.replace("layers.0", "layers." + "9" * 5000): value for key, value in good.items()},
        "whole": {**good, "base_model.model.lm_head.modules_to_save.weight": np.zeros((320, 64), np.float32)},
        "named": {key.replace(".weight", ".default.weight"): value for key, value in good.items()},
        "grown": {**good, f"base_model.model.{_EMBEDDING}.weight": np.zeros((330, 64), np.float32)},
        "magnitude": {**good, f"base_model.model.{_Q}.lora_magnitude_vector": np.zeros(64, np.float32)},
        "line": {**good, "base_model.model.a\nb.lora_A.weight": good[a]},
        "embedding": {
            **good, f"base_model.model.{_EMBEDDING}.lora_embedding_A": np.zeros((2, 320), np.float32),
            f"base_model.model.{_EMBEDDING}.lora_embedding_B": np.zeros((64, 2), np.float32),
        },
    }  # fmt: skip
    return {name: save(tensors) for name, tensors in changes.items()}


def _packed(pack_format: PackFormat, grid: Grid) -> Callable[[Path], None]:
    """Gives what makes a folder of packed weights."""

    def prepare(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as made:
            source, target = Path(made, "source"), Path(made, "packed")
            source.mkdir()
            llama_folder(source)
            pack_folder(source, target, pack_format, grid)
            for path in target.iterdir():
                shutil.move(path, folder / path.name)

    return prepare


def _older(folder: Path) -> None:
    """Makes a folder whose config.json says nothing of its packed weights, as AutoGPTQ did."""
    _GPTQ(folder)
    (folder / "config.json").write_text(json.dumps(llama_config()))


def _settings_seeds(good: str) -> Mapping[str, bytes]:
    settings = {name: llama_config(quantization_config=value) for name, value in _settings().items()}
    return {"good" if name == good else name: json.dumps(config).encode() for name, config in settings.items()}


def _beside_seeds() -> Mapping[str, bytes]:
    return {"good" if name == "gptq" else name: json.dumps(value).encode() for name, value in _settings().items()}


def _settings() -> dict[str, Any]:
    group = {
        "format": "pack-quantized", "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16},
    }  # fmt: skip
    gptq: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    compressed: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
    }
    return {
        "gptq": gptq,
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        "v2": {**gptq, "checkpoint_format": "gptq_v2", "sym": False}, "three": {**gptq, "bits": 3}, "list": [1],
        "dynamic": {**gptq, "dynamic": {"+:.*q_proj.*": {"bits": 8}, "-:.*down.*": {}, "(a+)+$": {"bits": 2}}},
        "marlin": {**gptq, "checkpoint_format": "marlin"}, "per-row": {**gptq, "group_size": -1}, "text": "gptq",
        "awq-left": {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head", 5]},
        "compressed": {**compressed, "config_groups": {"group_0": group}},
        "two": {**compressed, "config_groups": {"a": group, "b": {**group, "targets": ["re:.*down", "re:(a+)+b"]}}},
        "nf4": {**nf4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}, "nf4-bare": nf4,
        "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "hqq": {"quant_method": "hqq"}, "none": {},
    }  # fmt: skip


_SETTINGS_WORDS = (
    b'"quant_method": "awq"', b'"quant_method": ["gptq"]', b'"bits": 1', b'"bits": 9999999999', b'"group_size": 0',
    b'"group_size": -1', b'"dynamic": {"+:(": {"bits": 4}}', b'"desc_act": 1', b'"checkpoint_format": {}', b"null",
    b'"strategy": "channel"', b'"actorder": "weight"', b'"config_groups": {}', b'"ignore": ["re:("]',
    b'"meta": {"a": 1}',
)  # fmt: skip
_GPTQ = _packed(GPTQ_V1, Grid(4, 16))
_AWQ = _packed(AWQ, Grid(4, 32, symmetric=False))

TARGETS: tuple[Target, ...] = (
    Target("adapter-config", "adapter/adapter_config.json", _prepare, _parse_adapter, _config_seeds, _WORDS),
    Target("adapter-weights", "adapter/adapter_model.safetensors", _prepare, _parse_adapter, _weight_seeds),
    Target("gptq-config", "config.json", _GPTQ, parse_model, partial(_settings_seeds, "gptq"), _SETTINGS_WORDS),
    Target("awq-config", "config.json", _AWQ, parse_model, partial(_settings_seeds, "awq"), _SETTINGS_WORDS),
    Target(
        "plain-config-of-quantizers",
        "config.json",
        llama_folder,
        parse_model,
        partial(_settings_seeds, "none"),
        _SETTINGS_WORDS,
    ),
    Target("quantize-config", "quantize_config.json", _older, parse_model, _beside_seeds, _SETTINGS_WORDS),
)
