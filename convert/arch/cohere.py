"""Command-R, Command-R+, Aya 23 and Command A's predecessors, and Command R7B: one norm for attention and MLP.

Sources: transformers' modeling_cohere.py and modeling_cohere2.py (a norm subtracts the mean and has no bias, neighbours
turn, and in Command R7B only sliding layers do); llama.cpp's src/models/command-r.cpp and cohere2.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder, sliding_window
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, layer_types, real, size_metadata, whole
from quantpress.convert.arch.gguf_limits import refuse_bias, refuse_untied, require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_BIAS = "attention_bias"
_NORMED_LAYERS = 64  # llama.cpp knows Command-R+, whose heads have norms, by its layers
_DEFAULTS: Mapping[str, Any] = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5}


def _own_norm(part: str, heads: str) -> TensorSpec:
    name, slot = f"{_LAYER}self_attn.{part}_norm.weight", f"{_BLOCK}attn_{part}_norm.weight"
    return TensorSpec(name, slot, (heads, "head_dim"), Role.NORM, flag="use_qk_norm")


_COHERE2 = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS),
    *(row for row in gated_mlp(_LAYER) if row.role is not Role.NORM),
)
_COHERE = (*_COHERE2, _own_norm("q", "heads"), _own_norm("k", "kv_heads"))


def _read(config: fields.Config, *implemented: str) -> dict[str, Any]:
    read = read_decoder(config, context=8192, tied=True, biases=(_BIAS,), implemented=("logit_scale", *implemented))
    return {
        **read,
        "norm_eps": fields.number(config, "layer_norm_eps", high=1.0),
        "rope": replace(read["rope"], interleaved=True),
        "logit_scale": fields.number(config, "logit_scale"),
        "parallel_residual": True,
    }


def read_cohere(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` cohere (transformers: CohereConfig)."""
    config = {**_DEFAULTS, "rope_theta": 500_000.0, **config}
    read = _read(config, "use_qk_norm")
    if fields.flag(config, "use_qk_norm", False):
        read["flags"] |= {"use_qk_norm"}
    return Hyperparameters(**read)


def read_cohere2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` cohere2; every fourth layer sees all and knows no positions."""
    config = {**_DEFAULTS, **config}
    fields.refuse(config, {"rotary_pct": (1, None)})
    read = _read(config)
    pattern = fields.size(config, "sliding_window_pattern", 4)
    usual = tuple(bool((layer + 1) % pattern) for layer in range(read["layers"]))
    read.update(sliding_window(config, read["layers"], usual=usual, window=4096))
    return Hyperparameters(**read, rope_layers=read.get("sliding_layers", (False,) * read["layers"]))


def _cohere_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    return {
        **size_metadata(hyper, norm="layer", context=_trained_length(hyper, config)),
        "logit_scale": ("float32", hyper.logit_scale),
    }


def _trained_length(hyper: Hyperparameters, config: fields.Config) -> int:
    """Gives what Command-R was made for: its `max_position_embeddings` is only what its code allots at first."""
    given = config.get("model_max_length")
    unscaled = hyper.rope is not None and hyper.rope.kind == "default"
    if isinstance(given, bool) or not isinstance(given, int) or not unscaled:
        return hyper.context
    return max(hyper.context, min(given, fields.LARGEST))


def _cohere2_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {
        **size_metadata(hyper, norm="layer"),
        "logit_scale": ("float32", hyper.logit_scale),
        "attention.sliding_window": ("uint32", hyper.sliding_window),
        "attention.sliding_window_pattern": ("array[bool]", list(hyper.sliding_layers)),
    }


def _check(hyper: Hyperparameters, family: str) -> None:
    assert hyper.rope is not None  # every config of these families has one
    check_rope(hyper.rope, family)
    require_activation(hyper, "silu", family)
    refuse_bias(hyper, family, _BIAS)
    refuse_untied(hyper, family)
    require_plain_heads(hyper, family)


def _check_cohere(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    _check(hyper, "Command-R")
    normed = "use_qk_norm" in hyper.flags
    if normed != (hyper.layers >= _NORMED_LAYERS):
        raise InputError(
            f"config.json: 'use_qk_norm' is {str(normed).lower()} with {hyper.layers} layers; llama.cpp normalizes the "
            f"heads of Command-R from {_NORMED_LAYERS} layers on, and not below"
        )


def _check_cohere2(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    _check(hyper, "Command R7B")
    if not any(hyper.sliding_layers):
        raise InputError(
            "config.json: 'layer_types' has no sliding layer; llama.cpp cannot leave them out for Command R7B"
        )


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]], arch: str
) -> dict[str, Any]:
    return {
        **decoder_sizes(metadata, arch, norm="layer"),
        **rope_config(metadata, arch, factors),
        "hidden_act": "silu",
        "logit_scale": real(metadata, f"{arch}.logit_scale") if metadata.get(f"{arch}.logit_scale") else 1.0,
        "attention_bias": "blk.0.attn_q.bias" in names,
    }


def _cohere_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "CohereForCausalLM", "cohere"),
        **_from_gguf(metadata, names, factors, "command-r"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in names,
    }


def _cohere2_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    read = _from_gguf(metadata, names, factors, "cohere2")
    return {
        **general_config(metadata, names, "Cohere2ForCausalLM", "cohere2"),
        **read,
        "sliding_window": whole(metadata, "cohere2.attention.sliding_window"),
        "layer_types": layer_types(metadata, "cohere2", read["num_hidden_layers"], pattern=4),
    }


COHERE = ArchSpec(
    family="cohere",
    classes=("CohereForCausalLM", "CohereModel"),
    model_types=("cohere",),
    gguf="command-r",
    prefix="model.",
    norm="layer",
    gguf_rope="norm",
    tensors=_COHERE,
    read_config=read_cohere,
    gguf_metadata=_cohere_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_cohere_from_gguf,
    gguf_check=_check_cohere,
    gguf_notes=_notes,
    gguf_head="never",
)

COHERE2 = ArchSpec(
    family="cohere2",
    classes=("Cohere2ForCausalLM", "Cohere2Model"),
    model_types=("cohere2",),
    gguf="cohere2",
    prefix="model.",
    norm="layer",
    gguf_rope="norm",
    tensors=_COHERE2,
    read_config=read_cohere2,
    gguf_metadata=_cohere2_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_cohere2_from_gguf,
    gguf_check=_check_cohere2,
    gguf_notes=_notes,
    gguf_head="never",
)
