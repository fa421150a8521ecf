"""Where things lie in a cache folder, and which version of that order a folder has.

layout.json         the version
CACHEDIR.TAG        tells backup programs to pass the folder over; .gitignore tells git
entries/KEY/        entry.json (sealed), use.lock, files/
work/KEY/           note.json (sealed), files/: what a run has begun
locks/KEY.lock      held by the run that makes KEY
labels/             what was asked for last, by job and stage
trash/              entries on their way out
input-hashes.json   SHA-256 of inputs
inputs/             inputs that were fetched from elsewhere
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quantpress.convert.atomic import output_errors
from quantpress.convert.files import read_bounded, shown
from quantpress.convert.json_reader import parse_json
from quantpress.pipelines.cache.keys import is_key
from quantpress.pipelines.cache.sealed import replace_sealed
from quantpress.quant.errors import InputError, UsageError

__all__ = ["LAYOUT", "Layout"]

LAYOUT = 1
_VERSION = "layout.json"
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"  # https://bford.info/cachedir/
    "# This folder is a cache of quantpress: `quantpress cache ls` lists it; it may be removed while nothing runs.\n"
)
_FOLDERS = ("entries", "work", "locks", "labels", "trash", "inputs", "staging")
_OWN = frozenset({*_FOLDERS, "input-hashes.json", _TAG, ".gitignore", _VERSION})


@dataclass(frozen=True, slots=True)
class Layout:
    """A cache folder, which need not be there yet.

    Attributes:
        folder: absolute.
    """

    folder: Path

    @classmethod
    def of(cls, folder: Path | str) -> Layout:
        """Looks at a folder and changes nothing.

        Raises:
            UsageError: it is no cache of quantpress, or one of a newer quantpress.
        """
        layout = cls(Path(os.path.abspath(folder)))  # noqa: PTH100 - links stay as they are
        layout._check()
        return layout

    @property
    def entries(self) -> Path:
        """Finished work."""
        return self.folder / "entries"

    @property
    def work(self) -> Path:
        """Work that was begun."""
        return self.folder / "work"

    @property
    def trash(self) -> Path:
        """What is being removed."""
        return self.folder / "trash"

    @property
    def labels(self) -> Path:
        """What was asked for last."""
        return self.folder / "labels"

    @property
    def inputs(self) -> Path:
        """Inputs that were fetched."""
        return self.folder / "inputs"

    @property
    def staging(self) -> Path:
        """Outputs that are sent elsewhere when they are proved."""
        return self.folder / "staging"

    @property
    def locks(self) -> Path:
        """Locks of those who make something."""
        return self.folder / "locks"

    @property
    def input_hashes(self) -> Path:
        """Hashes of inputs."""
        return self.folder / "input-hashes.json"

    def entry(self, key: str) -> Path:
        """Gives the place of an entry.

        Raises:
            ValueError: `key` is no key.
        """
        return self.entries / _checked(key)

    def work_of(self, key: str) -> Path:
        """Gives the place of work that was begun (ValueError as for `entry`)."""
        return self.work / _checked(key)

    def lock_of(self, key: str) -> Path:
        """Gives the lock of whoever makes or removes an entry (ValueError as for `entry`)."""
        return self.locks / f"{_checked(key)}.lock"

    def create(self) -> None:
        """Makes the folder, with what tells others that it is a cache.

        Raises:
            UsageError: see `of`.
            OutputError: it cannot be made.
        """
        with output_errors(self.folder):
            if (self.folder / _VERSION).is_file():
                self._check()
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._check()
                (self.folder / _TAG).write_text(_TAG_TEXT, encoding="ascii")
                (self.folder / ".gitignore").write_text("*\n", encoding="ascii")
                replace_sealed(self.folder / _VERSION, {"layout": LAYOUT})
            for path in (self.entries, self.work, self.locks):
                path.mkdir(exist_ok=True)

    def _check(self) -> None:
        with output_errors(self.folder):
            names = sorted(entry.name for entry in os.scandir(self.folder)) if self.folder.is_dir() else []
            if not names and self.folder.exists() and not self.folder.is_dir():
                raise UsageError(f"{self.folder}: the cache is to be a folder, this is none; choose another one")
        if _VERSION in names:
            self._check_version()
        elif strange := [name for name in names if name not in _OWN and not _is_passing(name)]:
            raise UsageError(
                f"{self.folder}: not a cache of quantpress: it holds {shown(strange[0])}; choose an empty folder or a"
                " new one for the cache"
            )

    def _check_version(self) -> None:
        path = self.folder / _VERSION
        try:
            found = parse_json(read_bounded(path, 1 << 16), name=str(path))
            version = found["value"]["layout"]
        except (InputError, KeyError, TypeError):
            version = None
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise UsageError(f"{path}: damaged, so it is not known what the cache holds; remove the cache folder")
        if version > LAYOUT:
            raise UsageError(
                f"{self.folder}: the cache has layout {version}, made by a newer quantpress; this one knows layout"
                f" {LAYOUT}: update it, or choose another cache folder"
            )


def _is_passing(name: str) -> bool:
    """Whether a name is that of a lock, or of a file on its way to a name that we know: `.layout.json-PID-HEX.tmp`."""
    return name.startswith(".quantpress-") or (name.startswith(".") and name.endswith(".tmp"))


def _checked(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"{key!r} is not a key of the cache")
    return key
