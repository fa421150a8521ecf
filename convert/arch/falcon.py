"""Falcon in all layouts: 7B (one key head), 40B, 180B and 11B (groups), RW (ALiBi, no parallel blocks).

Sources: transformers' modeling_falcon.py; llama.cpp's src/models/falcon.cpp, which has parallel blocks with rotary
positions and without biases, and conversion/falcon.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from quantpress.convert.arch import fields
from quantpress.convert.arch.alibi import alibi_slopes
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.word_embeddings.weight"

_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("transformer.ln_f", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm", flag="input_norm"),
    *norm_rows(f"{_LAYER}ln_mlp", f"{_BLOCK}attn_norm", flag="two_norms"),
    *norm_rows(f"{_LAYER}ln_attn", f"{_BLOCK}attn_norm_2", flag="two_norms"),
    *linear_rows(
        f"{_LAYER}self_attention.query_key_value",
        f"{_BLOCK}attn_qkv",
        ("qkv", "hidden"),
        layout=Layout.GROUPED_QKV,
        bias="bias",
    ),
    *linear_rows(f"{_LAYER}self_attention.dense", f"{_BLOCK}attn_output", ("hidden", "q"), bias="bias"),
    *norm_rows(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm", flag="sequential"),
    *linear_rows(f"{_LAYER}mlp.dense_h_to_4h", f"{_BLOCK}ffn_up", ("ffn", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}mlp.dense_4h_to_h", f"{_BLOCK}ffn_down", ("hidden", "ffn"), bias="bias"),
)


def read_falcon(config: fields.Config) -> Hyperparameters:
    """Reads a config.json of Falcon (transformers: FalconConfig) or of its own code, RefinedWeb and RefinedWebModel."""
    fields.refuse_others(config, "alibi", "parallel_attn")
    hidden = fields.spelled(config, "hidden_size", "n_embed")
    heads = fields.spelled(config, "num_attention_heads", "n_head")
    head_dim, context = fields.head_size(hidden, heads), fields.size(config, "max_position_embeddings", 2048)
    alibi = fields.flag(config, "alibi", False)
    layout = _layout(config)
    return Hyperparameters(
        layers=fields.spelled(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=head_dim,
        intermediate=fields.size(config, "ffn_hidden_size", 4 * hidden),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation=fields.activation(config, "activation", "gelu"),
        attention_scale=head_dim**-0.5,
        rope=None if alibi else whole_rope(config, head_dim=head_dim, context=context),
        alibi=_slopes(heads, head_dim) if alibi else (),
        parallel_residual="sequential" not in layout,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=layout | ({"bias"} if fields.flag(config, "bias", False) else set()),
    )


def _slopes(heads: int, head_dim: int) -> tuple[float, ...]:
    """Gives what ALiBi takes from scores: in bfloat16, as Falcon's code has it, and before the scores are scaled.

    That code also rounds the products with places of keys, by up to half a unit of the last place from 256 on; this
    depends on where a text begins, no runtime repeats it, and it is left out here too.
    """
    slopes = np.array(alibi_slopes(heads), np.float32).astype(ml_dtypes.bfloat16)
    return tuple(float(slope) * head_dim**-0.5 for slope in slopes)


def _grouped(config: fields.Config) -> bool:
    """Whether it is of the kind of Falcon-40B; its own first code had no key that says so."""
    return fields.flag(config, "new_decoder_architecture", config.get("n_head_kv") is not None)


def _kv_heads(config: fields.Config, heads: int) -> int:
    if not _grouped(config):
        return 1 if fields.flag(config, "multi_query", True) else heads
    kv_heads = fields.spelled(config, "num_kv_heads", "n_head_kv", default=heads)
    if heads % kv_heads:
        raise InputError(f"config.json: 'num_attention_heads' is {heads}, wanted a multiple of {kv_heads} key heads")
    return kv_heads


def _layout(config: fields.Config) -> frozenset[str]:
    """Gives the flags of the norms that a layer has."""
    grouped, parallel = _grouped(config), fields.flag(config, "parallel_attn", True)
    norms = fields.size(config, "num_ln_in_parallel_attn", 2 if grouped else 1)
    if grouped and not parallel:
        raise InputError(
            "config.json: 'parallel_attn' is false with 'new_decoder_architecture', which has no such form"
        )
    if norms > (2 if grouped else 1):
        raise InputError(f"config.json: 'num_ln_in_parallel_attn' is {norms}, which no Falcon of this layout has")
    if not parallel:
        return frozenset({"input_norm", "sequential"})
    return frozenset({"two_norms" if norms == 2 else "input_norm"})


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="layer"), "tensor_data_layout": ("string", "jploski")}


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    wanted = "; llama.cpp computes Falcon with rotary positions, parallel blocks and no biases"
    if hyper.rope is None:
        raise InputError(f"config.json: 'alibi' is true{wanted}")
    if not hyper.parallel_residual:
        raise InputError(f"config.json: 'parallel_attn' is false{wanted}")
    if "bias" in hyper.flags:
        raise InputError(f"config.json: 'bias' is true{wanted}")
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: 'activation' is {hyper.activation!r}; llama.cpp computes gelu for Falcon")
    check_rope(hyper.rope, "Falcon")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    heads = whole(metadata, "falcon.attention.head_count")
    kv_heads = whole(metadata, "falcon.attention.head_count_kv", heads)
    two_norms = "blk.0.attn_norm_2.weight" in names
    grouped = kv_heads > 1 or two_norms
    return {
        **general_config(metadata, names, "FalconForCausalLM", "falcon"),
        **rope_config(metadata, "falcon", factors),
        "hidden_size": whole(metadata, "falcon.embedding_length"),
        "ffn_hidden_size": whole(metadata, "falcon.feed_forward_length"),
        "num_hidden_layers": whole(metadata, "falcon.block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads if grouped else heads,
        "multi_query": not grouped,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "activation": "gelu",
        "max_position_embeddings": whole(metadata, "falcon.context_length"),
        "layer_norm_epsilon": real(metadata, "falcon.attention.layer_norm_epsilon"),
    }


FALCON = ArchSpec(
    family="falcon",
    classes=("FalconForCausalLM", "FalconModel", "RWForCausalLM", "RWModel"),
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    gguf="falcon",
    prefix="transformer.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=(
        "transformer.h.{layer}.self_attention.maybe_rotary.inv_freq",
        "transformer.h.{layer}.self_attention.rotary_emb.inv_freq",
    ),
    read_config=read_falcon,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
