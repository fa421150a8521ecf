"""Keeps finished work by its key: found again when it is whole, made once however many runs ask for it.

An entry appears by one rename, with its files and their hashes. Whoever makes it holds the key's lock and works in a
folder that stays when the run dies, so that the next run goes on from there. Whoever reads it holds a lock that keeps
`prune` from taking it away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from quantpress.convert.atomic import output_errors
from quantpress.convert.lock import locked
from quantpress.pipelines.cache.entry import USE_LOCK, Entry, check_files, read_entry
from quantpress.pipelines.cache.keys import is_key, key_of, plain
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.making import Making, maker_lock, never, to_trash
from quantpress.pipelines.cache.use_lock import in_use, is_held_on, is_unused, take_shared
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import BusyError, InputError, OutputError

__all__ = ["Cache", "Making"]

log = logging.getLogger(__name__)

_MOST_HELD = 200  # entries of one object; each takes a descriptor, of which a process often has 1024


class Cache:
    """A folder of finished work. The entries that it gave last are kept from `prune` until it is closed or forgotten.

    Several threads may use one object; they may ask for different keys at the same time.
    """

    def __init__(self, folder: Path | str, progress: Progress = no_progress) -> None:
        """Looks at a cache folder, which is made when something is kept in it.

        Args:
            folder: the folder.
            progress: told how many bytes of an entry are hashed, when it is found and when it is made.

        Raises:
            UsageError: something else is there, or the cache of a newer quantpress.
        """
        self.layout, self._progress = Layout.of(folder), progress
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._held)

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return self.layout.folder

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Says that no entry is in use by this object any more."""
        with self._lock:
            _close_all(self._held)

    def find(self, key: str, *, hold: bool = True) -> Entry | None:
        """Finds an entry and checks every byte of it, once in a process where nothing changed.

        Args:
            key: see `keys.key_of`.
            hold: keep the entry from being removed for as long as this object is open.

        Returns:
            None where there is none; one that is damaged is removed, with a warning.

        Raises:
            OutputError, BusyError: the cache folder cannot be used.
        """
        try:
            return self._whole(key, hold=hold)
        except InputError as error:
            log.warning("a cache entry is damaged and is made again: %s", error)
        with contextlib.suppress(BusyError, OutputError), locked(self.layout.lock_of(key), self.folder, 0.0):
            self._remove_damaged(key)
        return None

    def peek(self, key: str) -> Entry | None:
        """Finds an entry by what it says of itself and by the sizes of its files; nothing is changed or held."""
        try:
            entry = read_entry(self.layout.entry(key), key)
            check_files(entry, contents=False)
        except InputError:
            return None
        return entry

    def damage(self, key: str) -> str:
        """Says what is wrong with an entry, every byte of it; empty text if nothing is. Nothing is changed or held.

        Raises:
            OutputError, BusyError: the cache folder cannot be used.
        """
        place = self.layout.entry(key)
        try:
            with in_use(place / USE_LOCK):
                check_files(read_entry(place, key))
        except InputError as error:
            return str(error)
        return ""

    def was_begun(self, key: str) -> bool:
        """Whether a run has begun this work, and was stopped or is still busy with it."""
        return self.layout.work_of(key).is_dir()

    def kept_keys(self) -> list[str]:
        """Gives the keys of all entries, whole or not."""
        with output_errors(self.folder):
            names = [path.name for path in self.layout.entries.iterdir()] if self.layout.entries.is_dir() else []
        return sorted(name for name in names if is_key(name))

    @contextlib.contextmanager
    def making(
        self,
        key: str,
        kind: str,
        material: Mapping[str, Any],
        *,
        wait: float | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[Making]:
        """Holds a key's lock for the block, in which the entry is made if it is not there.

        A block that fails leaves its work for the next run, unless it has none.

        Args:
            key: of `material`.
            kind: see `Entry`.
            material: what the result depends on.
            wait: seconds to wait for another run that makes the same; None for as long as it takes.
            cancelled: asked while waiting.

        Raises:
            BusyError: the other run did not end in time.
            CancelledError: `cancelled` said so.
            OutputError: the cache folder cannot be written.
        """
        material = plain(material)
        if key_of(material) != key:
            raise ValueError(f"{key} is not the key of the material")
        self.layout.create()
        with maker_lock(self.layout, key, kind, wait, cancelled):
            making = Making(self.layout, key, kind, material, self.hold, self._progress)
            making.entry = self._found_by_maker(key)
            if making.entry is None:
                making.begin()
            try:
                yield making
            finally:
                making.end()

    def update(self, key: str, record: Mapping[str, Any], *, wait: float = 30.0) -> Entry | None:
        """Replaces the record of an entry; None where there is no entry. Not inside a block of `making`.

        Raises:
            BusyError: another run makes the entry.
            OutputError, UsageError: see `Making.commit`.
        """
        if (found := self.peek(key)) is None:
            return None
        with self.making(key, found.kind, found.material, wait=wait) as making:
            return making.update(record) if making.entry is not None else None

    def remove(self, key: str, *, work: bool = False) -> bool:
        """Removes an entry.

        Args:
            key: its key.
            work: remove also what a run has begun for it, and the note of that run.

        Returns:
            False where it is in use and stays.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        self._release(key)
        places = [self.layout.entry(key)] + ([self.layout.work_of(key)] if work else [])
        if not any(os.path.lexists(place) for place in places):
            return True
        try:
            with locked(self.layout.lock_of(key), self.folder, 0.0), is_unused(self._use_lock(key)) as unused:
                for place in places if unused else ():
                    to_trash(self.layout, place)
                return unused
        except BusyError:
            return False

    def _use_lock(self, key: str) -> Path:
        return self.layout.entry(key) / USE_LOCK

    def hold(self, key: str) -> bool:
        """Keeps an entry from being removed for as long as this object is open; reads nothing of it.

        Returns:
            False where there is none.
        """
        path = self._use_lock(key)
        with self._lock:
            if key in self._held and is_held_on(self._held[key], path):
                return True
            descriptor = take_shared(path)
            for old in [key] if key in self._held else list(self._held)[: max(0, len(self._held) + 1 - _MOST_HELD)]:
                os.close(self._held.pop(old))
            if descriptor is not None:
                self._held[key] = descriptor
            return descriptor is not None

    def _release(self, key: str) -> None:
        with self._lock:
            if key in self._held:
                os.close(self._held.pop(key))

    def _whole(self, key: str, *, hold: bool) -> Entry | None:
        """Gives an entry whose every byte is checked; InputError where it is damaged."""
        held_before = key in self._held
        if not self.hold(key):
            if self.layout.entry(key).exists():
                raise InputError(f"{self._use_lock(key)}: no such file")
            return None
        keep = False
        try:
            entry = read_entry(self.layout.entry(key), key)
            check_files(entry, progress=self._progress)
            with contextlib.suppress(OSError):
                os.utime(self._use_lock(key))  # when it was last used, for prune
            keep = hold or held_before
        finally:
            if not keep:
                self._release(key)
        return entry

    def _found_by_maker(self, key: str) -> Entry | None:
        """What `find` gives, for whoever holds the key's lock."""
        try:
            return self._whole(key, hold=True)
        except InputError as error:
            log.warning("a cache entry is damaged and is made again: %s", error)
        to_trash(self.layout, self.layout.entry(key))
        return None

    def _remove_damaged(self, key: str) -> None:
        """Removes an entry unless it was made anew before its lock was ours."""
        try:
            self._whole(key, hold=False)
        except InputError:
            to_trash(self.layout, self.layout.entry(key))


def _close_all(held: dict[str, int]) -> None:
    while held:
        os.close(held.popitem()[1])
