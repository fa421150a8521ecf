"""Granite and MiniCPM: Llama with factors on embeddings, on what layers add, on attention scores and on logits.

Sources: transformers' modeling_granite.py; modeling_minicpm.py and configuration_minicpm.py beside OpenBMB's
checkpoints, whose factors follow from `scale_emb`, `scale_depth` and `dim_model_base`; llama.cpp's
src/models/granite.cpp, which computes both, and minicpm.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_limits import require_activation
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.gguf_values import real
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BIAS, _MLP_BIAS = "attention_bias", "mlp_bias"
_GRANITE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS, rotary=True),
    *gated_mlp(_LAYER, bias=_MLP_BIAS),
)
_MINICPM = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS, rotary=True),
    *gated_mlp(_LAYER),
)
_IGNORED = (f"{_LAYER}self_attn.rotary_emb.inv_freq",)
_FACTORS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
_KINDS = (*SCALABLE, "llama3", "longrope")


def read_granite(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` granite (transformers: GraniteConfig)."""
    read = read_decoder(config, context=2048, biases=(_BIAS, _MLP_BIAS), implemented=_FACTORS)
    read["attention_scale"] = fields.number(config, "attention_multiplier", 1.0)
    return Hyperparameters(
        **read,
        embedding_scale=fields.number(config, "embedding_multiplier", 1.0),
        residual_scale=fields.number(config, "residual_multiplier", 1.0),
        logit_scale=1 / fields.number(config, "logits_scaling", 1.0),
    )


def read_minicpm(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` minicpm (configuration_minicpm.py beside the weights)."""
    fields.refuse(config, {"sparse_config": (None,), "num_experts": (0, None), "kv_lora_rank": (None,)})
    read = read_decoder(config, context=2048, tied=True, biases=(_BIAS,), implemented=("scale_emb", "scale_depth"))
    return Hyperparameters(
        **read,
        embedding_scale=fields.number(config, "scale_emb", 1.0),
        residual_scale=fields.number(config, "scale_depth", 1.0) / read["layers"] ** 0.5,
        logit_scale=fields.size(config, "dim_model_base", 1) / read["hidden"],
    )


def _scales(hyper: Hyperparameters) -> Entries:
    return {
        "embedding_scale": ("float32", hyper.embedding_scale),
        "residual_scale": ("float32", hyper.residual_scale),
        "logit_scale": ("float32", 1 / hyper.logit_scale),  # llama.cpp divides by it here
    }


def _granite_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {
        **size_metadata(hyper, norm="rms"),
        "attention.scale": ("float32", hyper.attention_scale),
        **_scales(hyper),
    }


def _minicpm_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {**size_metadata(hyper, norm="rms"), **_scales(hyper)}


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of these families has one
    check_rope(hyper.rope, "Granite and MiniCPM", _KINDS)
    require_activation(hyper, "silu", "Granite and MiniCPM")


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _granite_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    if metadata.get("granite.rope.scaling.finetuned") is False:
        raise InputError("GGUF: 'granite.rope.scaling.finetuned' is false, no positions: not implemented for Granite")
    sizes = decoder_sizes(metadata, "granite")

    def scale(key: str, absent: float) -> float:
        return real(metadata, f"granite.{key}", 0.0) or absent  # llama.cpp reads 0 as none

    return {
        **general_config(metadata, names, "GraniteForCausalLM", "granite"),
        **sizes,
        **rope_config(metadata, "granite", factors),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "attention_multiplier": scale("attention.scale", sizes["head_dim"] ** -0.5),
        "embedding_multiplier": scale("embedding_scale", 1.0),
        "residual_multiplier": scale("residual_scale", 1.0),
        "logits_scaling": real(metadata, "granite.logit_scale"),
    }


def _minicpm_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a Granite's config: MiniCPM's own can only say factors whose quotients with its sizes are whole."""
    sizes = decoder_sizes(metadata, "minicpm")
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]

    def scale(key: str, absent: float) -> float:
        return real(metadata, f"minicpm.{key}", absent)

    return {
        **general_config(metadata, names, "GraniteForCausalLM", "granite"),
        **sizes,
        **rope_config(metadata, "minicpm", factors),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "attention_multiplier": sizes["head_dim"] ** -0.5,
        # what files lack that were made before these keys (llama.cpp: src/models/minicpm.cpp)
        "embedding_multiplier": scale("embedding_scale", 12.0),
        "residual_multiplier": scale("residual_scale", 1.4 / layers**0.5),
        "logits_scaling": scale("logit_scale", 256.0 / hidden),
    }


GRANITE = ArchSpec(
    family="granite",
    classes=("GraniteForCausalLM", "GraniteModel"),
    model_types=("granite",),
    gguf="granite",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_GRANITE,
    ignored=_IGNORED,
    read_config=read_granite,
    gguf_metadata=_granite_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_granite_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)

MINICPM = ArchSpec(
    family="minicpm",
    classes=("MiniCPMForCausalLM", "MiniCPMModel"),
    model_types=("minicpm",),
    gguf="minicpm",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_MINICPM,
    ignored=_IGNORED,
    read_config=read_minicpm,
    gguf_metadata=_minicpm_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_minicpm_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)
