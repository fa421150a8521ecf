"""ONNX models: data files that lead elsewhere, numbers that lie, graphs that no runtime feeds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.hostile.case import Case
from tests.hostile.model import CONFIG, tokenizer_files
from tests.onnx_models import DATA, save, summing_model
from tests.onnx_wire import field, varint

INSPECT = ("inspect", "model")
PERPLEXITY = ("perplexity", "model", "--context", "16", "--text", "text.txt")
Change = Callable[[ModelProto], object]


def _made(
    change: Change = lambda model: None,
    spoil: Callable[[Path], object] = lambda folder: None,
    arguments: Sequence[str] = INSPECT,
) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        save(folder / "model", summing_model(), change=lambda model: _done(change, model))
        spoil(folder / "model")
        (folder / "text.txt").write_text("a text of some words " * 50)
        return arguments

    return make


def _done(change: Change, model: ModelProto) -> None:
    change(model)


def _tensor(model: ModelProto, name: str = "embed") -> TensorProto:
    (found,) = [each for each in model.graph.initializer if each.name == name]
    tensor: TensorProto = found
    return tensor


def _place(key: str, value: str) -> Change:
    """Says something else of where the values of a tensor lie."""

    def change(model: ModelProto) -> None:
        entries = _tensor(model).external_data
        for entry in entries:
            if entry.key == key:
                entry.value = value
                return
        entry = entries.add()
        entry.key, entry.value = key, value

    return change


def _dims(*dims: int) -> Change:
    def change(model: ModelProto) -> None:
        tensor = _tensor(model)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def _kind(number: int) -> Change:
    return lambda model: setattr(_tensor(model), "data_type", number)


def _twice(model: ModelProto) -> None:
    entry = _tensor(model).external_data.add()
    entry.key, entry.value = "location", "other"


def _values_twice(model: ModelProto) -> None:
    _tensor(model).raw_data = b"x" * 16


def _name_twice(model: ModelProto) -> None:
    model.graph.initializer.append(_tensor(model))


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def _out(name: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return act


def _directory(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def _genai(**decoder: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))


def _bytes(data: bytes, name: str = "model.onnx") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _nested(depth: int) -> bytes:
    """A model of graphs inside each other: node, attribute, graph."""
    inner = b""
    for _ in range(depth):
        inner = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, inner)))
    return field(7, inner) + field(8, field(1, b"") + b"\x10\x17")


_PLACES: Mapping[str, tuple[Change, tuple[str, ...]]] = {
    **{
        f"data in {location}": (_place("location", location), ("'embed'",))
        for location in (
            "../x", "/etc/passwd", "/proc/self/mem", "C:\\x", "..\\x", "a/../../x", "", ".", "\x1b[2J", "x" * 5000,
            "missing", "*/_ORT_MEM_ADDR_/*", "file:///etc/passwd",
        )
    },
    "an offset below nought": (_place("offset", "-4096"), ("'embed'", "offset")),
    "an offset of 2^63": (_place("offset", str(1 << 63)), ("'embed'", str(1 << 63))),
    "an offset of 30 digits": (_place("offset", "9" * 30), ("'embed'", "offset")),
    "an offset that is a text": (_place("offset", "0x10"), ("'embed'", "offset")),
    "an offset beyond the file": (_place("offset", "4096"), ("'embed'", DATA)),
    "a length beyond the file": (_place("length", "999999"), ("'embed'", "999999")),
    "a length of nought": (_place("length", "0"), ("'embed'", "length is 0")),
    "a length below nought": (_place("length", "-1"), ("'embed'", "length")),
    "a place given twice": (_twice, ("'embed'", "'location'")),
    "values in both places": (_values_twice, ("'embed'",)),
    "huge dimensions": (_dims(1 << 40, 1 << 40), ("'embed'",)),
    "dimensions that overflow": (_dims(1 << 46, 1 << 46), ("'embed'",)),
    "dimensions below nought": (_dims(-1, 8), ("'embed'", "-1")),
    "seventeen dimensions": (_dims(*[1] * 17), ("tensor 0", "16 dimensions")),
    "a type that nobody knows": (_kind(99), ("'embed'", "99")),
    "texts in a data file": (_kind(8), ("'embed'", "STRING")),
    "a tensor twice": (_name_twice, ("'embed'",)),
    "no versions of operators": (lambda model: model.ClearField("opset_import"), ("model.onnx",)),
    "no graph": (lambda model: model.ClearField("graph"), ("no graph",)),
    "two versions of operators": (lambda model: model.opset_import.add(domain="", version=5), ("two versions",)),
    "operators of a library without version": (
        lambda model: model.graph.node.append(helper.make_node("Evil", ["x"], ["y"], domain="evil.so")),
        ("Evil", "evil.so"),
    ),
    "a training graph": (lambda model: model.training_info.add(), ("training",)),
}  # fmt: skip
_FILES: Mapping[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a pipe": (_pipe("model.onnx"), ("model.onnx", "named pipe")),
    "a folder in its place": (_directory, ("model.onnx",)),
    "a link out": (_out("model.onnx"), ("model.onnx", "leaves the model folder")),
    "data that are a pipe": (_pipe(DATA), (DATA, "named pipe")),
    "data that are a link out": (_out(DATA), (DATA, "leaves the model folder")),
    "data that are missing": (lambda folder: (folder / DATA).unlink(), (DATA,)),
    "data that are cut": (lambda folder: os.truncate(folder / DATA, 100), (DATA, "cut short")),
    "empty": (_bytes(b""), ("model.onnx",)),
    "garbage": (_bytes(b"\xff" * 99), ("model.onnx",)),
    "a page of the web": (_bytes(b"<!DOCTYPE html>"), ("model.onnx",)),
    "a Git LFS pointer": (_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ("Git LFS",)),
    "cut short": (lambda folder: os.truncate(folder / "model.onnx", 900), ("model.onnx",)),
    "a length of 2^62": (_bytes(b"\x3a" + varint(1 << 62)), ("model.onnx",)),
    "a number without end": (_bytes(b"\x08" + b"\xff" * 20), ("model.onnx",)),
    "groups": (_bytes(b"\x0b" * 5000), ("model.onnx",)),
    "graphs in graphs": (_bytes(_nested(500)), ("model.onnx",)),
    "genai_config.json names ../model.onnx": (_genai(filename="../model.onnx"), ("../model.onnx",)),
    "genai_config.json names /etc/passwd": (_genai(filename="/etc/passwd"), ("/etc/passwd",)),
    "genai_config.json names a number": (_genai(filename=7), ("genai_config.json", "filename")),
    "genai_config.json names what is not there": (_genai(filename="x.onnx"), ("x.onnx",)),
    "genai_config.json is deep": (_bytes(b"[" * 9999, "genai_config.json"), ("genai_config.json", "deeper")),
    "genai_config.json is a list": (_bytes(b"[]", "genai_config.json"), ("genai_config.json",)),
    "genai_config.json is a pipe": (_pipe("genai_config.json"), ("genai_config.json", "named pipe")),
    "config.json holds a key twice": (_bytes(b'{"a": 1, "a": 2}', "config.json"), ("config.json", "twice")),
    "tokenizer.json is a list": (_bytes(b"[]", "tokenizer.json"), ("tokenizer.json",)),
}
_SHARED = _place("offset", "1280")  # the head's


def _whole(folder: Path) -> None:
    """Puts what a model that can be run needs beside it."""
    for name, data in tokenizer_files().items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 320}))


def _wide(model: ModelProto) -> None:
    """Gives the model as many tokens as the tokenizer has."""
    chance = np.random.default_rng(0)
    for name, shape in (("embed", (320, 8)), ("head", (8, 320))):
        tensor = _tensor(model, name)
        tensor.CopyFrom(numpy_helper.from_array(chance.standard_normal(shape).astype(np.float32), name))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 320


def _runs(change: Change = lambda model: None) -> Callable[[Path], Sequence[str]]:
    def both(model: ModelProto) -> None:
        _wide(model)
        change(model)

    return _made(both, _whole, PERPLEXITY)


def _nan(model: ModelProto) -> None:
    tensor = _tensor(model, "head")
    tensor.CopyFrom(numpy_helper.from_array(np.full((8, 320), np.nan, np.float32), "head"))


def _without(name: str) -> Change:
    def change(model: ModelProto) -> None:
        for each in list(model.graph.input):
            if each.name == name:
                model.graph.input.remove(each)

    return change


def _renamed(old: str, new: str) -> Change:
    def change(model: ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                for at, name in enumerate(names):
                    if name == old:
                        names[at] = new
        for each in (*model.graph.input, *model.graph.output):
            if each.name == old:
                each.name = new

    return change


def _foreign(model: ModelProto) -> None:
    model.graph.node[-1].domain = "evil"
    model.opset_import.add(domain="evil", version=1)


_RUN: Mapping[str, tuple[Change, int, tuple[str, ...]]] = {
    "NaN as weights": (_nan, 4, ("not finite",)),
    "an input that nothing feeds": (_renamed("input_ids", "magic"), 3, ("magic",)),
    "an input that is missing": (_without("attention_mask"), 3, ("attention_mask",)),
    "caches of other names": (_renamed("past_key_values.0.key", "cache_x"), 3, ("cache_x",)),
    "no logits": (_renamed("logits", "others"), 3, ("logits",)),
    "an operator that nobody knows": (
        lambda model: setattr(model.graph.node[-1], "op_type", "Magic"), 3, ("Magic",),
    ),
    "an operator of a library": (
        _foreign,
        3,
        ("evil",),
    ),
    "whole numbers as weights": (lambda model: setattr(_tensor(model, "mix"), "data_type", 6), 3, ("model.onnx",)),
    "a graph that bites its tail": (_renamed("x", "logits"), 3, ("model.onnx",)),
}  # fmt: skip

CASES: tuple[Case, ...] = (
    Case("ONNX", "good", _made(), code=0),
    Case("ONNX", "good, two tensors share bytes", _made(_SHARED), code=0),  # onnxruntime reads them, too
    Case("ONNX", "good, run", _runs(), code=0, megabytes=2000),
    *(Case("ONNX", name[:80], _made(change), words=words) for name, (change, words) in _PLACES.items()),
    *(Case("ONNX", name, _made(spoil=spoil), words=words) for name, (spoil, words) in _FILES.items()),
    *(
        Case("ONNX", f"run: {name}", _runs(change), code, words, seconds=20, megabytes=2000)
        for name, (change, code, words) in _RUN.items()
    ),
    Case("ONNX", "run: without a tokenizer", _made(arguments=PERPLEXITY), words=("model",), seconds=20, megabytes=2000),
)
