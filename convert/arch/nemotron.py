"""Nemotron and Minitron: norms that store their weights minus one, squared relu without a gate, half-turned heads.

Sources: transformers' modeling_nemotron.py; llama.cpp's src/models/nemotron.cpp, which always has a head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows
from quantpress.convert.arch.decoder_fields import read_decoder
from quantpress.convert.arch.decoder_rows import separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata, turned_share, whole
from quantpress.convert.arch.gguf_limits import require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_BIAS, _MLP_BIAS = "attention_bias", "mlp_bias"
_PARTIAL = 0.5


def _norm(hf: str, gguf: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", ("hidden",), Role.NORM, offset=1.0),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", ("hidden",), Role.NORM),
    )


_TABLE = (
    *(row for row in trunk("model.") if row.role is not Role.NORM),
    *_norm("model.norm", "output_norm"),
    *_norm(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *(row for row in separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS) if row.role is not Role.NORM),
    *_norm(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm"),
    *linear_rows(f"{_LAYER}mlp.up_proj", f"{_BLOCK}ffn_up", ("ffn", "hidden"), bias=_MLP_BIAS),
    *linear_rows(f"{_LAYER}mlp.down_proj", f"{_BLOCK}ffn_down", ("hidden", "ffn"), bias=_MLP_BIAS),
)


def read_nemotron(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` nemotron (transformers: NemotronConfig)."""
    config = {"hidden_act": "relu2", **config}
    read = read_decoder(config, context=4096, biases=(_BIAS, _MLP_BIAS), partial=_PARTIAL)
    read["norm_eps"] = fields.number(config, "norm_eps", 1e-5, high=1.0)
    return Hyperparameters(**read)


def _metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="layer")


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Nemotron")
    require_activation(hyper, "relu2", "Nemotron")
    require_plain_heads(hyper, "Nemotron")


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, "nemotron", norm="layer")
    turned = whole(metadata, "nemotron.rope.dimension_count", sizes["head_dim"])
    return {
        **general_config(metadata, names, "NemotronForCausalLM", "nemotron"),
        **sizes,
        **rope_config(metadata, "nemotron", factors),
        "norm_eps": sizes["layer_norm_eps"],
        "partial_rotary_factor": turned_share(turned, sizes["head_dim"]),
        "hidden_act": "relu2",
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


NEMOTRON = ArchSpec(
    family="nemotron",
    classes=("NemotronForCausalLM", "NemotronModel"),
    model_types=("nemotron",),
    gguf="nemotron",
    prefix="model.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    read_config=read_nemotron,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
    gguf_head="required",
)
