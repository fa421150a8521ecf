"""Inputs that broke the property once, made anew by code; each must be refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping

from tests.fuzz.binary_targets import TARGETS

__all__ = ["REGRESSIONS"]

_SEEDS = {target.name: target.seeds for target in TARGETS}
_U32, _ARRAY = 4, 9


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _gguf_with(key: str, value: bytes) -> bytes:
    """A model with another value under a key; the old pair gets a name that nobody asks for."""
    data = _SEEDS["gguf-checkpoint"]()["good-model"]
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    old, head = _text(key), 24
    assert old in data
    other = _text("x" * len(key))
    first = old + value
    # the table's values are aligned to 32 bytes behind the header: a text fills what is missing
    filler = _text("filler") + struct.pack("<I", 8)
    size = len(first) + len(filler) + 8
    filled = filler + _text("." * (-size % 32))
    return data[:8] + struct.pack("<QQ", tensors, pairs + 2) + first + filled + data[head:].replace(old, other, 1)


def _number(value: int) -> bytes:
    return struct.pack("<II", _U32, value)


def _strings(*values: str) -> bytes:
    return struct.pack("<IIQ", _ARRAY, 8, len(values)) + b"".join(map(_text, values))


def _index(shard: str) -> bytes:
    return json.dumps({"weight_map": {"a": shard}}).encode()


def _torch(data: bytes) -> bytes:
    """An archive with another data.pkl."""
    import io
    import zipfile

    old = _SEEDS["torch-bin"]()["good"]
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(old)) as archive, zipfile.ZipFile(out, "w") as changed:
        for info in archive.infolist():
            changed.writestr(info.filename, data if info.filename.endswith("data.pkl") else archive.read(info))
    return out.getvalue()


REGRESSIONS: Mapping[str, Mapping[str, Callable[[], bytes]]] = {
    "gguf-checkpoint": {
        "types are one number": lambda: _gguf_with("tokenizer.ggml.token_type", _number(5)),
        "scores are one number": lambda: _gguf_with("tokenizer.ggml.scores", _number(5)),
        "an id is a text": lambda: _gguf_with("tokenizer.ggml.bos_token_id", struct.pack("<I", 8) + _text("gpt2")),
        "an id is an array": lambda: _gguf_with("tokenizer.ggml.bos_token_id", _strings("a")),
        "a token is not UTF-8": lambda: _gguf_with(
            "tokenizer.ggml.tokens", _strings(*(f"t{number}" for number in range(265)), "\udcff")
        ),
    },
    "gguf": {
        "alignment is an array that is written in lines": lambda: _gguf_with(
            "general.name", struct.pack("<I", _U32) + bytes(4)
        ).replace(
            _text("general.file_type") + struct.pack("<II", _U32, 1),
            _text("general.alignment") + struct.pack("<IIQ", _ARRAY, 6, 100) + bytes(400),
        ),
    },
    "safetensors-index": {
        "a name that no file system has": lambda: _index("x" * 300),
        "it is short only in characters": lambda: _index("é" * 128),
    },
    "torch-bin": {
        "pickle ends inside a number": lambda: _torch(b"\x80\x02J\x00"),
        "protocol 1": lambda: _torch(b"\x80\x01K\x05."),
    },
}
