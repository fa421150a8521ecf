"""GPT-2 and the models of its shape (DistilGPT2, Cerebras-GPT).

Sources: transformers' modeling_gpt2.py (Conv1D keeps weights as (K, N)); llama.cpp's src/models/gpt2.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.wte.weight"


def _norm(hf: str, gguf: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", ("hidden",), Role.NORM),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", ("hidden",), Role.NORM),
    )


def _linear(hf: str, gguf: str, shape: tuple[str, str]) -> tuple[TensorSpec, TensorSpec]:
    name, slot = f"{_LAYER}{hf}", f"{_BLOCK}{gguf}"
    return (
        TensorSpec(f"{name}.weight", f"{slot}.weight", shape, Role.LINEAR, layout=Layout.TRANSPOSED),
        TensorSpec(f"{name}.bias", f"{slot}.bias", shape[1:], Role.BIAS),
    )


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("transformer.wpe.weight", "position_embd.weight", ("context", "hidden"), Role.POSITION),
    *_norm("transformer.ln_f", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *_norm(f"{_LAYER}ln_1", f"{_BLOCK}attn_norm"),
    *_linear("attn.c_attn", "attn_qkv", ("hidden", "qkv")),
    *_linear("attn.c_proj", "attn_output", ("q", "hidden")),
    *_norm(f"{_LAYER}ln_2", f"{_BLOCK}ffn_norm"),
    *_linear("mlp.c_fc", "ffn_up", ("hidden", "ffn")),
    *_linear("mlp.c_proj", "ffn_down", ("ffn", "hidden")),
)


def read_gpt2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gpt2 (transformers: GPT2Config)."""
    fields.refuse(config, fields.NEUTRAL)
    hidden, heads = fields.size(config, "n_embd"), fields.size(config, "n_head")
    head_dim = fields.head_size(hidden, heads, "n_head")
    return Hyperparameters(
        layers=fields.size(config, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "n_inner", 4 * hidden),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "n_positions", config.get("n_ctx") or 1024),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation=fields.activation(config, "activation_function", "gelu_new"),
        attention_scale=head_dim**-0.5 if fields.flag(config, "scale_attn_weights", True) else 1.0,
        inverse_layer_scale=fields.flag(config, "scale_attn_by_inverse_layer_idx", False),
        tied=fields.flag(config, "tie_word_embeddings", True),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="layer")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.activation not in ("gelu_tanh", "gelu"):
        raise InputError(
            f"config.json: 'activation_function' is {hyper.activation!r}; llama.cpp computes gelu for GPT-2"
        )
    if hyper.inverse_layer_scale:
        raise InputError("config.json: 'scale_attn_by_inverse_layer_idx' is true; llama.cpp has no such scale")
    if hyper.attention_scale != hyper.head_dim**-0.5:
        raise InputError("config.json: 'scale_attn_weights' is false; llama.cpp always scales attention")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del factors
    context = whole(metadata, "gpt2.context_length")
    return {
        **general_config(metadata, names, "GPT2LMHeadModel", "gpt2"),
        "n_embd": whole(metadata, "gpt2.embedding_length"),
        "n_inner": whole(metadata, "gpt2.feed_forward_length"),
        "n_layer": whole(metadata, "gpt2.block_count"),
        "n_head": whole(metadata, "gpt2.attention.head_count"),
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": real(metadata, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


GPT2 = ArchSpec(
    family="gpt2",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    model_types=("gpt2",),
    gguf="gpt2",
    prefix="transformer.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    read_config=read_gpt2,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
)
