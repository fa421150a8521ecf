"""`quantpress inspect`: what a model file holds, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from quantpress.pipelines.inspection import inspect

EXAMPLES = """
\b
Examples:
  quantpress inspect ./model
  quantpress inspect model-Q8_0.gguf --json
  quantpress inspect ./adapter
"""


def _text(key: str, value: Any) -> str:
    if key == "tensor_types":
        return ", ".join(f"{kind}: {found['tensors']} ({found['parameters']:,})" for kind, found in value.items())
    if key == "estimated_bytes":
        return "\n".join(f"{kind:5} {size / 1e6:12,.1f} MB" for kind, size in value.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value")
    for key, value in report.items():
        if value is not None and value != {}:
            table.add_row(key.replace("_", " "), _text(key, value))
    Console().print(table)


@click.command(name="inspect", epilog=EXAMPLES)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Describe MODEL from its headers: family, sizes, types, tokenizer, and how big each target type would be."""
    report = inspect(model)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
