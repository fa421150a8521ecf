"""Opens files that strangers named: regular files only, inside their folder only, and never more bytes than agreed."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantpress.quant.errors import InputError

__all__ = ["MAX_SMALL_FILE", "FileStamp", "check_name", "inside", "open_regular", "read_at", "read_bounded", "shown"]

MAX_SMALL_FILE = 64 << 20  # bytes of a JSON or tokenizer file; the largest in use (Gemma 3) has 33 MB
_MAX_NAME = 1024  # bytes of a file name inside a model folder
_MAX_PART = 255  # bytes between two slashes, as file systems have it

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def shown(value: object, limit: int = 80) -> str:
    """Gives a value as it may stand in a one-line message: escaped, and cut after `limit` characters."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > limit:
        value = value[:limit]
        return repr(value)[:limit] + "..."
    text = " ".join(repr(value).split("\n"))  # an array is written in lines
    return text if len(text) <= limit else text[:limit] + "..."


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading bytes, unbuffered; never waits for a pipe's other end.

    Args:
        path: the file; a link at this path is followed, so a path from inside a model goes through `inside` first.

    Raises:
        InputError: there is no such file, it may not be read, or it is a folder, pipe, socket or device.
    """
    try:
        _refuse_irregular(path, os.stat(path).st_mode)  # noqa: PTH116 - `path` may be a plain string
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(str(path), 200)}: cannot be opened: {_reason(error)}") from error
    try:
        # Asked again of the descriptor: the name may have been given to something else in between.
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(path: Path | str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "not a file")
        raise InputError(f"{path}: a regular file is expected here, this is {kind}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_bounded(path: Path | str, limit: int = MAX_SMALL_FILE) -> bytes:
    """Reads a whole regular file of at most `limit` bytes.

    Raises:
        InputError: it cannot be opened or read, or it is larger.
    """
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > limit:
            raise InputError(f"{path}: the file has {nbytes} bytes, at most {limit} are read for a file of this kind")
        parts: list[bytes] = []
        missing = limit + 1
        try:
            while missing > 0 and (part := file.read(min(missing, 1 << 20))):
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from error
    if missing <= 0:
        raise InputError(f"{path}: the file grew past {limit} bytes while it was read")
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the one that was opened before: identity, size in bytes, time of change in ns."""

    device: int
    inode: int
    nbytes: int
    changed: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileStamp:
        """Takes the stamp of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, file: BinaryIO, name: str) -> None:
        """Checks that an open file has this stamp.

        Raises:
            InputError: it was replaced or written to.
        """
        if (now := FileStamp.of(file)) != self:
            raise InputError(f"{name}: the file changed while it was in use ({self.nbytes} bytes, now {now.nbytes})")


def read_at(file: BinaryIO, offset: int, buffer: memoryview) -> int:
    """Fills a buffer of bytes from a place in an unbuffered file.

    Returns:
        The number of bytes read: fewer than the buffer holds if the file ends before.

    Raises:
        InputError: the disk does not give the bytes.
    """
    done = 0
    try:
        file.seek(offset)
        while done < len(buffer) and (count := file.readinto(buffer[done:])):  # type: ignore[attr-defined]
            done += count
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read at byte {offset + done}: {_reason(error)}") from error
    return done


def check_name(folder: Path | str, name: str) -> None:
    """Checks a name that another file gives to a file of a model folder; nothing is looked up.

    Raises:
        InputError: the name is absolute, climbs with `..`, holds a backslash, a drive letter or a character that cannot
            be shown, or is too long.
    """
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME:
        raise InputError(f"{folder}: {shown(name)} is not a file name")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise InputError(
            f"{folder}: file name {shown(name)} is absolute; only names inside the model folder are opened"
        )
    if "\\" in name or not name.isprintable():  # a message with the name in it stays one line that reads as it is
        raise InputError(f"{folder}: file name {shown(name)} holds a backslash or a control character")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"{folder}: file name {shown(name)} leaves the model folder or is not in its plain form")
    if len(name.encode()) > _MAX_NAME or any(len(part.encode()) > _MAX_PART for part in name.split("/")):
        raise InputError(f"{folder}: file name {shown(name)} is longer than any file system has it")


def inside(folder: Path | str, name: str) -> Path:
    """Gives the path of a file that another file, or a convention, names inside a model folder.

    Args:
        folder: the model folder.
        name: relative name with `/` between parts, as in `weight_map` of model.safetensors.index.json.

    Returns:
        The real path, links followed. The file need not exist.

    Raises:
        InputError: the name is absolute, climbs with `..`, holds a backslash, a drive letter or a character that cannot
            be shown, or a link leads out of the folder. Links from `snapshots/<revision>` to `blobs` of one Hub cache
            are fine.
    """
    check_name(folder, name)
    try:
        root = Path(folder).resolve()
        target = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise InputError(f"{folder}: file name {shown(name)} cannot be followed: {_reason(error)}") from error
    if not target.is_relative_to(root) and not _in_blobs_of(root, target):
        raise InputError(
            f"{folder}: {shown(name)} is a link that leaves the model folder; put a copy of the file there"
        )
    return target


def _in_blobs_of(root: Path, target: Path) -> bool:
    """Whether root is in `snapshots/<revision>` of a Hub cache and target in `blobs` beside that `snapshots`."""
    for parent in root.parents:
        if parent.name == "snapshots":
            return target.parent == parent.parent / "blobs"
    return False
