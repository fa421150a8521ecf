"""Several files that appear together: moved out of a temporary folder one by one, the one that opens them all last.

Before the first is moved a note in the folder says which files they are. Whoever finds the folder of a dead run, or is
interrupted, undoes the move by that note: either all of the new files stand, or none and what stood there before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantpress.convert.disk import remove, sync_folder
from quantpress.convert.files import read_bounded
from quantpress.convert.json_reader import parse_json
from quantpress.quant.errors import InputError

__all__ = ["half_moved", "move_beside", "put_back"]

_NOTE = "moving.json"
_OLD = "replaced"
_Identity = list[int]


def move_beside(folder: Path, names: Sequence[str]) -> None:
    """Moves synced files out of a temporary folder, to names beside it; files of these names are replaced.

    Args:
        folder: holds them, and nothing else.
        names: what they are called here and there; without the first one the others are of no use, so it comes last.

    Raises:
        OSError: a file cannot be moved; what stood there before stands there again.
    """
    try:
        _move(folder, names)
    except BaseException:
        with contextlib.suppress(OSError):
            put_back(folder)
        raise


def _move(folder: Path, names: Sequence[str]) -> None:
    parent, old = folder.parent, folder / _OLD
    old.mkdir()
    _write_note(folder, names)
    for name in names:
        if os.path.lexists(parent / name):
            (parent / name).rename(old / name)
    for name in reversed(names):
        if name == names[0]:
            sync_folder(parent)  # the others' names are on the disk before the one that makes them a model
        (folder / name).rename(parent / name)
    sync_folder(parent)


def put_back(folder: Path) -> None:
    """Undoes a move that did not come to its end; does nothing where none was begun, or where all files stand.

    Args:
        folder: the temporary one, of a run that is dead or gives up.

    Raises:
        OSError: a file cannot be moved.
    """
    noted, parent = _noted(folder), folder.parent
    for name in half_moved(folder):
        remove(parent / name)
    if not noted or _stands(parent, noted, next(iter(noted))):
        return
    for name in reversed(list(noted)):  # again the first one last
        if os.path.lexists(folder / _OLD / name) and not os.path.lexists(parent / name):
            (folder / _OLD / name).rename(parent / name)
    sync_folder(parent)


def half_moved(folder: Path) -> list[str]:
    """Gives the names beside a temporary folder that a move out of it has made without coming to its end."""
    noted, parent = _noted(folder), folder.parent
    if not noted or _stands(parent, noted, next(iter(noted))):
        return []
    return [name for name in noted if _stands(parent, noted, name)]


def _write_note(folder: Path, names: Sequence[str]) -> None:
    note = {name: _identity(folder / name) for name in names}
    with (folder / _NOTE).open("xb") as file:
        file.write(json.dumps(note).encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _noted(folder: Path) -> Mapping[str, _Identity]:
    """Reads the note; nothing was moved where there is none, or none that is whole."""
    if not os.path.lexists(folder / _NOTE):
        return {}
    try:
        note = parse_json(read_bounded(folder / _NOTE), name=str(folder / _NOTE))
    except InputError:
        return {}
    return {name: found for name, found in note.items() if Path(name).name == name} if isinstance(note, dict) else {}


def _stands(parent: Path, noted: Mapping[str, _Identity], name: str) -> bool:
    return _identity(parent / name) == noted[name]


def _identity(path: Path) -> _Identity | None:
    """What stays with a file when it is moved: its number on the disk, its bytes and its time."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
