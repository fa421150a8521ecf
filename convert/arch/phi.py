"""Phi 1, 1.5 and 2.

Sources: transformers' modeling_phi.py (attention and MLP read the same norm, a part of each head turns, everything has
a bias, the head too); llama.cpp's src/models/phi2.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, turned_share, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.rotary import read_rope, rope_settings
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_ATTENTION = f"{_LAYER}self_attn."
_BLOCK = "blk.{layer}."
_EMBEDDING = "model.embed_tokens.weight"


def _head_norm(part: str) -> tuple[TensorSpec, ...]:
    name, slot = f"{_ATTENTION}{part}_layernorm", f"{_BLOCK}attn_{part}_norm"
    kinds = ("weight", "bias")
    return tuple(
        TensorSpec(f"{name}.{kind}", f"{slot}.{kind}", ("head_dim",), Role.NORM, flag="qk_layernorm") for kind in kinds
    )


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("model.final_layernorm", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    TensorSpec("lm_head.bias", "output.bias", ("vocab",), Role.BIAS),
    *norm_rows(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *linear_rows(f"{_ATTENTION}q_proj", f"{_BLOCK}attn_q", ("q", "hidden")),
    *linear_rows(f"{_ATTENTION}k_proj", f"{_BLOCK}attn_k", ("kv", "hidden")),
    *linear_rows(f"{_ATTENTION}v_proj", f"{_BLOCK}attn_v", ("kv", "hidden")),
    *_head_norm("q"),
    *_head_norm("k"),
    *linear_rows(f"{_ATTENTION}dense", f"{_BLOCK}attn_output", ("hidden", "q")),
    *linear_rows(f"{_LAYER}mlp.fc1", f"{_BLOCK}ffn_up", ("ffn", "hidden")),
    *linear_rows(f"{_LAYER}mlp.fc2", f"{_BLOCK}ffn_down", ("hidden", "ffn")),
)


def read_phi(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` phi (transformers: PhiConfig); half of each head turns by default."""
    fields.refuse_others(config, "qk_layernorm")
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "num_key_value_heads", heads)
    fields.grouped_heads(heads, kv_heads)
    head_dim, context = fields.head_size(hidden, heads), fields.size(config, "max_position_embeddings", 2048)
    fields.refuse(config, {"head_dim": (None, head_dim)})
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "layer_norm_eps", 1e-5, high=1.0),
        activation=fields.activation(config, "hidden_act", "gelu_new"),
        attention_scale=head_dim**-0.5,
        rope=read_rope(
            rope_settings(config),
            config,
            head_dim=head_dim,
            context=context,
            theta=fields.number(config, "rope_theta", 10000.0, low=1.0),
            partial=fields.number(config, "partial_rotary_factor", 0.5, high=1.0),
        ),
        parallel_residual=True,
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset({"qk_layernorm"} if fields.flag(config, "qk_layernorm", False) else ()),
    )


def phi2_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    """Gives the metadata of a file of the architecture phi2."""
    del config
    return size_metadata(hyper, norm="layer")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if "qk_layernorm" in hyper.flags:
        raise InputError("config.json: 'qk_layernorm' is true; llama.cpp has no norms of q and k for Phi")
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Phi")
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: 'hidden_act' is {hyper.activation!r}; llama.cpp computes gelu for Phi")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    hidden, heads = whole(metadata, "phi2.embedding_length"), whole(metadata, "phi2.attention.head_count")
    return {
        **general_config(metadata, names, "PhiForCausalLM", "phi"),
        **rope_config(metadata, "phi2", factors),
        "hidden_size": hidden,
        "intermediate_size": whole(metadata, "phi2.feed_forward_length"),
        "num_hidden_layers": whole(metadata, "phi2.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(metadata, "phi2.attention.head_count_kv", heads),
        "max_position_embeddings": whole(metadata, "phi2.context_length"),
        "layer_norm_eps": real(metadata, "phi2.attention.layer_norm_epsilon"),
        "hidden_act": "gelu_new",
        "partial_rotary_factor": turned_share(
            whole(metadata, "phi2.rope.dimension_count", hidden // heads), hidden // heads
        ),
        "qk_layernorm": False,
    }


PHI = ArchSpec(
    family="phi",
    classes=("PhiForCausalLM", "PhiModel"),
    model_types=("phi",),
    gguf="phi2",
    prefix="model.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    read_config=read_phi,
    gguf_metadata=phi2_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)
