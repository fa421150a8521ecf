"""MPT as its own code computes it (llm-foundry, modeling_mpt.py and attention.py), in float64 with nothing but numpy.

transformers' class ignores learned positions, biases, norms of q and k, grouped heads and the greatest slope, so it
cannot bear witness to them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["logits", "write"]

Wide = NDArray[np.float64]


def write(folder: Path, config: dict[str, Any]) -> None:
    """Writes random weights under the names that llm-foundry's classes give them."""
    from safetensors.numpy import save_file

    from tests.tiny import write_tokenizer

    width, inner, vocab = config["d_model"], config["d_model"] * config["expansion_ratio"], config["vocab_size"]
    kv = config["attn_config"].get("kv_n_heads", config["n_heads"]) * width // config["n_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, width),
        "transformer.norm_f.weight": (width,),
    }
    if not config["attn_config"]["alibi"]:
        shapes["transformer.wpe.weight"] = (config["max_seq_len"], width)
    for layer in range(config["n_layers"]):
        name = f"transformer.blocks.{layer}."
        shapes |= {f"{name}norm_1.weight": (width,), f"{name}norm_2.weight": (width,)}
        shapes |= {f"{name}attn.Wqkv.weight": (width + 2 * kv, width), f"{name}attn.out_proj.weight": (width, width)}
        shapes |= {f"{name}ffn.up_proj.weight": (inner, width), f"{name}ffn.down_proj.weight": (width, inner)}
        if config["attn_config"].get("qk_ln"):
            shapes |= {f"{name}attn.q_ln.weight": (width,), f"{name}attn.k_ln.weight": (kv,)}
    biases = {} if config["no_bias"] else _biases(shapes)
    random, tensors = np.random.default_rng(9), {}
    for name, shape in {**shapes, **biases}.items():
        noise = random.normal(size=shape)
        scale = 0.2 if len(shape) == 1 else 0.3 if name.endswith(("wte.weight", "wpe.weight")) else shape[1] ** -0.5
        tensors[name] = (noise * scale + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def _biases(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Everything has a bias but the embeddings."""
    named = {name: shape for name, shape in shapes.items() if "wte" not in name and "wpe" not in name}
    return {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in named.items()}


def logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives (T, vocab) logits after (T,) tokens."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    stored = {name: values.astype(np.float64) for name, values in load_file(folder / "model.safetensors").items()}
    hidden = stored["transformer.wte.weight"][tokens]
    if not config["attn_config"]["alibi"]:
        hidden = hidden + stored["transformer.wpe.weight"][: len(tokens)]
    for layer in range(config["n_layers"]):
        name = f"transformer.blocks.{layer}."
        block = {key.removeprefix(name): values for key, values in stored.items() if key.startswith(name)}
        hidden = hidden + _attention(config, block, _norm(block, "norm_1", hidden))
        inner = _linear(block, "ffn.up_proj", _norm(block, "norm_2", hidden))
        hidden = hidden + _linear(block, "ffn.down_proj", _gelu(inner))
    head = {"h.weight": stored["transformer.wte.weight"]}
    final = {key.removeprefix("transformer."): values for key, values in stored.items()}
    scale = config.get("logit_scale") or 1.0
    scale = config["d_model"] ** -0.5 if scale == "inv_sqrt_d_model" else scale
    return (_linear(head, "h", _norm(final, "norm_f", hidden)) * scale).astype(np.float32)


def _attention(config: dict[str, Any], block: dict[str, Wide], values: Wide) -> Wide:
    settings, heads, count = config["attn_config"], config["n_heads"], len(values)
    size = config["d_model"] // heads
    kv_heads = settings.get("kv_n_heads", heads)
    mixed = _linear(block, "attn.Wqkv", values)
    if settings.get("clip_qkv"):
        mixed = np.clip(mixed, -settings["clip_qkv"], settings["clip_qkv"])
    query, key, value = np.split(mixed, [heads * size, (heads + kv_heads) * size], axis=-1)
    if settings.get("qk_ln"):
        query, key = _norm(block, "attn.q_ln", query), _norm(block, "attn.k_ln", key)
    query, key, value = (part.reshape(count, -1, size).swapaxes(0, 1) for part in (query, key, value))
    key, value = (np.repeat(part, heads // kv_heads, axis=0) for part in (key, value))
    scores = query @ key.swapaxes(1, 2) * (settings.get("softmax_scale") or size**-0.5)
    place = np.arange(count)
    if settings["alibi"]:
        exponents = np.arange(1, heads + 1) * settings["alibi_bias_max"] / heads  # heads are a power of two here
        scores = scores - (2.0**-exponents)[:, None, None] * (place[:, None] - place[None, :])
    scores = np.where(place[None, :] <= place[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
    return _linear(block, "attn.out_proj", mixed.swapaxes(0, 1).reshape(count, -1))


def _linear(block: dict[str, Wide], name: str, values: Wide) -> Wide:
    return values @ block[f"{name}.weight"].T + block.get(f"{name}.bias", 0.0)


def _norm(block: dict[str, Wide], name: str, values: Wide) -> Wide:
    centred = values - values.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * block[f"{name}.weight"] + block.get(f"{name}.bias", 0.0)


def _gelu(values: Wide) -> Wide:
    return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))
