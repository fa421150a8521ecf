"""Checkpoint folders: what lies where a file is expected, headers, shards, weights."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.hostile.case import Case
from tests.hostile.model import CONVERT, HIDDEN, good_model, spoilt, weights

WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
INSPECT = ("inspect", "model")
_FIRST = "model.layers.0.self_attn.q_proj.weight"


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


def _link(path: Path, target: str) -> None:
    path.symlink_to(target)


def _outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.mkdir()
    (outside / path.name).write_bytes(b"{}")
    path.symlink_to(outside / path.name)


def _chain(path: Path) -> None:
    (path.parent / "step").symlink_to("/etc/hostname")
    path.symlink_to("step")


_KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a named pipe": (os.mkfifo, "named pipe"),
    "a socket": (_socket, "a socket"),
    "a folder": (Path.mkdir, "a folder"),
    "a link to a device": (lambda path: _link(path, "/dev/zero"), "leaves the model folder"),
    "a link out of the folder": (_outside, "leaves the model folder"),
    "a link to /etc/passwd": (lambda path: _link(path, "/etc/passwd"), "leaves the model folder"),
    "a link to /proc/self/mem": (lambda path: _link(path, "/proc/self/mem"), "leaves the model folder"),
    "a chain of links out": (_chain, "leaves the model folder"),
    "a link to itself": (lambda path: _link(path, path.name), ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "HTML": (lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"), ""),
}
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / name).unlink()
        put(model / name)

    return change


def _kinds() -> list[Case]:
    return [
        Case("checkpoint", f"{name} is {kind}", spoilt(_instead(name, put)), words=(name, words))
        for name in _FILES
        for kind, (put, words) in _KINDS.items()
    ]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def act(model: Path) -> None:
        path = model / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return act


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def act(model: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return act


def _with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


_HEADERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "offsets overlap": (_header(lambda h: _shift(h, -4)), ("overlaps",)),
    "a hole": (_header(lambda h: _shift(h, 4)), ("hole",)),
    "an offset beyond the file": (_header(lambda h: h[_FIRST].update(data_offsets=[0, 1 << 40])), (_FIRST,)),
    "an offset below zero": (_header(lambda h: h[_FIRST].update(data_offsets=[-8, 0])), (_FIRST, "places")),
    "sizes whose product wraps": (_header(lambda h: h[_FIRST].update(shape=[1 << 33, 1 << 31])), (_FIRST, "needs")),
    "a size below zero": (_header(lambda h: h[_FIRST].update(shape=[-32, -32])), (_FIRST, "shape")),
    "a type that is not known": (_header(lambda h: h[_FIRST].update(dtype="F12")), (_FIRST, "'F12'")),
    "a type of two numbers": (_header(lambda h: h[_FIRST].update(dtype="C64")), (_FIRST, "'C64'")),
    "a field more": (_header(lambda h: h[_FIRST].update(code="import os")), (_FIRST,)),
    "a header of 2**63 bytes": (_raw(lambda data: (1 << 63).to_bytes(8, "little") + data[8:]), ("header of",)),
    "a header longer than the file": (_raw(lambda data: (1 << 30).to_bytes(8, "little") + data[8:]), ("header of",)),
    "cut in the header": (_raw(lambda data: data[:100]), ("header of",)),
    "cut in the weights": (_raw(lambda data: data[:-7]), ("cut short or damaged",)),
    "bytes after the weights": (_raw(lambda data: data + b"x" * 9), ("9 bytes after the last tensor",)),
    "a tensor twice": (_raw(lambda data: _with_header(b'{"x":{},"x":{}}')), ("'x' twice",)),
    "deep": (_raw(lambda data: _with_header(b'{"x":' + b"[" * 50_000)), ("deeper",)),
    "NaN in the header": (_raw(lambda data: _with_header(b'{"x":NaN}')), ("NaN",)),
    "a pickle": (_raw(lambda data: b"\x80\x04cposix\nsystem\n."), ("model.safetensors",)),
    "a pointer of git lfs": (
        _raw(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("git lfs pull",),
    ),
}


def _shift(header: dict[str, Any], by: int) -> None:
    begin, end = header[_FIRST]["data_offsets"]
    header[_FIRST]["data_offsets"] = [begin + by, end + by]


def _headers() -> list[Case]:
    return [
        Case("safetensors", name, spoilt(change), words=("model.safetensors", *words))
        for name, (change, words) in _HEADERS.items()
    ]


def _held(change: Callable[[dict[str, np.ndarray]], object], **config: Any) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        held = weights()
        change(held)
        good_model(folder, held, **config)
        return CONVERT

    return make


def bad_weights(model: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Writes other weights into a model."""
    held = weights()
    change(held)
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})


