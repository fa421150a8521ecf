"""Reads values of a config.json that a stranger wrote: right type, within reason, or an error naming the key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from quantpress.quant.errors import InputError

Config = Mapping[str, Any]

LARGEST = 10_000_000  # no size of a language model is near it; a product of two still fits 64 bits
# What is written out one by one has bounds of its own: the deepest model has 1,000 layers, no layer has 1,000
# experts or heads, and the largest vocabulary has 262,144 tokens.
_BOUNDS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 10_000),
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts"), 1024),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), 65_536),
        **dict.fromkeys(("vocab_size", "padded_vocab_size"), 1 << 21),
        **dict.fromkeys(
            ("head_dim", "kv_channels", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 65_536
        ),
        **dict.fromkeys(("relative_attention_max_distance", "relative_attention_num_buckets"), 65_536),
    }
)
MISSING: Any = object()

ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {  # transformers' ACT2FN names -> ours
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
    }
)

# Keys that change what a model computes, and the values that say "not used". No family here implements the rest.
# A None among the values also stands for "null".
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "add_cross_attention": (False, None),
        "alibi": (False, None),
        "attention_multiplier": (None,),
        "attention_out_bias": (False, None),
        "clip_qkv": (None,),
        "embedding_multiplier": (1, None),
        "is_causal": (True, None),
        "is_encoder_decoder": (False, None),
        "layer_norm_bias": (False, None),
        "logit_scale": (1, None),
        "logits_scaling": (1, None),
        "mlp_only_layers": ((), None),
        "mrope_section": (None,),
        "n_shared_experts": (0, None),
        "no_rope_layers": (None,),
        "num_experts": (0, 1, None),
        "num_local_experts": (0, 1, None),
        "parallel_attn": (False, None),
        "qk_layernorm": (False, None),
        "residual_multiplier": (1, None),
        "rope_interleaved": (False, None),
        "scale_depth": (None,),
        "scale_emb": (1, None),
        "use_bidirectional_attention": (False, None),
        "use_mrope": (False, None),
        "use_qk_norm": (False, None),
    }
)


def get(config: Config, key: str, default: Any = MISSING) -> Any:
    """Gives a value, the default if the key is absent or null.

    Raises:
        InputError: the key is absent or null and there is no default.
    """
    value = config.get(key)
    if value is not None:
        return value
    if default is MISSING:
        raise InputError(f"config.json: key {key!r} is missing; without it the shapes of the model are not known")
    return default


def size(config: Config, key: str, default: Any = MISSING) -> int:
    """Gives a whole number from 1 to `LARGEST`, or to a smaller bound that a key has of its own.

    Raises:
        InputError: the key is missing without default, not a whole number, or absurd.
    """
    value = get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted a whole number")
    bound = _BOUNDS.get(key, LARGEST)
    if not 1 <= value <= bound:
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted 1 to {bound}")
    return value


def spelled(config: Config, *keys: str, default: Any = MISSING) -> int:
    """Gives a size that was called otherwise in other years.

    Args:
        config: the config.json.
        keys: its names, the one that is looked at first before the others.
        default: where no key has a value.

    Raises:
        InputError: as `size`, and where two of the keys disagree.
    """
    given = {key: size(config, key) for key in keys if config.get(key) is not None}
    if len(set(given.values())) > 1:
        (one, first), (other, second) = list(given.items())[:2]
        raise InputError(f"config.json: {one!r} is {first} and {other!r} is {second}; they mean the same")
    return next(iter(given.values())) if given else size(config, keys[0], default)


def number(config: Config, key: str, default: Any = MISSING, *, low: float = 0.0, high: float = 1e12) -> float:
    """Gives a finite number above `low` and not above `high`.

    Raises:
        InputError: the key is missing without default, not a number, not finite, or out of range.
    """
    value = get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted a number")
    if not (math.isfinite(value) and low < value <= high):
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted a number above {low:g} and up to {high:g}")
    return float(value)


def optional_number(config: Config, key: str, default: float | None = None) -> float | None:
    """Gives a positive number; None for null. The default stands in only where the key is absent."""
    if key not in config:
        return default
    return None if config[key] is None else number(config, key)


def flag(config: Config, key: str, default: bool) -> bool:
    """Gives true or false.

    Raises:
        InputError: the value is something else.
    """
    value = get(config, key, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted true or false")
    return value


def text(config: Config, key: str, default: Any = MISSING) -> str:
    """Gives a string.

    Raises:
        InputError: the key is missing without default, or the value is no string.
    """
    value = get(config, key, default)
    if not isinstance(value, str):
        raise InputError(f"config.json: {key!r} is {short(value)}, wanted a string")
    return value


def activation(config: Config, key: str, default: str) -> str:
    """Gives an activation by the name `Hyperparameters.activation` has for it.

    Raises:
        InputError: the name is not one of `ACTIVATIONS`.
    """
    name = text(config, key, default)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: {key!r} is {short(name)}, an activation not implemented here; known: {known}")
    return ACTIVATIONS[name]


def refuse(config: Config, neutral: Mapping[str, Sequence[Any]]) -> None:
    """Refuses keys that switch on what is not implemented.

    Raises:
        InputError: one of the keys has a value that is not among its neutral ones.
    """
    for key, values in neutral.items():
        if key not in config:
            continue
        value = tuple(config[key]) if isinstance(config[key], list) else config[key]
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            raise InputError(f"config.json: {key!r} is {short(config[key])}, which is not implemented")


def refuse_others(config: Config, *implemented: str) -> None:
    """Refuses the keys of `NEUTRAL` but those that a family implements; see `refuse`."""
    refuse(config, {key: values for key, values in NEUTRAL.items() if key not in implemented})


def grouped_heads(heads: int, kv_heads: int) -> None:
    """Checks that each key-value head serves the same number of query heads.

    Raises:
        InputError: it does not.
    """
    if heads % kv_heads:
        wanted = f"a multiple of 'num_key_value_heads', which is {kv_heads}"
        raise InputError(f"config.json: 'num_attention_heads' is {heads}, wanted {wanted}")


def head_size(hidden: int, heads: int, key: str = "num_attention_heads") -> int:
    """Gives the size of a head where no key states it.

    Raises:
        InputError: the hidden size does not divide by the number of heads.
    """
    if hidden % heads:
        raise InputError(f"config.json: the hidden size {hidden} is not divisible by {key!r}, which is {heads}")
    return hidden // heads


def layer_kinds(config: Config, layers: int) -> tuple[bool, ...] | None:
    """Gives for each layer whether `layer_types` makes it slide; None without that key.

    Raises:
        InputError: not a list of that many known names.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise InputError(f"config.json: 'layer_types' is {short(kinds)}, wanted a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"config.json: 'layer_types' holds {short(kind)}, which is not implemented")
    return tuple(kind == "sliding_attention" for kind in kinds)


def short(value: Any) -> str:
    """Spells a value for a message, cut where a stranger made it long."""
    spelled = repr(value)
    return spelled if len(spelled) <= 60 else spelled[:57] + "..."


def plain_float(value: float) -> float:
    """Gives the shortest decimal that rounds to the same float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
