"""Writes files and folders so that the final name holds the old output, nothing, or the whole new one.

A run takes the lock of its output, removes what dead runs of the same output left, writes under a temporary name in the
target's own folder, syncs, renames, and syncs the folder. An interrupt removes the temporary name on its way out.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from quantpress.convert.disk import remove, sync_folder, sync_tree
from quantpress.convert.lock import locked
from quantpress.convert.moved_files import put_back
from quantpress.convert.temporary_names import leftovers, lock_file, temporary_name, work_folder
from quantpress.quant.errors import OutputError, UsageError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_replaceable",
    "held_output",
    "new_file",
    "output_errors",
    "require_space",
    "temporary_beside",
    "work_folder",
    "write_file",
]

_BUFFER = 1 << 20  # bytes
_SIGNS_OF_A_MODEL = ("config.json", "quantpress.json", "adapter_config.json", "genai_config.json", "model.onnx")


class _FailsOnce(io.FileIO):
    """A descriptor that refuses everything after its first failed write.

    After a failed write or sync nobody knows which bytes are on the disk, and a second sync may report success for
    pages that the kernel has dropped; io.BufferedWriter would try again when it is closed.
    """

    failed = False

    def write(self, data: Any, /) -> int:
        if self.failed:
            raise OSError(errno.EIO, "an earlier write to this file failed")
        try:
            return super().write(data) or 0
        except OSError:
            self.failed = True
            raise


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns operating system errors of writing into OutputError naming the output.

    Raises:
        OutputError: disk full, no permission, read-only disk, failing device.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of stdout, not of the output
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_replaceable(path: Path | str, *, force: bool) -> Path:
    """Checks that an output may be written at a path, before any work is done for it.

    Returns:
        The path with links followed: an output that is a link is replaced where it points to.

    Raises:
        UsageError: something is there and `force` is not given, or it is nothing that quantpress would have written.
    """
    real = Path(os.path.realpath(path))
    try:
        mode = real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return real
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    if stat.S_ISDIR(mode):
        names = [entry.name for entry in real.iterdir()]
        if names and not force:
            raise UsageError(f"{path}: the output folder exists; give --force to replace it")
        if names and not any(name in names for name in _SIGNS_OF_A_MODEL):
            raise UsageError(
                f"{path}: not a model folder, so it is not replaced even with --force; choose another output"
            )
    elif not stat.S_ISREG(mode):
        raise UsageError(f"{path}: the output is neither a regular file nor a folder")
    elif not force:
        raise UsageError(f"{path}: the output exists; give --force to replace it")
    return real


def require_space(path: Path | str, nbytes: int) -> None:
    """Checks that the disk of an output has room.

    Raises:
        OutputError: fewer than `nbytes` bytes are free there.
    """
    folder = Path(os.path.realpath(path))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    with output_errors(Path(path)):
        free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(f"{path}: {nbytes} bytes are needed and {free} are free on the disk of {folder}")


def write_file(path: Path | str, data: bytes, *, force: bool = False) -> None:
    """Writes a small file atomically.

    Raises:
        UsageError, BusyError, OutputError: see `atomic_file`.
    """
    with atomic_file(path, force=force) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path, output: Path | None = None) -> Iterator[BinaryIO]:
    """Creates a file that must not exist and syncs it at the end; for use inside `atomic_folder`.

    Args:
        path: the file.
        output: what messages name instead, when `path` is temporary.

    Raises:
        OutputError: the file cannot be created or written.
    """
    with output_errors(output or path):
        raw = _FailsOnce(os.fspath(path), "xb")
        try:
            writer = io.BufferedWriter(raw, _BUFFER)
            yield cast(BinaryIO, writer)
            writer.flush()
            os.fsync(raw.fileno())
        finally:
            raw.close()  # not the buffer above it, which would write again


@contextlib.contextmanager
def atomic_file(path: Path | str, *, force: bool = False, wait: float = 5.0, held: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to write and to seek in, which gets its final name when the block ends without an error.

    Args:
        path: the output; missing parent folders are made.
        force: whether an existing file is replaced.
        wait: seconds to wait for another run that writes the same output.
        held: the caller has the output's lock already, from `held_output`.

    Raises:
        UsageError: the output exists and `force` is not given.
        BusyError: another run is still writing it after `wait` seconds.
        OutputError: disk full, no permission.
    """
    with _prepared(path, force, wait, held) as (target, temporary):
        if target.is_dir():
            raise UsageError(f"{path}: the output is a folder, a file is to be written")
        with new_file(temporary, target) as file:
            yield file
        with output_errors(target):
            temporary.replace(target)
            sync_folder(target.parent)


@contextlib.contextmanager
def held_output(path: Path | str, *, wait: float = 5.0) -> Iterator[Path]:
    """Holds the lock of an output for work that lasts long before the first byte of it is written.

    Args:
        path: the output; missing parent folders are made.
        wait: seconds to wait for another run that writes the same output.

    Returns:
        The path with links followed; `atomic_folder(..., held=True)` writes it inside the block.

    Raises:
        BusyError: another run is still writing it after `wait` seconds.
        OutputError: no permission.
    """
    target = _target(path)
    with locked(lock_file(target), target, wait):
        yield target


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, force: bool = False, wait: float = 5.0, held: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into, which gets its final name when the block ends without an error.

    An older folder stays until the new one is whole; with `force` it is renamed away, replaced, and then removed.

    Args:
        path: the output; missing parent folders are made.
        force: whether an existing model folder is replaced.
        wait: seconds to wait for another run that writes the same output.
        held: the caller has the output's lock already, from `held_output`.

    Raises:
        UsageError: the output exists and `force` is not given, or is not a model folder.
        BusyError: another run is still writing it after `wait` seconds.
        OutputError: disk full, no permission.
    """
    with _prepared(path, force, wait, held) as (target, temporary):
        if target.exists() and not target.is_dir():
            raise UsageError(f"{path}: the output is a file, a folder is to be written")
        with output_errors(target):
            temporary.mkdir()
        yield temporary
        with output_errors(target):
            sync_tree(temporary)
            _exchange(temporary, target)


@contextlib.contextmanager
def _prepared(path: Path | str, force: bool, wait: float, held: bool = False) -> Iterator[tuple[Path, Path]]:
    """Locks an output and gives its real path and a temporary one, which is gone afterwards in any case."""
    target = _target(path)
    with contextlib.nullcontext() if held else locked(lock_file(target), target, wait):
        check_replaceable(path, force=force)
        with temporary_beside(target) as temporary:
            yield target, temporary


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Removes what dead runs of an output left, and gives a new temporary name beside it, which is gone afterwards.

    Args:
        target: the output, links followed; the caller holds its lock.

    Raises:
        OutputError: no permission.
    """
    with output_errors(target):
        for entry in leftovers(target):
            put_back(entry)
            remove(entry)
    temporary = temporary_name(target)
    try:
        yield temporary
    finally:
        remove(temporary)


def _target(path: Path | str) -> Path:
    """Follows links and makes the folder that the output stands in."""
    target = Path(os.path.realpath(path))
    if not target.name:
        raise UsageError(f"{path}: not a name for an output")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _exchange(new: Path, target: Path) -> None:
    """Puts a whole new folder in the place of an old one, if there is one, and removes the old one."""
    old = temporary_name(target)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    remove(old)
