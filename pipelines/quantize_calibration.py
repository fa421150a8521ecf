"""The text that a calibrated method reads: which one, how it is cut, and what that takes of memory and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, TensorSpec
from quantpress.convert.calibration.windows import calibration_windows, overlap_note, windows_sha256
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.default_text import calibration_text
from quantpress.pipelines.machine import free_memory
from quantpress.pipelines.perplexity import plain_text
from quantpress.pipelines.windows import read_text
from quantpress.quant.drift import SHARE, check_share
from quantpress.quant.errors import UnknownFamilyError, UsageError

__all__ = [
    "CalibratedChoice",
    "Calibration",
    "TextChoice",
    "activation_budget",
    "chosen_precision",
    "drift_share",
    "layer_bytes",
    "needs",
    "sequence_length",
]

_QUICK = 1e12  # parameters times tokens: a second forward pass of about ten seconds on two cores
_LONGEST = 2048  # tokens of a window unless the user says more: what GPTQ's authors took
_FLOAT = 4  # bytes
_BASE_BYTES = 500 << 20  # torch, and what the slices under way take


class TextChoice(Protocol):
    """Which text, and which windows of it: options of a stage."""

    @property
    def calibration(self) -> Path | None:
        """UTF-8 text; None for the built-in one."""
        ...

    @property
    def samples(self) -> int:
        """Number of windows."""
        ...

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a window; None for what the model was made for, up to 2048."""
        ...

    @property
    def seed(self) -> int:
        """Chooses their places."""
        ...


class CalibratedChoice(TextChoice, Protocol):
    """The same, of a stage whose method runs the model on the text."""

    @property
    def method(self) -> str | None:
        """Name of the method; None for GPTQ."""
        ...

    @property
    def drift(self) -> float | None:
        """Share of the inputs' drift that GPTQ makes up for; None where that is to be chosen."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Calibration:
    """A text, cut into windows.

    Attributes:
        windows: (length,) int32 token ids each.
        text_sha256: of the text in UTF-8.
        seed: chose the places.
        note: what a user should know of the windows; empty if nothing.
    """

    windows: tuple[NDArray[np.int32], ...]
    text_sha256: str
    seed: int
    note: str = ""

    @classmethod
    def of(cls, source: Checkpoint, stage: TextChoice) -> Calibration:
        """Reads, tokenizes and cuts the text.

        Raises:
            InputError: the text or the tokenizer cannot be used, or the text is too short for one window.
        """
        text = calibration_text() if stage.calibration is None else read_text(stage.calibration, "calibrate")
        tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
        ids = tokenizer.encode(plain_text(text.text), special=False)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        length = sequence_length(source, stage.sequence_length)
        windows = calibration_windows(ids, samples=stage.samples, length=length, seed=stage.seed, bos=bos)
        note = overlap_note(len(ids), samples=stage.samples, length=length, bos=bos is not None)
        return cls(tuple(windows), text.sha256, stage.seed, note or "")

    def record(self) -> dict[str, Any]:
        """Gives what the sidecar says of it."""
        length = len(self.windows[0])
        return {
            "text_sha256": self.text_sha256,
            "windows_sha256": windows_sha256(self.windows),
            "samples": len(self.windows),
            "sequence_length": length,
            "tokens": len(self.windows) * length,
            "seed": self.seed,
        }


def sequence_length(source: Checkpoint, asked: int | None) -> int:
    """Gives the tokens of a window.

    Raises:
        UsageError: more than the model was made for.
        InputError: an unknown family.
    """
    context = find_arch(source.config).read_config(source.config).context
    if asked is not None and asked > context:
        raise UsageError(f"--sequence-length {asked}: {source.name} was made for {context} tokens")
    return asked or min(_LONGEST, context)


def activation_budget(max_memory: int | None) -> int:
    """Gives the bytes of memory for activations; the rest goes to the disk."""
    return free_memory() // 2 if max_memory is None else max_memory


def drift_share(source: Checkpoint, stage: CalibratedChoice) -> float:
    """Gives the share of the inputs' drift that GPTQ makes up for: what is asked for, or all where that is quick.

    Raises:
        UsageError: a share that is none.
    """
    if stage.drift is not None:
        check_share(stage.drift)
        return stage.drift
    try:
        tokens = stage.samples * sequence_length(source, stage.sequence_length)
    except UnknownFamilyError:
        return 0.0  # GPTQ will be refused
    return SHARE if source.parameters * tokens < _QUICK else 0.0


def chosen_precision(asked: str | None) -> str:
    """Gives how products of a calibration are computed: what is asked for, or what the processor is made for.

    Raises:
        UsageError: there is no such precision.
    """
    from quantpress.convert.calibration.precision import PRECISIONS, native_precision

    chosen = native_precision("cpu") if asked is None else asked.lower()
    if chosen not in PRECISIONS:
        raise UsageError(f"--calibration-dtype {chosen}: must be one of {', '.join(PRECISIONS)}")
    return chosen


def layer_bytes(spec: ArchSpec, hyper: Hyperparameters) -> int:
    """Gives the bytes of the weights of the largest layer in float32."""
    kinds = {hyper.has_experts(layer): layer for layer in range(hyper.layers)}
    sizes = (
        sum(math.prod(hyper.dims[dim] for dim in _own_dims(row)) for row in spec.layer_rows(hyper, layer))
        for layer in kinds.values()
    )
    return max(sizes) * _FLOAT


def _own_dims(row: TensorSpec) -> tuple[str, ...]:
    """Gives the shape of a row without that of the stack it is a part of."""
    return row.shape[1:] if row.expert >= 0 and row.shape[0] == "experts" else row.shape


def needs(source: Checkpoint, stage: CalibratedChoice) -> tuple[int, int]:
    """Estimates bytes of memory and of temporary files that calibration takes."""
    spec = find_arch(source.config)
    hyper = spec.read_config(source.config)
    dims, tokens = hyper.dims, stage.samples * sequence_length(source, stage.sequence_length)
    streams = 2 if stage.method in (None, "gptq") and stage.drift else 1
    inner = max(dims["attended"], dims["ffn"])
    if hyper.experts is not None:
        inner = max(inner, hyper.experts.used * hyper.experts.intermediate + hyper.experts.shared)
    width = streams * (2 * dims["hidden"] + inner)  # as convert.calibration.passes keeps them
    activations, budget = tokens * width * _FLOAT, activation_budget(None)
    layer = layer_bytes(spec, hyper)
    chain = 2 * streams * tokens * dims["hidden"] * _FLOAT
    return _BASE_BYTES + 2 * layer + min(activations, budget), chain + max(0, activations - budget)
