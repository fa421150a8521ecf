"""Whether one model speaks like another: KL divergence, top-1 agreement and perplexity on the same tokens.

Both models score the same windows (``perplexity.cut_windows``) and are compared at the same positions. A verdict is
"passed" only when every figure was computed, is finite and lies within its limit; everything else is a failure with
a reason. Figures follow llama.cpp's ``--kl-divergence`` (tools/perplexity/perplexity.cpp, ``kl_divergence``), but
from float32 logits instead of 16-bit log-probabilities and over all of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.adapter_share import AdapterShare, ShareTally
from quantpress.pipelines.content_proof import ContentProof
from quantpress.pipelines.parity_limits import Limits
from quantpress.pipelines.perplexity import Progress, Score
from quantpress.pipelines.runtime import Runtime
from quantpress.pipelines.token_figures import TokenFigures, token_figures
from quantpress.pipelines.vector_figures import VectorFigures
from quantpress.quant.errors import QuantpressError

__all__ = ["Judged", "Parity", "compare", "unjudged"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One side of a comparison: what ran it, its perplexity and the standard error (NaN when not known)."""

    runtime: str
    perplexity: float = math.nan
    stderr: float = math.nan


@dataclass(frozen=True, slots=True)
class Parity:
    """The verdict on a candidate model and the figures behind it.

    Attributes:
        text_sha256: identity of the scored text.
        tokens: scored tokens.
        context: tokens per window.
        baseline, candidate: perplexity of each side.
        ppl_ratio: candidate's perplexity over the baseline's.
        mean_kld, kld_p99, max_kld: KL(baseline || candidate) in nats per token: mean, 99 % quantile, maximum.
        top1_agreement: share of tokens whose likeliest next token is the same.
        limits: what was asked for.
        passed: true only if all figures are finite and within the limits.
        reason: why it did not pass, or what was shown.
        ppl_ratio_stderr, mean_kld_stderr, top1_stderr: standard errors; paired for the ratio. Not in the report's
            ``parity`` object.
        adapter_share: what the file has of the adapters it was merged with; None where there were none.
        vectors: of an encoder, how far the vectors of texts are from the source's; else None.
        content: what the file holds beside what the source holds; None where that was not looked at.
        failures: the measures that did not pass: "mean_kld", "ppl_change", "top1", "not_finite", "adapter_share",
            "vectors", "tokenizer", "cache", "padding", "weights", "settings", "vocabulary", "manifest", "unjudged".
    """

    text_sha256: str
    tokens: int
    context: int
    baseline: Judged
    candidate: Judged
    ppl_ratio: float
    mean_kld: float
    kld_p99: float
    max_kld: float
    top1_agreement: float
    limits: Limits
    passed: bool
    reason: str
    ppl_ratio_stderr: float = math.nan
    mean_kld_stderr: float = math.nan
    top1_stderr: float = math.nan
    adapter_share: AdapterShare | None = None
    vectors: VectorFigures | None = None
    content: ContentProof | None = None
    failures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The ``parity`` object of sidecars and of ``verify --json``; figures that are not finite become null."""
        sides = {
            name: {"runtime": side.runtime, "perplexity": _json(side.perplexity), "stderr": _json(side.stderr)}
            for name, side in (("baseline", self.baseline), ("candidate", self.candidate))
        }
        figures = ("ppl_ratio", "mean_kld", "kld_p99", "max_kld", "top1_agreement")
        return {
            "text_sha256": self.text_sha256,
            "tokens": self.tokens,
            "context": self.context,
            **sides,
            **{name: _json(getattr(self, name)) for name in figures},
            "limits": self.limits.to_json(),
            "passed": self.passed,
            "reason": self.reason,
            "failures": list(self.failures),
            **({} if self.adapter_share is None else {"adapter_share": self.adapter_share.to_json()}),
            **({} if self.vectors is None else {"vectors": self.vectors.to_json()}),
            **({} if self.content is None else {"content": self.content.to_json()}),
        }


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(slots=True)
class _Tally:
    """What is kept of the windows seen so far: numbers per token, never logits."""

    figures: list[TokenFigures]
    agreeing: int = 0

    def add(self, sides: Sequence[NDArray[np.float32]], targets: NDArray[np.int32]) -> str | None:
        """Take one window's (n, V) logits of both sides in; returns what is wrong with them, None if nothing is."""
        figures = token_figures(sides[0], sides[1], targets)
        if not np.isfinite(figures.divergence).all():  # one logit that is not finite is enough for that
            counts = [logits.size - int(np.isfinite(logits).sum()) for logits in sides]
            return f"logits that are NaN or infinite: {counts[0]} of the baseline, {counts[1]} of the candidate"
        self.figures.append(figures)
        self.agreeing += int((sides[0].argmax(axis=1) == sides[1].argmax(axis=1)).sum())
        return None


