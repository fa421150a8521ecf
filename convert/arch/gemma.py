"""Gemma 1, 2 and the text part of Gemma 3.

Sources: transformers' modeling_gemma.py, modeling_gemma2.py and modeling_gemma3.py (whose attention ignores
`attn_logit_softcapping`); llama.cpp's src/models/gemma.cpp, gemma2.cpp and gemma3.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import gated_mlp, head_norms, separate_attention, trunk
from quantpress.convert.arch.gemma_gguf import (
    check_gemma,
    check_gemma2,
    check_gemma3,
    gemma2_from_gguf,
    gemma2_metadata,
    gemma3_from_gguf,
    gemma3_metadata,
    gemma_from_gguf,
    gemma_metadata,
    gemma_notes,
)
from quantpress.convert.arch.gguf_rotary import rope_tensors
from quantpress.convert.arch.llama import flags, read_sizes
from quantpress.convert.arch.rotary import read_rope, whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
_ATTENTION = separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias", offset=1.0)
_POST_NORMS = (
    TensorSpec(
        f"{_LAYER}post_attention_layernorm.weight",
        "blk.{layer}.post_attention_norm.weight",
        ("hidden",),
        Role.NORM,
        offset=1.0,
    ),
    TensorSpec(
        f"{_LAYER}post_feedforward_layernorm.weight",
        "blk.{layer}.post_ffw_norm.weight",
        ("hidden",),
        Role.NORM,
        offset=1.0,
    ),
)
_MLP = gated_mlp(_LAYER, norm="pre_feedforward_layernorm", offset=1.0)


def _read(config: fields.Config, *, activation: str, context: int) -> dict[str, Any]:
    fields.refuse(config, fields.NEUTRAL)
    sizes = read_sizes(config)
    return {
        **sizes,
        "context": fields.size(config, "max_position_embeddings", context),
        "activation": activation,
        "embedding_scale": sizes["hidden"] ** 0.5,
        "tied": fields.flag(config, "tie_word_embeddings", True),
        "flags": flags(config, "attention_bias"),
    }


def read_gemma(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gemma; its "gelu" means the tanh form (transformers: GemmaConfig)."""
    defaults = {"num_key_value_heads": 16, "head_dim": 256}
    activation = fields.activation(config, "hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_tanh" if activation == "gelu" else activation
    _same_activation(config, "hidden_activation", activation)
    read = _read({**defaults, **config}, activation=activation, context=8192)
    rope = whole_rope(config, head_dim=read["head_dim"], context=read["context"])
    return Hyperparameters(**read, rope=rope)


def read_gemma2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gemma2; every second layer slides, the first one too."""
    config = {"num_key_value_heads": 4, "head_dim": 256, **config}
    activation = fields.activation(config, "hidden_activation", "gelu_pytorch_tanh")
    _same_activation(config, "hidden_act", activation)
    read = _read(config, activation=activation, context=8192)
    read["attention_scale"] = fields.number(config, "query_pre_attn_scalar", 256) ** -0.5
    return Hyperparameters(
        **read,
        **_sliding(config, read["layers"], pattern=2),
        rope=whole_rope(config, head_dim=read["head_dim"], context=read["context"]),
        attention_softcap=fields.optional_number(config, "attn_logit_softcapping", 50.0),
        logit_softcap=fields.optional_number(config, "final_logit_softcapping", 30.0),
    )


_GEMMA3_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def text_part(config: fields.Config) -> fields.Config:
    """Gives the settings of Gemma 3's language model, which image-reading checkpoints keep in `text_config`.

    Raises:
        InputError: `text_config` is no mapping.
    """
    inner = config.get("text_config")
    if inner is None:
        return config
    if not isinstance(inner, Mapping):
        raise InputError(f"config.json: 'text_config' is {fields.short(inner)}, wanted a mapping")
    # shared by both parts, and only the outer value counts (transformers: Gemma3ForConditionalGeneration); published
    # text configs leave out what has Gemma3TextConfig's default value
    tied = fields.flag(config, "tie_word_embeddings", True)
    return {**_GEMMA3_DEFAULTS, **inner, "tie_word_embeddings": tied}


def read_gemma3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gemma3_text, or the `text_config` of a gemma3."""
    config = {"num_key_value_heads": 4, "head_dim": 256, **text_part(config)}
    fields.refuse(config, {"attn_logit_softcapping": (None,)})
    activation = fields.activation(config, "hidden_activation", "gelu_pytorch_tanh")
    _same_activation(config, "hidden_act", activation)
    read = _read(config, activation=activation, context=131_072)
    read["attention_scale"] = fields.number(config, "query_pre_attn_scalar", 256) ** -0.5
    pattern = fields.size(config, "sliding_window_pattern", 6)
    full, local = _gemma3_ropes(config, read["head_dim"], read["context"])
    return Hyperparameters(
        **read,
        **_sliding(config, read["layers"], pattern=pattern),
        rope=full,
        rope_local=local,
        logit_softcap=fields.optional_number(config, "final_logit_softcapping"),
    )


def _gemma3_ropes(config: fields.Config, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """Reads positions of global and of local layers: one key each, or nested by layer type (transformers 5)."""
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping) or set(nested) - {"full_attention", "sliding_attention"}:
        raise InputError(f"config.json: 'rope_parameters' is {fields.short(nested)}, wanted one set per layer type")
    scaling = config.get("rope_scaling") or {}
    ropes = []
    for kind, theta in (
        ("full_attention", fields.number(config, "rope_theta", 1_000_000.0, low=1.0)),
        ("sliding_attention", fields.number(config, "rope_local_base_freq", 10_000.0, low=1.0)),
    ):
        settings = nested.get(kind) or {}
        extra = scaling if kind == "full_attention" else {}
        if not isinstance(settings, Mapping) or not isinstance(extra, Mapping):
            raise InputError(f"config.json: rope settings of {kind!r} are no mapping")
        ropes.append(read_rope({**settings, **extra}, config, head_dim=head_dim, context=context, theta=theta))
        if ropes[-1].dim != head_dim:
            raise InputError(f"config.json: 'partial_rotary_factor' of {kind!r} is not 1, which is not implemented")
    return ropes[0], ropes[1]


def _same_activation(config: fields.Config, key: str, wanted: str) -> None:
    """Refuses a second key that names another activation than the one that counts."""
    if config.get(key) is None:
        return
    other = fields.activation(config, key, "silu")
    if other != wanted and not (other == "gelu" and wanted == "gelu_tanh"):
        raise InputError(f"config.json: {key!r} is {config[key]!r}, but the other activation key means {wanted!r}")


def _sliding(config: fields.Config, layers: int, pattern: int) -> dict[str, Any]:
    usual = tuple(bool((layer + 1) % pattern) for layer in range(layers))
    sliding = fields.layer_kinds(config, layers) or usual
    if not any(sliding):
        return {}
    if "sliding_window" in config and config["sliding_window"] is None:
        raise InputError("config.json: 'sliding_window' is null, but 'layer_types' has sliding layers")
    return {"sliding_window": fields.size(config, "sliding_window", 4096), "sliding_layers": sliding}


GEMMA = ArchSpec(
    family="gemma",
    classes=("GemmaForCausalLM", "GemmaModel"),
    model_types=("gemma",),
    gguf="gemma",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(*trunk("model.", offset=1.0), *_ATTENTION, *gated_mlp(_LAYER, offset=1.0)),
    ignored=_IGNORED,
    read_config=read_gemma,
    gguf_metadata=gemma_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=gemma_from_gguf,
    gguf_check=check_gemma,
    gguf_notes=gemma_notes,
    gguf_head="never",
)

GEMMA2 = ArchSpec(
    family="gemma2",
    classes=("Gemma2ForCausalLM", "Gemma2Model"),
    model_types=("gemma2",),
    gguf="gemma2",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(*trunk("model.", offset=1.0), *_ATTENTION, *_MLP, *_POST_NORMS),
    ignored=_IGNORED,
    read_config=read_gemma2,
    gguf_metadata=gemma2_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=gemma2_from_gguf,
    gguf_check=check_gemma2,
    gguf_notes=gemma_notes,
    gguf_head="never",
)

GEMMA3 = ArchSpec(
    family="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel"),
    model_types=("gemma3_text", "gemma3"),
    gguf="gemma3",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=(*trunk("model.", offset=1.0), *_ATTENTION, *head_norms(_LAYER, offset=1.0), *_MLP, *_POST_NORMS),
    ignored=_IGNORED,
    read_config=read_gemma3,
    gguf_metadata=gemma3_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=gemma3_from_gguf,
    gguf_check=check_gemma3,
    gguf_notes=gemma_notes,
    other_prefixes=("model.language_model.", "language_model.model."),
    head_prefixes=("language_model.",),
    foreign=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
