"""What `quantize` prints of the weights: a line, or a table of all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantpress.pipelines.stage import TensorResult

__all__ = ["quantized_json", "show_quantized", "summary"]

_LOSSES = (("relative_loss", "relative loss"), ("relative_error", "relative error"))  # the better one first


def _quantized(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    return [tensor for tensor in tensors if re.match(r"int\d", tensor.type)]


def _loss(tensor: TensorResult) -> tuple[str, float] | None:
    """How far a weight is from its source, by the best figure there is."""
    figures = {**tensor.figures, "relative_error": tensor.relative_error}
    for key, name in _LOSSES:
        if figures.get(key) is not None:
            return name, float(figures[key])
    return None


def summary(tensors: Sequence[TensorResult]) -> str:
    """Tells in one line what became of the weights; empty where none was quantized."""
    found = _quantized(tensors)
    if not found:
        return ""
    kinds = Counter(tensor.type for tensor in found)
    text = f"quantized {', '.join(f'{count} weights to {kind}' for kind, count in kinds.most_common())}"
    losses = [(loss[1], loss[0], tensor.name) for tensor in found if (loss := _loss(tensor)) is not None]
    if not losses:
        return text
    worst = max(losses)
    mean = sum(value for value, _, _ in losses) / len(losses)
    return f"{text}: {worst[1]} {mean:.3g} mean, {worst[0]:.3g} in {worst[2].removesuffix('.weight')}"


def quantized_json(tensors: Sequence[TensorResult]) -> list[dict[str, Any]]:
    """Gives the weights as plain values."""
    return [
        {"name": each.name, "type": each.type, "bytes": each.nbytes, "relative_error": each.relative_error}
        | dict(each.figures)
        for each in _quantized(tensors)
    ]


def show_quantized(tensors: Sequence[TensorResult]) -> None:
    """Prints a row for every weight, with the figures that its method gives."""
    from rich.table import Table

    from quantpress.pipelines.commands.showing import plain_console

    rows = quantized_json(tensors)
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    table = Table(*(key.replace("_", " ") for key in keys))
    for row in rows:
        table.add_row(*(_text(row.get(key)) for key in keys))
    plain_console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
