"""Bad models given to every command that reads one: each must see what `convert` sees."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.checkpoint_cases import bad_weights
from tests.hostile.model import CONVERT, adapter, edit, good_model, write_adapter

_ONNX = ("convert", "model", "out-onnx", "--to", "onnx", "--no-verify")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "inspect": ("inspect", "model"),
    "inspect --json": ("inspect", "model", "--json"),
    "convert to ONNX": _ONNX,
    "convert --dry-run": (*CONVERT, "--dry-run"),
    "quantize": ("quantize", "model", "out", "--method", "rtn", "--group-size", "32", "--no-verify"),
    "merge": ("merge", "model", "adapter", "out", "--no-verify"),
    "perplexity": ("perplexity", "model", "--runtime", "torch", "--chunks", "1", "--context", "16"),
    "verify": ("verify", "model", "--against", "model", "--chunks", "1", "--context", "16"),
    "imatrix": ("imatrix", "model", "out.gguf", "--chunks", "1", "--context", "16"),
}
_GOOD: Mapping[str, tuple[str, ...]] = {
    "inspect": (),
    "convert to ONNX": ("out-onnx",),
    "convert --dry-run": (),
    "quantize": ("out",),
    "merge": ("out",),
}
"""The commands that end well within a second, and what they write; the others run the model."""


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _passwd(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


_NAMED = "model.layers.1.mlp.up_proj.weight"
_FIRST_SHARD = "model.safetensors"
_SPOILT: Mapping[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "weights that are a pipe": (lambda m: _pipe(m / _FIRST_SHARD), (_FIRST_SHARD, "named pipe")),
    "weights that are cut": (lambda m: os.truncate(m / _FIRST_SHARD, 20_000), (_FIRST_SHARD, "cut short")),
    "settings that are a pipe": (lambda m: _pipe(m / "config.json"), ("config.json", "named pipe")),
    "settings that lead out": (lambda m: _passwd(m / "config.json"), ("config.json", "leaves the model folder")),
    "a tensor less": (lambda m: bad_weights(m, lambda h: h.pop(_NAMED)), (_NAMED, "missing")),
    "a layer more than there is": (
        lambda m: edit(m / "config.json", lambda said: said.update(num_hidden_layers=3)),
        ("layer 2 is missing",),
    ),
    "a tokenizer that leads out": (
        lambda m: _passwd(m / "tokenizer.json"),
        ("tokenizer.json", "leaves the model folder"),
    ),
}

_DESCRIBED = ("a tensor less", "a layer more than there is")  # `inspect` shows what is there, and what is wrong with it


def made(change: Callable[[Path], object], arguments: Sequence[str]) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        model = good_model(folder)
        if "merge" in arguments:
            write_adapter(folder, *adapter())
        change(model)
        return arguments

    return make


def _cases() -> list[Case]:
    return [
        Case("commands", f"{command}: {what}", made(change, arguments), words=words)
        for command, arguments in COMMANDS.items()
        for what, (change, words) in _SPOILT.items()
        if not (command.startswith("inspect") and what in _DESCRIBED)
    ]


CASES: tuple[Case, ...] = (
    *(
        Case("commands", f"good: {name}", made(lambda model: None, COMMANDS[name]), code=0, writes=writes)
        for name, writes in _GOOD.items()
    ),
    *_cases(),
)
