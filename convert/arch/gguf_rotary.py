"""Rotary positions in GGUF files: what llama.cpp reads, what it cannot compute, and the way back to config.json.

Sources: llama.cpp v0.5.0, llama-model.cpp (`load_hparams`, `get_rope_factors`), llama-context.cpp (YaRN's magnitude),
ggml-cpu/ops.cpp (`rope_yarn`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.fields import plain_float
from quantpress.convert.arch.gguf_values import Metadata, real, whole
from quantpress.convert.arch.rotary import attention_factor, llama3_factors, llama3_parameters
from quantpress.convert.arch.spec import Hyperparameters, Rope
from quantpress.quant.errors import InputError

Entries = dict[str, tuple[str, Any]]

SCALABLE = ("default", "linear", "dynamic", "yarn")  # kinds that every rotary graph of llama.cpp computes

_STORED_KINDS = ("none", "linear", "yarn", "longrope")  # LLAMA_ROPE_SCALING_TYPES; llama.cpp reads no others


def check_rope(rope: Rope, family: str, kinds: tuple[str, ...] = SCALABLE) -> None:
    """Refuses rotary settings that this architecture's graph does not compute.

    Raises:
        InputError: naming the kind or the key.
    """
    if rope.kind not in kinds:
        raise InputError(
            f"config.json: rope_type {rope.kind!r} cannot be expressed in GGUF for {family}; "
            f"llama.cpp computes {', '.join(kinds)}"
        )
    if rope.kind == "yarn":
        for key, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            value = rope.parameters.get(key)
            if (fixed if value is None else value) != fixed:
                raise InputError(
                    f"config.json: yarn's {key!r} is {value}; llama.cpp computes only {fixed} for {family}"
                )


def rope_metadata(rope: Rope, context: int) -> Entries:
    """Gives the `rope.*` keys of an architecture.

    Args:
        rope: the settings of full-attention layers.
        context: `max_position_embeddings`, which YaRN and LongRoPE compare with the training length.
    """
    entries: Entries = {
        "rope.dimension_count": ("uint32", rope.dim),
        "rope.freq_base": ("float32", rope.theta),
    }
    magnitude = attention_factor(rope, context)
    if rope.kind == "linear":
        entries["rope.scaling.type"] = ("string", "linear")
        entries["rope.scaling.factor"] = ("float32", float(rope.parameters["factor"]))
    elif rope.kind == "yarn":
        factor = float(rope.parameters["factor"])
        entries["rope.scaling.type"] = ("string", "yarn")
        entries["rope.scaling.factor"] = ("float32", factor)
        entries.update(_original_length(rope))
        # llama.cpp multiplies by YaRN's own magnitude whatever the file says; this key is a further factor
        usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        if magnitude != usual:
            entries["rope.scaling.attn_factor"] = ("float32", magnitude / usual)
    elif rope.kind == "longrope":
        entries["rope.scaling.type"] = ("string", "longrope")
        entries.update(_original_length(rope))
        entries["rope.scaling.attn_factor"] = ("float32", magnitude)
    return entries


def rope_tensors(hyper: Hyperparameters) -> dict[str, tuple[float, ...]]:
    """Gives the tensors of frequency factors: `rope_freqs.weight`, `rope_factors_long.weight` and `_short.weight`."""
    rope = hyper.rope
    if rope is not None and rope.kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope)}
    if rope is not None and rope.kind == "longrope":
        return {
            "rope_factors_long.weight": tuple(map(float, rope.parameters["long_factor"])),
            "rope_factors_short.weight": tuple(map(float, rope.parameters["short_factor"])),
        }
    return {}


def rope_notes(rope: Rope | None, context: int) -> tuple[str, ...]:
    """Says where llama.cpp's rotary positions part from transformers'."""
    if rope is None:
        return ()
    if rope.kind == "dynamic":
        return (
            f"dynamic rotary scaling begins beyond {context} tokens and is not part of GGUF: use the file up to there",
        )
    if rope.kind == "longrope" and rope.parameters["long_factor"] != rope.parameters["short_factor"]:
        original = rope.parameters["original_max_position_embeddings"]
        note = (
            f"llama.cpp picks the long rotary factors when its context is above {original} tokens, "
            "transformers when the text is: run with a context of at most that for shorter texts"
        )
        return (note,)
    return ()


def rope_config(metadata: Metadata, arch: str, factors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """Gives the rotary keys of a config.json: `rope_theta` and, where positions are scaled, `rope_scaling`.

    Args:
        metadata: the file's metadata, full keys and plain values.
        arch: `general.architecture`.
        factors: values of those tensors of `GGUF_FACTORS` that the file holds.

    Raises:
        InputError: naming a key whose value makes no sense.
    """
    start = f"{arch}.rope."
    theta = real(metadata, f"{start}freq_base", 10000.0)
    context = whole(metadata, f"{arch}.context_length")
    original = whole(metadata, f"{start}scaling.original_context_length", context)
    kind = metadata.get(f"{start}scaling.type", "linear")
    if kind not in _STORED_KINDS:
        raise InputError(f"GGUF: key '{start}scaling.type' is {kind!r:.60}, wanted one of {', '.join(_STORED_KINDS)}")
    older = real(metadata, f"{start}scale_linear", 0.0)
    factor = real(metadata, f"{start}scaling.factor", older) or 1.0  # llama.cpp reads 0 as none
    magnitude = real(metadata, f"{start}scaling.attn_factor", 1.0)
    scaling: dict[str, Any] | None = None
    if "rope_freqs.weight" in factors:
        scaling = llama3_parameters(factors["rope_freqs.weight"], theta)
        scaling = scaling or _exact_factors(factors["rope_freqs.weight"], factors["rope_freqs.weight"], context, 1.0)
    elif "rope_factors_long.weight" in factors and "rope_factors_short.weight" in factors:
        long, short = factors["rope_factors_long.weight"], factors["rope_factors_short.weight"]
        scaling = _exact_factors(long, short, original, magnitude)
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if magnitude != 1.0:
            scaling["attention_factor"] = magnitude * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _original_length(rope: Rope) -> Entries:
    return {"rope.scaling.original_context_length": ("uint32", rope.parameters["original_max_position_embeddings"])}


def _exact_factors(
    long: tuple[float, ...], short: tuple[float, ...], original: int, magnitude: float
) -> dict[str, Any]:
    """LongRoPE is the one kind of config.json that holds any factors."""
    return {
        "rope_type": "longrope",
        "long_factor": [plain_float(value) for value in long],
        "short_factor": [plain_float(value) for value in short],
        "original_max_position_embeddings": original,
        "attention_factor": magnitude,
    }
