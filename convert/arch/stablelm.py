"""StableLM: 3B and Zephyr, StableLM 2 1.6B and 12B, and those of their first code, StableLMEpoch.

Sources: transformers' modeling_stablelm.py (each head of q and k has a norm of its own where `qk_layernorm` is set;
parallel blocks read one norm); llama.cpp's src/models/stablelm.cpp.
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


def _head_norms(part: str, heads: str) -> TensorSpec:
    name, slot = f"{_ATTENTION}{part}_layernorm.norms.{{head}}.weight", f"{_BLOCK}attn_{part}_norm.weight"
    return TensorSpec(name, slot, (heads, "head_dim"), Role.NORM, flag="qk_layernorm")


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("model.norm", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *linear_rows(f"{_ATTENTION}q_proj", f"{_BLOCK}attn_q", ("q", "hidden"), bias="use_qkv_bias"),
    *linear_rows(f"{_ATTENTION}k_proj", f"{_BLOCK}attn_k", ("kv", "hidden"), bias="use_qkv_bias"),
    *linear_rows(f"{_ATTENTION}v_proj", f"{_BLOCK}attn_v", ("kv", "hidden"), bias="use_qkv_bias"),
    _head_norms("q", "heads"),
    _head_norms("k", "kv_heads"),
    TensorSpec(f"{_ATTENTION}o_proj.weight", f"{_BLOCK}attn_output.weight", ("hidden", "q"), Role.LINEAR),
    *norm_rows(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm", flag="sequential"),
    TensorSpec(f"{_LAYER}mlp.gate_proj.weight", f"{_BLOCK}ffn_gate.weight", ("ffn", "hidden"), Role.LINEAR),
    TensorSpec(f"{_LAYER}mlp.up_proj.weight", f"{_BLOCK}ffn_up.weight", ("ffn", "hidden"), Role.LINEAR),
    TensorSpec(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight", ("hidden", "ffn"), Role.LINEAR),
)


def read_stablelm(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` stablelm (transformers: StableLmConfig) or stablelm_epoch."""
    fields.refuse_others(config, "qk_layernorm")
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "num_key_value_heads", heads)
    fields.grouped_heads(heads, kv_heads)
    head_dim, context = fields.head_size(hidden, heads), fields.size(config, "max_position_embeddings", 4096)
    parallel = fields.flag(config, "use_parallel_residual", False)
    switched = {name for name in ("use_qkv_bias", "qk_layernorm") if fields.flag(config, name, False)}
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "layer_norm_eps", config.get("norm_eps", 1e-5), high=1.0),
        activation=fields.activation(config, "hidden_act", "silu"),
        attention_scale=head_dim**-0.5,
        rope=read_rope(
            rope_settings(config),
            config,
            head_dim=head_dim,
            context=context,
            theta=fields.number(config, "rope_theta", 10000.0, low=1.0),
            partial=fields.number(config, "partial_rotary_factor", config.get("rope_pct", 0.25), high=1.0),
        ),
        parallel_residual=parallel,
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset(switched | (set() if parallel else {"sequential"})),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="layer"), "use_parallel_residual": ("bool", hyper.parallel_residual)}


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "StableLM")
    if hyper.activation != "silu":
        raise InputError(f"config.json: 'hidden_act' is {hyper.activation!r}; llama.cpp computes silu for StableLM")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    hidden, heads = whole(metadata, "stablelm.embedding_length"), whole(metadata, "stablelm.attention.head_count")
    turned = whole(metadata, "stablelm.rope.dimension_count", hidden // heads)
    return {
        **general_config(metadata, names, "StableLmForCausalLM", "stablelm"),
        **rope_config(metadata, "stablelm", factors),
        "hidden_size": hidden,
        "intermediate_size": whole(metadata, "stablelm.feed_forward_length"),
        "num_hidden_layers": whole(metadata, "stablelm.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(metadata, "stablelm.attention.head_count_kv", heads),
        "max_position_embeddings": whole(metadata, "stablelm.context_length"),
        "layer_norm_eps": real(metadata, "stablelm.attention.layer_norm_epsilon"),
        "hidden_act": "silu",
        "partial_rotary_factor": turned_share(turned, hidden // heads),
        "use_qkv_bias": "blk.0.attn_q.bias" in names,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in names,
        # llama.cpp goes by the tensor: files of sequential models may say that they are parallel
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in names,
    }


STABLELM = ArchSpec(
    family="stablelm",
    classes=("StableLmForCausalLM", "StableLmModel", "StableLMEpochForCausalLM", "StableLMEpochModel"),
    model_types=("stablelm", "stablelm_epoch"),
    gguf="stablelm",
    prefix="model.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    read_config=read_stablelm,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)
