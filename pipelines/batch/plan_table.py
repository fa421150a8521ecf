"""What a batch would do, as `run --dry-run` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantpress.pipelines.batch.tasks import Estimate
from quantpress.pipelines.batch.wording import printable, time_class
from quantpress.pipelines.commands.showing import size_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CACHED", "TO_DO", "PlanRow", "plan_json", "plan_totals", "shared_with", "show_plan_table"]

TO_DO, CACHED = "to do", "cached"
_NARROW = 100  # columns; below, sizes that are not the output's stand in the totals alone


def shared_with(job: str) -> str:
    """Gives the state of work that is done for another job."""
    return f"shared with {job}"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One step of a job.

    Attributes:
        job: its name.
        stage: what a person reads, as `Task.title`.
        state: "to do", "cached", or as `shared_with` gives it.
        estimate: what it would take.
        output: path or URL of what it writes; empty where nothing is written outside the cache.
        reasons: why it is to be done (`--explain`).
    """

    job: str
    stage: str
    state: str
    estimate: Estimate = field(default_factory=Estimate)
    output: str = ""
    reasons: tuple[str, ...] = ()


def plan_totals(rows: Sequence[PlanRow]) -> Estimate:
    """Adds up what is to be done as if one step followed the other; memory is that of the largest."""
    todo = [row.estimate for row in rows if row.state == TO_DO]
    return Estimate(
        seconds=sum(each.seconds for each in todo),
        memory=max((each.memory for each in todo), default=0),
        disk=sum(each.disk for each in todo),
        output_bytes=sum(each.output_bytes for each in todo),
        gpu=any(each.gpu for each in todo),
    )


def plan_json(rows: Sequence[PlanRow]) -> dict[str, Any]:
    """Gives the plan for `run --dry-run --json`."""
    steps = [
        {"job": row.job, "stage": row.stage, "state": row.state, "output": row.output, **_estimate(row.estimate)}
        | ({"reasons": list(row.reasons)} if row.reasons else {})
        for row in rows
    ]
    return {"steps": steps, "total": {"to_do": _count(rows), **_estimate(plan_totals(rows))}}


def show_plan_table(rows: Sequence[PlanRow], console: Console) -> None:
    """Prints the plan: a row per step, totals, and why steps are to be done where that is known.

    Args:
        rows: in the order of the jobs and their stages.
        console: from `plain_console`; on less than 100 columns the table leaves memory and disk to the totals.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= _NARROW
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("job", "stage", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("time", "output", *(("memory", "disk") if wide else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        cells = ["" if row.job == before else row.job, row.stage, row.state, *_figures(row)[: 4 if wide else 2]]
        table.add_row(*(Text(printable(cell)) for cell in cells))
        before = row.job
    console.print(table)
    for line in _reasons(rows):
        console.print(Text(line))
    console.print(Text(_summary(rows)), soft_wrap=not console.is_terminal)


def _figures(row: PlanRow) -> tuple[str, ...]:
    """Time, output, memory and disk; nothing where nothing is to be done."""
    found = row.estimate
    output = size_text(found.output_bytes) if found.output_bytes else ""
    if row.state != TO_DO:
        return "", output, "", ""
    return time_class(found.seconds), output, *(size_text(n) if n else "" for n in (found.memory, found.disk))


def _reasons(rows: Sequence[PlanRow]) -> list[str]:
    return [printable(f"{row.job}: {row.stage}: {'; '.join(row.reasons)}") for row in rows if row.reasons]


def _summary(rows: Sequence[PlanRow]) -> str:
    """Says in a line what all of it comes to."""
    jobs = len({row.job for row in rows})
    head = f"{jobs} job{_s(jobs)}, {len(rows)} step{_s(len(rows))}, {_count(rows)} to do"
    if not _count(rows):
        return f"{head}; nothing was written"
    total = plan_totals(rows)
    return (
        f"{head}: {time_class(total.seconds)} if one follows the other, {size_text(total.output_bytes)} of outputs, "
        f"{size_text(total.disk)} of disk, {size_text(total.memory)} of memory for the largest; nothing was written"
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _count(rows: Sequence[PlanRow]) -> int:
    return sum(row.state == TO_DO for row in rows)


def _estimate(found: Estimate) -> dict[str, Any]:
    return {
        "seconds": round(found.seconds, 1),
        "time": time_class(found.seconds),
        "bytes": found.output_bytes,
        "peak_memory": found.memory,
        "disk_needed": found.disk,
        "gpu": found.gpu,
    }
