"""Locks that say that an entry is in use: many may read it at once, and nobody removes it then.

The system drops such a lock when its holder dies. Where there is no `flock` (Windows), a file that is open keeps its
folder from being renamed, which comes to the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quantpress.quant.errors import BusyError, OutputError

__all__ = ["in_use", "is_held_on", "is_unused", "take_shared"]

_POLL = 0.02  # seconds; whoever removes an entry holds its lock for the time of a rename
_WAIT = 10.0


def take_shared(path: Path) -> int | None:
    """Says that an entry is in use, until the descriptor is closed.

    Args:
        path: the entry's lock file.

    Returns:
        A descriptor, or None if there is no such file.

    Raises:
        BusyError: the entry is being removed all the time.
        OutputError: the file cannot be opened, or the disk has no locks.
    """
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened: {error.strerror or error}") from error
        try:
            if _locks(descriptor, path, shared=True) and is_held_on(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise BusyError(f"{path.parent}: another run is removing this cache entry and does not end")
        time.sleep(_POLL)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Keeps an entry from being removed, inside the block; does nothing where there is none (errors: `take_shared`)."""
    descriptor = take_shared(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_held_on(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is still of the file that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def is_unused(path: Path) -> Iterator[bool]:
    """Says whether nobody uses an entry; inside the block nobody can begin to.

    Args:
        path: the entry's lock file; an entry without one is unused.

    Raises:
        OutputError: the file cannot be opened, or the disk has no locks.
    """
    try:
        # Over NFS only a file that is open for writing can be locked against all others.
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be opened: {error.strerror or error}") from error
    try:
        yield _locks(descriptor, path, shared=False)
    finally:
        os.close(descriptor)


def _locks(descriptor: int, path: Path, *, shared: bool) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise OutputError(f"{path}: cannot be locked: {error.strerror or error}") from error
    return True
