"""Tables of what each weight lost, a row per layer and a column per module, with colours that follow the numbers."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.pipelines.report.values import items, mapping, number, plain, significant, text

__all__ = ["CLASSES", "Cell", "Heatmap", "heatmaps", "same_figures"]

CLASSES = 8  # shades of a table
_LAYER = re.compile(r"[A-Za-z_][\w.]*?\.(?P<layer>\d{1,5})\.(?P<module>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MAX_NAME = 200  # characters
_MAX_OUTSIDE = 8
_MAX_MODULES = 40  # columns; what is beyond is told of in words

_Figure = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One weight, or the worst of several.

    Attributes:
        text: the figure.
        shade: 0 to `CLASSES` - 1; the darker the worse.
        title: name, type and figure in full.
    """

    text: str
    shade: int
    title: str


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One figure of all weights of an output.

    Attributes:
        figure: "relative error", ...
        unit: what a number in the table is to be multiplied with: "%", "10⁻⁴" or nothing.
        modules: columns.
        rows: name of the layer, or of a band of layers, and its cells; None where a layer has no such module.
        notes: what is not in the table.
    """

    figure: str
    unit: str
    modules: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    notes: tuple[str, ...]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.rows) * len(self.modules)


def _plain(key: str) -> _Figure:
    return lambda tensor: number(tensor.get(key))


def _awq(tensor: Mapping[str, Any]) -> float | None:
    found, plain = number(tensor.get("sampled_loss")), number(tensor.get("unscaled_loss"))
    return found / plain if found is not None and plain else None


_FIGURES: tuple[tuple[str, _Figure], ...] = (
    ("relative error", _plain("relative_error")),
    ("GPTQ loss over the output's square", _plain("relative_loss")),
    ("GPTQ loss", _plain("loss")),
    ("AWQ loss over that of plain rounding", _awq),
)


def heatmaps(sidecar: Mapping[str, Any], most_cells: int) -> tuple[Heatmap, ...]:
    """Gives a table for each figure that the weights of an output have.

    Args:
        sidecar: the output's.
        most_cells: of one table; layers are put together into bands where there would be more.
    """
    tensors = items(sidecar.get("tensors"))
    found: list[Heatmap] = []
    for name, figure in _FIGURES:
        if name == "GPTQ loss" and any(table.figure.startswith("GPTQ") for table in found):
            continue  # the relative one says the same, and can be compared between layers
        values = [(tensor, value) for tensor in tensors if (value := figure(tensor)) is not None]
        if any(value > 0 for _, value in values):
            found.append(_table(name, values, most_cells))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight with its figure; the layer is None where its name does not say one."""

    layer: int | None
    module: str
    value: float
    name: str
    type: str


def _table(figure: str, values: Sequence[tuple[Mapping[str, Any], float]], most_cells: int) -> Heatmap:
    everything = [_weight(tensor, value) for tensor, value in values]
    lossy = {weight.module for weight in everything if weight.value > 0}
    weights = [weight for weight in everything if weight.module in lossy]
    inside = [weight for weight in weights if weight.layer is not None]
    outside = [weight for weight in weights if weight.layer is None]
    exact = len(everything) - len(weights)
    notes = [f"{exact} tensors are kept exactly and are not shown."] if exact else []
    if not inside:
        return _outside_only(figure, outside, tuple(notes))
    modules = tuple(dict.fromkeys(weight.module for weight in inside))
    if len(modules) > _MAX_MODULES:
        notes.append(f"{len(modules) - _MAX_MODULES} more modules are in the sidecar.")
        modules = modules[:_MAX_MODULES]
    factor, unit = _scale(figure, [weight.value for weight in weights])
    layers = sorted({weight.layer for weight in inside if weight.layer is not None})
    band = max(1, math.ceil(len(layers) * len(modules) / max(most_cells, len(modules))))
    if band > 1:
        notes.append(f"Each row is {band} layers; the worst of them is shown.")
    worst = sorted(outside, key=lambda weight: -weight.value)[:_MAX_OUTSIDE]
    if worst:
        told = "; ".join(f"{plain(each.name)} ({each.type}) {significant(each.value * factor)}" for each in worst)
        notes.insert(0, f"Outside the layers: {told}.")
    rows = _rows(inside, layers, band, modules, factor)
    return Heatmap(figure, unit, tuple(plain(module, 80) for module in modules), rows, tuple(notes))


