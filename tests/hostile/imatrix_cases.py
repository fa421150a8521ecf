"""Importance matrices: of another model, with numbers that no squares have, garbage of either form."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.hostile.case import Case
from tests.hostile.gguf_file import ARRAY, STRING, U32, Row, Whole, array, pair, text
from tests.hostile.model import good_model

USE = ("convert", "model", "out.gguf", "--outtype", "q4_0", "--no-verify", "--imatrix")
_WIDTHS = {"attn_q": 32, "attn_k": 32, "attn_v": 32, "attn_output": 32, "ffn_gate": 32, "ffn_up": 32, "ffn_down": 64}
_SUMS, _COUNTS = "blk.1.ffn_down.weight.in_sum2", "blk.1.ffn_down.weight.counts"


def _whole() -> Whole:
    whole = Whole({}, {})
    whole.set("general.type", STRING, text("imatrix"))
    whole.set("imatrix.datasets", ARRAY, array(STRING, 1, text("a.txt")))
    whole.number("imatrix.chunk_count", 4)
    whole.number("imatrix.chunk_size", 32)
    for layer in range(2):
        for name, width in _WIDTHS.items():
            start = f"blk.{layer}.{name}.weight"
            whole.rows[f"{start}.in_sum2"] = Row(f"{start}.in_sum2", (width,), 0, np.ones(width, "<f4").tobytes())
            whole.rows[f"{start}.counts"] = Row(f"{start}.counts", (1,), 0, np.full(1, 128, "<f4").tobytes())
    return whole


def _made(change: Callable[[Whole], object]) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        good_model(folder)
        whole = _whole()
        change(whole)
        (folder / "m.gguf").write_bytes(whole.built())
        return (*USE, "m.gguf")

    return make


def _old(data: bytes) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        good_model(folder)
        (folder / "m.dat").write_bytes(data)
        return (*USE, "m.dat")

    return make


def _entry(name: str, calls: int, values: np.ndarray) -> bytes:
    raw = name.encode()
    head = struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size)
    return head + values.astype("<f4").tobytes()


def _row(name: str, values: Sequence[float]) -> Callable[[Whole], object]:
    data = np.array(values, "<f4")
    return lambda whole: whole.rows.update({name: Row(name, (data.size,), 0, data.tobytes())})


def _of_another_model(whole: Whole) -> None:
    for row in whole.rows.values():
        row.name = str(row.name).replace("blk.", "blk.7")


_ENTRIES = b"".join(
    _entry(f"blk.{layer}.{name}.weight", 4, np.ones(width)) for layer in range(2) for name, width in _WIDTHS.items()
)
_GOOD_OLD = struct.pack("<i", 2 * len(_WIDTHS)) + _ENTRIES + struct.pack("<ii", 4, 5) + b"a.txt"
_NEW: Mapping[str, tuple[Callable[[Whole], object], tuple[str, ...]]] = {
    "NaN": (_row(_SUMS, [float("nan")] * 64), ("ffn_down", "64 of 64", "m.gguf")),
    "infinity": (_row(_SUMS, [float("inf")] + [1.0] * 63), ("ffn_down", "1 of 64")),
    "below nought": (_row(_SUMS, [-1.0] * 64), ("ffn_down", "-1")),
    "counts below nought": (_row(_COUNTS, [-5.0]), ("ffn_down", "-5")),
    "counts that do not divide": (_row(_COUNTS, [1.0] * 7), ("ffn_down", "7")),
    "a width of another model": (_row(_SUMS, [1.0] * 96), ("ffn_down", "96")),
    "of another model": (_of_another_model, ("m.gguf",)),
    "sums without counts": (lambda whole: whole.rows.pop(_COUNTS), (_COUNTS, "missing")),
    "no tensors": (lambda whole: whole.rows.clear(), ("not an importance matrix",)),
    "no number of chunks": (lambda whole: whole.pairs.pop("imatrix.chunk_count"), ("imatrix.chunk_count",)),
    "a text as number of chunks": (
        lambda whole: whole.set("imatrix.chunk_count", STRING, text("4")),
        ("imatrix.chunk_count",),
    ),
    "texts that are a number": (lambda whole: whole.number("imatrix.datasets", 4), ("imatrix.datasets",)),
    "2^63 tensors": (lambda whole: setattr(whole, "counts", (1 << 63, 4)), (str(1 << 63),)),
    "a key twice": (lambda whole: whole.more.append(pair("imatrix.chunk_size", U32, bytes(4))), ("twice",)),
}
_OLD: Mapping[str, tuple[bytes, tuple[str, ...]]] = {
    "a number of entries below nought": (struct.pack("<i", -1), ("number of entries", "-1")),
    "2^31 - 1 entries": (struct.pack("<i", (1 << 31) - 1) + _ENTRIES, ("number of entries",)),
    "a name of 2^30 bytes": (struct.pack("<ii", 1, 1 << 30) + bytes(99), ("name",)),
    "values beyond the end": (_GOOD_OLD[:60], ("m.dat",)),
    "NaN, old": (struct.pack("<i", 1) + _entry("blk.0.attn_q.weight", 1, np.full(32, np.nan)), ("attn_q", "32 of 32")),
    "an entry twice": (struct.pack("<i", 2) + 2 * _entry("blk.0.attn_q.weight", 1, np.ones(32)), ("attn_q", "twice")),
    "calls below nought": (struct.pack("<i", 1) + _entry("blk.0.attn_q.weight", -1, np.ones(32)), ("calls", "-1")),
}


def _pipe(folder: Path) -> Sequence[str]:
    good_model(folder)
    os.mkfifo(folder / "m.gguf")
    return (*USE, "m.gguf")


_WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
CASES: tuple[Case, ...] = (
    Case("importance", "good", _made(lambda whole: None), code=0, writes=_WRITTEN, megabytes=1000),  # numba compiles
    Case("importance", "good, old", _old(_GOOD_OLD), code=0, writes=_WRITTEN, megabytes=1000),
    *(Case("importance", name, _made(change), words=words) for name, (change, words) in _NEW.items()),
    *(Case("importance", name, _old(data), words=words) for name, (data, words) in _OLD.items()),
    Case("importance", "a pipe", _pipe, words=("m.gguf", "named pipe")),
)
