"""Changes inputs: bytes anywhere, and fields of the formats they are in, lengths and checksums kept right."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence

from tests.fuzz.surgery import SURGEONS

__all__ = ["mutated", "mutated_once"]

_EDGES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47,
          (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_TEXTS = (b"0", b"-1", b"1", b"2", b"255", b"4096", b"2147483648", b"4294967296", b"9223372036854775807", b"1e308",
          b"18446744073709551615", b"18446744073709551616", b"-0.0", b"1e400", b"0.5", b"NaN", b"null", b"true",
          b"99999999999999999999999999", b'""', b"[]", b"{}", b'"x"')  # fmt: skip
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")

Random = random.Random


def _flip(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _edge(data: bytearray, rng: Random) -> None:
    """Overwrites a number of 1 to 8 bytes, most often near the start, where headers are."""
    width = rng.choice((1, 2, 4, 8))
    if len(data) >= width:
        place = min(int(rng.expovariate(4 / len(data))), len(data) - width)
        place -= place % width if rng.random() < 0.5 else 0
        value = rng.choice(_EDGES) if rng.random() < 0.7 else len(data) + rng.randrange(-16, 17)
        data[place : place + width] = struct.pack("<Q", value % (1 << 64))[:width]


def _count(data: bytearray, rng: Random) -> None:
    """Moves a byte a little up or down."""
    if data:
        place = rng.randrange(len(data))
        data[place] = (data[place] + rng.randrange(-9, 10)) % 256


def _cut(data: bytearray, rng: Random) -> None:
    start, stop = _span(data, rng)
    del data[start:stop]


def _double(data: bytearray, rng: Random) -> None:
    start, stop = _span(data, rng)
    place = rng.choice((stop, rng.randrange(len(data) + 1)))
    data[place:place] = data[start:stop] * rng.choice((1, 1, 2, 40))


def _shorten(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _append(data: bytearray, rng: Random) -> None:
    data += rng.choice((b"\0", b"\0" * 32, b"\n", b" " * 8, rng.randbytes(8)))


def _number(data: bytearray, rng: Random) -> None:
    """Writes another number where one stands as text."""
    found = list(_NUMBER.finditer(data[: 1 << 14]))
    if found:
        one = rng.choice(found)
        data[one.start() : one.end()] = rng.choice(_TEXTS)


def _span(data: bytearray, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 512)))


_PLAIN: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip, _edge, _edge, _count, _cut, _double, _shorten, _append, _number, _number,
)  # fmt: skip


def mutated_once(data: bytes, rng: Random, words: Sequence[bytes] = (), others: Sequence[bytes] = ()) -> bytes:
    """Changes one thing; half of the time a field of the format, where it is one that is known."""
    if rng.random() < 0.5:
        for surgeon in SURGEONS:
            changed = surgeon(data, rng, words)
            if changed is not None:
                return changed
    result = bytearray(data)
    what = rng.random()
    if words and what < 0.15:
        start, stop = _span(result, rng)
        result[start : rng.choice((start, stop))] = rng.choice(words)
    elif others and what < 0.2:
        other = rng.choice(others)
        result[rng.randrange(len(result) + 1) :] = other[rng.randrange(len(other) + 1) :]
    else:
        rng.choice(_PLAIN)(result, rng)
    return bytes(result)


def mutated(
    data: bytes, rng: Random, words: Sequence[bytes] = (), others: Sequence[bytes] = (), max_len: int = 1 << 16
) -> bytes:
    """Changes one to six things."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        data = mutated_once(data, rng, words, others)[:max_len]
    return data
