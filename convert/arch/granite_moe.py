"""Granite's mixtures of experts, without and with an MLP that every token goes to beside them.

Sources: transformers' modeling_granitemoe.py and modeling_granitemoeshared.py; llama.cpp's src/models/granite-moe.cpp
and conversion/granite.py. Checkpoints are published with all experts of a layer in one tensor; quantizers store them
one by one under Mixtral's names, which vLLM reads (model_executor/models/granitemoe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from quantpress.convert.arch.gguf_fields import whole
from quantpress.convert.arch.gguf_rotary import Entries, rope_tensors
from quantpress.convert.arch.granite import GRANITE, read_granite
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Role, TensorSpec

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."
_MOE, _SHARED = f"{_LAYER}block_sparse_moe.", f"{_LAYER}shared_mlp."
_BOTH = ("shared_ffn2", "hidden")
_TABLE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias", rotary=True),
    TensorSpec(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    *stacked_rows(_MOE, router="router.layer.weight", up="input_linear.weight", down="output_linear.weight"),
)
_SHARED_ROWS = tuple(
    TensorSpec(hf, f"{_BLOCK}{gguf}.weight", shape, Role.LINEAR, part=part, flag="shared_mlp")
    for hf, gguf, shape, part in (
        (f"{_SHARED}input_linear.weight", "ffn_gate_shexp", _BOTH, "gate"),
        (f"{_SHARED}input_linear.weight", "ffn_up_shexp", _BOTH, "up"),
        (f"{_SHARED}output_linear.weight", "ffn_down_shexp", ("hidden", "shared_ffn"), ""),
    )
)
_OTHERS = (*stacked_rows(_MOE, router="router.weight"), *expert_rows(_MOE, gate="w1", up="w3", down="w2"))


def read_granite_moe(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` granitemoe or granitemoeshared (transformers: GraniteMoeSharedConfig)."""
    fields.refuse(config, {"mlp_bias": (False, None)})
    config = {"num_local_experts": 8, "num_experts_per_tok": 2, **config}
    hyper = read_granite({key: value for key, value in config.items() if key != "num_local_experts"})
    sizes = expert_sizes(config, all_layers(config), count="num_local_experts", intermediate="intermediate_size")
    shared = fields.size(config, "shared_intermediate_size") if config.get("shared_intermediate_size") else 0
    flags = hyper.flags | {"shared_mlp"} if shared else hyper.flags
    return replace(hyper, flags=flags, experts=Experts(**sizes, gating="softmax_chosen", shared=shared))


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    entries = {**GRANITE.gguf_metadata(hyper, config), **expert_entries(hyper, inner=False)}
    if hyper.experts is not None and hyper.experts.shared:
        entries["expert_shared_feed_forward_length"] = ("uint32", hyper.experts.shared)
    return entries


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    dense = {key.replace("granitemoe.", "granite.", 1): value for key, value in metadata.items()}
    config = GRANITE.config_from_gguf({**dense, "general.architecture": "granite"}, names, factors)
    key = "granitemoe.expert_shared_feed_forward_length"
    shared = whole(metadata, key) if metadata.get(key) else 0
    kind = ("GraniteMoeSharedForCausalLM", "granitemoeshared") if shared else ("GraniteMoeForCausalLM", "granitemoe")
    return {
        **{name: value for name, value in config.items() if name != "mlp_bias"},
        **expert_config(metadata, "granitemoe", count="num_local_experts"),
        **({"shared_intermediate_size": shared} if shared else {}),
        "architectures": [kind[0]],
        "model_type": kind[1],
    }


GRANITE_MOE = ArchSpec(
    family="granitemoe",
    classes=("GraniteMoeForCausalLM", "GraniteMoeModel", "GraniteMoeSharedForCausalLM", "GraniteMoeSharedModel"),
    model_types=("granitemoe", "granitemoeshared"),
    gguf="granitemoe",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=(*_TABLE, *_SHARED_ROWS),
    other_rows=_OTHERS,
    read_config=read_granite_moe,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=GRANITE.gguf_check,
    gguf_notes=GRANITE.gguf_notes,
)
