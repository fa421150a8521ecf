"""GLM-4-9b in transformers' own layout (`glm`), and GLM-4-0414 with norms on both sides of attention and MLP (`glm4`).

Sources: transformers' modeling_glm.py and modeling_glm4.py (gate and up in one matrix, neighbours turn in the first
half of each head); llama.cpp's src/models/chatglm.cpp and glm4.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata, turned_share, whole
from quantpress.convert.arch.gguf_limits import require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec

__all__ = ["GLM", "GLM4", "glm_from_gguf", "read_glm"]

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_BIAS = "attention_bias"
_PARTIAL = 0.5
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}


def _norm(hf: str, gguf: str) -> TensorSpec:
    return TensorSpec(f"{_LAYER}{hf}.weight", f"{_BLOCK}{gguf}.weight", ("hidden",), Role.NORM)


_GLM = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=None),
    _norm("post_attention_layernorm", "ffn_norm"),
    TensorSpec(f"{_LAYER}mlp.gate_up_proj.weight", f"{_BLOCK}ffn_up.weight", ("ffn2", "hidden"), Role.LINEAR),
    TensorSpec(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight", ("hidden", "ffn"), Role.LINEAR),
)
_GLM4 = (
    *_GLM,
    _norm("post_self_attn_layernorm", "post_attention_norm"),
    _norm("post_mlp_layernorm", "post_ffw_norm"),
)


def read_glm(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` glm or glm4 (transformers: GlmConfig, Glm4Config, of the same keys)."""
    fields.refuse(config, {"num_nextn_predict_layers": (0, None)})
    read = read_decoder({**_DEFAULTS, **config}, context=131_072, biases=(_BIAS,), partial=_PARTIAL)
    read["rope"] = replace(read["rope"], interleaved=True)
    return Hyperparameters(**read)


def _metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms")


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of these families has one
    check_rope(hyper.rope, "GLM-4")
    require_activation(hyper, "silu", "GLM-4")


def _check_glm(hyper: Hyperparameters, config: fields.Config) -> None:
    _check(hyper, config)
    require_plain_heads(hyper, "GLM-4")


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def glm_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a config.json for a `chatglm` file with q, k and v apart; see `ArchSpec.config_from_gguf`."""
    return {
        **general_config(metadata, names, "GlmForCausalLM", "glm"),
        **_from_gguf(metadata, names, factors, "chatglm"),
    }


def _glm4_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "Glm4ForCausalLM", "glm4"),
        **_from_gguf(metadata, names, factors, "glm4"),
    }


def _from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]], arch: str
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, arch)
    head_dim = sizes["head_dim"]
    turned = whole(metadata, f"{arch}.rope.dimension_count", head_dim)
    return {
        **sizes,
        **rope_config(metadata, arch, factors),
        "partial_rotary_factor": turned_share(turned, head_dim),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in names,
    }


GLM = ArchSpec(
    family="glm",
    classes=("GlmForCausalLM", "GlmModel"),
    model_types=("glm",),
    gguf="chatglm",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_GLM,
    read_config=read_glm,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=glm_from_gguf,
    gguf_check=_check_glm,
    gguf_notes=_notes,
)

GLM4 = ArchSpec(
    family="glm4",
    classes=("Glm4ForCausalLM", "Glm4Model"),
    model_types=("glm4",),
    gguf="glm4",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_GLM4,
    read_config=read_glm,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_glm4_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)
