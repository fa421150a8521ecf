"""What is fuzzed: one of our parsers, given bytes of a stranger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Attributes:
        name: of the target, `safetensors-header`.
        file: name of the file, inside the folder, that the made-up bytes are written to.
        prepare: makes the good rest of a folder, once; the file may lie there as a good one.
        parse: opens the folder as the product does; may raise typed errors and nothing else.
        seeds: name -> bytes of good and nearly good files, made on the spot.
        words: byte strings that a mutation may insert.
        max_len: longest input in bytes.
    """

    name: str
    file: str
    prepare: Callable[[Path], None]
    parse: Callable[[Path], object]
    seeds: Callable[[], Mapping[str, bytes]]
    words: tuple[bytes, ...] = ()
    max_len: int = 1 << 16
