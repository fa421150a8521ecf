"""OLMoE: OLMo's mixture of experts, with norms over all heads of q and k together.

Sources: transformers' modeling_olmoe.py; llama.cpp's src/models/olmoe.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import separate_attention, trunk
from quantpress.convert.arch.expert_rows import (
    all_layers,
    expert_config,
    expert_entries,
    expert_rows,
    expert_sizes,
    stacked_rows,
)
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_limits import refuse_bias, require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_MLP = f"{_LAYER}mlp."


def read_olmoe(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` olmoe (transformers: OlmoeConfig)."""
    config = {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, **config}
    read = read_decoder(config, context=4096, biases=("attention_bias",), implemented=("clip_qkv", "num_experts"))
    sizes = expert_sizes(config, all_layers(config), count="num_experts", intermediate="intermediate_size")
    return Hyperparameters(
        **read,
        clip_qkv=fields.optional_number(config, "clip_qkv"),
        experts=Experts(**sizes, normalized=fields.flag(config, "norm_topk_prob", False)),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="rms"), **expert_entries(hyper, inner=False)}


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None, "every config of this family has one"
    assert hyper.experts is not None, "every config of this family has some"
    check_rope(hyper.rope, "OLMoE")
    require_activation(hyper, "silu", "OLMoE")
    require_plain_heads(hyper, "OLMoE")
    refuse_bias(hyper, "OLMoE", "attention_bias")
    if hyper.kv_heads != hyper.heads:
        raise InputError(
            f"config.json: 'num_key_value_heads' is {hyper.kv_heads}; llama.cpp wants {hyper.heads} for OLMoE, as many "
            "as query heads"
        )
    if hyper.clip_qkv is not None:
        raise InputError(f"config.json: 'clip_qkv' is {hyper.clip_qkv:g}; llama.cpp does not clip for OLMoE")
    if hyper.experts.normalized:
        raise InputError(
            "config.json: 'norm_topk_prob' is true; llama.cpp computes false for OLMoE, so a GGUF file would be "
            "another model"
        )


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "OlmoeForCausalLM", "olmoe"),
        **decoder_sizes(metadata, "olmoe"),
        **rope_config(metadata, "olmoe", factors),
        **expert_config(metadata, "olmoe", count="num_experts"),
        "hidden_act": "silu",
        "norm_topk_prob": False,
    }


OLMOE = ArchSpec(
    family="olmoe",
    classes=("OlmoeForCausalLM", "OlmoeModel"),
    model_types=("olmoe",),
    gguf="olmoe",
    gguf_head="required",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(
        *trunk("model."),
        *separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias"),
        TensorSpec(f"{_LAYER}self_attn.q_norm.weight", f"{_BLOCK}attn_q_norm.weight", ("q",), Role.NORM),
        TensorSpec(f"{_LAYER}self_attn.k_norm.weight", f"{_BLOCK}attn_k_norm.weight", ("kv",), Role.NORM),
        TensorSpec(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
        *expert_rows(_MLP),
    ),
    other_rows=stacked_rows(_MLP),
    read_config=read_olmoe,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
