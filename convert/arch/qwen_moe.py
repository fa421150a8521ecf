"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B) and Qwen3-MoE (30B-A3B, 235B-A22B, Coder).

Sources: transformers' modeling_qwen2_moe.py and modeling_qwen3_moe.py; llama.cpp's src/models/qwen2moe.cpp and
qwen3moe.cpp, which have experts in every layer, no sliding window, and one way each to weigh the chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import gated_mlp, head_norms, separate_attention, trunk
from quantpress.convert.arch.expert_rows import (
    expert_config,
    expert_entries,
    expert_rows,
    expert_sizes,
    shared_rows,
    stacked_rows,
)
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
    whole,
)
from quantpress.convert.arch.gguf_limits import refuse_bias, require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_MLP = f"{_LAYER}mlp."
_COUNTS = ("num_experts", "num_local_experts")
_IMPLEMENTED = (*_COUNTS, "mlp_only_layers")
_NORM = TensorSpec(f"{_LAYER}post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", ("hidden",), Role.NORM)


def dense_rows(layer: str) -> tuple[TensorSpec, ...]:
    """Rows of the layers that have one MLP; the norm before it is that of all layers."""
    rows = (row for row in gated_mlp(layer) if row.role is not Role.NORM)
    return tuple(TensorSpec(row.hf, row.gguf, row.shape, row.role, layers="dense") for row in rows)


