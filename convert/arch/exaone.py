"""EXAONE 3 and 3.5, a Llama under other names; EXAONE 4.0, whose norms follow attention and MLP.

Sources: modeling_exaone.py and configuration_exaone.py beside LG's checkpoints (never run); transformers'
modeling_exaone4.py (positions in sliding layers only, if there are such); llama.cpp's src/models/exaone.cpp, and
exaone4.cpp, which knows sliding models by their 64 layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder, sliding_window
from quantpress.convert.arch.decoder_rows import gated_mlp, head_norms, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, layer_types, size_metadata, whole
from quantpress.convert.arch.gguf_limits import require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_SLIDING_LAYERS = 64
_PATTERN = 4
_WINDOW = 4096
_DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-5, "num_key_value_heads": 32}


def _after(hf: str, gguf: str) -> TensorSpec:
    return TensorSpec(f"{_LAYER}{hf}.weight", f"{_BLOCK}{gguf}.weight", ("hidden",), Role.NORM)


_TABLE = (
    *trunk("model."),
    *(row for row in separate_attention(_LAYER, bias="", output_bias=None) if row.role is Role.LINEAR),
    *head_norms(_LAYER),
    _after("post_attention_layernorm", "post_attention_norm"),
    *(row for row in gated_mlp(_LAYER) if row.role is Role.LINEAR),
    _after("post_feedforward_layernorm", "post_ffw_norm"),
)

_OLD = "transformer.h.{layer}."


def _linear(hf: str, gguf: str, shape: tuple[str, str]) -> TensorSpec:
    return TensorSpec(f"{_OLD}{hf}.weight", f"{_BLOCK}{gguf}.weight", shape, Role.LINEAR)


_EXAONE = (
    TensorSpec("transformer.wte.weight", "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("transformer.ln_f.weight", "output_norm.weight", ("hidden",), Role.NORM),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to="transformer.wte.weight"),
    TensorSpec(f"{_OLD}ln_1.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    _linear("attn.attention.q_proj", "attn_q", ("q", "hidden")),
    _linear("attn.attention.k_proj", "attn_k", ("kv", "hidden")),
    _linear("attn.attention.v_proj", "attn_v", ("kv", "hidden")),
    _linear("attn.attention.out_proj", "attn_output", ("hidden", "q")),
    TensorSpec(f"{_OLD}ln_2.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    _linear("mlp.c_fc_0", "ffn_gate", ("ffn", "hidden")),
    _linear("mlp.c_fc_1", "ffn_up", ("ffn", "hidden")),
    _linear("mlp.c_proj", "ffn_down", ("hidden", "ffn")),
)


def read_exaone(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` exaone (configuration_exaone.py beside the weights)."""
    layers = fields.spelled(config, "num_layers", "num_hidden_layers", default=32)
    hidden = fields.size(config, "hidden_size")
    config = {
        **config,
        "num_hidden_layers": layers,
        "hidden_act": fields.text(config, "activation_function", "silu"),
        "intermediate_size": fields.size(config, "intermediate_size", 4 * hidden),
        "rms_norm_eps": fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
    }
    return Hyperparameters(**read_decoder(config, context=2048))


def read_exaone4(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` exaone4 (transformers: Exaone4Config)."""
    config = {**_DEFAULTS, **config}
    read = read_decoder(config, context=2048)
    layers = read["layers"]
    if "sliding_window" in config and config["sliding_window"] is None:
        if any(fields.layer_kinds(config, layers) or ()):
            raise InputError("config.json: 'sliding_window' is null, but 'layer_types' has sliding layers")
        return Hyperparameters(**read)
    read.update(sliding_window(config, layers, usual=_usual(config, layers), window=_WINDOW))
    fields.size(config, "sliding_window", _WINDOW)
    # with a window, layers that see all know no positions, even where no layer slides
    return Hyperparameters(**read, rope_layers=read.get("sliding_layers", (False,) * layers))


def _usual(config: fields.Config, layers: int) -> tuple[bool, ...]:
    """Reads the pattern of published files: "LLLG", local and global, or a number of which each one is global."""
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and not set(pattern) - {"L", "G"}:
        return tuple(pattern[layer % len(pattern)] == "L" for layer in range(layers))
    every = fields.size(config, "sliding_window_pattern", _PATTERN)
    return tuple(bool((layer + 1) % every) for layer in range(layers))


def _metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    entries = size_metadata(hyper, norm="rms")
    if any(hyper.sliding_layers):
        entries["attention.sliding_window"] = ("uint32", hyper.sliding_window)
        entries["attention.sliding_window_pattern"] = ("array[bool]", list(hyper.sliding_layers))
    return entries


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "EXAONE 4", (*SCALABLE, "llama3"))
    require_activation(hyper, "silu", "EXAONE 4")
    require_plain_heads(hyper, "EXAONE 4")
    slides = any(hyper.sliding_layers)
    if slides != (hyper.layers == _SLIDING_LAYERS) or (hyper.rope_layers and not slides):
        found = "sliding" if slides else "no sliding"
        raise InputError(
            f"config.json: 'layer_types' has {found} layers among {hyper.layers}; llama.cpp lets layers of EXAONE 4 "
            f"slide where there are {_SLIDING_LAYERS}, and turns all of them where there are more or fewer"
        )


def _check_exaone(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None
    check_rope(hyper.rope, "EXAONE", (*SCALABLE, "llama3"))
    require_activation(hyper, "silu", "EXAONE")


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, "exaone4")
    config = {
        **general_config(metadata, names, "Exaone4ForCausalLM", "exaone4"),
        **sizes,
        **rope_config(metadata, "exaone4", factors),
        "hidden_act": "silu",
        "sliding_window": None,
    }
    if sizes["num_hidden_layers"] == _SLIDING_LAYERS:
        config["sliding_window"] = whole(metadata, "exaone4.attention.sliding_window", _WINDOW)
        config["layer_types"] = layer_types(metadata, "exaone4", _SLIDING_LAYERS, pattern=_PATTERN)
    return config


def _exaone_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, "exaone")
    return {
        **general_config(metadata, names, "ExaoneForCausalLM", "exaone"),
        **sizes,
        **rope_config(metadata, "exaone", factors),
        "num_layers": sizes["num_hidden_layers"],
        "layer_norm_epsilon": sizes["rms_norm_eps"],
        "activation_function": "silu",
    }


EXAONE = ArchSpec(
    family="exaone",
    classes=("ExaoneForCausalLM", "ExaoneModel"),
    model_types=("exaone",),
    gguf="exaone",
    prefix="transformer.",
    norm="rms",
    gguf_rope="neox",
    tensors=_EXAONE,
    ignored=(f"{_OLD}attn.attention.rotary.inv_freq",),
    read_config=read_exaone,
    gguf_metadata=_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_exaone_from_gguf,
    gguf_check=_check_exaone,
    gguf_notes=_notes,
)

EXAONE4 = ArchSpec(
    family="exaone4",
    classes=("Exaone4ForCausalLM", "Exaone4Model"),
    model_types=("exaone4",),
    gguf="exaone4",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_TABLE,
    read_config=read_exaone4,
    gguf_metadata=_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)
