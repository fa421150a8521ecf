"""SmolLM3: Llama whose every fourth layer knows no positions.

Sources: transformers' modeling_smollm3.py and configuration_smollm3.py; llama.cpp's src/models/smollm3.cpp, which
counts those layers itself and has no sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_fields import read_decoder, sliding_window
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
)
from quantpress.convert.arch.gguf_limits import refuse_bias, require_activation
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BIAS, _MLP_BIAS = "attention_bias", "mlp_bias"
_STEP = 4  # llama.cpp and published models leave each such layer without positions
_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 4, "rope_theta": 2_000_000.0}
_TABLE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias=_BIAS, output_bias=_BIAS, rotary=True),
    *gated_mlp(_LAYER, bias=_MLP_BIAS),
)


def read_smollm3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` smollm3 (transformers: SmolLM3Config)."""
    # null heads mean as many as there are queries, an absent key means 4
    config = {**_DEFAULTS, **config}
    read = read_decoder(config, context=32768, tied=True, biases=(_BIAS, _MLP_BIAS), implemented=("no_rope_layers",))
    turned = _turned(config, read["layers"])
    return Hyperparameters(**read, **_sliding(config, read["layers"], turned), rope_layers=turned)


def _turned(config: fields.Config, layers: int) -> tuple[bool, ...]:
    """Reads which layers turn by positions: those with a 1 in a list that says otherwise in its name."""
    given = config.get("no_rope_layers")
    if given is None:
        step = fields.size(config, "no_rope_layer_interval", _STEP)
        return tuple(bool((layer + 1) % step) for layer in range(layers))
    if not isinstance(given, list) or len(given) < layers or not all(value in (0, 1) for value in given):
        raise InputError(f"config.json: 'no_rope_layers' is {fields.short(given)}, wanted a 0 or 1 for {layers} layers")
    return tuple(bool(value) for value in given[:layers])


def _sliding(config: fields.Config, layers: int, turned: tuple[bool, ...]) -> dict[str, Any]:
    window = config.get("sliding_window")
    if fields.flag(config, "use_sliding_window", False) and window is not None:
        return sliding_window(config, layers, usual=[not turns for turns in turned], window=window)
    if any(fields.layer_kinds(config, layers) or ()):
        raise InputError(
            "config.json: 'layer_types' has sliding layers, but 'use_sliding_window' or the window does not"
        )
    return {}


def _metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms", context=capped_context(hyper))


def _check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "SmolLM3")
    require_activation(hyper, "silu", "SmolLM3")
    refuse_bias(hyper, "SmolLM3", _BIAS, _MLP_BIAS)
    if hyper.rope_layers != tuple(bool((layer + 1) % _STEP) for layer in range(hyper.layers)):
        raise InputError(
            f"config.json: 'no_rope_layers' is not every {_STEP}th layer; llama.cpp turns all others for SmolLM3"
        )


def _notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "SmolLM3"), *rope_notes(hyper.rope, hyper.context))


def _from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "SmolLM3ForCausalLM", "smollm3"),
        **decoder_sizes(metadata, "smollm3"),
        **rope_config(metadata, "smollm3", factors),
        "hidden_act": "silu",
        "no_rope_layer_interval": _STEP,
        "use_sliding_window": False,
    }


SMOLLM3 = ArchSpec(
    family="smollm3",
    classes=("SmolLM3ForCausalLM", "SmolLM3Model"),
    model_types=("smollm3",),
    gguf="smollm3",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    read_config=read_smollm3,
    gguf_metadata=_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_from_gguf,
    gguf_check=_check,
    gguf_notes=_notes,
)
