"""Columns of the table of outputs: what they are called, what a cell shows, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantpress.pipelines.report.rows import Row
from quantpress.pipelines.report.values import bytes_text, memory_text, percent_text, seconds_text, significant

__all__ = ["COLUMNS", "Column", "perplexity_text", "verdict_text"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: heading.
        hint: what the figure is.
        show: text of a cell.
        key: what the column is sorted by, a number; None sorts by the text.
        below: a second line of a cell.
    """

    name: str
    hint: str
    show: Callable[[Row], str]
    key: Callable[[Row], float | None] | None = None
    below: Callable[[Row], str] | None = None


def perplexity_text(row: Row) -> str:
    """Gives perplexity with its standard error, rounded where the error begins."""
    if row.perplexity is None:
        return "–"
    if not row.stderr or row.stderr >= row.perplexity:
        return significant(row.perplexity, 4)
    places = max(0, 2 - len(str(int(row.stderr)))) if row.stderr >= 1 else 3
    return f"{row.perplexity:,.{places}f} ± {row.stderr:,.{places}f}"


def verdict_text(row: Row) -> str:
    """Gives the verdict with a sign, so that it needs no colour."""
    return {"passed": "✓ passed", "failed": "✗ failed"}.get(row.verdict, "– not proved")


COLUMNS = (
    Column("verdict", "whether every figure is within its limit", verdict_text),
    Column(
        "type",
        "main type of the weights, and the format",
        lambda row: row.ftype,
        below=lambda row: " · ".join(filter(None, [row.kind, row.method])),
    ),
    Column("size", "bytes of all files", lambda row: bytes_text(row.nbytes), lambda row: row.nbytes),
    Column(
        "bits/weight",
        "stored bits of all tensors, scales included, over the number of weights",
        lambda row: significant(row.bits),
        lambda row: row.bits,
    ),
    Column(
        "perplexity",
        "with its standard error, in the runtime that people use",
        perplexity_text,
        lambda row: row.perplexity,
    ),
    Column(
        "× source",
        "perplexity over that of the source on the same tokens",
        lambda row: significant(row.ppl_ratio, 4),
        lambda row: row.ppl_ratio,
    ),
    Column(
        "mean KLD",
        "KL divergence of the source to the output, nats per token",
        lambda row: significant(row.mean_kld),
        lambda row: row.mean_kld,
    ),
    Column(
        "top-1",
        "tokens whose likeliest successor is the same",
        lambda row: percent_text(row.top1),
        lambda row: row.top1,
    ),
    Column("time", "of all steps, when it was made", lambda row: seconds_text(row.seconds), lambda row: row.seconds),
    Column(
        "peak RSS",
        "most memory of the process that made it",
        lambda row: memory_text(row.peak_rss),
        lambda row: row.peak_rss or None,
    ),
)
