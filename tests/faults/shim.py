"""Makes the n-th step on the disk of a run go wrong, in the process that runs it.

Everything of the output is written by `io.FileIO`, `open` and the functions of `os` below, so far as the product's own
code writes it; a write that native code made by itself would be missed. `io.FileIO` must be replaced
before quantpress is imported, which makes subclasses of it; the rest is replaced in the process that is spoiled.
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = ("write", "pwrite")
ENTRIES = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir")
OTHERS = ("fsync", "open", "ftruncate", "truncate", "utime")
STEPS = (*WRITES, *ENTRIES, *OTHERS)
CREATING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclasses.dataclass(frozen=True)
class Spoil:
    """What is to go wrong.

    Attributes:
        at: number of the step, from 1; 0 never.
        kinds: of steps that count; () for all.
        error: name of the errno that the step fails with.
        sticky: every later step of these kinds fails too, as on a disk that is full or has gone.
        short: a write takes half of its bytes first.
        signal: name of the signal that the process gets at the step instead.
        act: what happens to the folder at the step instead, see `acts`.
    """

    at: int = 0
    kinds: tuple[str, ...] = ()
    error: str = ""
    sticky: bool = False
    short: bool = False
    signal: str = ""
    act: str = ""


class Shim:
    """Counts the steps below a folder and spoils one of them."""

    def __init__(self, folder: Path, spoil: Spoil, acts: Callable[[str, Path], None] | None = None) -> None:
        self.folder, self.spoil, self.acts = os.fspath(folder.resolve()), spoil, acts
        self.steps: list[str] = []
        self.met = 0

    def concerns(self, place: Any, dir_fd: int | None = None) -> bool:
        """Whether a step is below the folder; names of terminals and devices are not."""
        try:
            if isinstance(place, int):
                path = os.readlink(f"/proc/self/fd/{place}")  # noqa: PTH115
            elif dir_fd is not None:
                path = os.readlink(f"/proc/self/fd/{dir_fd}") + "/" + os.fsdecode(place)  # noqa: PTH115
            else:
                path = os.path.abspath(os.fsdecode(place))  # noqa: PTH100
        except (OSError, TypeError):
            return False
        return path.startswith(self.folder + "/")

    def step(self, kind: str, place: Any, dir_fd: int | None = None) -> bool:
        """Counts a step and says whether half of its bytes are to be written before `fail`."""
        spoil = self.spoil
        if not self.concerns(place, dir_fd):
            return False
        self.steps.append(kind)
        if not spoil.at or (spoil.kinds and kind not in spoil.kinds):
            return False
        self.met += 1
        if self.met < spoil.at or (self.met > spoil.at and not spoil.sticky):
            return False
        if spoil.short and kind in WRITES and self.met == spoil.at:
            return True
        self.fail()
        return False

    def fail(self) -> None:
        """What happens at the step."""
        spoil = self.spoil
        if spoil.act:
            assert self.acts is not None
            self.acts(spoil.act, Path(self.folder))
        elif spoil.signal:
            os.kill(os.getpid(), getattr(signal, spoil.signal))
        else:
            number = getattr(errno, spoil.error)
            raise OSError(number, os.strerror(number))


_active: Shim | None = None
_FILE_IO, _OPEN, _WRITE, _OS_OPEN = io.FileIO, io.open, os.write, os.open


class WatchedFile(_FILE_IO):
    """A file whose writes are steps."""

    def write(self, data: Any, /) -> int:
        """Writes, or half, or not."""
        if _active is not None and _active.step("write", self.fileno()):
            half = memoryview(data).cast("B")
            super().write(half[: len(half) // 2])
            _active.fail()
            return len(half) // 2
        return super().write(data) or 0


def prepare() -> None:
    """Replaces `io.FileIO`; before quantpress is imported."""
    io.FileIO = WatchedFile  # type: ignore[misc]


def arm(shim: Shim) -> None:
    """Watches this process from now on."""
    global _active
    _active = shim
    io.open = builtins.open = _open  # type: ignore[assignment]
    os.open = _os_open
    for kind in ("pwrite", *ENTRIES, "fsync", "ftruncate", "truncate", "utime"):
        setattr(os, kind, _watched(kind, getattr(os, kind)))
    os.write = _os_write


def _watched(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def step(place: Any, *rest: Any, **options: Any) -> Any:
        assert _active is not None
        if _active.step(kind, place, options.get("dir_fd", options.get("src_dir_fd"))):
            _active.fail()
        return real(place, *rest, **options)

    for support in (os.supports_dir_fd, os.supports_follow_symlinks, os.supports_fd):
        if real in support:
            support.add(step)  # shutil looks there for how it may remove a tree
    return step


def _os_write(descriptor: int, data: Any, /) -> int:
    assert _active is not None
    if _active.step("write", descriptor):
        return _WRITE(descriptor, memoryview(data).cast("B")[: max(1, len(data) // 2)])
    return _WRITE(descriptor, data)


def _os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    assert _active is not None
    if flags & CREATING:
        _active.step("open", path, dir_fd)
    return _OS_OPEN(path, flags, mode, dir_fd=dir_fd)


def _open(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
    """Opens as `open` does; what is written goes through a watched file."""
    assert _active is not None
    if isinstance(file, int) or not set(mode) & set("wxa+") or not _active.concerns(file):
        return _OPEN(file, mode, buffering, *text, **options)
    _active.step("open", file)
    raw = WatchedFile(file, mode.replace("b", "").replace("t", ""))
    if buffering == 0:
        return raw
    binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return binary
    names = dict(zip(("encoding", "errors", "newline"), text, strict=False)) | options
    return io.TextIOWrapper(binary, **names)
