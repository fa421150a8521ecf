"""Numbers out of a GGUF file's metadata, whose types and sizes a stranger chose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.fields import LARGEST, plain_float, short
from quantpress.quant.errors import InputError

__all__ = ["Metadata", "real", "whole"]

Metadata = Mapping[str, Any]


def whole(metadata: Metadata, key: str, default: int | None = None) -> int:
    """Gives a size from GGUF metadata.

    Raises:
        InputError: the key is missing without default, no whole number (an array: sizes that differ by layer), absurd.
    """
    value = metadata.get(key, default)
    if value is None:
        raise InputError(f"GGUF: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"GGUF: key {key!r} is {short(value)}, wanted one whole number for all layers")
    if not 1 <= value <= LARGEST:
        raise InputError(f"GGUF: key {key!r} is {value}, wanted 1 to {LARGEST}")
    return value


def real(metadata: Metadata, key: str, default: float | None = None) -> float:
    """Gives a number from GGUF metadata, as the shortest decimal that has the same float32 value.

    Raises:
        InputError: the key is missing without default, or no finite number.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"GGUF: key {key!r} is {short(value)}, wanted a number")
    if not math.isfinite(value):
        raise InputError(f"GGUF: key {key!r} is {value}, wanted a finite number")
    return plain_float(value)
