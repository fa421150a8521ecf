"""Parses JSON that strangers wrote: bounded in size, depth and number of values before anything is built from it."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from quantpress.convert.files import MAX_SMALL_FILE, read_bounded, shown
from quantpress.quant.errors import InputError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "many_objects", "parse_json", "read_json"]

MAX_DEPTH = 64  # brackets inside brackets; config.json of real models needs 6
MAX_VALUES = 4_000_000  # commas and brackets, and strings; the largest tokenizer.json in use (Gemma 3) has 2,100,000
_MAX_DIGITS = 20  # digits of an integer, enough for 64 bits
_SAFE_DIGITS = 18  # digits of an integer that fits 64 bits whatever they are
# int(1e30), which transformers writes as `model_max_length` of tokenizers without a limit (VERY_LARGE_INTEGER)
_NO_LIMIT = "1000000000000000019884624838656"
_MAX_FLOAT = 400  # characters of a number with a point or exponent
_MAX_RUN = 8 << 20  # bytes without a quotation mark; the longest text in use, a character map, has half a million
_MAX_WIDE = 40 << 20  # bytes with other characters than ASCII: Python keeps one emoji's text at 4 bytes a character
_CHUNK = 1 << 20  # bytes scanned at a time, so that the scan itself needs little memory

_STRUCTURE = b'"[]{},'
_OTHERS = bytes(set(range(256)) - set(_STRUCTURE))
_QUOTE, _COMMA = _STRUCTURE[0], _STRUCTURE[5]
# [ and { are 0x5B and 0x7B, their closing brackets 0x5D and 0x7D
_STEP = np.zeros(256, np.int32)
_STEP[[0x5B, 0x7B]] = 1
_STEP[[0x5D, 0x7D]] = -1
# every digit as a nought, everything else as a blank
_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path | str, *, limit: int = MAX_SMALL_FILE, max_values: int = MAX_VALUES) -> Any:
    """Reads a JSON file of at most `limit` bytes.

    Raises:
        InputError: the file cannot be read, or is refused by `parse_json`.
    """
    return parse_json(read_bounded(path, limit), name=str(path), max_values=max_values)


def parse_json(data: bytes, *, name: str, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """Parses JSON text more strictly than `json.loads`. The caller bounds the number of bytes.

    Args:
        data: UTF-8 without a byte order mark.
        name: the file, for messages.
        max_depth: greatest number of open brackets.
        max_values: greatest number of commas and brackets outside strings.

    Raises:
        InputError: not UTF-8, not JSON, too deep, too many values, a key twice in one object, NaN or Infinity, an
            integer beyond 64 bits (but for transformers' mark of "no limit"), half of a surrogate pair.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise InputError(f"{name}: JSON starts with a byte order mark; save it as UTF-8 without one")
    if len(data) > _MAX_WIDE and not data.isascii():
        raise InputError(f"{name}: {len(data)} bytes of JSON, at most {_MAX_WIDE} with other characters than ASCII")
    _check_structure(data, name, max_depth, max_values)

    def refuse(text: str) -> NoReturn:
        raise InputError(f"{name}: JSON holds {text}, which is not a finite number")

    def to_int(text: str) -> int:
        if text == _NO_LIMIT:
            return int(text)
        if len(text) > _MAX_DIGITS or not -(1 << 63) <= (value := int(text)) < (1 << 64):
            raise InputError(f"{name}: JSON holds the integer {text[:40]}..., which does not fit 64 bits")
        return value

    def to_float(text: str) -> float:
        if len(text) > _MAX_FLOAT or not math.isfinite(value := float(text)):
            refuse(text[:40])
        return value

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise InputError(f"{name}: JSON holds the key {shown(_first_twice(pairs))} twice in one object")
        return result

    try:
        text = data.decode("utf-8")
        ints = to_int if _has_long_number(data) else None  # None: json's own, which calls nothing for each of them
        with many_objects():
            value = json.loads(
                text, object_pairs_hook=to_dict, parse_int=ints, parse_float=to_float, parse_constant=refuse
            )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: JSON holds half of a surrogate pair, which no text may hold") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    return value


@contextlib.contextmanager
def many_objects() -> Iterator[None]:
    """Makes objects without looking for cycles among them, which takes as long again where there are a million."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _has_long_number(data: bytes) -> bool:
    """Whether digits follow each other that need not fit 64 bits; in a text too."""
    long = b"0" * (_SAFE_DIGITS + 1)
    return any(
        long in data[start : start + _CHUNK + _SAFE_DIGITS].translate(_DIGITS) for start in range(0, len(data), _CHUNK)
    )


def _first_twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _check_structure(data: bytes, name: str, max_depth: int, max_values: int) -> None:
    """Counts depth and values without building anything; what a parser reads before its first error is counted."""
    depth, values, strings, in_string, start, run = 0, 0, 0, 0, 0, 0
    while start < len(data):
        chunk = data[start : start + _CHUNK]
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:  # an escape must not be cut from the character it escapes
            chunk = data[start : start + _CHUNK + 1]
        start += len(chunk)
        plain = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in chunk else chunk
        last_quote = plain.rfind(b'"')
        run = len(plain) - last_quote - 1 if last_quote >= 0 else run + len(plain)
        if run > _MAX_RUN:
            raise InputError(f"{name}: JSON holds a text or a gap of more than {_MAX_RUN} bytes")
        bare = plain.translate(None, _OTHERS)
        marks = np.frombuffer(bare, np.uint8)
        quotes = np.cumsum(marks == _QUOTE, dtype=np.int32) + in_string
        outside = marks[(quotes & 1) == 0]
        strings += plain.count(b'"')
        in_string = int(quotes[-1]) & 1 if quotes.size else in_string
        depths = np.cumsum(_STEP[outside], dtype=np.int32) + depth
        values += int(np.count_nonzero(outside == _COMMA)) + int(np.count_nonzero(_STEP[outside] > 0))
        if depths.size:
            depth = int(depths[-1])
            if int(depths.max()) > max_depth:
                raise InputError(f"{name}: JSON is nested deeper than {max_depth} levels")
        if max(values, strings // 2) > max_values:
            raise InputError(f"{name}: JSON holds more than {max_values} values")
