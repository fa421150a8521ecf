"""BLOOM and BLOOMZ.

Sources: transformers' modeling_bloom.py (a norm after the embedding, ALiBi, rows of the fused projection head by
head); llama.cpp's src/models/bloom.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.alibi import alibi_slopes
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.word_embeddings.weight"
_CONTEXT = 2048  # what BLOOM was trained on; ALiBi itself has no limit

_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("transformer.word_embeddings_layernorm", "token_embd_norm"),
    *norm_rows("transformer.ln_f", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *linear_rows(
        f"{_LAYER}self_attention.query_key_value", f"{_BLOCK}attn_qkv", ("qkv", "hidden"), layout=Layout.HEADS_QKV
    ),
    *linear_rows(f"{_LAYER}self_attention.dense", f"{_BLOCK}attn_output", ("hidden", "q")),
    *norm_rows(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm"),
    *linear_rows(f"{_LAYER}mlp.dense_h_to_4h", f"{_BLOCK}ffn_up", ("ffn", "hidden")),
    *linear_rows(f"{_LAYER}mlp.dense_4h_to_h", f"{_BLOCK}ffn_down", ("hidden", "ffn")),
)


def read_bloom(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` bloom (transformers: BloomConfig), in the spelling of any year."""
    fields.refuse_others(config, "alibi")
    fields.refuse(config, {"alibi": (True, None), "apply_residual_connection_post_layernorm": (False, None)})
    hidden, heads = (
        fields.spelled(config, "hidden_size", "n_embed"),
        fields.spelled(config, "n_head", "num_attention_heads"),
    )
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * hidden:
        raise InputError(f"config.json: 'n_inner' is {fields.short(inner)}; BLOOM's is 4 * {hidden}")
    head_dim = fields.head_size(hidden, heads, "n_head")
    return Hyperparameters(
        layers=fields.spelled(config, "n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=4 * hidden,
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "seq_length", _CONTEXT),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation="gelu_tanh",
        attention_scale=head_dim**-0.5,
        alibi=alibi_slopes(heads),
        tied=fields.flag(config, "tie_word_embeddings", True),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="layer")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del factors
    return {
        **general_config(metadata, names, "BloomForCausalLM", "bloom"),
        "hidden_size": whole(metadata, "bloom.embedding_length"),
        "n_inner": whole(metadata, "bloom.feed_forward_length"),
        "n_layer": whole(metadata, "bloom.block_count"),
        "n_head": whole(metadata, "bloom.attention.head_count"),
        "seq_length": whole(metadata, "bloom.context_length"),
        "layer_norm_epsilon": real(metadata, "bloom.attention.layer_norm_epsilon"),
    }


BLOOM = ArchSpec(
    family="bloom",
    classes=("BloomForCausalLM", "BloomModel"),
    model_types=("bloom",),
    gguf="bloom",
    prefix="transformer.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    read_config=read_bloom,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
)
