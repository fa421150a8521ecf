"""Mixtral: Mistral's attention and experts in the place of the MLP.

Sources: transformers' modeling_mixtral.py; llama.cpp's src/models/llama.cpp and conversion/llama.py. llama.cpp runs it
as `llama` with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import separate_attention, trunk
from quantpress.convert.arch.expert_rows import (
    all_layers,
    expert_config,
    expert_entries,
    expert_rows,
    expert_sizes,
    stacked_rows,
)
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
)
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.llama import read_sizes, require_activation
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Role, TensorSpec

_LAYER = "model.layers.{layer}."
_NORM = TensorSpec(f"{_LAYER}post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", ("hidden",), Role.NORM)


def read_mixtral(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` mixtral (transformers: MixtralConfig)."""
    fields.refuse_others(config, "num_local_experts")
    fields.refuse(config, {"attention_bias": (False, None), "mlp_bias": (False, None)})
    config = {"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, **config}
    sizes = read_sizes({"rms_norm_eps": 1e-5, **config})
    context = fields.size(config, "max_position_embeddings", 4096 * 32)
    window = config.get("sliding_window")
    if window is not None:
        window = fields.size(config, "sliding_window")
    experts = expert_sizes(config, all_layers(config), count="num_local_experts", intermediate="intermediate_size")
    return Hyperparameters(
        **sizes,
        context=context,
        activation=fields.activation(config, "hidden_act", "silu"),
        rope=whole_rope(config, head_dim=sizes["head_dim"], context=context),
        tied=fields.flag(config, "tie_word_embeddings", False),
        sliding_window=window,
        sliding_layers=() if window is None else (True,) * sizes["layers"],
        experts=Experts(**experts, gating="softmax", normalized=True),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="rms", context=capped_context(hyper)), **expert_entries(hyper, inner=False)}


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None, "every config of this family has one"
    check_rope(hyper.rope, "Llama", (*SCALABLE, "llama3", "longrope"))
    require_activation(hyper, "silu", "Mixtral")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "the llama architecture"), *rope_notes(hyper.rope, hyper.context))


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "MixtralForCausalLM", "mixtral"),
        **decoder_sizes(metadata, "llama"),
        **rope_config(metadata, "llama", factors),
        **expert_config(metadata, "llama", count="num_local_experts"),
        "hidden_act": "silu",
        "sliding_window": None,
    }


MIXTRAL = ArchSpec(
    family="mixtral",
    classes=("MixtralForCausalLM", "MixtralModel"),
    model_types=("mixtral",),
    gguf="llama",
    gguf_key="llama.expert_count",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=(
        *trunk("model."),
        *separate_attention(_LAYER, bias=None, output_bias=None, rotary=True),
        _NORM,
        *expert_rows(f"{_LAYER}block_sparse_moe.", gate="w1", up="w3", down="w2"),
    ),
    other_rows=stacked_rows(f"{_LAYER}mlp."),
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    read_config=read_mixtral,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
