"""GGUF models: headers, tables and metadata that lie, tensors that fit nothing, parts that do not belong together."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.hostile.case import Case
from tests.hostile.gguf_file import (
    ARRAY,
    BOOL,
    STRING,
    U32,
    Row,
    Whole,
    array,
    good_bytes,
    good_gguf,
    in_parts,
    pair,
    text,
)

CONVERT = ("convert", "bad.gguf", "out.gguf", "--outtype", "f16", "--no-verify")
UNPACK = ("convert", "bad.gguf", "out", "--to", "safetensors", "--no-verify")
INSPECT = ("inspect", "bad.gguf")
WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
_Q, _DOWN, _EMBED, _FIRST = "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"
Change = Callable[[Whole], object]
Said = tuple[Change, tuple[str, ...]]
_ARCH = "general.architecture"


def _file(data: Callable[[], bytes], arguments: Sequence[str] = CONVERT) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        (folder / "bad.gguf").write_bytes(data())
        return arguments

    return make


def _changed(
    change: Change, arguments: Sequence[str] = CONVERT, outtype: str = "f32"
) -> Callable[[Path], Sequence[str]]:
    def built() -> bytes:
        whole = good_gguf(outtype)
        change(whole)
        return whole.built()

    return _file(built, arguments)


def _row(which: str, /, **values: object) -> Change:
    def change(whole: Whole) -> None:
        for key, value in values.items():
            setattr(whole.rows[which], key, value)

    return change


def _shaped(name: str, *dims: int) -> Change:
    """Gives a tensor another shape, with as many values."""

    def change(whole: Whole) -> None:
        whole.rows[name].dims = dims
        whole.rows[name].data = bytes(4 * int(np.prod(dims)))

    return change


def _number(key: str, value: int) -> Change:
    return lambda whole: whole.number(key, value)


def _values(name: str, change: Callable[[np.ndarray], object]) -> Change:
    def act(whole: Whole) -> None:
        values = np.frombuffer(whole.rows[name].data, np.float32).copy()
        change(values)
        whole.rows[name].data = values.tobytes()

    return act


def _put(place: object, value: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(place, value)


def _nan_scale(whole: Whole) -> None:
    row = whole.rows[_Q]
    row.data = struct.pack("<e", float("nan")) + row.data[2:]


_TABLE: dict[str, Said] = {
    "version 1": (lambda w: setattr(w, "start", b"GGUF\x01\0\0\0"), ("version 1",)),
    "big-endian": (lambda w: setattr(w, "start", b"GGUF\0\0\0\x03"), ("big-endian",)),
    "2^63 tensors": (lambda w: setattr(w, "counts", (1 << 63, len(w.pairs))), (str(1 << 63), "tensors")),
    "2^63 pairs": (lambda w: setattr(w, "counts", (len(w.rows), 1 << 63)), (str(1 << 63), "metadata pairs")),
    "a pair more than there is": (lambda w: setattr(w, "counts", (len(w.rows), len(w.pairs) + 1)), ("bad.gguf",)),
    "a tensor less than there is": (
        lambda w: setattr(w, "counts", (len(w.rows) - 1, len(w.pairs))),
        ("bytes follow the last tensor",),
    ),
    "a key twice": (lambda w: w.more.append(w.pairs[_ARCH]), (_ARCH, "twice")),
    "a tensor twice": (lambda w: w.twice.append(w.rows[_Q]), (_Q, "twice")),
    "a string of 2^62 bytes": (
        lambda w: w.more.append(pair("k", STRING, struct.pack("<Q", 1 << 62))),
        (str(1 << 62), "'k'"),
    ),
    "arrays of arrays": (
        lambda w: w.more.append(pair("k", ARRAY, array(ARRAY, 1, array(U32, 0, b"")))),
        ("'k'", "array of arrays"),
    ),
    "an array of 2^61 numbers": (lambda w: w.more.append(pair("k", ARRAY, array(U32, 1 << 61, b""))), ("'k'",)),
    "a kind of value that nobody knows": (lambda w: w.more.append(pair("k", 99, b"")), ("'k'", "99")),
    "a bool of 2": (lambda w: w.more.append(pair("k", BOOL, b"\x02")), ("'k'", "bool")),
    "an alignment of 0": (_number("general.alignment", 0), ("general.alignment is 0",)),
    "an alignment of 3": (_number("general.alignment", 3), ("general.alignment is 3",)),
    "a huge alignment": (_number("general.alignment", 1 << 31), ("general.alignment",)),
    "a type that nobody knows": (_row(_Q, kind=999), (_Q, "999")),
    "a type that was removed": (_row(_Q, kind=4), (_Q, "removed")),
    "an offset outside": (_row(_Q, offset=1 << 40), (_Q, "hole")),
    "an offset of all bits": (_row(_Q, offset=-32), (_Q, "hole")),
    "an offset that overlaps": (_row(_Q, offset=0), (_Q, "overlaps")),
    "an offset that is not aligned": (_row(_Q, offset=4), (_Q, "multiple of 32")),
    "dimensions that overflow": (_row(_DOWN, dims=(1 << 32, 1 << 32)), (_DOWN, "ends at byte")),
    "dimensions that wrap to nought": (_row(_DOWN, dims=(1 << 62, 4)), (_DOWN, "ends at byte")),
    "a dimension of nought": (_row(_Q, dims=(0, 32)), (_Q, "without any values")),
    "five dimensions": (_row(_Q, dims=(32, 32, 1, 1, 1)), (_Q, "5 dimensions")),
    "a name with an escape": (_row(_Q, name="a\x1b[2J"), ("is not a tensor name",)),
    "a name of 64 bytes": (_row(_Q, name="x" * 64), ("is not a tensor name",)),
    "a name that is no UTF-8": (_row(_Q, name=b"\xff\xfe"), ("UTF-8",)),
}
_TENSORS: dict[str, Said] = {
    "a tensor less": (lambda w: w.rows.pop(_Q), (_Q, "missing")),
    "no tensors": (lambda w: w.rows.clear(), ("tensor",)),
    "a tensor that nobody knows": (lambda w: w.rows.update(x=Row("x.weight", (4,), 0, bytes(16))), ("x.weight",)),
    "a tensor named like a path": (_row(_Q, name="../../x"), (_Q, "missing")),
    "a matrix turned": (_row(_DOWN, dims=(32, 64)), (_DOWN, "(64, 32)", "(32, 64)")),
    "a matrix as a vector": (_row(_Q, dims=(1024,)), (_Q, "(1024,)")),
    "a wider matrix": (_shaped(_Q, 64, 32), (_Q, "(32, 64)")),
    "more rows of an embedding than tokens": (_shaped(_EMBED, 32, 321), (_EMBED, "321", "320")),
    "fewer rows of an embedding than tokens": (_shaped(_EMBED, 32, 319), (_EMBED, "319", "320")),
    "whole numbers as weights": (_row(_Q, kind=26), (_Q, "I32")),
    "NaN": (_values(_DOWN, _put(7, np.nan)), ("model.layers.1.mlp.down_proj.weight", "1 ")),
    "infinity": (_values(_FIRST, _put(slice(0, 2), np.inf)), ("model.norm.weight", "2 ")),
}
_KEYS: dict[str, Said] = {
    "no architecture": (lambda w: w.pairs.pop(_ARCH), (_ARCH,)),
    "an architecture that nobody knows": (lambda w: w.set(_ARCH, STRING, text("magic")), ("magic",)),
    "an architecture that is a number": (_number(_ARCH, 7), (_ARCH,)),
    "an architecture named like a path": (lambda w: w.set(_ARCH, STRING, text("../../etc/passwd")), ("passwd",)),
    "an architecture with an escape": (lambda w: w.set(_ARCH, STRING, text("\x1b[2J")), ("bad.gguf",)),
    "block_count is a text": (lambda w: w.set("llama.block_count", STRING, text("2")), ("block_count",)),
    "block_count of 10^9": (_number("llama.block_count", 10**9), ("1000000000",)),
    "block_count of 0": (_number("llama.block_count", 0), ("block_count",)),
    "a block more than there is": (_number("llama.block_count", 3), ("blk.2",)),
    "a block less than there is": (_number("llama.block_count", 1), ("blk.1",)),
    "no block_count": (lambda w: w.pairs.pop("llama.block_count"), ("block_count",)),
    "no embedding_length": (lambda w: w.pairs.pop("llama.embedding_length"), ("embedding_length",)),
    "embedding_length of 0": (_number("llama.embedding_length", 0), ("embedding_length",)),
    "embedding_length of 2^32 - 1": (_number("llama.embedding_length", (1 << 32) - 1), ("4294967295",)),
    "heads that do not divide": (_number("llama.attention.head_count", 5), ("5",)),
    "no heads": (_number("llama.attention.head_count", 0), ("head",)),
    "more heads of keys than heads": (_number("llama.attention.head_count_kv", 8), ("head",)),
    "an epsilon of NaN": (
        lambda w: w.set("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan"))),
        ("epsilon",),
    ),
    "a rope base of infinity": (
        lambda w: w.set("llama.rope.freq_base", 6, struct.pack("<f", float("inf"))),
        ("rope", "inf"),
    ),
    "a rope base below nought": (
        lambda w: w.set("llama.rope.freq_base", 6, struct.pack("<f", -1.0)),
        ("rope_theta", "-1.0"),
    ),
    "a rope base that is a text": (lambda w: w.set("llama.rope.freq_base", STRING, text("x")), ("freq_base",)),
    "a scaling of rope that is a number": (_number("llama.rope.scaling.type", 7), ("rope",)),
    "a scaling of rope that nobody knows": (
        lambda w: w.set("llama.rope.scaling.type", STRING, text("magic")),
        ("magic",),
    ),
    "a factor of rope of NaN": (
        lambda w: (
            w.set("llama.rope.scaling.type", STRING, text("linear")),
            w.set("llama.rope.scaling.factor", 6, struct.pack("<f", float("nan"))),
        ),
        ("factor",),
    ),
    "an epsilon that is a text": (
        lambda w: w.set("llama.attention.layer_norm_rms_epsilon", STRING, text("x")),
        ("epsilon",),
    ),
    "heads by layer": (
        lambda w: w.set("llama.attention.head_count", ARRAY, array(U32, 2, bytes(8))),
        ("head_count",),
    ),
    "a context of nought": (_number("llama.context_length", 0), ("context_length",)),
}


def _tokens(count: int) -> bytes:
    return array(STRING, count, b"".join(text(f"t{number}") for number in range(count)))


_VOCAB: dict[str, Said] = {
    "fewer tokens than rows": (lambda w: w.set("tokenizer.ggml.tokens", ARRAY, _tokens(300)), ("300",)),
    "more tokens than rows": (lambda w: w.set("tokenizer.ggml.tokens", ARRAY, _tokens(400)), ("400",)),
    "no tokens": (lambda w: w.pairs.pop("tokenizer.ggml.tokens"), ("tokenizer.ggml.tokens",)),
    "tokens that are a text": (lambda w: w.set("tokenizer.ggml.tokens", STRING, text("a")), ("tokenizer.ggml.tokens",)),
    "merges that make no sense": (
        lambda w: w.set("tokenizer.ggml.merges", ARRAY, array(STRING, 1, text("nothing"))),
        ("merge 'nothing'",),
    ),
    "merges of tokens that are not there": (
        lambda w: w.set("tokenizer.ggml.merges", ARRAY, array(STRING, 1, text("qqq zzz"))),
        ("qqq",),
    ),
    "a kind of tokenizer that nobody knows": (
        lambda w: w.set("tokenizer.ggml.model", STRING, text("magic")),
        ("magic",),
    ),
    "kinds of fewer tokens": (
        lambda w: w.set("tokenizer.ggml.token_type", ARRAY, array(5, 1, bytes(4))),
        ("token_type",),
    ),
    "a template that is a number": (_number("tokenizer.chat_template", 7), ("tokenizer.chat_template",)),
    "scores missing": (lambda w: w.set("tokenizer.ggml.model", STRING, text("llama")), ("scores",)),
}


def _cut(size: Callable[[bytes], int]) -> Callable[[], bytes]:
    def cut() -> bytes:
        data = good_bytes()
        return data[: size(data)]

    return cut


_BYTES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "empty": (lambda: b"", ("bad.gguf",)),
    "a page of the web": (lambda: b"<!DOCTYPE html>" * 9, ("not a GGUF file",)),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", ("bad.gguf",)),
    "cut in the magic": (_cut(lambda data: 3), ("bad.gguf",)),
    "cut in the counts": (_cut(lambda data: 14), ("left",)),
    "cut in a key": (_cut(lambda data: 40), ("left",)),
    "cut in the vocabulary": (_cut(lambda data: 2000), ("left",)),
    "cut in the table": (_cut(lambda data: 7200), ("bad.gguf",)),
    "cut in the data": (_cut(lambda data: len(data) // 2), ("cut off or damaged",)),
    "cut by a byte": (_cut(lambda data: len(data) - 1), ("cut off or damaged",)),
    "bytes behind its end": (lambda: good_bytes() + bytes(32), ("32 bytes follow",)),
}


def _pipe(folder: Path) -> Sequence[str]:
    os.mkfifo(folder / "bad.gguf")
    return CONVERT


def _folder(folder: Path) -> Sequence[str]:
    (folder / "bad.gguf").mkdir()
    return CONVERT


def _loop(folder: Path) -> Sequence[str]:
    (folder / "bad.gguf").symlink_to("bad.gguf")
    return CONVERT


def _parts(
    change: Callable[[Path, Sequence[Whole]], object] = lambda folder, parts: None,
) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        parts = in_parts(good_gguf(), 3)
        place = folder / "m"
        place.mkdir()
        skipped = change(place, parts)
        for number, part in enumerate(parts, 1):
            if number != skipped:
                (place / f"p-{number:05d}-of-00003.gguf").write_bytes(part.built())
        return ("convert", "m/p-00001-of-00003.gguf", *CONVERT[2:])

    return make


def _led_out(folder: Path, parts: Sequence[Whole]) -> int:
    (folder.parent / "other.gguf").write_bytes(parts[1].built())
    (folder / "p-00002-of-00003.gguf").symlink_to("../other.gguf")
    return 2


def _piped(folder: Path, parts: Sequence[Whole]) -> int:
    os.mkfifo(folder / "p-00003-of-00003.gguf")
    return 3


def _short(key: str, value: int) -> Callable[[Path, Sequence[Whole]], object]:
    return lambda folder, parts: parts[1].set(key, 2, struct.pack("<H", value))


_PARTS: dict[str, tuple[Callable[[Path, Sequence[Whole]], object], tuple[str, ...]]] = {
    "a part is missing": (lambda folder, parts: 2, ("p-00002-of-00003.gguf", "missing")),
    "a part is a pipe": (_piped, ("p-00003-of-00003.gguf", "named pipe")),
    "a part is a link out": (_led_out, ("p-00002-of-00003.gguf", "leaves the model folder")),
    "split.no is wrong": (_short("split.no", 2), ("p-00002-of-00003.gguf", "split.no")),
    "split.count is wrong": (_short("split.count", 4), ("p-00002-of-00003.gguf", "split.count")),
    "a part without split.no": (
        lambda folder, parts: parts[1].pairs.pop("split.no"),
        ("p-00002-of-00003.gguf", "split.no"),
    ),
    "a tensor in two parts": (
        lambda folder, parts: parts[1].rows.update(again=parts[0].rows[_EMBED]),
        (_EMBED, "earlier part"),
    ),
    "tensors fewer than promised": (
        lambda folder, parts: parts[1].rows.popitem(),
        ("split.tensors.count",),
    ),
    "60,000 parts": (
        lambda folder, parts: parts[0].set("split.count", 2, struct.pack("<H", 60_000)),
        ("split.count is 60000",),
    ),
}


def _many(said: dict[str, Said], *arguments: Sequence[str]) -> list[Case]:
    return [
        Case("GGUF", f"{name}{', unpacked' if each is UNPACK else ''}", _changed(change, each), words=words)
        for each in arguments
        for name, (change, words) in said.items()
    ]


CASES: tuple[Case, ...] = (
    Case("GGUF", "good", _changed(lambda w: None), code=0, writes=WRITTEN),
    Case("GGUF", "good, unpacked", _changed(lambda w: None, UNPACK), code=0, writes=("out",)),
    Case("GGUF", "good, looked at", _changed(lambda w: None, INSPECT), code=0),
    Case("GGUF", "good, in parts", _parts(), code=0, writes=WRITTEN),
    Case("GGUF", "good, version 2", _changed(lambda w: setattr(w, "start", b"GGUF\x02\0\0\0")), code=0, writes=WRITTEN),
    Case(
        "GGUF",
        "good, a start outside the vocabulary is passed over",  # as llama.cpp does
        _changed(_number("tokenizer.ggml.bos_token_id", 9999), UNPACK),
        code=0,
        writes=("out",),
    ),
    *(Case("GGUF", name, _file(data), words=words) for name, (data, words) in _BYTES.items()),
    *_many(_TABLE, CONVERT),
    *_many(_TENSORS, CONVERT),
    *_many(_KEYS, CONVERT),
    *_many(_VOCAB, UNPACK),
    Case("GGUF", "a scale of NaN in a block", _changed(_nan_scale, outtype="q4_0"), words=("q_proj", "32 ")),
    Case("GGUF", "a pipe", _pipe, words=("bad.gguf", "named pipe")),
    Case("GGUF", "a folder", _folder, words=("bad.gguf",)),
    Case("GGUF", "a link to itself", _loop, words=("bad.gguf",)),
    *(Case("GGUF", name, _parts(change), words=words) for name, (change, words) in _PARTS.items()),
)
