"""Good ONNX files of trained models, made once per session, and what the proof of their content says of others."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_proof import onnx_content
from tests.onnx_exports import export

_SHARED = Path(os.environ.get("QUANTPRESS_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
_WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 64}


@dataclass(frozen=True)
class File:
    """A file to make.

    Attributes:
        model: "demo", trained on the spot, or a folder of the shared models.
        name: of the kind of file.
        options: of the stage.
    """

    model: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"


_KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int4": {"precision": "int4", "symmetric": False},
    "gptq": {"precision": "int4", "method": "gptq", **_WINDOWS},
    "int8-dynamic": {"precision": "int8", "int8": "dynamic"},
    "fp16": {"precision": "fp16"},
    "bf16-standard": {"precision": "bf16", "standard_ops": True},
    "int4-standard": {"precision": "int4", "standard_ops": True},
    "int8": {"precision": "int8"},
    "int8-static": {"precision": "int8", "int8": "static", **_WINDOWS},
    "int4-all": {"precision": "int4", "output_tensor_type": "int4", "token_embedding_type": "int4"},
    "awq": {"precision": "int4", "method": "awq", **_WINDOWS},
    "hqq": {"precision": "int4", "method": "hqq"},
    "gptq-8": {"precision": "int8", "method": "gptq", **_WINDOWS},
    "int4-fp16": {"precision": "int4", "compute_type": "fp16"},
}
FILES = [File("demo", name, options) for name, options in _KINDS.items()] + [
    File("stories260k-hf", name, _KINDS[name]) for name in ("fp16", "int4", "gptq", "awq")
] + [File("glasslm-en-hf", name, _KINDS[name]) for name in ("fp32", "int4", "int8-dynamic")]  # fmt: skip
LONG_FILES = [
    File(model, name, options)
    for model in ("stories260k-hf", "glasslm-en-hf", "mix6m-hf")
    for name, options in _KINDS.items()
]


def model_of(file: File, scratch: Path) -> Path:
    """Gives the checkpoint of a file; skips where it is not beside the repository."""
    if file.model != "demo":
        folder = _SHARED / "models" / file.model
        if not folder.is_dir():
            pytest.skip("real models are not beside the repository (set QUANTPRESS_SHARED)")
        return folder
    folder = scratch / "demo"
    if not folder.exists():
        from quantpress.pipelines.demo_model import train_demo_model

        train_demo_model(folder, lambda _what, _done, _total: None)
    return folder


def good_file(file: File, scratch: Path) -> Path:
    """Makes a file, or gives it where it was made before; never change it."""
    target = scratch / str(file)
    if not target.exists():
        export(model_of(file, scratch), target, threads=1, **file.options)
    return target


@lru_cache(maxsize=4)
def opened(model: Path, *adapters: Path) -> Checkpoint:
    """Opens a checkpoint, with adapters merged into it."""
    checkpoint = open_checkpoint(model)
    for adapter in adapters:
        checkpoint = merge_lora(checkpoint, adapter)
    return checkpoint


def measures_of(folder: Path, model: Path, *adapters: Path) -> tuple[str, ...]:
    """Gives the measures that find something wrong with what a folder holds."""
    content = onnx_content(opened(model, *adapters), folder)
    return tuple(dict.fromkeys(each.measure for each in content.findings))
