"""ChatGLM2, ChatGLM3 and GLM-4-9b in their own layout, against Glm of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.families.cases import Case
from tests.families.published import Settings, Tensors, computed, stored_in, write_published
from tests.tiny import VOCABULARY

__all__ = ["CASES", "write_chatglm"]

_CHATGLM: Settings = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": VOCABULARY,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "eos_token_id": 0,
}


def write_chatglm(folder: Path, options: Settings) -> None:
    config = {**_CHATGLM, **options}
    hidden, ffn, head_dim = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads = config["num_attention_heads"] * head_dim
    fused = heads + 2 * config["multi_query_group_num"] * head_dim
    vocabulary = (config["padded_vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": vocabulary,
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": vocabulary,
        "transformer.rotary_pos_emb.inv_freq": (head_dim // 4,),
    }
    linears = {
        "self_attention.query_key_value": (fused, hidden),
        "self_attention.dense": (hidden, heads),
        "mlp.dense_h_to_4h": (2 * ffn, hidden),
        "mlp.dense_4h_to_h": (hidden, ffn),
    }
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if config["add_qkv_bias"]:
            shapes[f"{prefix}self_attention.query_key_value.bias"] = (fused,)
    write_published(folder, config, shapes)


def _chatglm_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    config, stored = stored_in(folder)
    ratio, scaling = config.get("rope_ratio", 1), None
    if "chatglm2" in config["_name_or_path"]:  # its code divides positions, that of all later ones changes the base
        scaling, ratio = {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0}, 1
    scaling = scaling or {"rope_type": "default", "rope_theta": 10000.0 * ratio}
    settings = {
        "vocab_size": config["padded_vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["multi_query_group_num"],
        "head_dim": config["kv_channels"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "max_position_embeddings": config["seq_length"],
        "attention_bias": config["add_qkv_bias"],
        "rope_parameters": {**scaling, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    q = config["num_attention_heads"] * config["kv_channels"]
    kv = config["multi_query_group_num"] * config["kv_channels"]
    tensors: Tensors = {
        "model.embed_tokens.weight": stored["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": stored["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": stored["transformer.output_layer.weight"],
    }
    names = {
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
    }
    for layer in range(config["num_layers"]):
        source, target = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        tensors |= {f"{target}{ours}.weight": stored[f"{source}{name}.weight"] for name, ours in names.items()}
        for kind in ("weight", "bias") if config["add_qkv_bias"] else ("weight",):
            parts = np.split(stored[f"{source}self_attention.query_key_value.{kind}"], [q, q + kv])
            for part, values in zip("qkv", parts, strict=True):
                tensors[f"{target}self_attn.{part}_proj.{kind}"] = values
    return computed("glm", settings, tensors, tokens)


def _chatglm(name: str, *, gguf: str = "", long: bool = True, **options: Any) -> Case:
    make: Callable[[Path], None] = partial(write_chatglm, options=options)
    return Case(name, "chatglm", gguf=gguf, make=make, logits=_chatglm_logits, long=long)


CASES: tuple[Case, ...] = (
    _chatglm("chatglm", long=False),
    _chatglm("chatglm-one-group", multi_query_group_num=1),
    _chatglm("chatglm-no-bias", add_qkv_bias=False),
    _chatglm("chatglm-ratio", rope_ratio=50, layernorm_epsilon=1.5625e-07),
    _chatglm("chatglm2-ratio", _name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=4),
    _chatglm("chatglm-kv_channels", kv_channels=24, gguf="kv_channels"),
)
