"""Phi-3, Phi-3.5 and Phi-4-mini.

Sources: transformers' modeling_phi3.py and configuration_phi3.py; llama.cpp's src/models/phi3.cpp, which switches the
sliding window off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import trunk
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
    turned_share,
    whole,
)
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.llama import read_sizes, require_activation
from quantpress.convert.arch.rotary import read_rope, rope_settings
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_TABLE = (
    *trunk("model."),
    TensorSpec(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    TensorSpec(f"{_LAYER}self_attn.qkv_proj.weight", f"{_BLOCK}attn_qkv.weight", ("qkv", "hidden"), Role.LINEAR),
    TensorSpec(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight", ("hidden", "q"), Role.LINEAR),
    TensorSpec(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    TensorSpec(f"{_LAYER}mlp.gate_up_proj.weight", f"{_BLOCK}ffn_up.weight", ("ffn2", "hidden"), Role.LINEAR),
    TensorSpec(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight", ("hidden", "ffn"), Role.LINEAR),
)


def read_phi3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` phi3; its rope types "su" and "yarn" are old names of longrope."""
    fields.refuse(config, {**fields.NEUTRAL, "attention_bias": (False, None), "mlp_bias": (False, None)})
    sizes = read_sizes(config)
    context = fields.size(config, "max_position_embeddings", 4096)
    rope = read_rope(
        rope_settings(config),
        config,
        head_dim=sizes["head_dim"],
        context=context,
        theta=fields.number(config, "rope_theta", 10000.0, low=1.0),
        partial=fields.number(config, "partial_rotary_factor", 1.0, high=1.0),
        original=4096,
        aliases={"su": "longrope", "yarn": "longrope"},
    )
    if rope.kind not in ("default", "longrope"):
        raise InputError(f"config.json: rope_type is {rope.kind!r}; Phi-3 knows default and longrope")
    window = config.get("sliding_window")
    if window is not None:
        window = fields.size(config, "sliding_window")
    return Hyperparameters(
        **{**sizes, "norm_eps": fields.number(config, "rms_norm_eps", 1e-5, high=1.0)},
        context=context,
        activation=fields.activation(config, "hidden_act", "silu"),
        rope=rope,
        sliding_window=window,
        sliding_layers=(True,) * sizes["layers"] if window is not None else (),
        tied=fields.flag(config, "tie_word_embeddings", False),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    entries = size_metadata(hyper, norm="rms", context=capped_context(hyper))
    entries["attention.sliding_window"] = ("uint32", 0)  # keeps readers that know a window from assuming one
    return entries


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Phi-3", ("default", "longrope"))
    require_activation(hyper, "silu", "Phi-3")
    if hyper.heads * hyper.head_dim != hyper.hidden:
        raise InputError(
            f"config.json: 'head_dim' is {hyper.head_dim}; llama.cpp wants {hyper.hidden // hyper.heads} for Phi-3, "
            "the hidden size divided by the heads"
        )


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "Phi-3"), *rope_notes(hyper.rope, hyper.context))


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, "phi3")
    ropes = rope_config(metadata, "phi3", factors)
    original = whole(metadata, "phi3.rope.scaling.original_context_length", sizes["max_position_embeddings"])
    turned = whole(metadata, "phi3.rope.dimension_count", sizes["head_dim"])
    return {
        **general_config(metadata, names, "Phi3ForCausalLM", "phi3"),
        **sizes,
        **ropes,
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "partial_rotary_factor": turned_share(turned, sizes["head_dim"]),
        "sliding_window": None,
    }


PHI3 = ArchSpec(
    family="phi3",
    classes=("Phi3ForCausalLM", "Phi3Model"),
    model_types=("phi3",),
    gguf="phi3",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    read_config=read_phi3,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
