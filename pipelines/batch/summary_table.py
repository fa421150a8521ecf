"""What became of a batch, as `run` prints it at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
from quantpress.pipelines.batch.wording import duration, error_line, printable
from quantpress.pipelines.commands.showing import size_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_batch", "verdict"]

_NARROW = 110  # columns; below, the output's name stands for its job and its folder
_FIGURES = ("type", "size", "perplexity", "KLD", "top-1", "verdict", "time")
_ABSENT = "-"


def verdict(output: OutputResult) -> str:
    """Gives "verified", "FAILED" or, where nobody asked for a proof, "written"."""
    if output.parity is None:
        return "written"
    return "verified" if output.parity.get("passed") is True else "FAILED"


def show_batch(result: BatchResult, console: Console) -> None:
    """Prints a row per output, then the errors of failed jobs, then a line that says how many are well.

    Args:
        result: of the batch.
        console: from `plain_console`; 80 columns are enough.
    """
    from rich.text import Text

    if any(job.outputs for job in result.jobs):
        console.print(_table(result, wide=console.width >= _NARROW))
    for job in result.failed:
        reason = f": {error_line(job.error)}" if job.error else ""
        console.print(Text(f"{printable(job.name)}: {job.state}{reason}"), soft_wrap=True)
    console.print(Text(_summary(result)), soft_wrap=True)


def _table(result: BatchResult, *, wide: bool) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("job", "output") if wide else ("output",):
        table.add_column(heading, overflow="fold")
    for heading in _FIGURES:
        table.add_column("PPL" if heading == "perplexity" and not wide else heading, no_wrap=heading != "type")
    for job in result.jobs:
        for place, output in enumerate(job.outputs):
            names = (job.name if place == 0 else "", _near(output.path)) if wide else (_last(output.path),)
            table.add_row(*(Text(printable(cell)) for cell in (*names, *_figures(job, output))))
    return table


def _figures(job: JobResult, output: OutputResult) -> tuple[str, ...]:
    parity = output.parity or {}
    candidate = parity.get("candidate")
    perplexity = _number(candidate.get("perplexity"), ".3f") if isinstance(candidate, Mapping) else _ABSENT
    judged = bool(parity.get("tokens"))
    figures = (perplexity, _number(parity.get("mean_kld"), ".2g"), _number(parity.get("top1_agreement"), ".1%"))
    return (
        output.ftype or _ABSENT,
        size_text(output.nbytes),
        *(figures if judged else (_ABSENT,) * 3),
        verdict(output),
        _time(job, output),
    )


def _number(value: Any, form: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return _ABSENT
    return format(value, form)


def _time(job: JobResult, output: OutputResult) -> str:
    """Gives the time that the job took; "cached" where the output was there."""
    if output.state == "cached":
        return "cached"
    return duration(job.seconds) if output is job.outputs[0] else ""


def _near(path: str) -> str:
    """Gives a path as it is written from here, where that is shorter."""
    if "://" in path:
        return path
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def _summary(result: BatchResult) -> str:
    """Says in a line how many jobs are well."""
    states = [job.state for job in result.jobs]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    cached = sum(job.cached for job in result.jobs)
    note = f", {cached} of them cached" if cached else ""
    jobs = f"{len(states)} job{'s' if len(states) != 1 else ''}"
    return f"{jobs}: {', '.join(parts) or 'none'}{note}; {duration(result.seconds)}"
