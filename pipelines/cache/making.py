"""One key's work while its lock is held: the folder it is done in, and the rename that makes an entry of it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import output_errors
from quantpress.convert.disk import remove, sync_folder, sync_tree
from quantpress.convert.lock import locked
from quantpress.pipelines.cache.entry import DESCRIPTION, FILES, USE_LOCK, Entry, describe, list_files, read_entry
from quantpress.pipelines.cache.keys import plain
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.sealed import read_sealed, replace_sealed, write_sealed
from quantpress.pipelines.progress import Progress
from quantpress.quant.errors import BusyError, CancelledError, InputError

__all__ = ["Making", "maker_lock", "never", "to_trash"]

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at whether the caller wants to stop, while another run makes an entry
_PATIENCE = 1.0  # seconds of waiting after which a user is told
_NOTE = "note.json"


def never() -> bool:
    """Says that nobody wants to stop."""
    return False


class Making:
    """One key's work while its lock is held; see `Cache.making`."""

    def __init__(
        self,
        layout: Layout,
        key: str,
        kind: str,
        material: Mapping[str, Any],
        hold: Callable[[str], bool],
        progress: Progress,
    ) -> None:
        self.key, self.kind = key, kind
        self._material, self._hold, self._progress = material, hold, progress
        self._layout, self._place, self._target = layout, layout.work_of(key), layout.entry(key)
        self.entry: Entry | None = None
        """The finished entry: found, or committed; None while there is work to do."""

    @property
    def folder(self) -> Path:
        """Where the work is done; it may hold what a run that was stopped has left."""
        return self._place / FILES

    @property
    def note(self) -> Mapping[str, Any] | None:
        """What was last written by `write_note` for this key, by this run or one that was stopped; None if nothing."""
        try:
            value = read_sealed(self._place / _NOTE)
        except InputError:
            return None
        return value if isinstance(value, dict) else None

    def write_note(self, note: Mapping[str, Any]) -> None:
        """Writes down, for a later run, what this one is about to do; the note goes when the entry is finished.

        Args:
            note: plain values, as {"output": path} before something outside of the cache is written.

        Raises:
            OutputError: the disk is full.
        """
        replace_sealed(self._place / _NOTE, note)

    def drop_note(self) -> None:
        """Forgets the note, where what it announced did not come to pass."""
        remove(self._place / _NOTE)

    def redo(self) -> None:
        """Does the work again although the entry is there; `commit` puts the new one in its place.

        A run that is stopped before that leaves the old one.

        Raises:
            OutputError: the folder cannot be made.
        """
        self.entry = None
        self.begin()

    def commit(self, record: Mapping[str, Any]) -> Entry:
        """Makes what is in the folder an entry.

        Args:
            record: what else is to be known; plain values.

        Raises:
            OutputError: the disk is full; something that is no regular file is in the folder. The work is kept.
            UsageError: the record holds what is no plain value.
        """
        files = list_files(self.folder, self._progress)
        description = describe(self.key, self.kind, plain(record), self._material, files, round(time.time(), 3))
        with output_errors(self._place):
            for name in (DESCRIPTION, USE_LOCK):  # of a run that was stopped right here
                remove(self._place / name)
            write_sealed(self._place / DESCRIPTION, description)
            (self._place / USE_LOCK).touch()
            sync_tree(self._place)
            to_trash(self._layout, self._target)
            self._place.rename(self._target)
            sync_folder(self._target.parent)
        remove(self._target / _NOTE)
        self._hold(self.key)
        self.entry = read_entry(self._target, self.key)
        return self.entry

    def update(self, record: Mapping[str, Any]) -> Entry:
        """Replaces the record of the entry that is there.

        Raises:
            OutputError, UsageError: see `commit`.
        """
        if self.entry is None:
            raise RuntimeError("an entry is updated after it is there: call commit")
        entry = self.entry
        description = describe(entry.key, entry.kind, plain(record), entry.material, entry.files, entry.created)
        replace_sealed(self._target / DESCRIPTION, description)
        self.entry = read_entry(self._target, self.key)
        return self.entry

    def begin(self) -> None:
        """Makes the folder (OutputError where it cannot be)."""
        with output_errors(self._place):
            self.folder.mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Removes the folder where nothing was begun that a later run could go on from."""
        if self.entry is None and not (self._place / _NOTE).exists():
            with contextlib.suppress(OSError):  # not empty: that stays
                self.folder.rmdir()
                self._place.rmdir()


def to_trash(layout: Layout, place: Path) -> None:
    """Removes a folder of the cache, so that nobody finds a part of it under its name.

    Raises:
        OutputError: it cannot be taken away.
    """
    gone = layout.trash / f"{place.name}-{os.getpid()}-{os.urandom(4).hex()}"
    with output_errors(place):
        if not os.path.lexists(place):
            return
        layout.trash.mkdir(exist_ok=True)
        place.rename(gone)
    remove(gone)


@contextlib.contextmanager
def maker_lock(
    layout: Layout, key: str, kind: str, wait: float | None, cancelled: Callable[[], bool]
) -> Iterator[None]:
    """Holds the lock of whoever makes an entry."""
    start, told = time.monotonic(), False
    with contextlib.ExitStack() as stack:
        while True:
            if cancelled():
                raise CancelledError(f"{kind}: stopped while another run was making it")
            waited = time.monotonic() - start
            step = _POLL if wait is None else max(0.0, min(_POLL, wait - waited))
            try:
                stack.enter_context(locked(layout.lock_of(key), layout.folder, step))
                break
            except BusyError:
                if wait is not None and time.monotonic() - start >= wait:
                    raise BusyError(
                        f"{layout.folder}: another run is making {kind} {key[:12]} in this cache; wait for it to end"
                    ) from None
            if not told and waited >= _PATIENCE:
                told = True
                log.warning("waiting for another run that makes the same (%s %s)", kind, key[:12])
        yield