def _set(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda held: held.update({name: change(held[name])})


def _nan(values: np.ndarray) -> np.ndarray:
    values[1, 2] = values[3, 4] = np.nan
    return values


def _infinite(values: np.ndarray) -> np.ndarray:
    values[0, 0] = -np.inf
    return values


_EXTRA = np.zeros((4, 4), np.float32)
_WEIGHTS: dict[str, tuple[Callable[[Path], Sequence[str]], tuple[str, ...]]] = {
    "NaN": (_held(_set(_FIRST, _nan)), (_FIRST, "2 ")),
    "infinity": (_held(_set(_FIRST, _infinite)), (_FIRST, "1 ")),
    "NaN in a norm": (_held(_set("model.norm.weight", lambda v: v * np.float32("nan"))), ("model.norm.weight", "32")),
    "whole numbers": (_held(_set(_FIRST, lambda v: v.astype(np.int64))), (_FIRST, "I64")),
    "truth values": (_held(_set(_FIRST, lambda v: v > 0)), (_FIRST, "BOOL")),
    "bytes": (_held(_set(_FIRST, lambda v: v.astype(np.uint8))), (_FIRST, "U8")),
    "a matrix turned": (_held(_set("model.layers.1.mlp.up_proj.weight", lambda v: v.T.copy())), ("up_proj", "64")),
    "a matrix as a vector": (_held(_set(_FIRST, lambda v: v.reshape(-1))), (_FIRST,)),
    "a scalar": (_held(_set("model.norm.weight", lambda v: np.ones((), np.float32))), ("model.norm.weight",)),
    "a tensor less": (_held(lambda h: h.pop(_FIRST)), (_FIRST, "missing")),
    "a norm less": (_held(lambda h: h.pop("model.norm.weight")), ("model.norm.weight", "missing")),
    "the embedding less": (_held(lambda h: h.pop("model.embed_tokens.weight")), ("model.embed_tokens.weight",)),
    "the head less": (_held(lambda h: h.pop("lm_head.weight")), ("lm_head.weight",)),
    "a layer less": (_held(lambda h: [h.pop(n) for n in list(h) if ".layers.1." in n]), ("layer 1 is missing",)),
    "a layer more": (
        _held(lambda h: h.update({n.replace(".1.", ".2."): v for n, v in h.items() if ".layers.1." in n})),
        ("layer 2 is unexpected",),
    ),
    "a tensor more": (
        _held(lambda h: h.update({"model.layers.0.extra.weight": _EXTRA})),
        ("model.layers.0.extra.weight",),
    ),
    "a bias that no setting knows": (
        _held(lambda h: h.update({"model.layers.0.self_attn.q_proj.bias": np.ones(HIDDEN, np.float32)})),
        ("q_proj.bias",),
    ),
    "a tied head that differs": (_held(lambda h: None, tie_word_embeddings=True), ("lm_head.weight", "tie")),
    "nothing": (_held(lambda h: h.clear()), ("only 0 tensors",)),
    "names of another program": (_held(lambda h: [h.update({f"x.{n}": h.pop(n)}) for n in list(h)]), ("missing",)),
}


def _index(folder: Path, change: Callable[[dict[str, Any]], object], spoil: Callable[[Path], object]) -> Sequence[str]:
    model = good_model(folder)
    (model / "model.safetensors").unlink()
    held, where = weights(), {}
    for number, names in enumerate((sorted(held)[::2], sorted(held)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: held[name] for name in names}, model / file)
        where |= dict.fromkeys(names, file)
    said = {"metadata": {"total_size": 1}, "weight_map": where}
    change(said)
    (model / "model.safetensors.index.json").write_text(json.dumps(said))
    spoil(model)
    return CONVERT


def _sharded(
    change: Callable[[dict[str, Any]], object] = lambda said: None, spoil: Callable[[Path], object] = lambda model: None
) -> Callable[[Path], Sequence[str]]:
    return lambda folder: _index(folder, change, spoil)


def _maps(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda said: said["weight_map"].update({_FIRST: value})


_SECOND = "model-00002-of-00002.safetensors"
_SHARDS: dict[str, tuple[Callable[[Path], Sequence[str]], tuple[str, ...]]] = {
    "a shard is missing": (_sharded(spoil=lambda m: (m / _SECOND).unlink()), ("1 of 2 shards are missing", _SECOND)),
    "a shard is cut short": (_sharded(spoil=lambda m: os.truncate(m / _SECOND, 5000)), (_SECOND,)),
    "a shard is another's": (
        _sharded(spoil=lambda m: save_file({"x": _EXTRA}, m / _SECOND)),
        ("not where the index says",),
    ),
    "a tensor is in both": (_sharded(spoil=lambda m: _also(m)), ("is in",)),
    "a shard is a pipe": (_sharded(spoil=lambda m: _pipe(m / _SECOND)), (_SECOND, "named pipe")),
    "a shard is a link out": (_sharded(spoil=lambda m: _linked(m / _SECOND)), (_SECOND, "leaves the model folder")),
    "the index climbs": (_sharded(_maps("../outside.safetensors")), ("leaves the model folder",)),
    "the index is absolute": (_sharded(_maps("/etc/passwd")), ("absolute",)),
    "the index names a drive": (_sharded(_maps("C:\\x.safetensors")), ("absolute",)),
    "the index has a backslash": (_sharded(_maps("..\\x.safetensors")), ("backslash",)),
    "the index has a control character": (_sharded(_maps("a\x00b")), ("control character",)),
    "the index has a line": (_sharded(_maps("a\nb")), ("control character",)),
    "the index names a number": (_sharded(_maps(7)), (_FIRST, "not in a file")),
    "the index names nothing": (_sharded(_maps(None)), (_FIRST, "not in a file")),
    "the index names a folder": (_sharded(_maps("."), lambda m: None), ("plain form",)),
    "the index is a list": (_sharded(lambda said: said.update(weight_map=[1])), ("weight_map",)),
    "the index is empty": (_sharded(lambda said: said.update(weight_map={})), ("weight_map",)),
    "the index says another shard": (_sharded(_maps(_SECOND.replace("2-", "1-", 1))), ("not where the index says",)),
    "the index lacks a tensor": (_sharded(lambda said: said["weight_map"].pop(_FIRST)), ("not in the index", _FIRST)),
    "the index has a tensor more": (
        _sharded(lambda said: said["weight_map"].update(x=_SECOND)),
        ("not where the index says", "'x'"),
    ),
    "the index names 10,000 shards": (
        _sharded(lambda said: said["weight_map"].update({f"x{n}": f"{n}.safetensors" for n in range(100_000)})),
        ("shards",),
    ),
}


def _also(model: Path) -> None:
    held = weights()
    names = sorted(held)
    save_file({name: held[name] for name in [names[0], *names[1::2]]}, model / _SECOND)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(path: Path) -> None:
    outside = path.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def _blobs(folder: Path) -> Sequence[str]:
    """Links as the Hub's cache has them are no tricks."""
    model = good_model(folder)
    snapshot, blobs = folder / "models--x" / "snapshots" / "abc", folder / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    model.rmdir()
    return ("convert", "models--x/snapshots/abc", *CONVERT[2:])


CASES: tuple[Case, ...] = (
    Case("checkpoint", "a good folder", spoilt(lambda model: None), code=0, writes=WRITTEN),
    Case("checkpoint", "good links of a cache", _blobs, code=0, writes=WRITTEN),
    Case(
        "checkpoint",
        "good, without tensors that nobody needs",
        spoilt(lambda m: (m / "model.pt").write_bytes(b"x")),
        code=0,
        writes=WRITTEN,
    ),
    *_kinds(),
    Case("safetensors", "good, looked at", spoilt(lambda model: None, INSPECT), code=0),
    *_headers(),
    Case("weights", "good", _held(lambda held: None), code=0, writes=WRITTEN),
    Case(
        "weights",
        "good, of 16 bits",
        _held(lambda h: [h.update({n: v.astype(np.float16)}) for n, v in list(h.items())]),
        code=0,
        writes=WRITTEN,
    ),
    *(Case("weights", name, make, words=words) for name, (make, words) in _WEIGHTS.items()),
    Case("shards", "good", _sharded(), code=0, writes=WRITTEN),
    *(Case("shards", name, make, words=words) for name, (make, words) in _SHARDS.items()),
)
