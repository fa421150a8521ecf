"""Gemma in GGUF files: which keys each generation has, what llama.cpp fixes, and the way back to config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.fields import Config
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.gguf_values import real
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.quant.errors import InputError

_PATTERN = "attention.sliding_window_pattern"
# llama.cpp knows the 27B models by their layers and gives only them a scale of their own (gemma2.cpp, gemma3.cpp)
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62


def gemma_metadata(hyper: Hyperparameters, config: Config) -> Entries:
    """Gives the keys of a `gemma` file."""
    del config
    return size_metadata(hyper, norm="rms")


def gemma2_metadata(hyper: Hyperparameters, config: Config) -> Entries:
    """Gives the keys of a `gemma2` file."""
    return {
        **gemma_metadata(hyper, config),
        "attn_logit_softcapping": ("float32", hyper.attention_softcap),
        "final_logit_softcapping": ("float32", hyper.logit_softcap),
        **_window(hyper, pattern=2),
    }


def gemma3_metadata(hyper: Hyperparameters, config: Config) -> Entries:
    """Gives the keys of a `gemma3` file."""
    entries = gemma_metadata(hyper, config)
    if hyper.logit_softcap is not None:
        entries["final_logit_softcapping"] = ("float32", hyper.logit_softcap)
    if any(hyper.sliding_layers) and hyper.rope_local is not None:
        entries["rope.freq_base_swa"] = ("float32", hyper.rope_local.theta)
        entries.update(_window(hyper, pattern=6))
    return entries


def gemma_notes(hyper: Hyperparameters, config: Config) -> tuple[str, ...]:
    """Says where llama.cpp parts from transformers."""
    del config
    return rope_notes(hyper.rope, hyper.context)


def _window(hyper: Hyperparameters, pattern: int) -> Entries:
    """The window, and which layers have it where that is not every layer but each `pattern`-th."""
    entries: Entries = {"attention.sliding_window": ("uint32", hyper.sliding_window)}
    if hyper.sliding_layers != _usual(hyper.layers, pattern):
        entries[_PATTERN] = ("array[bool]", list(hyper.sliding_layers))
    return entries


def _usual(layers: int, pattern: int) -> tuple[bool, ...]:
    return tuple(bool((layer + 1) % pattern) for layer in range(layers))


def _check(hyper: Hyperparameters, family: str, kinds: tuple[str, ...], own_scale: int = 0) -> None:
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, family, kinds)
    if hyper.activation not in ("gelu_tanh", "gelu"):
        raise InputError(f"config.json: the activation is {hyper.activation!r}; llama.cpp computes gelu for {family}")
    if "attention_bias" in hyper.flags:
        raise InputError(f"config.json: 'attention_bias' is true; llama.cpp has no bias after attention for {family}")
    size = hyper.hidden // hyper.heads if own_scale and hyper.layers == own_scale else hyper.head_dim
    if not math.isclose(hyper.attention_scale, size**-0.5, rel_tol=1e-6):
        raise InputError(
            f"config.json: 'query_pre_attn_scalar' is {hyper.attention_scale**-2:g}; llama.cpp scales attention of "
            f"{family} with {hyper.layers} layers by {size}"
        )


def _check_tied(hyper: Hyperparameters, family: str) -> None:
    if not hyper.tied:
        raise InputError(f"config.json: 'tie_word_embeddings' is false; llama.cpp has no separate head for {family}")


def check_gemma(hyper: Hyperparameters, config: Config) -> None:
    """Refuses what llama.cpp's gemma.cpp does not compute."""
    del config
    _check(hyper, "Gemma", ("default", "linear", "dynamic", "yarn"))
    _check_tied(hyper, "Gemma")


def check_gemma2(hyper: Hyperparameters, config: Config) -> None:
    """Refuses what llama.cpp's gemma2.cpp does not compute: it always has both caps and sliding layers."""
    del config
    _check(hyper, "Gemma 2", ("default", "linear", "dynamic", "yarn"), _GEMMA2_27B_LAYERS)
    _check_tied(hyper, "Gemma 2")
    for key, cap in (
        ("attn_logit_softcapping", hyper.attention_softcap),
        ("final_logit_softcapping", hyper.logit_softcap),
    ):
        if cap is None:
            raise InputError(f"config.json: {key!r} is null; llama.cpp cannot leave it out for Gemma 2")
    if not any(hyper.sliding_layers):
        raise InputError("config.json: 'layer_types' has no sliding layer; llama.cpp cannot leave them out for Gemma 2")


def check_gemma3(hyper: Hyperparameters, config: Config) -> None:
    """Refuses what llama.cpp's gemma3.cpp does not compute: local layers have plain positions."""
    del config
    _check(hyper, "Gemma 3", ("default", "linear", "dynamic"), _GEMMA3_27B_LAYERS)
    local = hyper.rope_local
    if any(hyper.sliding_layers) and local is not None and local.kind != "default":
        raise InputError(f"config.json: rope_type of sliding layers is {local.kind!r}; llama.cpp does not scale them")


def gemma_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a config.json for a `gemma` file."""
    return {
        **general_config(metadata, names, "GemmaForCausalLM", "gemma"),
        **decoder_sizes(metadata, "gemma"),
        **rope_config(metadata, "gemma", factors),
        "hidden_act": "gelu_pytorch_tanh",
    }


def gemma2_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a config.json for a `gemma2` file; the caps have llama.cpp's defaults."""
    sizes = decoder_sizes(metadata, "gemma2")
    return {
        **general_config(metadata, names, "Gemma2ForCausalLM", "gemma2"),
        **sizes,
        **rope_config(metadata, "gemma2", factors),
        **_layers_from_gguf(metadata, "gemma2", sizes, pattern=2, window=4096, own_scale=_GEMMA2_27B_LAYERS),
        "attn_logit_softcapping": real(metadata, "gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": real(metadata, "gemma2.final_logit_softcapping", 30.0),
    }


def gemma3_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a config.json for a `gemma3` file, as of the text model alone."""
    sizes = decoder_sizes(metadata, "gemma3")
    ropes = rope_config(metadata, "gemma3", factors)
    return {
        **general_config(metadata, names, "Gemma3ForCausalLM", "gemma3_text"),
        **sizes,
        "rope_theta": ropes["rope_theta"],
        "rope_scaling": ropes["rope_scaling"],
        "rope_local_base_freq": real(metadata, "gemma3.rope.freq_base_swa", 10000.0),
        **_layers_from_gguf(metadata, "gemma3", sizes, pattern=6, window=0, own_scale=_GEMMA3_27B_LAYERS),
        "final_logit_softcapping": real(metadata, "gemma3.final_logit_softcapping", 0.0) or None,
    }


def _layers_from_gguf(
    metadata: Mapping[str, Any], arch: str, sizes: Mapping[str, Any], *, pattern: int, window: int, own_scale: int
) -> dict[str, Any]:
    layers = sizes["num_hidden_layers"]
    stored = metadata.get(f"{arch}.{_PATTERN}", pattern)
    if hasattr(stored, "__len__"):
        sliding = tuple(bool(value) for value in stored[:layers])
    else:
        sliding = _usual(layers, whole(metadata, f"{arch}.{_PATTERN}", pattern))
    has_window = metadata.get(f"{arch}.attention.sliding_window", window)
    if not has_window:
        sliding = (False,) * layers
    own = layers == own_scale
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": sizes["hidden_size"] // sizes["num_attention_heads"] if own else sizes["head_dim"],
        "sliding_window": whole(metadata, f"{arch}.attention.sliding_window", window) if has_window else 4096,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }
