"""`quantpress stages`: the installed stages with their options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.batch.stage_list import DescribedOption, DescribedStage


@click.command(name="stages")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the stages of pipeline files; with NAME, its options too.

    Packages add stages by the entry point group quantpress.stages.
    """
    from quantpress.pipelines.batch.registry import find_stage
    from quantpress.pipelines.batch.stage_list import described_stages

    chosen = {name: find_stage(name) for name in names}
    stages = described_stages(chosen or None)
    if as_json:
        click.echo(json.dumps([stage.to_json() for stage in stages], indent=2, ensure_ascii=False))
    elif names:
        _show_options(stages)
    else:
        _show_names(stages)


def _show_names(stages: tuple[DescribedStage, ...]) -> None:
    from rich.table import Table

    from quantpress.pipelines.commands.showing import plain_console

    if not stages:
        raise UsageError("no stage can be used")
    table = Table("stage", "kind", "does", "from")
    for stage in stages:
        table.add_row(stage.name, stage.kind, stage.description, stage.package)
    plain_console().print(table)
    click.echo("quantpress stages NAME lists a stage's options, quantpress schema all of them for editors")


def _show_options(stages: tuple[DescribedStage, ...]) -> None:
    from rich.table import Table

    from quantpress.pipelines.commands.showing import plain_console

    for stage in stages:
        table = Table("option", "type", "default", "meaning", title_justify="left")
        table.title = f"{stage.name} ({stage.kind}, {stage.package}): {stage.description}"
        for option in stage.options:
            table.add_row(option.name, _type_of(option), _default_of(option), option.description)
        plain_console().print(table)


def _type_of(option: DescribedOption) -> str:
    return ", ".join(map(str, option.choices)) or option.type


def _default_of(option: DescribedOption) -> str:
    if option.required:
        return "must be given"
    return "" if option.default in (None, [], {}) else json.dumps(option.default, ensure_ascii=False)
