"""`quantpress inspect`: what a model file holds, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.showing import plain_console
from quantpress.pipelines.inspection import inspect

EXAMPLES = """
\b
Examples:
  quantpress inspect ./model
  quantpress inspect model-Q8_0.gguf --json
  quantpress inspect ./model-onnx
  quantpress inspect ./adapter
"""


def _text(key: str, value: Any) -> str:
    if key == "tensor_types":
        return ", ".join(f"{kind}: {found['tensors']} ({found['parameters']:,})" for kind, found in value.items())
    if key == "estimated_bytes":
        return "\n".join(f"{kind:9} {size / 1e6:12,.1f} MB" for kind, size in value.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _show(report: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("what", "value")
    for key, value in report.items():
        if key != "modules" and value not in (None, {}, [], False):
            table.add_row(key.replace("_", " "), _text(key, value))
    plain_console().print(table)


@click.command(name="inspect", epilog=EXAMPLES)
@click.argument("model")
@click.option("-v", "--verbose", is_flag=True, help="Show every module of an adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(session: Session, /, model: str, verbose: bool, as_json: bool) -> None:
    """Describe MODEL from its headers: family, sizes, types, tokenizer, and how big each target type would be.

    Of an ONNX model: also its operators, inputs and outputs.

    Of an adapter: its settings, and for each kind of module the rank, the scale and the norm of what it adds.
    """
    report = inspect(model)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _show(report)
    if "modules" in report:
        from quantpress.pipelines.commands.ledger_table import show_modules

        show_modules(report, every_module=verbose or session.verbose)
