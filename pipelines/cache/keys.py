"""Keys of cache entries: SHA-256 over everything that the bytes of a result depend on, written in one way only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import UsageError

__all__ = ["canonical", "is_key", "key_of", "plain"]

_DEPTH = 48  # values inside values; what is read back may be nested as deep as json_reader.MAX_DEPTH


def key_of(material: Mapping[str, Any]) -> str:
    """Gives the key of a piece of work.

    Args:
        material: what the result depends on: plain values, nested; the order of keys does not matter, the order of
            lists does. 1 and 1.0 differ, a tuple and a list do not.

    Returns:
        SHA-256 of the canonical JSON, hexadecimal.

    Raises:
        UsageError: a number that is NaN, infinite or wider than 64 bits, a text that is not UTF-8, or what is no plain
            value, with its place.
    """
    return hashlib.sha256(canonical(material)).hexdigest()


def canonical(value: Any) -> bytes:
    """Gives the one JSON text of a value: keys sorted, no blanks, ASCII, floats as the shortest text that is exact.

    Raises:
        UsageError: see `key_of`.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def is_key(text: str) -> bool:
    """Whether a text has the form of a key, so that it is safe as a file's name."""
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text)


def plain(value: Any) -> Any:
    """Gives a value as reading its JSON would give it: mappings as dicts, tuples as lists.

    Raises:
        UsageError: see `key_of`.
    """
    return _plain(value, ())


def _plain(value: Any, place: tuple[str, ...]) -> Any:
    """`plain` for a value inside of others, whose names and indices are its place."""
    if len(place) > _DEPTH:
        raise UsageError(f"{_at(place)}: values are nested deeper than {_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, place)
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:  # what json_reader reads
            raise UsageError(f"{_at(place)}: {shown(value)} does not fit 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{_at(place)}: {value} cannot be part of a key; give a finite number")
        return float(value)
    if isinstance(value, Mapping):
        return {_name(key, place): _plain(item, (*place, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*place, str(index))) for index, item in enumerate(value)]
    raise UsageError(
        f"{_at(place)}: {shown(value)} of type {type(value).__name__} is no plain value (text, number, true or false,"
        " null, list, mapping), so no key can hold it"
    )


def _name(key: object, place: tuple[str, ...]) -> str:
    if not isinstance(key, str):
        raise UsageError(f"{_at(place)}: {shown(key)} is no text, so it cannot be a name in a key")
    return _text(key, place)


def _text(value: str, place: tuple[str, ...]) -> str:
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise UsageError(f"{_at(place)}: {shown(value)} is a name that is not UTF-8; rename the file or folder")
    return str.__str__(value)  # of a member of an enumeration, the text


def _at(place: tuple[str, ...]) -> str:
    """A place as messages name it."""
    return shown(".".join(place))[1:-1] if place else "value"
