"""OLMo 1, whose norms have no weights, OLMo 2 and OLMo 3, whose norms follow attention and MLP.

Sources: transformers' modeling_olmo.py (whose epsilon is fixed), modeling_olmo2.py and modeling_olmo3.py (sliding
layers turn by plain positions); llama.cpp's src/models/olmo.cpp and olmo2.cpp, which serves both later generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder, sliding_window
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, layer_types, real, size_metadata, whole
from quantpress.convert.arch.gguf_limits import refuse_bias, require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.llama import flags, read_sizes
from quantpress.convert.arch.rotary import read_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_EPSILON = 1e-5  # OlmoLayerNorm has no other
_PATTERN = 4  # every fourth layer of OLMo 3 sees all
_IGNORED = (f"{_LAYER}self_attn.rotary_emb.inv_freq",)


def _after(part: str, gguf: str) -> TensorSpec:
    return TensorSpec(f"{_LAYER}{part}.weight", f"{_BLOCK}{gguf}.weight", ("hidden",), Role.NORM)


def _without_norms(rows: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(row for row in rows if row.role is not Role.NORM)


_BIAS = "attention_bias"
_OLMO = (
    *_without_norms(trunk("model.")),
    *_without_norms(separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS, rotary=True)),
    *_without_norms(gated_mlp(_LAYER)),
)
_OLMO2 = (
    *trunk("model."),
    *_without_norms(separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS)),
    TensorSpec(f"{_LAYER}self_attn.q_norm.weight", f"{_BLOCK}attn_q_norm.weight", ("q",), Role.NORM),
    TensorSpec(f"{_LAYER}self_attn.k_norm.weight", f"{_BLOCK}attn_k_norm.weight", ("kv",), Role.NORM),
    _after("post_attention_layernorm", "post_attention_norm"),
    *_without_norms(gated_mlp(_LAYER)),
    _after("post_feedforward_layernorm", "post_ffw_norm"),
)


def read_olmo(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` olmo (transformers: OlmoConfig)."""
    read = read_decoder(config, context=2048, biases=(_BIAS,), implemented=("clip_qkv",))
    read["norm_eps"] = _EPSILON
    return Hyperparameters(**read, clip_qkv=fields.optional_number(config, "clip_qkv"))