def _layers(config: fields.Config) -> tuple[bool, ...]:
    """Gives which layers have experts."""
    layers, step = fields.size(config, "num_hidden_layers"), fields.size(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise InputError(f"config.json: 'mlp_only_layers' is {fields.short(dense)}, wanted a list of layers")
    found = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if not any(found):
        raise InputError("config.json: 'mlp_only_layers' and 'decoder_sparse_step' leave no layer with experts")
    return found


def _experts(config: fields.Config, count: int, used: int, inner: int) -> dict[str, Any]:
    key = next((key for key in _COUNTS if config.get(key) is not None), _COUNTS[0])
    config = {key: count, "num_experts_per_tok": used, "moe_intermediate_size": inner, **config}
    found = expert_sizes(config, _layers(config), count=key, intermediate="moe_intermediate_size")
    return {**found, "normalized": fields.flag(config, "norm_topk_prob", False)}


def read_qwen2_moe(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` qwen2_moe (transformers: Qwen2MoeConfig)."""
    fields.refuse(config, {"attention_bias": (True, False, None)})  # Qwen2MoeAttention looks at `qkv_bias` alone
    config = {key: value for key, value in config.items() if key != "attention_bias"}
    read = read_decoder({"num_key_value_heads": 16, **config}, context=32768, implemented=_IMPLEMENTED)
    shared = fields.size(config, "shared_expert_intermediate_size", 5632)
    experts = Experts(**_experts(config, 60, 4, 1408), shared=shared, shared_gate=True)
    if fields.flag(config, "qkv_bias", True):
        read["flags"] |= {"qkv_bias"}
    return Hyperparameters(**read, **_even_window(config, read["layers"]), experts=experts)


def read_qwen3_moe(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` qwen3_moe (transformers: Qwen3MoeConfig); all layers slide or none."""
    config = {"num_key_value_heads": 4, **config}
    read = read_decoder(config, context=32768, biases=("attention_bias",), implemented=_IMPLEMENTED)
    window = _window(config)
    if window is not None:
        read.update(sliding_window=window, sliding_layers=(True,) * read["layers"])
    return Hyperparameters(**read, experts=Experts(**_experts(config, 128, 8, 768)))


def _window(config: fields.Config) -> int | None:
    window = config.get("sliding_window", 4096)
    if not fields.flag(config, "use_sliding_window", False) or window is None:
        return None
    return fields.size({"sliding_window": window}, "sliding_window")


def _even_window(config: fields.Config, layers: int) -> dict[str, Any]:
    """Reads which layers slide: every other one of the first `max_window_layers`, or as `layer_types` says."""
    window, kinds = _window(config), fields.layer_kinds(config, layers)
    if window is None:
        if any(kinds or ()):
            raise InputError("config.json: 'layer_types' has sliding layers, but 'use_sliding_window' is not true")
        return {}
    last = config.get("max_window_layers", 28)
    if isinstance(last, bool) or not isinstance(last, int) or last < 0:
        raise InputError(f"config.json: 'max_window_layers' is {fields.short(last)}, wanted a number of layers")
    usual = tuple(layer % 2 == 0 and layer < last for layer in range(layers))
    return {"sliding_window": window, "sliding_layers": usual if kinds is None else kinds}


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="rms", context=capped_context(hyper)), **expert_entries(hyper)}


def _check(hyper: Hyperparameters, family: str, *, normalized: bool) -> None:
    assert hyper.rope is not None, "every config of this family has one"
    assert hyper.experts is not None, "every config of this family has some"
    check_rope(hyper.rope, family)
    require_activation(hyper, "silu", family)
    if not all(hyper.experts.layers):
        raise InputError(
            "config.json: 'mlp_only_layers' or 'decoder_sparse_step' leaves layers without experts; llama.cpp has none "
            f"such for {family}"
        )
    if hyper.experts.normalized != normalized:
        raise InputError(
            f"config.json: 'norm_topk_prob' is {str(hyper.experts.normalized).lower()}; llama.cpp computes "
            f"{str(normalized).lower()} for {family}, so a GGUF file would be another model"
        )


def _check_qwen2_moe(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    _check(hyper, "Qwen2-MoE", normalized=False)
    require_plain_heads(hyper, "Qwen2-MoE")


def _check_qwen3_moe(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    _check(hyper, "Qwen3-MoE", normalized=True)
    refuse_bias(hyper, "Qwen3-MoE", "attention_bias")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "Qwen's mixtures"), *rope_notes(hyper.rope, hyper.context))


def _from_gguf(metadata: Mapping[str, Any], arch: str, factors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, arch)
    experts = expert_config(metadata, arch, count="num_experts")
    usual = max(1, sizes["intermediate_size"] // experts["num_experts_per_tok"])
    return {
        **sizes,
        **rope_config(metadata, arch, factors),
        **experts,
        "moe_intermediate_size": whole(metadata, f"{arch}.expert_feed_forward_length", usual),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen2_moe_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    config = _from_gguf(metadata, "qwen2moe", factors)
    inner = whole(metadata, "qwen2moe.expert_shared_feed_forward_length", config["intermediate_size"])
    return {
        **general_config(metadata, names, "Qwen2MoeForCausalLM", "qwen2_moe"),
        **config,
        "shared_expert_intermediate_size": inner,
        "qkv_bias": "blk.0.attn_q.bias" in names,
        "norm_topk_prob": False,
    }


def _qwen3_moe_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    general = general_config(metadata, names, "Qwen3MoeForCausalLM", "qwen3_moe")
    return {**general, **_from_gguf(metadata, "qwen3moe", factors), "norm_topk_prob": True}


QWEN2_MOE = ArchSpec(
    family="qwen2_moe",
    classes=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    model_types=("qwen2_moe",),
    gguf="qwen2moe",
    gguf_head="required",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(
        *trunk("model."),
        *separate_attention(_LAYER, bias="qkv_bias", output_bias=None),
        _NORM,
        *dense_rows(_LAYER),
        *expert_rows(_MLP),
        *shared_rows(f"{_MLP}shared_expert.", f"{_MLP}shared_expert_gate.weight"),
    ),
    other_rows=stacked_rows(_MLP),
    read_config=read_qwen2_moe,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_qwen2_moe_from_gguf,
    gguf_check=_check_qwen2_moe,
    gguf_notes=_gguf_notes,
)

QWEN3_MOE = ArchSpec(
    family="qwen3_moe",
    classes=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    model_types=("qwen3_moe",),
    gguf="qwen3moe",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(
        *trunk("model."),
        *separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias"),
        *head_norms(_LAYER),
        _NORM,
        *dense_rows(_LAYER),
        *expert_rows(_MLP),
    ),
    other_rows=stacked_rows(_MLP),
    read_config=read_qwen3_moe,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_qwen3_moe_from_gguf,
    gguf_check=_check_qwen3_moe,
    gguf_notes=_gguf_notes,
)
