"""Makes room in a cache: removes what was not used for long, or what is too much; never what a run is using."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from quantpress.convert.disk import remove
from quantpress.convert.lock import locked
from quantpress.pipelines.cache.contents import INPUT, Piece, pieces, unused
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.making import to_trash
from quantpress.pipelines.cache.store import Cache
from quantpress.quant.errors import BusyError, OutputError

__all__ = ["Pruned", "Wanted", "prune"]

_STALE = 3600.0  # seconds after which a file that was never renamed to its final name belongs to a dead run


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be removed; a piece goes if any of these says so.

    Records of outputs that stand go only with everything: they are small, and without them the outputs are in the way.

    Attributes:
        older_than: pieces that were not used for so many seconds.
        max_size: those that were not used for longest, until what is left has at most so many bytes.
        everything: all pieces.
        names: pieces by name, as entries that were found damaged.
    """

    older_than: float | None = None
    max_size: int | None = None
    everything: bool = False
    names: frozenset[str] = frozenset()

    def chosen(self, found: Iterable[Piece], now: float) -> list[Piece]:
        """Gives the pieces that are to go; `found` has what was used last at its end."""
        ordered = list(found)
        too_much = sum(piece.nbytes for piece in ordered) - self.max_size if self.max_size is not None else 0
        gone: list[Piece] = []
        for piece in ordered:
            old = self.older_than is not None and piece.used < now - self.older_than and not piece.stands
            if self.everything or old or piece.name in self.names:
                gone.append(piece)
        too_much -= sum(piece.nbytes for piece in gone)
        for piece in ordered:
            if too_much > 0 and piece not in gone and not piece.stands:
                gone.append(piece)
                too_much -= piece.nbytes
        return gone


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a cache.

    Attributes:
        removed: what is gone, or would go.
        in_use: what was to go and is used by a run.
        left: bytes of what is still there.
    """

    removed: tuple[Piece, ...]
    in_use: tuple[Piece, ...]
    left: int

    @property
    def freed(self) -> int:
        """Bytes of what is gone."""
        return sum(piece.nbytes for piece in self.removed)


def prune(cache: Cache, wanted: Wanted, *, dry_run: bool = False) -> Pruned:
    """Removes pieces of a cache.

    Inputs that were fetched stay while anything else of the cache is in use: nothing says which run reads them.

    Args:
        cache: its entries that are held, by this object too, stay.
        wanted: what is to go.
        dry_run: only say what would go.

    Raises:
        OutputError: the folder cannot be written.
    """
    layout, found = cache.layout, pieces(cache)
    if not dry_run:
        _sweep(layout)
    chosen = wanted.chosen(found, time.time())
    busy = any(piece.state == INPUT for piece in chosen) and _is_busy(layout, found)
    removed: list[Piece] = []
    in_use: list[Piece] = []
    for piece in chosen:
        with unused(layout, piece) as free:
            if not free or (busy and piece.state == INPUT):
                in_use.append(piece)
                continue
            if not dry_run:
                to_trash(layout, piece.place)
            removed.append(piece)
    left = sum(piece.nbytes for piece in found) - sum(piece.nbytes for piece in removed)
    return Pruned(tuple(removed), tuple(in_use), left)


def _is_busy(layout: Layout, found: Iterable[Piece]) -> bool:
    """Whether any run makes or reads a piece."""
    for piece in found:
        with unused(layout, piece) as free:
            if not free:
                return True
    return False


def _sweep(layout: Layout) -> None:
    """Removes what dead runs have left: locks, half removed pieces, files on their way to a name."""
    for path in layout.locks.glob("*.lock") if layout.locks.is_dir() else ():
        with contextlib.suppress(BusyError, OutputError), locked(path, layout.folder, 0.0):
            pass  # whoever gives a lock back removes its file
    for path in layout.trash.iterdir() if layout.trash.is_dir() else ():
        remove(path)
    for folder in (layout.folder, layout.labels):
        for path in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _STALE:
                    path.unlink()
