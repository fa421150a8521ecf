"""What a cache folder holds, piece by piece: entries, work that was begun, inputs that were fetched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantpress.convert.atomic import output_errors
from quantpress.convert.lock import locked
from quantpress.pipelines.cache.entry import DESCRIPTION, USE_LOCK
from quantpress.pipelines.cache.keys import is_key
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.store import Cache
from quantpress.pipelines.cache.use_lock import is_unused
from quantpress.quant.errors import BusyError

__all__ = ["DAMAGED", "INPUT", "OUTPUT", "UNFINISHED", "WHOLE", "Piece", "pieces", "unused"]

OUTPUT = (
    "output"  # kind of entries that only say what an output is; their material has its "place", seen from the cache
)
WHOLE, DAMAGED, UNFINISHED, INPUT = "whole", "damaged", "unfinished", "input"


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that can be removed by itself.

    Attributes:
        state: WHOLE or DAMAGED (an entry), UNFINISHED (what a run has begun), INPUT (fetched from elsewhere).
        kind: of an entry, else what it is.
        name: key of an entry or of work, else a name.
        place: folder with all its files.
        nbytes: of all of them on the disk.
        created: seconds since 1970; 0 where it is not known.
        used: when it was last read or written.
        stands: of the record of an output: whether the output is still there. Without its record a run takes it for
            another's, and will not replace it.
    """

    state: str
    kind: str
    name: str
    place: Path
    nbytes: int
    created: float
    used: float
    stands: bool = False


def pieces(cache: Cache) -> list[Piece]:
    """Lists what can be removed, what was used last at the end; sizes are looked at, contents are not.

    Raises:
        OutputError: a folder cannot be read.
    """
    layout = cache.layout
    found = [_entry(cache, key) for key in cache.kept_keys()]
    for folder, state, kind in (
        (layout.work, UNFINISHED, "work"),
        (layout.staging, UNFINISHED, "upload"),
        (layout.inputs, INPUT, "input"),
    ):
        for place in _folders(folder):
            begun = place.name.startswith(".quantpress-")
            nbytes, used = _measure(place)
            found.append(Piece(UNFINISHED if begun else state, kind, place.name, place, nbytes, 0.0, used))
    return sorted(found, key=lambda piece: (piece.used, piece.name))


@contextlib.contextmanager
def unused(layout: Layout, piece: Piece) -> Iterator[bool]:
    """Says whether no run makes or reads a piece; inside the block none can begin to.

    Of inputs that were fetched only the fetching is seen: see `prune.prune` for those that are read.

    Raises:
        OutputError: the disk has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            for lock in _locks(layout, piece):
                stack.enter_context(locked(lock, layout.folder, 0.0))
        except BusyError:
            yield False
            return
        yield stack.enter_context(is_unused(piece.place / USE_LOCK))


def _locks(layout: Layout, piece: Piece) -> list[Path]:
    """The locks that whoever makes a piece holds."""
    if is_key(piece.name):
        return [layout.lock_of(piece.name)]
    if piece.kind == "upload":  # named by the beginning of its output's key
        return sorted(layout.locks.glob(f"{piece.name}*.lock")) if piece.name.isalnum() else []
    slot = piece.name.removeprefix(".quantpress-").removesuffix(".work")
    return [piece.place.with_name(f".quantpress-{slot}.lock")]


def _entry(cache: Cache, key: str) -> Piece:
    place = cache.layout.entry(key)
    nbytes, changed = _measure(place)
    entry = cache.peek(key)
    if entry is None:
        return Piece(DAMAGED, "entry", key, place, nbytes, 0.0, changed)
    used = max(entry.created, _time(place / USE_LOCK), _time(place / DESCRIPTION))
    output = entry.material.get("place") if entry.kind == OUTPUT else None
    stands = isinstance(output, str) and os.path.lexists(cache.folder / output)
    return Piece(WHOLE, entry.kind, key, place, nbytes, entry.created, used, stands)


def _folders(folder: Path) -> list[Path]:
    with output_errors(folder):
        places = sorted(folder.iterdir()) if folder.is_dir() else []
    return [place for place in places if place.is_dir() and not place.is_symlink()]


def _measure(place: Path) -> tuple[int, float]:
    """Bytes of all files, and the time of the last change; what disappears meanwhile counts nothing."""
    nbytes, changed = 0, _time(place)
    for parent, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(OSError):
                status = (Path(parent) / name).lstat()
                nbytes += status.st_size
                changed = max(changed, status.st_mtime)
    return nbytes, changed


def _time(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
