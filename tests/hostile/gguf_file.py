"""A small good GGUF file in pieces, to be put together wrongly; read and written without the program's own code."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from tests.hostile.model import good_model

__all__ = ["ALIGNMENT", "U32", "Row", "Whole", "array", "good_gguf", "pair", "text"]

ALIGNMENT = 32
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    """Gives a string as GGUF has it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    """Gives a pair of metadata."""
    return text(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, items: bytes) -> bytes:
    """Gives the value of an array."""
    return struct.pack("<IQ", item, count) + items


@dataclass
class Row:
    """A tensor: `dims` innermost first, as the file has them; `offset` None is the place where it lies."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class Whole:
    """What a file is made of."""

    pairs: dict[str, bytes]
    rows: dict[str, Row]
    start: bytes = b"GGUF\x03\x00\x00\x00"
    counts: tuple[int, int] | None = None
    more: list[bytes] = field(default_factory=list)  # pairs that the counts count
    twice: list[Row] = field(default_factory=list)  # rows that stand once more at the end

    def set(self, key: str, kind: int, value: bytes) -> None:
        """Sets a pair."""
        self.pairs[key] = pair(key, kind, value)

    def number(self, key: str, value: int) -> None:
        """Sets a number."""
        self.set(key, U32, struct.pack("<I", value))

    def built(self) -> bytes:
        """Puts it together."""
        pairs = [*self.pairs.values(), *self.more]
        rows = [*self.rows.values(), *self.twice]
        head = self.start + struct.pack("<QQ", *(self.counts or (len(rows), len(pairs)))) + b"".join(pairs)
        data = b""
        for row in rows:
            offset = len(data) if row.offset is None else row.offset
            head += text(row.name) + struct.pack(
                f"<I{len(row.dims)}QIQ", len(row.dims), *row.dims, row.kind, offset % (1 << 64)
            )
            data += row.data + bytes(-len(row.data) % ALIGNMENT)
        return head + bytes(-len(head) % ALIGNMENT) + data


@functools.cache
def _good(outtype: str) -> bytes:
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.gguf_stage import Gguf
    from quantpress.pipelines.runner import press
    from quantpress.pipelines.stage import RunContext

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "good.gguf"
        press(open_checkpoint(good_model(Path(folder))), Gguf(output=out, outtype=outtype), RunContext(threads=1))
        return out.read_bytes()


def good_bytes(outtype: str = "f32") -> bytes:
    """Gives a good file."""
    return _good(outtype)


@functools.cache
def _pieces(outtype: str) -> tuple[dict[str, bytes], tuple[tuple[str, tuple[int, ...], int, bytes], ...]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.gguf"
        path.write_bytes(_good(outtype))
        reader = gguf.GGUFReader(path)
        pairs = {
            name: b"".join(part.tobytes() for part in found.parts)
            for name, found in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        rows = tuple(
            (each.name, tuple(int(size) for size in each.shape), int(each.tensor_type), each.data.tobytes())
            for each in reader.tensors
        )
        return pairs, rows


def good_gguf(outtype: str = "f32") -> Whole:
    """Gives the pieces of a good file, to be changed."""
    pairs, rows = _pieces(outtype)
    return Whole(dict(pairs), {name: Row(name, dims, kind, data) for name, dims, kind, data in rows})


def in_parts(whole: Whole, count: int) -> Sequence[Whole]:
    """Divides a file into parts as llama.cpp has them."""
    names = list(whole.rows)
    size = -(-len(names) // count)
    parts = []
    for number in range(count):
        rows = {name: whole.rows[name] for name in names[number * size : (number + 1) * size]}
        part = Whole(dict(whole.pairs) if number == 0 else {}, rows)
        part.set("split.no", 2, struct.pack("<H", number))
        part.set("split.count", 2, struct.pack("<H", count))
        part.set("split.tensors.count", I32, struct.pack("<i", len(names)))
        parts.append(part)
    return parts