def read_olmo2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` olmo2 (transformers: Olmo2Config)."""
    fields.refuse(config, {"sliding_window": (None,)})
    return Hyperparameters(**read_decoder({"rms_norm_eps": 1e-5, **config}, context=2048, biases=(_BIAS,)))


def read_olmo3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` olmo3; scaled positions turn the layers that see all, and no others."""
    config = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, **config}
    fields.refuse(config, {**fields.NEUTRAL, "mlp_bias": (False, None)})
    sizes = read_sizes(config)
    context = fields.size(config, "max_position_embeddings", 2048)
    full, local = _ropes(config, sizes["head_dim"], context)
    usual = tuple(bool((layer + 1) % _PATTERN) for layer in range(sizes["layers"]))
    return Hyperparameters(
        **sizes,
        **sliding_window(config, sizes["layers"], usual=usual, window=4096),
        context=context,
        activation=fields.activation(config, "hidden_act", "silu"),
        rope=full,
        rope_local=local,
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=flags(config, "attention_bias"),
    )


def _ropes(config: fields.Config, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """Reads positions of both kinds of layers: nested by kind (transformers 5), or those of full layers alone."""
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping) or set(nested) - {"full_attention", "sliding_attention"}:
        raise InputError(f"config.json: 'rope_parameters' is {fields.short(nested)}, wanted one set per layer type")
    scaling = config.get("rope_scaling") or {}
    theta = fields.number(config, "rope_theta", low=1.0)
    fields.refuse(config, {"partial_rotary_factor": (None, 1)})
    ropes = []
    for kind, extra in (("full_attention", scaling), ("sliding_attention", {})):
        settings = nested.get(kind) or {}
        if not isinstance(settings, Mapping) or not isinstance(extra, Mapping):
            raise InputError(f"config.json: rope settings of {kind!r} are no mapping")
        ropes.append(read_rope({**settings, **extra}, config, head_dim=head_dim, context=context, theta=theta))
        if ropes[-1].dim != head_dim:
            raise InputError(f"config.json: 'partial_rotary_factor' of {kind!r} is not 1, which is not implemented")
    return ropes[0], ropes[1]


def _olmo_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    entries = size_metadata(hyper, norm="layer")
    if hyper.clip_qkv is not None:
        entries["attention.clamp_kqv"] = ("float32", hyper.clip_qkv)
    return entries


def _olmo2_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    entries = size_metadata(hyper, norm="rms")
    if any(hyper.sliding_layers):
        entries["attention.sliding_window"] = ("uint32", hyper.sliding_window)
        entries["attention.sliding_window_pattern"] = ("array[bool]", list(hyper.sliding_layers))
    return entries


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of these families has one
    check_rope(hyper.rope, "OLMo")
    require_activation(hyper, "silu", "OLMo")
    refuse_bias(hyper, "OLMo", "attention_bias")
    require_plain_heads(hyper, "OLMo")


def _check_olmo3(hyper: Hyperparameters, config: fields.Config) -> None:
    _check(hyper, config)
    full, local = hyper.rope, hyper.rope_local
    assert full is not None  # as `read_olmo3` makes them
    assert local is not None
    if any(hyper.sliding_layers) and (local.kind != "default" or local.theta != full.theta):
        raise InputError(
            f"config.json: sliding layers turn by rope_type {local.kind!r} with base {local.theta:g}; llama.cpp turns "
            f"them by 'default' with the base of the other layers, {full.theta:g}, in OLMo 3"
        )


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _olmo_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    epsilon = real(metadata, "olmo.attention.layer_norm_epsilon")
    if epsilon != _EPSILON:
        raise InputError(
            f"GGUF: 'olmo.attention.layer_norm_epsilon' is {epsilon:g}; OLMo has {_EPSILON:g} and no other"
        )
    clamp = metadata.get("olmo.attention.clamp_kqv")
    sizes = decoder_sizes(metadata, "olmo", norm="layer")
    del sizes["layer_norm_eps"]
    return {
        **general_config(metadata, names, "OlmoForCausalLM", "olmo"),
        **sizes,
        **rope_config(metadata, "olmo", factors),
        "hidden_act": "silu",
        "clip_qkv": real(metadata, "olmo.attention.clamp_kqv") if clamp else None,
        "attention_bias": False,
    }


def _olmo2_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives the config of OLMo 3 where the file has a window, as llama.cpp tells them apart."""
    window = metadata.get("olmo2.attention.sliding_window")
    name, model_type = ("Olmo3ForCausalLM", "olmo3") if window else ("Olmo2ForCausalLM", "olmo2")
    sizes = decoder_sizes(metadata, "olmo2")
    config = {
        **general_config(metadata, names, name, model_type),
        **sizes,
        **rope_config(metadata, "olmo2", factors),
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if not window:
        return config
    config["sliding_window"] = whole(metadata, "olmo2.attention.sliding_window")
    config["layer_types"] = layer_types(metadata, "olmo2", sizes["num_hidden_layers"], pattern=_PATTERN)
    return config


OLMO = ArchSpec(
    family="olmo",
    classes=("OlmoForCausalLM", "OlmoModel"),
    model_types=("olmo",),
    gguf="olmo",
    prefix="model.",
    norm="layer",
    gguf_rope="norm",
    tensors=_OLMO,
    ignored=_IGNORED,
    read_config=read_olmo,
    gguf_metadata=_olmo_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_olmo_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)

OLMO2 = ArchSpec(
    family="olmo2",
    classes=("Olmo2ForCausalLM", "Olmo2Model"),
    model_types=("olmo2",),
    gguf="olmo2",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_OLMO2,
    ignored=_IGNORED,
    read_config=read_olmo2,
    gguf_metadata=_olmo2_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_olmo2_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
    gguf_head="required",
)

OLMO3 = ArchSpec(
    family="olmo3",
    classes=("Olmo3ForCausalLM", "Olmo3Model"),
    model_types=("olmo3",),
    gguf="olmo2",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_OLMO2,
    ignored=_IGNORED,
    read_config=read_olmo3,
    gguf_metadata=_olmo2_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_olmo2_from_gguf,
    gguf_check=_check_olmo3,
    gguf_notes=_notes,
    gguf_head="required",
)
