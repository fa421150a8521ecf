"""An adapter's ledger as a table that a person can read: one row per kind of target."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from quantpress.convert.files import shown
from quantpress.pipelines.commands.showing import plain_console

if TYPE_CHECKING:
    from rich.table import Table

    from quantpress.convert.lora.ledger import LedgerEntry

__all__ = ["Group", "Key", "group_entries", "show_ledger", "show_modules", "target_kind"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Key(NamedTuple):
    """What the targets of a group share; `target` is their common name, the rest is as in `LedgerEntry`."""

    adapter: str
    weight: float
    target: str
    kind: str
    rank: int | None
    alpha: float | None
    scale: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Targets of one kind that an adapter changes in one way.

    Attributes:
        key: what they share.
        modules: how many there are.
        norms: relative norm of each target's change, ascending, where it is known.
    """

    key: Key
    modules: int
    norms: tuple[float, ...]


def target_kind(name: str) -> str:
    """Gives the name that a tensor has in every layer: "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj"."""
    first, separator, more = name.partition(" and ")  # of a fused module whose parts are apart in the base
    pattern = _NUMBER.sub("*", first).removesuffix(".weight")
    return (pattern.partition(".*.")[2] or pattern.removeprefix("model.")) + separator + more


def group_entries(ledger: Sequence[LedgerEntry]) -> list[Group]:
    """Puts the entries together that differ in the layer only, in the order in which they first appear."""
    norms: dict[Key, dict[str, float | None]] = {}
    for entry in ledger:
        key = Key(
            entry.adapter, entry.weight, target_kind(entry.target), entry.kind, entry.rank, entry.alpha, entry.scale
        )
        norms.setdefault(key, {})[entry.target] = entry.delta_norm
    return [
        Group(key, len(targets), tuple(sorted(norm for norm in targets.values() if norm is not None)))
        for key, targets in norms.items()
    ]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _printable(name: str) -> str:
    """A name from a file without what would steer the terminal."""
    return name if name.isprintable() else shown(name)


def show_ledger(ledger: Sequence[LedgerEntry], *, every_tensor: bool = False) -> None:
    """Prints the ledger, each adapter in a table of its own."""
    console = plain_console()
    for adapter, weight in dict.fromkeys((entry.adapter, entry.weight) for entry in ledger):
        own = [entry for entry in ledger if (entry.adapter, entry.weight) == (adapter, weight)]
        title = f"{_printable(adapter)}, weight {weight:g}"
        console.print(_tensors(own, title) if every_tensor else _groups(own, title))


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _groups(entries: Sequence[LedgerEntry], title: str, figure: str = "change") -> Table:
    numbers = ["rank", "alpha", "scale", "modules", f"min {figure}", "median", f"max {figure}"]
    table = _table(title, ["target", "kind"], numbers)
    for key, modules, norms in ((group.key, group.modules, group.norms) for group in group_entries(entries)):
        figures = (norms[0], statistics.median(norms), norms[-1]) if norms else (None, None, None)
        settings = [_text(each) for each in (key.rank, key.alpha, key.scale)]
        table.add_row(_printable(key.target), key.kind, *settings, str(modules), *(_text(each) for each in figures))
    return table


def _tensors(entries: Sequence[LedgerEntry], title: str) -> Table:
    table = _table(title, ["tensor of the adapter", "target", "kind"], ["shape", "type", "scale", "change"])
    for entry in entries:
        names = (_printable(entry.name), _printable(entry.target), entry.kind)
        table.add_row(*names, _shape(entry.shape), entry.dtype, _text(entry.scale), _text(entry.delta_norm))
    return table


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def show_modules(report: Mapping[str, Any], *, every_module: bool = False) -> None:
    """Prints what an adapter does to modules, as `inspect` tells it without a base.

    Args:
        report: of `inspect`.
        every_module: a row for each module, not for each kind of them.
    """
    if every_module:
        table = _table("", ["module", "kind", "tensors"], ["rank", "alpha", "scale", "norm"])
        for module in report["modules"]:
            parts = ", ".join(f"{part} {_shape(shape)}" for part, shape in module["shapes"].items())
            figures = [_text(module[name]) for name in ("rank", "alpha", "scale", "delta_norm")]
            table.add_row(_printable(module["path"]), module["kind"], _printable(parts), *figures)
    else:
        table = _groups([_as_entry(module) for module in report["modules"]], "norms of what is added", "norm")
    plain_console().print(table)


def _as_entry(module: Mapping[str, Any]) -> LedgerEntry:
    from quantpress.convert.lora.ledger import LedgerEntry

    figures = {name: module[name] for name in ("kind", "rank", "alpha", "scale", "delta_norm")}
    return LedgerEntry(adapter="", weight=1.0, name="", shape=(), dtype="", target=module["path"], **figures)
