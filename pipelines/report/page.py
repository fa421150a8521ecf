"""The report as one HTML file: no network, no font of its own, every text from a file escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from quantpress.pipelines.batch.results import BatchResult
from quantpress.pipelines.report import values
from quantpress.pipelines.report.charts import Chart, Point, scatter
from quantpress.pipelines.report.columns import COLUMNS
from quantpress.pipelines.report.heatmap import Heatmap, heatmaps, same_figures
from quantpress.pipelines.report.ledgers import ledgers
from quantpress.pipelines.report.provenance import Source, makings, sources
from quantpress.pipelines.report.rows import Row, rows_of

__all__ = ["html_report"]

_MAX_CELLS = 20_000  # of all tables of weights together: 2 MB
_LEAST_CELLS = 14  # of one table, however many there are
_FIGURES = 2  # tables that an output may have, about
_MAX_CHARTED = 12  # sources with charts of their own


@dataclass(frozen=True, slots=True)
class _Charts:
    source: Source
    kld: Chart | None
    perplexity: Chart | None


@dataclass(frozen=True, slots=True)
class _Weights:
    rows: tuple[Row, ...]
    tables: tuple[Heatmap, ...]


def html_report(result: BatchResult, models: Mapping[str, str]) -> str:
    """Gives the report of a batch.

    Args:
        result: the batch.
        models: job -> its model, as the pipeline file has it; may be empty.
    """
    rows = rows_of(result)
    found = sources(rows, models)
    style, script = _asset("report.css"), _asset("report.js")
    return _template().render(
        title=values.plain(result.pipeline.name),
        result=result,
        failed=result.failed,
        rows=rows,
        sources=found,
        charts=_charts(found),
        weights=_weights(rows),
        ledgers=ledgers(rows),
        makings=makings(rows),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        verdicts={name: sum(row.verdict == name for row in rows) for name in ("passed", "failed", "not proved")},
        uncharted=max(0, len(found) - _MAX_CHARTED),
    )


@functools.lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update({"v": values, "columns": COLUMNS})
    return environment.from_string(_asset("report.html.j2"))


def _asset(name: str) -> str:
    return resources.files("quantpress.pipelines.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Gives the source expression of a content security policy for an inline element (W3C CSP level 2, section 4.2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _charts(found: Sequence[Source]) -> tuple[_Charts, ...]:
    charts = [
        _Charts(
            source,
            scatter(_points(source.rows, "mean_kld"), title="mean KL divergence, nats per token", log=True),
            _perplexity(source.rows),
        )
        for source in found[:_MAX_CHARTED]
    ]
    return tuple(chart for chart in charts if chart.kld or chart.perplexity)


def _perplexity(rows: Sequence[Row]) -> Chart | None:
    baselines = {row.baseline for row in rows if row.baseline is not None}
    line = baselines.pop() if len(baselines) == 1 else None  # judged on different texts there are several
    return scatter(_points(rows, "perplexity"), title="perplexity", log=None, line=line)


def _points(rows: Sequence[Row], figure: str) -> list[Point]:
    points = []
    for row in rows:
        value: Any = getattr(row, figure)
        if value is None or not row.nbytes:
            continue
        title = f"{row.label} · {row.path} · {values.bytes_text(row.nbytes)} · {values.significant(value, 4)}"
        loss = value if figure == "mean_kld" else _distance(row)
        points.append(Point(row.nbytes, value, row.label, row.kind, row.anchor, title, row.verdict == "failed", loss))
    return points


def _distance(row: Row) -> float:
    """Says how far a perplexity is from the source's: one that falls is as suspicious as one that rises."""
    return abs(math.log(row.ppl_ratio)) if row.ppl_ratio and row.ppl_ratio > 0 else math.inf


def _weights(rows: Sequence[Row]) -> tuple[_Weights, ...]:
    """Gives the tables of weights, each once however many outputs have it."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(same_figures(row.sidecar), []).append(row)
    each = max(_LEAST_CELLS, _MAX_CELLS // max(1, _FIGURES * len(groups)))
    made = [_Weights(tuple(group), heatmaps(group[0].sidecar, each)) for group in groups.values()]
    return tuple(weights for weights in made if weights.tables)
