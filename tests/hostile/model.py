"""A small good model, adapter and GGUF file to spoil; nothing here needs torch."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.tiny import VOCABULARY, write_tokenizer

__all__ = ["ADAPTED", "CONFIG", "CONVERT", "adapter", "edit", "good_model", "spoilt", "weights", "write_adapter"]

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, RANK = 32, 64, 4, 2, 2, 4
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
CONVERT = ("convert", "model", "out.gguf", "--outtype", "q8_0", "--no-verify")
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


@functools.cache
def _weights() -> Mapping[str, np.ndarray]:
    chance = np.random.default_rng(5)

    def some(*shape: int) -> np.ndarray:
        return chance.standard_normal(shape).astype(np.float32) / 8

    made = {"model.embed_tokens.weight": some(VOCABULARY, HIDDEN), "lm_head.weight": some(VOCABULARY, HIDDEN)}
    made["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        for name, shape in _SHAPES.items():
            made[f"model.layers.{layer}.{name}.weight"] = some(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    return made


def weights() -> dict[str, np.ndarray]:
    """Gives the good weights, to be changed."""
    return {name: values.copy() for name, values in _weights().items()}


@functools.cache
def tokenizer_files() -> Mapping[str, bytes]:
    """Gives the tokenizer's files."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def good_model(folder: Path, held: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Writes a good model into `folder / "model"`; with other weights or settings one that may not be good."""
    model = folder / "model"
    model.mkdir()
    for name, data in tokenizer_files().items():
        (model / name).write_bytes(data)
    (model / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(_weights() if held is None else held), model / "model.safetensors", metadata={"format": "pt"})
    return model


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Changes what a JSON file says."""
    said = json.loads(file.read_bytes())
    changed = change(said)
    file.write_text(json.dumps(said if changed is None else changed))


def adapter(base: str = "model") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Gives a good adapter's configuration and weights, to be changed."""
    chance = np.random.default_rng(6)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": RANK, "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"], "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "lora_dropout": 0.0, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    held = {}
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            rows, columns = _SHAPES[name]
            start = f"base_model.model.model.layers.{layer}.{name}"
            held[f"{start}.lora_A.weight"] = chance.standard_normal((RANK, columns)).astype(np.float32) / 8
            held[f"{start}.lora_B.weight"] = chance.standard_normal((rows, RANK)).astype(np.float32) / 8
    return config, held


def write_adapter(folder: Path, config: Mapping[str, Any], held: Mapping[str, np.ndarray]) -> Path:
    """Writes an adapter into `folder / "adapter"`."""
    place = folder / "adapter"
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(held), place / "adapter_model.safetensors")
    return place


Change = Callable[[Path], object]


def spoilt(change: Change, arguments: Sequence[str] = CONVERT) -> Callable[[Path], Sequence[str]]:
    """Gives what makes a good model, spoils it and converts it."""

    def make(folder: Path) -> Sequence[str]:
        change(good_model(folder))
        return arguments

    return make