def _rows(
    weights: Sequence[_Weight], layers: Sequence[int], band: int, modules: Sequence[str], factor: float
) -> tuple[tuple[str, tuple[Cell | None, ...]], ...]:
    """Puts weights into rows of `band` layers and columns of modules."""
    shades = _Shades([weight.value for weight in weights if weight.value > 0])
    place = {layer: number // band for number, layer in enumerate(layers)}
    cells: dict[tuple[int, str], list[_Weight]] = {}
    for weight in weights:
        if weight.layer is not None:
            cells.setdefault((place[weight.layer], weight.module), []).append(weight)
    return tuple(
        (
            _band_name(layers[row * band : (row + 1) * band]),
            tuple(_cell(cells.get((row, module), []), factor, shades) for module in modules),
        )
        for row in range(math.ceil(len(layers) / band))
    )


def _outside_only(figure: str, weights: Sequence[_Weight], notes: tuple[str, ...]) -> Heatmap:
    """Gives a table with a row per tensor, for names that do not say a layer."""
    factor, unit = _scale(figure, [weight.value for weight in weights])
    shades = _Shades([weight.value for weight in weights if weight.value > 0])
    worst = sorted(weights, key=lambda weight: -weight.value)[:_MAX_MODULES]
    if len(weights) > len(worst):
        notes = (*notes, f"The worst {len(worst)} of {len(weights)} tensors are shown.")
    rows = tuple((plain(weight.name), (_cell([weight], factor, shades),)) for weight in worst)
    return Heatmap(figure, unit, ("tensor",), rows, notes)


def _weight(tensor: Mapping[str, Any], value: float) -> _Weight:
    name = tensor.get("name")
    name = name[:_MAX_NAME] if isinstance(name, str) else ""
    return _Weight(*_place(name), value, name, text(tensor.get("type"), 40))


@functools.lru_cache(maxsize=65536)
def _place(name: str) -> tuple[int | None, str]:
    """Gives layer and module of a weight, with numbers inside the module's name as `*`: experts are put together."""
    match = _LAYER.match(name)
    if match is None:
        return None, name
    return int(match["layer"]), _NUMBER.sub("*", match["module"].removesuffix(".weight"))


def _band_name(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _cell(weights: Sequence[_Weight], factor: float, shades: _Shades) -> Cell | None:
    if not weights:
        return None
    worst = max(weights, key=lambda weight: weight.value)
    more = f", worst of {len(weights)}" if len(weights) > 1 else ""
    title = f"{plain(worst.name)} {worst.type}: {significant(worst.value, 4)}{more}"
    return Cell(significant(worst.value * factor, 2), shades.of(worst.value), title)


def _scale(figure: str, values: Sequence[float]) -> tuple[float, str]:
    """Gives a factor that makes the numbers short, and what it is called."""
    if figure == "relative error":
        return 100.0, "%"
    power = math.floor(math.log10(max(values))) if values else 0
    if -2 <= power <= 2:
        return 1.0, ""
    return 10.0**-power, "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


class _Shades:
    """Shades by the ratio of a value to the least and the most of its table; all alike where they are close."""

    def __init__(self, positive: Sequence[float]) -> None:
        low, high = max(min(positive, default=1.0), 1e-300), max(positive, default=1.0)
        low = max(low, high / 1e4)  # one tensor that is almost exact would make all others look alike
        self._low, self._span = math.log(low), max(math.log(high / low), math.log(1.5))

    def of(self, value: float) -> int:
        """Gives a shade from 0 to `CLASSES` - 1."""
        if value <= 0:
            return 0
        share = (math.log(value) - self._low) / self._span
        return min(CLASSES - 1, max(0, int(share * CLASSES)))


def same_figures(sidecar: Mapping[str, Any]) -> tuple[Any, ...]:
    """Gives what tells whether two outputs have the same tables: names, types and figures of the weights."""
    keys = ("name", "type", "relative_error", "relative_loss", "loss", "sampled_loss", "unscaled_loss")
    found = (tuple(tensor.get(key) for key in keys) for tensor in items(mapping(sidecar).get("tensors")))
    return tuple(
        values if all(isinstance(value, (str, int, float, type(None))) for value in values) else () for values in found
    )
