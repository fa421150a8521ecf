"""The YAML at the start of a model card that the Hub reads; nothing that is not known."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quantpress.pipelines.report.rows import Row

__all__ = ["front_matter"]


def front_matter(rows: Sequence[Row], base_models: Sequence[str], license_name: str) -> str:
    """Gives the front matter of a card.

    Args:
        rows: the outputs that the card is about.
        base_models: Hub ids.
        license_name: as another card has it, or empty.
    """
    lines = ["---"]
    if base_models:
        lines += ["base_model:", *(f"- {_text(name)}" for name in base_models)]
        merged = any(row.source[1] for row in rows)
        if not merged:  # what adapters make of a model is for the author to name: finetune, merge
            lines.append("base_model_relation: quantized")
    if license_name:
        lines.append(f"license: {_text(license_name)}")
    lines += ["pipeline_tag: text-generation"]
    kinds = {row.kind for row in rows}
    if kinds == {"safetensors"}:
        lines.append("library_name: transformers")
    tags = [*sorted(kinds & {"gguf", "onnx", "safetensors"}), "quantpress"]
    return "\n".join([*lines, "tags:", *(f"- {_text(tag)}" for tag in tags), "---"])


def _text(value: str) -> str:
    """Gives a text as YAML: JSON's form of it is one."""
    return json.dumps(value, ensure_ascii=True)
