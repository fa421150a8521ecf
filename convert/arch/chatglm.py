"""ChatGLM2, ChatGLM3 and GLM-4-9b in the layout of their own code (`ChatGLMModel`), which is never run.

Sources: modeling_chatglm.py of these checkpoints (multi-query attention in one matrix, gate before up in another, the
first half of each head turned by neighbours); llama.cpp's src/models/chatglm.cpp, which has biases for q, k and v only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config
from quantpress.convert.arch.glm import glm_from_gguf
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.encoder.layers.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.embedding.word_embeddings.weight"
_BASE = 10000.0  # of the rotary frequencies; no key of config.json changes it but `rope_ratio`
_GLM4_VOCABULARY = 100_000  # ChatGLM2 and 3 have 65,024 rows, GLM-4 has 151,552


def _linear(hf: str, gguf: str, shape: tuple[str, str], flag: str) -> tuple[TensorSpec, TensorSpec]:
    name, slot = f"{_LAYER}{hf}", f"{_BLOCK}{gguf}"
    return (
        TensorSpec(f"{name}.weight", f"{slot}.weight", shape, Role.LINEAR),
        TensorSpec(f"{name}.bias", f"{slot}.bias", shape[:1], Role.BIAS, flag=flag),
    )


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("transformer.encoder.final_layernorm.weight", "output_norm.weight", ("hidden",), Role.NORM),
    TensorSpec("transformer.output_layer.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    TensorSpec(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    *_linear("self_attention.query_key_value", "attn_qkv", ("qkv", "hidden"), "attention_bias"),
    *_linear("self_attention.dense", "attn_output", ("hidden", "q"), "linear_bias"),
    TensorSpec(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    *_linear("mlp.dense_h_to_4h", "ffn_up", ("ffn2", "hidden"), "linear_bias"),
    *_linear("mlp.dense_4h_to_h", "ffn_down", ("hidden", "ffn"), "linear_bias"),
)
# what the classes' code can do and no published checkpoint asks for
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (False, None),
    "interleaved_qkv": (False, None),
    "post_layer_norm": (True, None),
    "pre_seq_len": (None,),
    "quantization_bit": (0, None),
    "rmsnorm": (True, None),
}


def read_chatglm(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` chatglm (configuration_chatglm.py beside the weights)."""
    if config.get("position_encoding_2d") or "inner_hidden_size" in config:
        raise InputError("config.json: 'inner_hidden_size' is a key of the first ChatGLM-6B, which is not implemented")
    fields.refuse(config, {**fields.NEUTRAL, **_FIXED})
    if not fields.flag(config, "multi_query_attention", False):
        raise InputError("config.json: 'multi_query_attention' is false, which is not implemented for ChatGLM")
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "multi_query_group_num", 1)
    if heads % kv_heads:
        raise InputError(
            f"config.json: 'num_attention_heads' is {heads}, wanted a multiple of 'multi_query_group_num', {kv_heads}"
        )
    head_dim = (
        fields.head_size(hidden, heads) if config.get("kv_channels") is None else fields.size(config, "kv_channels")
    )
    if head_dim % 4:
        raise InputError(f"config.json: 'kv_channels' is {head_dim}, wanted a multiple of 4: half of it turns in pairs")
    linear_bias = fields.flag(config, "add_bias_linear", False)
    attention_bias = linear_bias or fields.flag(config, "add_qkv_bias", False)
    flags = {"linear_bias": linear_bias, "attention_bias": attention_bias}
    return Hyperparameters(
        layers=fields.size(config, "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "ffn_hidden_size"),
        vocab=fields.size(config, "padded_vocab_size"),
        context=fields.size(config, "seq_length"),
        norm_eps=fields.number(config, "layernorm_epsilon", 1e-5, high=1.0),
        activation="silu",
        # `apply_query_key_layer_scaling` divides by the layer's number and multiplies by it again
        attention_scale=head_dim**-0.5,
        rope=_rope(config, head_dim // 2),
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset(name for name, on in flags.items() if on),
    )


def _rope(config: fields.Config, dim: int) -> Rope:
    """Half of each head, by neighbours; what `rope_ratio` does differs by generation and only their code says it."""
    ratio = fields.number(config, "rope_ratio", 1.0)
    if ratio == 1.0:
        return Rope(theta=_BASE, dim=dim, interleaved=True)
    name = str(config.get("_name_or_path", "")).lower()
    if "chatglm2" in name:
        return Rope(theta=_BASE, dim=dim, kind="linear", parameters={"factor": ratio}, interleaved=True)
    if "chatglm3" in name or "glm-4" in name or fields.size(config, "padded_vocab_size") >= _GLM4_VOCABULARY:
        return Rope(theta=_BASE * ratio, dim=dim, interleaved=True)
    raise InputError(
        f"config.json: 'rope_ratio' is {ratio:g}: ChatGLM2 divides positions by it, ChatGLM3 and GLM-4 multiply the "
        "base of the frequencies; say which it is: '_name_or_path' must hold chatglm2, chatglm3 or glm-4"
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "ChatGLM", ("default", "linear"))
    if "linear_bias" in hyper.flags:
        raise InputError("config.json: 'add_bias_linear' is true; llama.cpp has biases for q, k and v only in ChatGLM")
    if hyper.heads * hyper.head_dim != hyper.hidden:
        raise InputError(
            f"config.json: 'kv_channels' is {hyper.head_dim}; llama.cpp wants {hyper.hidden // hyper.heads} for "
            "ChatGLM, the hidden size divided by the heads"
        )


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    if "blk.0.attn_q.weight" in names:  # made from transformers' own layout
        return glm_from_gguf(metadata, names, factors)
    sizes = decoder_sizes(metadata, "chatglm")
    ropes = rope_config(metadata, "chatglm", factors)
    scaling, ratio = ropes["rope_scaling"], ropes["rope_theta"] / _BASE
    if scaling and (scaling["rope_type"] != "linear" or ratio != 1.0):
        raise InputError(f"GGUF: 'chatglm.rope.scaling.type' is {scaling['rope_type']!r}, not implemented for ChatGLM")
    general = general_config(metadata, names, "ChatGLMModel", "chatglm")
    return {
        **general,
        # whose meaning `rope_ratio` has
        "_name_or_path": "chatglm2" if scaling else "chatglm3",
        "rope_ratio": scaling["factor"] if scaling else ratio,
        "padded_vocab_size": general["vocab_size"],
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "ffn_hidden_size": sizes["intermediate_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": sizes["num_key_value_heads"],
        "kv_channels": sizes["head_dim"],
        "seq_length": sizes["max_position_embeddings"],
        "layernorm_epsilon": sizes["rms_norm_eps"],
        "add_qkv_bias": "blk.0.attn_qkv.bias" in names,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "post_layer_norm": True,
        "rmsnorm": True,
    }


CHATGLM = ArchSpec(
    family="chatglm",
    classes=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    model_types=("chatglm",),
    gguf="chatglm",
    prefix="transformer.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    ignored=("transformer.rotary_pos_emb.inv_freq",),
    read_config=read_chatglm,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    foreign=("transformer.vision.",),
)
