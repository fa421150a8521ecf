"""The adapters' ledgers of a batch, each once, with the targets of a kind in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.convert.lora.ledger import LedgerEntry
from quantpress.pipelines.commands.ledger_table import group_entries
from quantpress.pipelines.report.rows import Row
from quantpress.pipelines.report.values import count, items, mapping, number, significant, text

__all__ = ["Ledger", "LedgerRow", "ledgers"]


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Targets of one kind; figures as text."""

    adapter: str
    target: str
    kind: str
    rank: str
    alpha: str
    scale: str
    weight: str
    modules: int
    norms: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of the adapters of some outputs.

    Attributes:
        rows: in the order of the adapters.
        tensors: how many tensors of adapters there are, every one used once.
        outputs: rows of the report that were made with these adapters.
        share: lowest share of the adapters' effect that an output shows, with its tolerance; None where not measured.
    """

    rows: tuple[LedgerRow, ...]
    tensors: int
    outputs: tuple[Row, ...]
    share: tuple[float, float] | None


def ledgers(rows: Sequence[Row]) -> tuple[Ledger, ...]:
    """Gives the ledgers of the outputs that have one."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        entries = items(row.sidecar.get("adapters"))
        if entries:
            key = tuple((text(e.get("adapter")), text(e.get("name")), number(e.get("weight"))) for e in entries)
            groups.setdefault((row.source, key), []).append(row)
    return tuple(_ledger(group) for group in groups.values())


def _ledger(rows: Sequence[Row]) -> Ledger:
    entries = [_entry(each) for each in items(rows[0].sidecar.get("adapters"))]
    shares = [
        (share, number(found.get("tolerance")) or 0.0)
        for row in rows
        for found in [mapping(mapping(row.output.parity).get("adapter_share"))]
        if (share := number(found.get("share"))) is not None
    ]
    grouped = tuple(
        LedgerRow(
            adapter=group.key.adapter,
            target=group.key.target,
            kind=group.key.kind,
            rank=str(group.key.rank or "–"),
            alpha=significant(group.key.alpha),
            scale=significant(group.key.scale),
            weight=significant(group.key.weight),
            modules=group.modules,
            norms=_range(group.norms),
        )
        for group in group_entries(entries)
    )
    lowest = min(shares, key=lambda share: share[0]) if shares else None
    return Ledger(grouped, len(entries), tuple(rows), lowest)


def _entry(entry: Mapping[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        adapter=text(entry.get("adapter")),
        weight=number(entry.get("weight")) or 0.0,
        name=text(entry.get("name")),
        shape=(),
        dtype=text(entry.get("dtype"), 20),
        target=text(entry.get("target")),
        kind=text(entry.get("kind"), 20),
        rank=count(entry.get("rank")) or None,
        alpha=number(entry.get("alpha")),
        scale=number(entry.get("scale")),
        delta_norm=number(entry.get("delta_norm")),
    )


def _range(norms: Sequence[float]) -> str:
    if not norms:
        return "–"
    return significant(norms[0]) if len(norms) == 1 else f"{significant(norms[0])} to {significant(norms[-1])}"
