"""InternLM2 and the first Qwen in their own layouts, against Llama and Qwen2 of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.families.cases import Case
from tests.families.published import Settings, Tensors, computed, llama_settings, stored_in, write_published
from tests.tiny import VOCABULARY

__all__ = ["CASES", "internlm2_as_llama", "write_qwen"]

_INTERNLM2: Settings = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _write_internlm2(folder: Path, options: Settings) -> None:
    config = {**_INTERNLM2, **options}
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    fused = hidden // heads * (heads + 2 * config["num_key_value_heads"])
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": vocabulary,
        "model.norm.weight": (hidden,),
        "output.weight": vocabulary,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}attention.wqkv.weight": (fused, hidden),
            f"{prefix}attention.wo.weight": (hidden, hidden),
            f"{prefix}feed_forward.w1.weight": (ffn, hidden),
            f"{prefix}feed_forward.w2.weight": (hidden, ffn),
            f"{prefix}feed_forward.w3.weight": (ffn, hidden),
            f"{prefix}attention_norm.weight": (hidden,),
            f"{prefix}ffn_norm.weight": (hidden,),
        }
        if config["bias"]:
            shapes |= {f"{prefix}attention.wqkv.bias": (fused,), f"{prefix}attention.wo.bias": (hidden,)}
    write_published(folder, config, shapes)


def internlm2_as_llama(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Gives Llama's settings and the same values under Llama's names, q, k and v apart."""
    config, stored = stored_in(folder)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    scaling = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    if config["rope_scaling"]:
        scaling |= {"rope_type": config["rope_scaling"]["type"], "factor": config["rope_scaling"]["factor"]}
    settings = llama_settings(
        config,
        num_key_value_heads=kv_heads,
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=scaling,
        attention_bias=config["bias"],
        max_position_embeddings=config["max_position_embeddings"],
    )
    tensors: Tensors = {
        "model.embed_tokens.weight": stored["model.tok_embeddings.weight"],
        "model.norm.weight": stored["model.norm.weight"],
        "lm_head.weight": stored["output.weight"],
    }
    kinds = ("weight", "bias") if config["bias"] else ("weight",)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}{ours}.weight": stored[f"{prefix}{name}.weight"] for name, ours in _INTERNLM2_NAMES.items()
        }
        for kind in kinds:
            fused = stored[f"{prefix}attention.wqkv.{kind}"]
            # each key head: the query heads that look at it, itself, its values
            groups = fused.reshape(kv_heads, heads // kv_heads + 2, -1, *fused.shape[1:])
            parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
            for part, values in parts.items():
                tensors[f"{prefix}self_attn.{part}_proj.{kind}"] = values.reshape(-1, *fused.shape[1:])
        if config["bias"]:
            tensors[f"{prefix}self_attn.o_proj.bias"] = stored[f"{prefix}attention.wo.bias"]
    return settings, tensors


def _internlm2_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    return computed("llama", *internlm2_as_llama(folder), tokens)


def _internlm2(name: str, *, gguf: str = "", long: bool = True, **options: Any) -> Case:
    make: Callable[[Path], None] = partial(_write_internlm2, options=options)
    return Case(name, "internlm2", gguf=gguf, make=make, logits=_internlm2_logits, long=long)


_QWEN: Settings = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "hidden_size": 64,
    "intermediate_size": 192,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 128,
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": VOCABULARY,
}


def write_qwen(folder: Path, options: Settings) -> None:
    config = {**_QWEN, **options}
    hidden, ffn = config["hidden_size"], config["intermediate_size"] // 2
    width = config["num_attention_heads"] * config["kv_channels"]
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": vocabulary,
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": vocabulary,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        shapes |= {
            f"{prefix}attn.c_attn.weight": (3 * width, hidden),
            f"{prefix}attn.c_attn.bias": (3 * width,),
            f"{prefix}attn.c_proj.weight": (hidden, width),
            f"{prefix}mlp.w1.weight": (ffn, hidden),
            f"{prefix}mlp.w2.weight": (ffn, hidden),
            f"{prefix}mlp.c_proj.weight": (hidden, ffn),
            f"{prefix}ln_1.weight": (hidden,),
            f"{prefix}ln_2.weight": (hidden,),
        }
    write_published(folder, config, shapes)


def _qwen_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Qwen2 of the same shape: biases for q, k and v; texts are no longer than `seq_length`."""
    config, stored = stored_in(folder)
    settings = llama_settings(
        config,
        intermediate_size=config["intermediate_size"] // 2,
        num_key_value_heads=config["num_attention_heads"],
        head_dim=config["kv_channels"],
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])},
    )
    names = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }
    tensors: Tensors = {
        "model.embed_tokens.weight": stored["transformer.wte.weight"],
        "model.norm.weight": stored["transformer.ln_f.weight"],
        "lm_head.weight": stored["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        source, target = f"transformer.h.{layer}.", f"model.layers.{layer}."
        tensors |= {f"{target}{ours}.weight": stored[f"{source}{name}.weight"] for name, ours in names.items()}
        for kind in ("weight", "bias"):
            for part, values in zip("qkv", np.split(stored[f"{source}attn.c_attn.{kind}"], 3), strict=True):
                tensors[f"{target}self_attn.{part}_proj.{kind}"] = values
    return computed("qwen2", settings, tensors, tokens)


def _qwen(name: str, *, gguf: str = "", long: bool = True, **options: Any) -> Case:
    make: Callable[[Path], None] = partial(write_qwen, options=options)
    return Case(name, "qwen", gguf=gguf, make=make, logits=_qwen_logits, long=long)


CASES: tuple[Case, ...] = (
    _internlm2("internlm2", long=False),
    _internlm2("internlm2-mha", num_key_value_heads=4),
    _internlm2("internlm2-mqa", num_key_value_heads=1),
    _internlm2("internlm2-dynamic", rope_scaling={"type": "dynamic", "factor": 2.0}),
    _internlm2("internlm2-linear", rope_scaling={"type": "linear", "factor": 4.0}),
    _internlm2("internlm2-bias", bias=True, gguf="bias"),
    _qwen("qwen", long=False),
    _qwen("qwen-plain", use_dynamic_ntk=False, use_logn_attn=False, rotary_emb_base=50000),
    _qwen("qwen-heads", kv_channels=8, gguf="kv_channels"),
)
