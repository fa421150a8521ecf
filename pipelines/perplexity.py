"""Perplexity by llama.cpp's method, so that the figures can be laid beside llama-perplexity's.

Method (llama.cpp, tools/perplexity/perplexity.cpp, ``perplexity``): the text is tokenised once, as plain text with
the tokens the vocabulary adds by itself; it is cut into chunks of ``context`` tokens and the rest is dropped; each
chunk is scored from an empty state, its first token replaced by BOS when the vocabulary adds BOS; only positions
context/2 to context-2 count, each as the prediction of the token after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.runtime import Runtime
from quantpress.quant.errors import InputError, ParityError, UsageError

__all__ = ["Perplexity", "Progress", "Score", "cut_windows", "perplexity", "plain_text", "row_blocks", "score"]

Progress = Callable[[int, int], None]  # chunks done, chunks in all
_BLOCK_VALUES = 1 << 16  # float64 temporaries of 512 KiB stay in the cache (0.11 s per 256 x 49152 chunk)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What one model makes of a text.

    Attributes:
        model: name of the model.
        runtime: what ran it.
        perplexity: exp of the mean negative log-likelihood per scored token.
        stderr: standard error of ``perplexity`` (llama.cpp's formula).
        tokens: scored tokens.
        context: tokens per chunk.
        chunks: scored chunks.
        seconds: wall time of the scoring.
    """

    model: str
    runtime: str
    perplexity: float
    stderr: float
    tokens: int
    context: int
    chunks: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The keys and values that ``perplexity --json`` prints."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over scored tokens, in nats, float64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, losses: NDArray[np.float64]) -> Score:
        """The sums with (n,) further losses."""
        total, squares = float(losses.sum()), float(np.square(losses).sum())
        return Score(self.count + losses.size, self.total + total, self.squares + squares)

    def perplexity(self) -> tuple[float, float]:
        """Perplexity and its standard error: ``ppl * sqrt((mean(nll^2) - mean(nll)^2) / (count - 1))``."""
        if self.count == 0:
            return math.nan, math.nan
        mean = self.total / self.count
        value = math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows; NaN compares false and passes on
        variance = self.squares / self.count - mean * mean
        if self.count == 1:
            return value, math.nan
        return value, value * math.sqrt(max(variance, 0.0) / (self.count - 1))


def plain_text(text: str) -> str:
    """The text as llama.cpp's ``-f`` option takes it: without one final line break (common/arg.cpp)."""
    return text.removesuffix("\n")


def cut_windows(
    tokens: NDArray[np.int32], *, context: int, chunks: int | None = None, bos: int | None = None
) -> list[NDArray[np.int32]]:
    """Cut a tokenised text into the windows that are scored.

    Args:
        tokens: (n,) int32 ids of the whole text, with what the vocabulary adds (BOS) in front.
        context: tokens per window, at least 4.
        chunks: at most so many windows; None or fewer in the text: all.
        bos: id that replaces each window's first token; None when the vocabulary does not add BOS.

    Returns:
        windows of (context,) int32.

    Raises:
        UsageError: ``context`` or ``chunks`` is too small.
        InputError: fewer than 2 * context tokens, llama.cpp's own minimum.
    """
    if context < 4:
        raise UsageError(f"--context {context}: wanted at least 4 tokens")
    if chunks is not None and chunks < 1:
        raise UsageError(f"--chunks {chunks}: wanted at least 1")
    if len(tokens) < 2 * context:
        fits = len(tokens) // 2
        advice = f"use --context {fits} or less, or a longer text" if fits >= 4 else "use a longer text"
        raise InputError(f"the text has {len(tokens)} tokens, wanted at least {2 * context} (2 x context); {advice}")
    count = len(tokens) // context if chunks is None else min(chunks, len(tokens) // context)
    windows = [np.array(tokens[start : start + context], np.int32) for start in range(0, count * context, context)]
    if bos is not None:
        for window in windows:
            window[0] = bos
    return windows


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose float64 copies stay in the processor's cache."""
    step = max(1, _BLOCK_VALUES // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def score(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, by log-softmax in float64.

    Args:
        logits: (n, V) float32.
        targets: (n,) int32 in [0, V).

    Returns:
        (n,) float64 nats; NaN or infinite where the logits are.
    """
    losses = np.empty(len(targets), np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN it gives is what the caller looks for
        for rows in row_blocks(*logits.shape):
            shifted = logits[rows].astype(np.float64)
            shifted -= shifted.max(axis=1, keepdims=True)
            chosen = shifted[np.arange(len(shifted)), targets[rows]]
            losses[rows] = np.log(np.exp(shifted, out=shifted).sum(axis=1)) - chosen
    return losses


def perplexity(
    runtime: Runtime, windows: Sequence[NDArray[np.int32]], *, model: str, progress: Progress | None = None
) -> Perplexity:
    """Score windows from ``cut_windows`` one by one.

    Args:
        runtime: the loaded model.
        windows: windows of equal length.
        model: name for the result.
        progress: called after each window.

    Raises:
        InputError: no windows.
        ParityError: a loss is not finite, or the runtime failed.
    """
    if not windows:
        raise InputError(f"{model}: there is no text to score")
    started = time.perf_counter()
    context, total = len(windows[0]), Score()
    first = context // 2
    for index, window in enumerate(windows):
        losses = score(runtime.logits(window, first)[:-1], window[first + 1 :])
        if not np.isfinite(losses).all():
            position = first + int(np.flatnonzero(~np.isfinite(losses))[0])
            raise ParityError(f"{model}: {runtime.name} gives a loss that is not finite, chunk {index}, {position=}")
        total = total.add(losses)
        if progress is not None:
            progress(index + 1, len(windows))
    value, stderr = total.perplexity()
    seconds = time.perf_counter() - started
    return Perplexity(model, runtime.name, value, stderr, total.count, context, len(windows), seconds)
