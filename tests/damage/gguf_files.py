"""Good GGUF files, made once per session, and what the proof of their content says of them and of damaged ones."""

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
from quantpress.pipelines import demo_model
from quantpress.pipelines.gguf_proof import gguf_content
from quantpress.quant.errors import InputError
from tests.gguf_exports import export
from tests.tiny import tiny_checkpoint

__all__ = ["FILES", "LONG_FILES", "File", "findings_of", "good_file", "model_of", "opened"]

_SHARED = Path(os.environ.get("QUANTPRESS_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
_GPTQ: dict[str, Any] = {"method": "gptq", "samples": 8, "sequence_length": 64}
# of a model that is trained on the spot in some seconds: rows that divide into super-blocks, and biases
_TRAINED = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "attention_bias": True}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_STEPS, _BATCH = 24, 4


@dataclass(frozen=True)
class File:
    """A file to make.

    Attributes:
        model: "trained" on the spot, "biases" or "factors" (random ones), or a folder of the shared models.
        name: type and method.
        options: of the stage.
    """

    model: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"


def _kinds(*types: str) -> dict[str, dict[str, Any]]:
    return {kind: {"outtype": kind} for kind in types} | {
        f"{kind}-gptq": {"outtype": kind, **_GPTQ} for kind in types if kind not in ("f32", "f16", "bf16")
    }


_SHORT = _kinds("f16", "q8_0", "q4_0", "q4_k_m")
_LONG = _kinds(
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
_MODELS = "stories260k-hf", "glasslm-en-hf", "mix6m-hf"
FILES = [File("trained", name, options) for name, options in _SHORT.items()]
FILES += [File("biases", name, {"outtype": name}) for name in ("f16", "q8_0")]
FILES += [File("factors", "f16", {"outtype": "f16"})]
FILES += [File(model, name, _SHORT[name]) for model in _MODELS for name in ("f16", "q8_0", "q4_0", "q4_k_m")]
LONG_FILES = [File(model, name, options) for model in ("trained", *_MODELS) for name, options in _LONG.items()]


def model_of(file: File, scratch: Path) -> Path:
    """Gives the checkpoint of a file; skips where it is not beside the repository."""
    folder = scratch / file.model
    if file.model == "trained":
        return folder if folder.exists() else trained(folder)
    if file.model == "biases":
        return folder if folder.exists() else tiny_checkpoint(folder, "qwen2", tie_word_embeddings=False)
    if file.model == "factors":
        return folder if folder.exists() else tiny_checkpoint(folder, "llama", rope_scaling=_LLAMA3)
    shared = _SHARED / "models" / file.model
    if not shared.is_dir():
        pytest.skip("real models are not beside the repository (set QUANTPRESS_SHARED)")
    return shared


def trained(folder: Path) -> Path:
    """Trains a model on the built-in text, some seconds long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "CONFIG", {**demo_model.CONFIG, **_TRAINED})
        for name, value in (("STEPS", _STEPS), ("BATCH", _BATCH), ("CONTEXT", 128)):
            patch.setattr(demo_model, name, value)
        return demo_model.train_demo_model(folder, lambda _what, _done, _total: None)


def good_file(file: File, scratch: Path) -> Path:
    """Makes a file, or gives it where it was made before; never change it."""
    target = scratch / f"{file}.gguf"
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


def findings_of(path: Path, model: Path, *adapters: Path) -> list[str]:
    """Gives what is wrong with what a file holds, each with the measure that found it."""
    try:
        content = gguf_content(opened(model, *adapters), path)
    except InputError as error:  # as `verify` says it: could not be judged
        return [f"unjudged: {error}"]
    return [f"{each.measure}: {each}" for each in content.findings]
