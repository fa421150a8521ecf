"""`quantpress run`: a pipeline file with all its jobs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.quant.errors import BatchError

if TYPE_CHECKING:
    from quantpress.pipelines.batch.plan import BatchPlan

EXAMPLES = """
\b
Examples:
  quantpress run release.yaml
  quantpress run release.yaml --dry-run
  quantpress run release.yaml --job 'smol-*' --set model=./my-model
  quantpress run release.yaml --report report.html --report README.md
  quantpress run release.yaml --fresh --workers 2
  RAY_ADDRESS=head:6379 quantpress run release.yaml --executor ray
"""


@click.command(name="run", epilog=EXAMPLES)
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--job", "jobs", multiple=True, metavar="NAME", help="Only this job; * and ? match, may be repeated.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A variable, or a key as in defaults.device.")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), help="Tasks at once; 0: in this process.  [default: what fits]")
@click.option("--resume/--fresh", default=True, help="Go on from what earlier runs have made (default), or anew.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, its sizes and memory; touch no weight.")
@click.option("--explain", is_flag=True, help="Say why a stage runs (again).")
@click.option(
    "--report", "reports", multiple=True, metavar="FILE", help="Write a report: FILE.html, or FILE.md for a model card."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(
    session: Session, /, pipeline: Path, jobs: tuple[str, ...], sets: tuple[str, ...], resume: bool,
    reports: tuple[str, ...], as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Press everything that PIPELINE says, and prove every output.

    Jobs that share work share it, and what an earlier run has made and still stands is not made again. A job that
    fails leaves the others alone: exit code 7, and the summary names it.
    """
    from quantpress.pipelines.batch.display import batch_display
    from quantpress.pipelines.batch.load import load_batch
    from quantpress.pipelines.batch.plan import plan_batch
    from quantpress.pipelines.batch.run import device_on, require_disk, run_batch
    from quantpress.pipelines.report.writing import report_form, write_report

    places = [Path(f"report.{each}" if each in ("html", "md") else each) for each in reports]
    for place in places:
        report_form(place)
    dry_run, explain = flags.pop("dry_run"), flags.pop("explain")
    spec = load_batch(pipeline, sets=sets, jobs=jobs)
    with session.progress() as progress:
        plan = plan_batch(
            spec, force=flags.pop("force"), fresh=not resume, dry_run=dry_run, explain=explain,
            device_of=device_on(flags["executor"]), progress=progress,
        )  # fmt: skip
    if dry_run:
        _show_plan(plan, as_json=as_json)
        require_disk(plan)
        return
    require_disk(plan)
    if explain and not session.quiet:
        _say_why(plan)
    with batch_display(plan.tasks, quiet=session.quiet, log_format=session.log_format) as watch:
        result = run_batch(plan, watch=watch, **flags)
    for place in places:
        write_report(result, place)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    elif not session.quiet:
        from quantpress.pipelines.batch.summary_table import show_batch
        from quantpress.pipelines.commands.showing import plain_console

        show_batch(result, plain_console())
    result.require_success()


def _show_plan(plan: BatchPlan, *, as_json: bool) -> None:
    from quantpress.pipelines.batch.plan_table import plan_json, show_plan_table
    from quantpress.pipelines.commands.showing import plain_console

    failed = {job.spec.name: str(job.error) for job in plan.jobs if job.error is not None}
    if as_json:
        click.echo(json.dumps(plan_json(plan.rows) | {"failed": failed}, indent=2))
    else:
        show_plan_table(plan.rows, plain_console())
        for name, error in failed.items():
            click.echo(f"{name}: {error}")
    if failed:
        raise BatchError(f"{plan.spec.path}: {len(failed)} of {len(plan.jobs)} jobs cannot run: {', '.join(failed)}")


def _say_why(plan: BatchPlan) -> None:
    for row in plan.rows:
        if row.reasons:
            logging.getLogger(__name__).warning("%s: %s: %s", row.job, row.stage, "; ".join(row.reasons))
