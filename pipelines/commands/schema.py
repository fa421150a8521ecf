"""`quantpress schema`: the JSON Schema of pipeline files."""

from __future__ import annotations

import json

import click

EXAMPLES = """
\b
Examples:
  quantpress schema > quantpress.schema.json
\b
and in the first line of a pipeline file, for editors that know YAML's language server:
  # yaml-language-server: $schema=quantpress.schema.json
"""


@click.command(name="schema", epilog=EXAMPLES)
def command() -> None:
    """Print the JSON Schema of pipeline files, with every installed stage and its options."""
    from quantpress.pipelines.batch.schema import pipeline_schema

    click.echo(json.dumps(pipeline_schema(), indent=2, ensure_ascii=False))
