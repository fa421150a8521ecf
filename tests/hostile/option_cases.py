"""Options and texts: places that no output may take, texts that are none, patterns that explode."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.model import CONVERT, adapter, good_model, write_adapter

WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
_PERPLEXITY = ("perplexity", "model", "--context", "32", "--text", "text.txt")
_IMATRIX = ("imatrix", "model", "out.gguf", "--context", "32", "--text", "text.txt")
_GPTQ = (
    "quantize",
    "model",
    "out",
    "--group-size",
    "32",
    "--samples",
    "2",
    "--sequence-length",
    "32",
    "--no-verify",
    "--calibration",
    "text.txt",
)


def _words(*arguments: str, before: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        good_model(folder)
        before(folder)
        return arguments

    return make


def _more(*arguments: str, before: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], Sequence[str]]:
    return _words(*CONVERT, *arguments, before=before)


def _to(
    out: str, *more: str, before: Callable[[Path], object] = lambda folder: None
) -> Callable[[Path], Sequence[str]]:
    return _words("convert", "model", out, "--to", "gguf", "--outtype", "q8_0", "--no-verify", *more, before=before)


def _adapted(*arguments: str) -> Callable[[Path], Sequence[str]]:
    return _words(*arguments, before=lambda folder: write_adapter(folder, *adapter()))


def _file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


_AS_ONNX = ("--to", "onnx", "--no-verify")
_TEXTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda folder: None, ("text.txt",)),
    "a pipe": (lambda folder: os.mkfifo(folder / "text.txt"), ("text.txt", "named pipe")),
    "a folder": (lambda folder: (folder / "text.txt").mkdir(), ("text.txt",)),
    "empty": (_file("text.txt", b""), ("",)),
    "no UTF-8": (_file("text.txt", b"\xff\xfe\x00" * 500), ("text.txt", "UTF-8")),
    "a few words": (_file("text.txt", b"one two"), ("",)),
}
_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a type that nobody knows": (("--outtype", "q9_z"), ("q9_z",)),
    "a pattern that is none": (("--tensor-type", "((=q8_0"), ("((",)),
    "a pattern without a type": (("--tensor-type", "attn"), ("attn",)),
    "a pattern for a type that nobody knows": (("--tensor-type", "attn=zz"), ("zz",)),
    "a pattern that explodes": (("--tensor-type", "^((a|b|.)*)*x$=f16"), ("",)),
    "an override without a type": (("--override-kv", "llama.context_length=5"), ("llama.context_length",)),
    "an override of a text as a number": (("--override-kv", "llama.context_length=int:many"), ("many",)),
    "an override beyond 64 bits": (("--override-kv", f"llama.context_length=int:{1 << 70}"), ("context_length",)),
    "an override of nothing": (("--override-kv", "=int:5"), ("",)),
    "no threads": (("--threads", "0"), ("threads",)),
    "threads below zero": (("--threads", "-1"), ("threads",)),
    "no memory": (("--max-memory", "0"), ("max-memory",)),
    "a pattern that explodes and fits nothing": (("--tensor-type", "((a+)+)+$=f16"), ("((a+)+)+$", "no name")),
    "parts without an end": (("--split-max-tensors", "-1"), ("split-max-tensors",)),
    "a type of embedding that nobody knows": (("--token-embedding-type", "x"), ("x",)),
    "memory of no size": (("--max-memory", "lots"), ("lots",)),
    "memory below zero": (("--max-memory", "-5G"), ("max-memory",)),
    "parts of no size": (("--split-max-size", "x"), ("split-max-size",)),
    "an option that nobody knows": (("--magic",), ("--magic",)),
    "a method that GGUF lacks": (("--method", "awq"), ("awq",)),
    "a device that nobody knows": (("--device", "tpu"), ("tpu",)),
}


def _metadata(data: bytes) -> Callable[[Path], Sequence[str]]:
    return _more("--metadata", "more.json", before=_file("more.json", data))


CASES: tuple[Case, ...] = (
    Case("options", "good", _more("--threads", "2", "--tensor-type", "attn_v=f16"), code=0, writes=WRITTEN),
    Case("options", "good, only planned", _more("--dry-run"), code=0),
    *(
        Case("options", name, _more(*words), code=2, words=said)
        for name, (words, said) in _OPTIONS.items()
        if said != ("",)
    ),
    Case("options", "metadata that are a list", _metadata(b"[]"), words=("more.json",)),
    Case("options", "metadata of another architecture", _metadata(b'{"general.architecture": "x"}'), words=("'x'",)),
    Case("options", "metadata with a line break", _metadata(b'{"a\\nb": 1}'), words=("more.json", "unknown")),
    Case("options", "metadata that hold objects", _metadata(b'{"general.name": {"a": 1}}'), words=("general.name",)),
    Case("options", "metadata that hold a key twice", _metadata(b'{"a": 1, "a": 2}'), words=("more.json", "twice")),
    Case("options", "metadata that are deep", _metadata(b"[" * 9999), words=("more.json", "deeper")),
    Case("options", "metadata that are missing", _more("--metadata", "more.json"), words=("more.json",)),
    Case(
        "options",
        "metadata that are a pipe",
        _more("--metadata", "p", before=lambda folder: os.mkfifo(folder / "p")),
        words=("named pipe",),
    ),
    Case(
        "options",
        "an importance matrix that is text",
        _more("--imatrix", "m.gguf", before=_file("m.gguf", b"text")),
        words=("m.gguf",),
    ),
    Case(
        "options",
        "an importance matrix that is old and garbage",
        _more("--imatrix", "m.dat", before=_file("m.dat", b"\xff" * 99)),
        words=("m.dat",),
    ),
    Case("places", "good", _to("out.gguf"), code=0, writes=WRITTEN),
    Case("places", "a folder that is missing is good", _to("a/b/out.gguf"), code=0, writes=("a",)),
    Case(
        "places",
        "an output that stands",
        _to("out.gguf", before=_file("out.gguf", b"old")),
        code=2,
        words=("out.gguf", "--force"),
    ),
    Case(
        "places",
        "an output that is a folder of other things",
        _to("out.gguf", "--force", before=lambda f: ((f / "out.gguf").mkdir(), (f / "out.gguf" / "x").touch())),
        code=2,
        words=("out.gguf",),
    ),
    Case("places", "below a file", _to("x/out.gguf", before=_file("x", b"old")), code=5, words=("out.gguf",)),
    Case("places", "a device", _to("/dev/null", "--force"), code=2, words=("/dev/null",)),
    Case("places", "a pipe", _to("p", "--force", before=lambda folder: os.mkfifo(folder / "p")), code=2, words=("p",)),
    Case("places", "an input", _to("model/model.safetensors", "--force"), code=2, words=("model.safetensors", "input")),
    Case(
        "places",
        "the model's folder",
        _words("convert", "model", "model", "--to", "onnx", "--force", "--no-verify"),
        code=2,
        words=("model", "input"),
    ),
    Case(
        "places",
        "a folder above the model",
        _words("convert", "model", ".", "--to", "onnx", "--force", "--no-verify"),
        code=2,
        words=(".",),
    ),
    Case(
        "places",
        "good, a link is followed",
        _to("out.gguf", before=lambda folder: (folder / "out.gguf").symlink_to("out-there.gguf")),
        code=0,
        writes=("out-there.gguf", "out.gguf.quantpress.json"),
    ),
    Case(
        "places",
        "a folder of other things",
        _words(
            "convert",
            "model",
            "mine",
            "--to",
            "onnx",
            "--force",
            "--no-verify",
            before=lambda folder: ((folder / "mine").mkdir(), (folder / "mine" / "x").touch()),
        ),
        code=2,
        words=("mine", "not a model folder"),
    ),
    Case(
        "places",
        "good, a folder inside the model",
        _words("convert", "model", "model/sub", *_AS_ONNX),
        code=0,
        writes=("model/sub",),
    ),
    Case("places", "good, a file inside the model", _to("model/x.gguf"), code=0, writes=("model/x.gguf",)),
    Case(
        "places",
        "the text",
        _words(
            *CONVERT[:2], "text.txt", "--to", "gguf", "--force", "--text", "text.txt", before=_file("text.txt", b"x")
        ),
        code=2,
        words=("text.txt", "input"),
        seconds=20,
        megabytes=2000,
    ),
    Case(
        "places",
        "the importance matrix",
        _to("m.gguf", "--force", "--imatrix", "m.gguf", before=_file("m.gguf", b"x")),
        code=2,
        words=("m.gguf", "input"),
    ),
    Case(
        "places",
        "the metadata",
        _to("m.json", "--force", "--metadata", "m.json", before=_file("m.json", b'{"general.author": "x"}')),
        code=2,
        words=("m.json", "input"),
    ),
    Case(
        "places",
        "the adapter",
        _adapted("convert", "model", "adapter", *_AS_ONNX, "--adapter", "adapter", "--force"),
        code=2,
        words=("adapter", "input"),
    ),
    Case("places", "a name too long", _to("x" * 300 + ".gguf"), code=5, words=("xxx",)),
    Case("places", "/proc", _to("/proc/out.gguf"), code=5, words=("/proc/out.gguf",)),
    Case(
        "text",
        "good",
        _words(*_IMATRIX, before=_file("text.txt", b"some words of a text " * 99)),
        code=0,
        writes=WRITTEN,
        megabytes=2000,
    ),
    *(
        Case("text", f"{words[0]}: {name}", _words(*words, before=before), words=said, megabytes=2000, seconds=20)
        for words in (_PERPLEXITY, _IMATRIX, _GPTQ)
        for name, (before, said) in _TEXTS.items()
    ),
)