def compare(
    baseline: Runtime,
    candidate: Runtime,
    windows: Sequence[NDArray[np.int32]],
    limits: Limits,
    *,
    text_sha256: str,
    vocabulary: int | None = None,
    progress: Progress | None = None,
    watch: ShareTally | None = None,
) -> Parity:
    """Score the windows with both models and judge the difference; holds one window of logits of each side.

    Args:
        baseline: the source model.
        candidate: the model to judge.
        windows: windows of equal length from ``cut_windows``.
        limits: what still passes.
        text_sha256: identity of the text, for the report.
        vocabulary: tokens the tokenizer knows. When the two sides have different numbers of rows, only these are
            compared, for rows beyond them are padding; without it, different numbers fail.
        progress: called after each window.
        watch: shown each window and the logits of both sides that are compared.

    Returns:
        a verdict in every case: a runtime that fails, logits that are not finite and an empty text all give
        ``passed=False`` with the reason.
    """
    rows = min(baseline.vocab_size, candidate.vocab_size)
    if baseline.vocab_size != candidate.vocab_size:
        rows = vocabulary or 0
    context = len(windows[0]) if len(windows) else 0
    tally = _Tally([])
    problem = _unfit(baseline, candidate, windows, rows)
    for index, window in enumerate(windows if problem is None else ()):
        problem = _add_window(tally, (baseline, candidate), window, rows, watch)
        if problem is not None:
            problem = f"chunk {index}: {problem}"
            break
        if progress is not None:
            progress(index + 1, len(windows))
    if problem is not None:
        names = Judged(baseline.name), Judged(candidate.name)
        return unjudged(problem, limits, text_sha256=text_sha256, context=context, sides=names)
    return _verdict(tally, limits, text_sha256, context, (baseline.name, candidate.name))


def _add_window(
    tally: _Tally, runtimes: tuple[Runtime, Runtime], window: NDArray[np.int32], rows: int, watch: ShareTally | None
) -> str | None:
    """Score one window with both; returns why it could not be, or None. Its logits are freed on return."""
    first = len(window) // 2
    try:
        sides = [runtime.logits(window, first)[:-1, :rows] for runtime in runtimes]
        problem = tally.add(sides, window[first + 1 :])
        if problem is None and watch is not None:
            watch.watch(window, *sides)
    except QuantpressError as error:
        return f"could not be judged: {error}"
    return problem


def unjudged(
    reason: str,
    limits: Limits,
    *,
    text_sha256: str = "",
    context: int = 0,
    sides: tuple[Judged, Judged] = (Judged("none"), Judged("none")),
) -> Parity:
    """The verdict "not passed" for a comparison that could not be made."""
    failures = ("unjudged",)
    return Parity(text_sha256, 0, context, *sides, *(math.nan,) * 5, limits, False, reason, failures=failures)


def _unfit(baseline: Runtime, candidate: Runtime, windows: Sequence[NDArray[np.int32]], rows: int) -> str | None:
    """Why the two cannot be compared on these windows, or None."""
    sizes = baseline.vocab_size, candidate.vocab_size
    if sizes[0] != sizes[1] and not 0 < rows <= min(sizes):
        return f"vocabularies of {sizes[0]} (baseline) and {sizes[1]} (candidate) tokens cannot be compared"
    if not len(windows) or len(windows[0]) < 4:
        return "no token was scored: the text is empty or shorter than two windows"
    if len({len(window) for window in windows}) != 1:
        return "windows of different lengths"
    low, high = min(int(window.min()) for window in windows), max(int(window.max()) for window in windows)
    if low < 0 or high >= rows:
        return f"token ids from {low} to {high} in the text, vocabulary of {rows}"
    return None


def _verdict(tally: _Tally, limits: Limits, text_sha256: str, context: int, names: tuple[str, str]) -> Parity:
    """Figures and judgement from the tokens of all windows."""
    kinds = "divergence", "baseline", "candidate"
    divergence, *losses = (np.concatenate([getattr(figures, kind) for figures in tally.figures]) for kind in kinds)
    count = divergence.size
    sides = [Judged(name, *Score().add(loss).perplexity()) for name, loss in zip(names, losses, strict=True)]
    difference = losses[1] - losses[0]
    ratio = math.exp(min(float(difference.mean()), 700.0))
    agreement = tally.agreeing / count
    figures: dict[str, Any] = {
        "ppl_ratio": ratio,
        "mean_kld": max(float(divergence.mean()), 0.0),  # rounding may leave -1e-17
        "kld_p99": float(np.quantile(divergence, 0.99)),
        "max_kld": float(divergence.max()),
        "top1_agreement": agreement,
    }
    errors: dict[str, Any] = {
        "ppl_ratio_stderr": ratio * _stderr(difference),
        "mean_kld_stderr": _stderr(divergence),
        "top1_stderr": math.sqrt(agreement * (1 - agreement) / (count - 1)) if count > 1 else math.nan,
    }
    finite = all(map(math.isfinite, (*figures.values(), sides[0].perplexity, sides[1].perplexity)))
    exceeded = limits.problems(mean_kld=figures["mean_kld"], ppl_ratio=ratio, top1_agreement=agreement)
    problems = exceeded if finite else {"not_finite": "a figure is not finite"}
    return Parity(
        text_sha256=text_sha256,
        tokens=count,
        context=context,
        baseline=sides[0],
        candidate=sides[1],
        **figures,
        limits=limits,
        passed=not problems,
        reason="; ".join(problems.values()) or "all figures are within the limits",
        failures=tuple(problems),
        **errors,
    )


def _stderr(values: NDArray[np.float64]) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
