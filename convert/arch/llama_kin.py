"""Seed-OSS, ERNIE 4.5 and Arcee: Llama with other biases, other pairs of positions, or an MLP without a gate.

Sources: transformers' modeling_seed_oss.py, modeling_ernie4_5.py (neighbours turn) and modeling_arcee.py (squared
relu); llama.cpp's src/models/seed-oss.cpp, ernie4-5.cpp and arcee.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_limits import refuse_bias, require_activation
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_BIAS, _OUT_BIAS, _MLP_BIAS, _ANY_BIAS = "attention_bias", "attention_out_bias", "mlp_bias", "use_bias"
_SEED_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}
_ERNIE_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
_ARCEE_DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "relu2"}

# llama.cpp calls the norm before the MLP by the name of one after attention here
_SEED = tuple(
    replace(row, gguf=f"{_BLOCK}post_attention_norm.weight", place="ffn_norm.weight")
    if row.slot == "ffn_norm.weight"
    else row
    for row in (
        *trunk("model."),
        *separate_attention(_LAYER, bias=_BIAS, output_bias=_OUT_BIAS),
        *gated_mlp(_LAYER, bias=_MLP_BIAS),
    )
)
_ERNIE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_ANY_BIAS, output_bias=_ANY_BIAS),
    *gated_mlp(_LAYER, bias=_ANY_BIAS),
)
_ARCEE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS, rotary=True),
    *(row for row in gated_mlp(_LAYER, bias=_MLP_BIAS) if not row.slot.startswith("ffn_gate")),
)


def read_seed_oss(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` seed_oss (transformers: SeedOssConfig)."""
    read = read_decoder(
        {**_SEED_DEFAULTS, **config},
        context=524_288,
        biases=(_BIAS, _OUT_BIAS, _MLP_BIAS),
        implemented=("attention_out_bias",),
    )
    return Hyperparameters(**read)


def read_ernie4_5(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` ernie4_5 (transformers: Ernie4_5Config)."""
    read = read_decoder({**_ERNIE_DEFAULTS, **config}, context=131_072, tied=True, biases=(_ANY_BIAS,))
    read["rope"] = replace(read["rope"], interleaved=True)
    return Hyperparameters(**read)


def read_arcee(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` arcee (transformers: ArceeConfig)."""
    return Hyperparameters(**read_decoder({**_ARCEE_DEFAULTS, **config}, context=4096, biases=(_BIAS, _MLP_BIAS)))


def _metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms")


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _check_seed(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of these families has one
    check_rope(hyper.rope, "Seed-OSS")
    require_activation(hyper, "silu", "Seed-OSS")
    refuse_bias(hyper, "Seed-OSS", _OUT_BIAS, _MLP_BIAS)


def _check_ernie(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None
    check_rope(hyper.rope, "ERNIE 4.5")
    require_activation(hyper, "silu", "ERNIE 4.5")
    refuse_bias(hyper, "ERNIE 4.5", _ANY_BIAS)


def _check_arcee(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None
    check_rope(hyper.rope, "Arcee", (*SCALABLE, "llama3"))
    require_activation(hyper, "relu2", "Arcee")
    refuse_bias(hyper, "Arcee", _BIAS, _MLP_BIAS)


def _from_gguf(class_name: str, arch: str) -> Callable[..., dict[str, Any]]:
    """Gives the `config_from_gguf` of a family that GGUF and config.json call alike."""

    def config(
        metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
    ) -> dict[str, Any]:
        return {
            **general_config(metadata, names, class_name, arch),
            **decoder_sizes(metadata, arch),
            **rope_config(metadata, arch, factors),
            "attention_bias": "blk.0.attn_q.bias" in names,
        }

    return config


SEED_OSS = ArchSpec(
    family="seed_oss",
    classes=("SeedOssForCausalLM", "SeedOssModel"),
    model_types=("seed_oss",),
    gguf="seed_oss",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_SEED,
    read_config=read_seed_oss,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_from_gguf("SeedOssForCausalLM", "seed_oss"),
    gguf_check=_check_seed,
    gguf_notes=_notes,
)

ERNIE4_5 = ArchSpec(
    family="ernie4_5",
    classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5Model"),
    model_types=("ernie4_5",),
    gguf="ernie4_5",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_ERNIE,
    read_config=read_ernie4_5,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_from_gguf("Ernie4_5ForCausalLM", "ernie4_5"),
    gguf_check=_check_ernie,
    gguf_notes=_notes,
)

ARCEE = ArchSpec(
    family="arcee",
    classes=("ArceeForCausalLM", "ArceeModel"),
    model_types=("arcee",),
    gguf="arcee",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_ARCEE,
    read_config=read_arcee,
    gguf_metadata=_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_from_gguf("ArceeForCausalLM", "arcee"),
    gguf_check=_check_arcee,
    gguf_notes=_notes,
)
