"""Qwen2, Qwen2.5 and Qwen3, dense.

Sources: transformers' modeling_qwen2.py and modeling_qwen3.py; llama.cpp's src/models/qwen2.cpp and qwen3.cpp, which
have neither a sliding window nor, in Qwen3, a bias after attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import gated_mlp, head_norms, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
)
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.llama import flags, read_sizes, require_activation
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def _read(config: fields.Config) -> dict[str, Any]:
    fields.refuse(config, fields.NEUTRAL)
    sizes = read_sizes({"num_key_value_heads": 32, **config})
    context = fields.size(config, "max_position_embeddings", 32768)
    read = {
        **sizes,
        "context": context,
        "activation": fields.activation(config, "hidden_act", "silu"),
        "rope": whole_rope(config, head_dim=sizes["head_dim"], context=context),
        "tied": fields.flag(config, "tie_word_embeddings", False),
    }
    window = config.get("sliding_window", 4096)
    if not fields.flag(config, "use_sliding_window", False) or window is None:
        if any(fields.layer_kinds(config, sizes["layers"]) or ()):
            raise InputError("config.json: 'layer_types' has sliding layers, but 'use_sliding_window' is not true")
        return read
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise InputError(f"config.json: 'max_window_layers' is {fields.short(first)}, wanted a number of layers")
    usual = tuple(layer >= first for layer in range(sizes["layers"]))
    read["sliding_window"] = fields.size({"sliding_window": window}, "sliding_window")
    read["sliding_layers"] = fields.layer_kinds(config, sizes["layers"]) or usual
    return read


def read_qwen2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` qwen2 (transformers: Qwen2Config); q, k and v always have biases."""
    return Hyperparameters(**_read(config))


def read_qwen3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` qwen3 (transformers: Qwen3Config); heads have 128 values by default."""
    return Hyperparameters(**_read({"head_dim": 128, **config}), flags=flags(config, "attention_bias"))


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms", context=capped_context(hyper))


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Qwen")
    require_activation(hyper, "silu", "Qwen")
    if "attention_bias" in hyper.flags:
        raise InputError("config.json: 'attention_bias' is true; llama.cpp has no bias after attention for Qwen3")


def _check_qwen2(hyper: Hyperparameters, config: fields.Config) -> None:
    _gguf_check(hyper, config)
    if hyper.heads * hyper.head_dim != hyper.hidden:
        raise InputError(
            f"config.json: 'head_dim' is {hyper.head_dim}; llama.cpp wants {hyper.hidden // hyper.heads} for Qwen2, "
            "the hidden size divided by the heads"
        )


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "Qwen"), *rope_notes(hyper.rope, hyper.context))


def _from_gguf(
    metadata: Mapping[str, Any],
    names: frozenset[str],
    factors: Mapping[str, tuple[float, ...]],
    arch: str,
    class_name: str,
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, class_name, arch),
        **decoder_sizes(metadata, arch),
        **rope_config(metadata, arch, factors),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


QWEN2 = ArchSpec(
    family="qwen2",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    model_types=("qwen2",),
    gguf="qwen2",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(*trunk("model."), *separate_attention(_LAYER, bias="", output_bias=None), *gated_mlp(_LAYER)),
    ignored=_IGNORED,
    read_config=read_qwen2,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=lambda metadata, names, factors: _from_gguf(metadata, names, factors, "qwen2", "Qwen2ForCausalLM"),
    gguf_check=_check_qwen2,
    gguf_notes=_gguf_notes,
)

QWEN3 = ArchSpec(
    family="qwen3",
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    model_types=("qwen3",),
    gguf="qwen3",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(
        *trunk("model."),
        *separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias"),
        *head_norms(_LAYER),
        *gated_mlp(_LAYER),
    ),
    ignored=_IGNORED,
    read_config=read_qwen3,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=lambda metadata, names, factors: _from_gguf(metadata, names, factors, "qwen3", "Qwen3ForCausalLM"),
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
