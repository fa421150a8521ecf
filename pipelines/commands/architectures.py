"""`quantpress architectures`: the families that are known, and what works for each."""

from __future__ import annotations

import json
from typing import Any

import click

_TESTED = (
    "transformers",
    "PEFT",
    "llama.cpp",
    "onnxruntime",
)  # whose results ours are compared with, see docs/families.md


def families() -> list[dict[str, Any]]:
    """Gives one row per family, from the tables."""
    from quantpress.convert.arch.registry import ARCHITECTURES

    return [
        {
            "family": spec.family,
            "classes": list(spec.classes),
            "kind": spec.kind,
            "inputs": ["safetensors", "torch .bin", *(["gguf"] if spec.gguf_opens else [])],
            "gguf": spec.gguf if spec.gguf_runs else "",
            "onnx": True,
            "gptq": spec.kind != "encoder_decoder",
            "lora": True,
            "tested": ", ".join(_TESTED if spec.gguf_runs else [each for each in _TESTED if each != "llama.cpp"]),
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

    table = Table("family", "class in config.json", "kind", "GGUF architecture", "ONNX", "GPTQ", "LoRA")
    for row in rows:
        known = ("yes" if row[key] else "no" for key in ("onnx", "gptq", "lora"))
        kind = row["kind"].replace("_", "-")
        table.add_row(row["family"], "\n".join(row["classes"]), kind, row["gguf"] or "not in llama.cpp", *known)
    Console().print(table)
    click.echo("adapters are merged into other families too, tensor by tensor into safetensors, but not judged there")
