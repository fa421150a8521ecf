"""Rotary settings of a config.json, in the spelling of any year, and their form in GGUF files.

Sources: transformers' modeling_rope_utils.py (what each kind means), llama.cpp's llama-model.cpp and llama-context.cpp
(which keys its graphs read).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantpress.convert.arch.fields import Config, number, optional_number, short, size, text
from quantpress.convert.arch.spec import Rope
from quantpress.quant.errors import InputError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_PLAIN = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
_YARN = ("attention_factor", "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_OTHERS = ("short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "finetuned")
_KNOWN = frozenset((*_PLAIN, *_YARN, *_OTHERS))
_OWN_ORIGINAL = ("llama3", "yarn", "longrope")  # kinds that need original_max_position_embeddings


def rope_settings(config: Config) -> Mapping[str, Any]:
    """Gives `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5), or nothing.

    Raises:
        InputError: it is no mapping.
    """
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"config.json: {key!r} is {short(value)}, wanted a mapping")
        if value:
            return value
    return {}


def read_rope(
    settings: Mapping[str, Any],
    config: Config,
    *,
    head_dim: int,
    context: int,
    theta: float = 10000.0,
    partial: float = 1.0,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Reads one flat set of rotary settings.

    Args:
        settings: contents of `rope_scaling` or `rope_parameters`, of one layer type where they are nested.
        config: the config.json around it, for `original_max_position_embeddings`.
        head_dim: values per head.
        context: `max_position_embeddings`.
        theta: base where the settings have none.
        partial: share of each head that is turned where the settings have none.
        original: `original_max_position_embeddings` where config.json has none; None means the settings' own.
        aliases: kinds that this family calls otherwise.

    Raises:
        InputError: an unknown kind, an unknown key, a missing or absurd value.
    """
    where = {f"rope_parameters.{key}": value for key, value in settings.items()}
    unknown = sorted(set(settings) - _KNOWN)
    if unknown:
        key = unknown[0]
        raise InputError(f"config.json: rope key {short(key)} is {short(settings[key])}, which is not implemented")
    spelled = "rope_type" if settings.get("rope_type") is not None else "type"
    kind = text(where, f"rope_parameters.{spelled}", "default")
    kind = (aliases or {}).get(kind, kind)
    if kind not in KINDS:
        raise InputError(f"config.json: rope_type is {short(kind)}, not implemented; known: {', '.join(KINDS)}")
    share = number(where, "rope_parameters.partial_rotary_factor", partial, high=1.0)
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise InputError(
            f"config.json: rotary positions turn {dim} of {head_dim} values per head, wanted an even count"
        )
    parameters = {key: value for key, value in settings.items() if value is not None and key not in _NOT_KEPT}
    if kind in _OWN_ORIGINAL:
        parameters["original_max_position_embeddings"] = _original(where, config, context, original)
    _CHECKS[kind](where, dim)
    base = number(where, "rope_parameters.rope_theta", theta, low=1.0)
    return Rope(theta=base, dim=dim, kind=kind, parameters=parameters)


def whole_rope(config: Config, *, head_dim: int, context: int) -> Rope:
    """Reads the rotary settings of a family that turns whole heads, the same in all layers.

    Raises:
        InputError: as `read_rope`, and where a part of the head is turned.
    """
    rope = read_rope(
        rope_settings(config),
        config,
        head_dim=head_dim,
        context=context,
        theta=number(config, "rope_theta", 10000.0, low=1.0),
        partial=number(config, "partial_rotary_factor", 1.0, high=1.0),
    )
    if rope.dim != head_dim:
        raise InputError(f"config.json: 'partial_rotary_factor' turns {rope.dim} of {head_dim}, not implemented here")
    return rope


_NOT_KEPT = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned")


def _original(where: Config, config: Config, context: int, default: int | None) -> int:
    """Training length: config.json's own key goes before the one in the settings, as in transformers."""
    inner_key = "rope_parameters.original_max_position_embeddings"
    outer = config.get("original_max_position_embeddings", default)
    if outer is None:
        return size(where, inner_key, context)
    outer = size({"original_max_position_embeddings": outer}, "original_max_position_embeddings")
    inner = size(where, inner_key, outer)
    if inner != outer:
        raise InputError(f"config.json: 'original_max_position_embeddings' is {outer} and in the rope settings {inner}")
    return outer


def _check_plain(where: Config, dim: int) -> None:
    """Nothing to check: no parameters."""
    del where, dim


def _check_factor(where: Config, dim: int) -> None:
    number(where, "rope_parameters.factor", low=0.0)
    if dim == 2 and where.get("rope_parameters.rope_type", where.get("rope_parameters.type")) == "dynamic":
        raise InputError("config.json: rope_type 'dynamic' needs more than 2 turned values per head")


def _check_llama3(where: Config, dim: int) -> None:
    del dim
    number(where, "rope_parameters.factor")
    low = number(where, "rope_parameters.low_freq_factor")
    high = number(where, "rope_parameters.high_freq_factor")
    if high <= low:
        raise InputError(f"config.json: rope 'high_freq_factor' is {high:g}, wanted above 'low_freq_factor', {low:g}")


def _check_yarn(where: Config, dim: int) -> None:
    del dim
    if "rope_parameters.attn_factor" in where:
        raise InputError("config.json: rope key 'attn_factor' is not implemented; transformers has 'attention_factor'")
    number(where, "rope_parameters.factor")
    for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
        optional_number(where, f"rope_parameters.{key}")
    truncate = where.get("rope_parameters.truncate", True)
    if not isinstance(truncate, bool):
        raise InputError(f"config.json: rope 'truncate' is {short(truncate)}, wanted true or false")


def _check_longrope(where: Config, dim: int) -> None:
    for key in ("short_factor", "long_factor"):
        values = where.get(f"rope_parameters.{key}")
        if not isinstance(values, list | tuple) or len(values) != dim // 2:
            count = len(values) if isinstance(values, list | tuple) else short(values)
            raise InputError(f"config.json: rope {key!r} has {count} values, wanted a list of {dim // 2}")
        for value in values:
            number({key: value}, key)
    optional_number(where, "rope_parameters.factor")
    optional_number(where, "rope_parameters.attention_factor")


_CHECKS = {
    "default": _check_plain,
    "linear": _check_factor,
    "dynamic": _check_factor,
    "llama3": _check_llama3,
    "yarn": _check_yarn,
    "longrope": _check_longrope,
}


def attention_factor(rope: Rope, context: int) -> float:
    """Factor on sine and cosine (transformers: `_compute_yarn_parameters`, `_compute_longrope_parameters`)."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    given = rope.parameters.get("attention_factor")
    if given is not None:
        return float(given)
    original = rope.parameters["original_max_position_embeddings"]
    factor = rope.parameters.get("factor") or context / original
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    mscale, all_dim = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    return _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)


def _mscale(scale: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0


def llama3_factors(rope: Rope) -> tuple[float, ...]:
    """What llama.cpp divides each frequency by: 1 for short waves, `factor` for long ones, a ramp between them.

    Returns:
        `dim / 2` numbers for `rope_freqs.weight`, in float64.
    """
    factor, low = float(rope.parameters["factor"]), float(rope.parameters["low_freq_factor"])
    high, original = float(rope.parameters["high_freq_factor"]), rope.parameters["original_max_position_embeddings"]
    factors = []
    for index in range(0, rope.dim, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / rope.dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def llama3_parameters(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Finds llama3 settings that give these factors to float32 precision; None where the ramp does not tell.

    Only the ratios of the two wavelengths and the training length show in the factors, so `low_freq_factor` is taken
    as 1, as in every published Llama 3.
    """
    dim, factor = 2 * len(factors), max(factors)
    if factor <= 1:
        return None
    inner = [index for index, value in enumerate(factors) if 1 < value < factor]
    if len(inner) < 2:
        return None
    points = []
    for index in (inner[0], inner[-1]):
        smooth = (1 / factors[index] - 1 / factor) / (1 - 1 / factor)
        points.append((1 / (2 * math.pi * theta ** (2 * index / dim)), smooth))
    (left, left_smooth), (right, right_smooth) = points
    slope = (left_smooth - right_smooth) / (left - right)
    offset = left_smooth - slope * left
    if slope <= 0 or offset >= 0:
        return None
    high = round(1 - 1 / offset, 2)
    original = round(slope * (high - 1))
    factor = round(factor, 4)
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    again = llama3_factors(Rope(theta=theta, dim=dim, kind="llama3", parameters=found)) if high > 1 else ()
    # float32 rounding of the file's factors is 2^-24 relative; a factor of 4 for the way it was computed
    close = len(again) == len(factors) and all(abs(a - b) <= 2.0**-22 * b for a, b in zip(again, factors, strict=True))
    return found if close else None
