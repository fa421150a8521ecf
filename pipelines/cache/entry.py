"""An entry of the cache: files with their hashes, and a record; written whole, and checked when it is read."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import output_errors
from quantpress.convert.files import inside, shown
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.sealed import read_sealed
from quantpress.pipelines.cache.stamped_hash import Hashed, Stamp, hash_files
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import InputError, OutputError

__all__ = [
    "DESCRIPTION",
    "FILES",
    "USE_LOCK",
    "Entry",
    "EntryFile",
    "check_files",
    "describe",
    "list_files",
    "read_entry",
]

DESCRIPTION, FILES, USE_LOCK = "entry.json", "files", "use.lock"


@dataclass(frozen=True, slots=True)
class EntryFile:
    """A file of an entry.

    Attributes:
        name: below the entry's folder, `/` between parts.
    """

    name: str
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Finished work.

    Attributes:
        key: see `keys.key_of`.
        kind: what sort of work: "prepare", "reference", "output".
        folder: where its files are; nothing else of the cache is in there.
        record: what whoever made it wrote down; plain values.
        material: what the key is of.
        files: all of them.
        created: seconds since 1970.
    """

    key: str
    kind: str
    folder: Path
    record: Mapping[str, Any] = field(repr=False)
    material: Mapping[str, Any] = field(repr=False)
    files: tuple[EntryFile, ...]
    created: float

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.nbytes for file in self.files)


class _Checked:
    """Files that this process has hashed: their stamps, and what the hash was. Two threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Hashed] = {}

    def hash_of(self, path: Path, stamp: Stamp) -> str | None:
        """Gives the hash of a file that has not changed since."""
        with self._lock:
            known = self._known.get(str(path))
        return known.sha256 if known is not None and known.stamp == stamp else None

    def remember(self, path: Path, hashed: Hashed) -> None:
        """Keeps a hash, of a file whose later changes can be seen."""
        if hashed.settled:
            with self._lock:
                self._known[str(path)] = hashed


_checked = _Checked()  # what is true of a file is true for the whole process


def describe(
    key: str,
    kind: str,
    record: Mapping[str, Any],
    material: Mapping[str, Any],
    files: Sequence[EntryFile],
    created: float,
) -> dict[str, Any]:
    """Gives what entry.json holds."""
    listed = [{"name": file.name, "sha256": file.sha256, "bytes": file.nbytes} for file in files]
    return {
        "key": key,
        "kind": kind,
        "created": created,
        "record": dict(record),
        "material": dict(material),
        "files": listed,
    }


def read_entry(place: Path, key: str) -> Entry:
    """Reads what an entry says of itself; no file of it is read.

    Args:
        place: the entry's own folder, which holds entry.json.
        key: that the entry must have.

    Raises:
        InputError: it is damaged or not of this key.
    """
    path = place / DESCRIPTION
    value = read_sealed(path)
    try:
        files = tuple(EntryFile(str(f["name"]), str(f["sha256"]), int(f["bytes"])) for f in value["files"])
        entry = Entry(
            key=str(value["key"]),
            kind=str(value["kind"]),
            folder=place / FILES,
            record=dict(value["record"]),
            material=dict(value["material"]),
            files=files,
            created=float(value["created"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the file is damaged: {type(error).__name__} {shown(str(error), 200)}") from error
    if entry.key != key or key_of(entry.material) != key:
        raise InputError(f"{path}: the entry is of another key, {shown(entry.key)}")
    return entry


def check_files(entry: Entry, *, contents: bool = True, progress: Progress = no_progress) -> None:
    """Checks that every file is there and is what it was.

    Args:
        entry: as it was read.
        contents: whether files are hashed, but for those that this process has hashed before; else only their sizes
            are looked at.
        progress: told how many bytes are hashed.

    Raises:
        InputError: naming the first file that is not.
    """
    wanted: dict[Path, EntryFile] = {}
    for file in entry.files:
        path = inside(entry.folder, file.name)
        stamp = Stamp.of(path)
        if stamp.nbytes != file.nbytes:
            raise InputError(f"{path}: the file has {stamp.nbytes} bytes, {file.nbytes} were written")
        known = _checked.hash_of(path, stamp) if contents else file.sha256
        if known is not None and known != file.sha256:
            raise InputError(f"{path}: the file is damaged: its hash is not what was written")
        if known is None:
            wanted[path] = file
    for path, hashed in hash_files(list(wanted), progress, "check the cache"):
        if isinstance(hashed, InputError):
            raise hashed
        _checked.remember(path, hashed)
        if hashed.sha256 != wanted[path].sha256:
            raise InputError(f"{path}: the file is damaged: its hash is not what was written")


def list_files(folder: Path, progress: Progress = no_progress) -> tuple[EntryFile, ...]:
    """Hashes all files of a folder that is to become an entry, in the order of their names.

    Args:
        folder: the folder.
        progress: told how many bytes are hashed.

    Raises:
        OutputError: something there is no regular file, or cannot be read.
    """
    paths: list[Path] = []
    with output_errors(folder):
        for parent, folders, names in os.walk(folder):
            for name in (*folders, *names):
                path = Path(parent) / name
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    paths.append(path)
                elif not stat.S_ISDIR(mode):
                    raise OutputError(f"{path}: only regular files can be kept in the cache")
    files: list[EntryFile] = []
    for path, hashed in hash_files(sorted(paths), progress, "hash what is kept"):
        if isinstance(hashed, InputError):
            raise OutputError(f"{path}: cannot be kept in the cache: {hashed}")
        files.append(EntryFile(path.relative_to(folder).as_posix(), hashed.sha256, hashed.stamp.nbytes))
    return tuple(sorted(files, key=lambda file: file.name))
