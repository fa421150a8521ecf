"""Small steps on the disk that every atomic output takes: making names last, and removing them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

__all__ = ["remove", "sync_folder", "sync_tree"]


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; what cannot be removed is left for the next run.

    A signal that comes while it is at work does not leave half of it: it goes on and is stopped afterwards.
    """
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_tree(folder: Path) -> None:
    """Makes every file in a folder, and every name, last."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(parent, name), os.O_RDONLY)  # noqa: PTH118
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    if os.name != "nt":  # Windows cannot open folders, and keeps names by itself
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path | str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # disks that cannot sync this kind of name
            raise
    finally:
        os.close(descriptor)
