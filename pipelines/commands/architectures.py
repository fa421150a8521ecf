"""`quantpress architectures`: the families that are known, and what works for each."""

from __future__ import annotations

import json
from typing import Any

import click


def families() -> list[dict[str, Any]]:
    """Gives one row per family, from the tables."""
    from quantpress.convert.arch.registry import ARCHITECTURES

    return [
        {
            "family": spec.family,
            "classes": list(spec.classes),
            "inputs": ["safetensors", "torch .bin", "gguf"],
            "gguf": spec.gguf,
            "onnx": True,
            "gptq": False,
            "lora": True,
            "tested": "transformers, PEFT, llama.cpp, onnxruntime",
        }
        for spec in ARCHITECTURES
    ]


@click.command(name="architectures")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the model families and what works for each."""
    rows = families()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "class in config.json", "GGUF architecture", "ONNX", "LoRA", "tested against")
    for row in rows:
        known = ("yes" if row[key] else "no" for key in ("onnx", "lora"))
        table.add_row(row["family"], "\n".join(row["classes"]), row["gguf"], *known, row["tested"])
    Console().print(table)
    click.echo("adapters are merged into other families too, tensor by tensor into safetensors, but not judged there")
