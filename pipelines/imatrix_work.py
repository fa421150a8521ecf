"""Measures an importance matrix as llama-imatrix does: which text, which windows of it, and what that takes.

Method (llama.cpp, tools/imatrix/imatrix.cpp, `compute_imatrix`): the text is tokenised once and cut into chunks of
`context` tokens, the rest is dropped; each chunk starts from an empty state, its first token replaced by BOS when the
vocabulary adds BOS; every position counts. The head is measured too, which llama-imatrix does only when it is told to
(`--process-output`), and under the name of the embedding where that is the head.

Any other embedding has an entry too, which llama-imatrix lacks and llama-quantize uses: no inputs are multiplied with
it, so the diagonal of the Fisher information of the predictions about its rows stands for their squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.calibration.windows import windows_sha256
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.importance_names import EMBEDDING, measured_sizes
from quantpress.convert.preflight import check_tied_head, preflight
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.default_text import calibration_text
from quantpress.pipelines.machine import save_memory
from quantpress.pipelines.quantize_calibration import activation_budget, chosen_precision, layer_bytes
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.windows import DEFAULT_CONTEXT, read_text, text_windows
from quantpress.quant.errors import UsageError

__all__ = [
    "MATRIX_NAME",
    "TEXT_NOTE",
    "ImatrixText",
    "MeasureOptions",
    "empty_matrix",
    "filled",
    "measure",
    "needs",
    "text_tokens",
]

TEXT_NOTE = (
    "measured on the built-in text, Python's help topics: give a text like what the model will read with --text (in"
    " pipeline files: text)"
)
MATRIX_NAME = "imatrix.gguf"
"""What a matrix is called in the files made with it, where a stage measured it."""

_FLOAT = 4  # bytes
_BASE_BYTES = 500 << 20  # torch, and what the slices under way take
_BYTES_PER_TOKEN = 3  # of text, fewer than in any language that a model's tokenizer was made for


class MeasureOptions(Protocol):
    """Which text, and how much of it: options of a stage."""

    @property
    def text(self) -> Path | None:
        """UTF-8 text; None for the built-in one."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens of a chunk; None for 512, or what the model was made for."""
        ...

    @property
    def chunks(self) -> int | None:
        """At most so many; None for the whole text."""
        ...

    @property
    def calibration_dtype(self) -> str | None:
        """How products are computed; None for what the processor is made for."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class ImatrixText:
    """A text, cut into windows.

    Attributes:
        windows: (length,) int32 token ids each.
        sha256: of the text in UTF-8.
        name: of its file.
    """

    windows: tuple[NDArray[np.int32], ...]
    sha256: str
    name: str

    @classmethod
    def of(cls, source: Checkpoint, stage: MeasureOptions) -> ImatrixText:
        """Reads, tokenizes and cuts the text.

        Raises:
            InputError: the text or the tokenizer cannot be used, or the text has fewer than two windows.
        """
        text = calibration_text() if stage.text is None else read_text(stage.text, "measure")
        tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
        context = _context(source, stage.context)
        windows = text_windows(tokenizer, text.text, context=context, chunks=stage.chunks)
        return cls(tuple(windows), text.sha256, text.name)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return len(self.windows[0])

    def record(self) -> dict[str, Any]:
        """Gives what the sidecar says of it."""
        return {
            "text_sha256": self.sha256,
            "windows_sha256": windows_sha256(self.windows),
            "samples": len(self.windows),
            "sequence_length": self.length,
            "tokens": len(self.windows) * self.length,
        }


def filled(source: Checkpoint, stage: MeasureOptions) -> dict[str, Any]:
    """Gives the options that depend on the source and on the machine.

    Raises:
        UsageError: windows that are longer than the model was made for, or a precision that there is not.
        UnknownFamilyError: there is no table for the model.
    """
    precision = chosen_precision(stage.calibration_dtype)
    return {"context": _context(source, stage.context), "calibration_dtype": precision}


def _context(source: Checkpoint, asked: int | None) -> int:
    made_for = find_arch(source.config).read_config(source.config).context
    if asked is not None and asked > made_for:
        raise UsageError(f"--context {asked}: {source.name} was made for {made_for} tokens")
    return asked or min(DEFAULT_CONTEXT, made_for)


def measure(
    source: Checkpoint, stage: MeasureOptions, text: ImatrixText, folder: Path, context: RunContext
) -> ImportanceMatrix:
    """Runs the model on the text and measures the inputs of its weights.

    Args:
        source: the model.
        stage: with every default filled in.
        text: what it is run on.
        folder: an existing folder for activations that do not fit into memory; they are removed at the end.
        context: what the run may use.

    Raises:
        InputError: the model does not fit its family, or its weights or activations are not finite.
        OutputError: activations cannot be written.
    """
    from quantpress.convert.calibration.powers import measure_powers  # brings torch
    from quantpress.pipelines.layer_work import with_checks

    check_tied_head(preflight(source))
    save_memory()  # the text has been tokenized, and no worker has started
    checked = with_checks(source)
    found = measure_powers(
        checked,
        text.windows,
        threads=context.threads,
        folder=folder,
        device=context.device,
        max_memory=activation_budget(context.max_memory),
        precision=stage.calibration_dtype or "f32",
        progress=partial(context.progress, "measuring"),
    )
    sums, counts = dict(found.sums), dict(found.counts)
    if EMBEDDING in empty_matrix(source, stage).entries and EMBEDDING not in sums:
        sums[EMBEDDING] = found.tokens * _embedding_costs(checked, text, folder, context)[None]
        counts[EMBEDDING] = np.array([found.tokens])
    return ImportanceMatrix.measured(sums, counts, tokens=found.tokens, length=text.length, dataset=text.name)


def _embedding_costs(source: Checkpoint, text: ImatrixText, folder: Path, context: RunContext) -> NDArray[np.float64]:
    """Gives what an error in each column of the embedding costs, (K,)."""
    from quantpress.convert.calibration.sensitivity import embedding_sensitivity
    from quantpress.convert.calibration.windows import enough_windows

    columns = find_arch(source.config).read_config(source.config).dims["embedding"]
    found = embedding_sensitivity(
        source,
        enough_windows(text.windows, columns),
        threads=context.threads,
        folder=folder,
        max_memory=activation_budget(context.max_memory),
        progress=partial(context.progress, "embedding"),
    )
    return found.diagonal().astype(np.float64)


def empty_matrix(source: Checkpoint, stage: MeasureOptions) -> ImportanceMatrix:
    """Gives a matrix of the right names and sizes in which every column counts alike, for planning.

    Raises:
        UnknownFamilyError: there is no table for the model.
    """
    spec = find_arch(source.config)
    hyper = spec.read_config(source.config)
    one = np.ones(1, np.float32)
    entries = {
        name: Importance(np.broadcast_to(one, size), np.broadcast_to(one, size[:1]))
        for name, size in measured_sizes(spec, hyper).items()
    }
    name = calibration_text().name if stage.text is None else stage.text.name
    return ImportanceMatrix(entries, (name,), stage.chunks or 1, _context(source, stage.context), MATRIX_NAME)


def text_tokens(source: Checkpoint, stage: MeasureOptions) -> int:
    """Estimates the tokens that are measured; reads no text, only its size."""
    context = _context(source, stage.context)
    if stage.text is None:
        nbytes = len(calibration_text().text)
    else:
        nbytes = stage.text.stat().st_size if stage.text.is_file() else 0
    found = max(2, nbytes // _BYTES_PER_TOKEN // context)
    return context * (found if stage.chunks is None else min(found, stage.chunks))


def needs(source: Checkpoint, stage: MeasureOptions) -> tuple[int, int]:
    """Estimates bytes of memory and of temporary files that measuring takes."""
    spec = find_arch(source.config)
    hyper = spec.read_config(source.config)
    hidden = text_tokens(source, stage) * hyper.hidden * _FLOAT
    budget = activation_budget(None)
    return _BASE_BYTES + layer_bytes(spec, hyper) + min(hidden, budget), max(0, hidden - budget)
