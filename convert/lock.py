"""One run at a time on one output: an advisory lock that the system drops when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quantpress.quant.errors import BusyError, OutputError

__all__ = ["locked"]

_POLL = 0.1  # seconds between attempts


@contextlib.contextmanager
def locked(path: Path, what: Path, wait: float) -> Iterator[None]:
    """Holds the lock file `path`, which is gone afterwards.

    Args:
        path: the lock file; its folder exists.
        what: what is locked, for messages.
        wait: seconds to wait for another holder.

    Raises:
        BusyError: another run still holds it after `wait` seconds.
        OutputError: the lock file cannot be made.
    """
    descriptor = _acquire(path, what, time.monotonic() + wait)
    try:
        yield
    finally:
        # Removed while still held. Whoever waits on the removed file sees that and starts again with a new one.
        try:
            _unlink(path)
        except BaseException:  # a signal just here; once the name is gone it may be another run's
            if _is_current(descriptor, path):
                _unlink(path)
            raise
        finally:
            os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _acquire(path: Path, what: Path, deadline: float) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise OutputError(f"{what}: cannot be locked: {error.strerror or error}") from error
        try:
            if _try_lock(descriptor, what) and _is_current(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise BusyError(f"{what}: another run is writing this output; wait for it to end or choose another output")
        time.sleep(_POLL)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, what: Path) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise OutputError(f"{what}: cannot be locked: {error.strerror or error}") from error
    return True
