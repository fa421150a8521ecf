"""Says what the paths, Hub ids and URLs of a pipeline file mean."""

from __future__ import annotations

import difflib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from quantpress.convert.files import shown
from quantpress.convert.hub import is_hub_id
from quantpress.pipelines.batch.problems import Mark, Problems
from quantpress.pipelines.batch.stores import is_url, local_path, shown_url

__all__ = ["Places"]

_MAX_COMPARED = 2000  # names of a folder that a missing one is compared with
_MAX_LENGTH = 4096  # characters, Linux' PATH_MAX
_CUTOFF = 0.7  # of difflib's ratio; endings alone make "a.json" and "meta.json" 0.6


@dataclass(slots=True)
class Places:
    """Places as seen from a pipeline file.

    Attributes:
        folder: of the file, absolute.
        lost: inputs that are not there, by where they are named.
    """

    folder: Path
    lost: dict[Mark, Path] = field(default_factory=dict)
    _missing: dict[tuple[str, bool], str] = field(default_factory=dict)

    def absolute(self, text: str) -> Path:
        """Gives the absolute path that a text means; links are not followed."""
        local = local_path(text)
        path = Path(text if local is None else local)
        if text == "~" or text.startswith("~/"):
            path = path.expanduser()
        return Path(os.path.normpath(self.folder / path))

    def model(self, text: str, mark: Mark, problems: Problems, label: str) -> str | Path:
        """Gives a model's or adapter's path; a Hub id or URL stays as it is. What is there is never a Hub id."""
        if _elsewhere(text) or not _writable(text, mark, problems, label):
            return text
        path = self.absolute(text)
        if os.path.lexists(path):
            return path
        if is_hub_id(text) and ("@" in text or not self.absolute(text.partition("/")[0]).is_dir()):
            return text
        self._miss(text, mark, problems, label, hub=is_hub_id(text))
        return path

    def text(self, text: str, mark: Mark, problems: Problems, label: str) -> str | Path:
        """Gives the path of any other input; a URL stays as it is."""
        if _elsewhere(text) or not _writable(text, mark, problems, label):
            return text
        path = self.absolute(text)
        if not os.path.lexists(path):
            self._miss(text, mark, problems, label, hub=False)
        return path

    def output(self, text: str, mark: Mark, problems: Problems, label: str) -> tuple[Path, str]:
        """Gives an output's path, and its URL where it lies elsewhere: the path is then the last part of that."""
        if not _writable(text, mark, problems, label):
            return Path("output"), ""
        if not _elsewhere(text):
            return self.absolute(text), ""
        url = text.rstrip("/")
        name = url.partition("://")[2].rpartition("/")[2]
        if not name or "?" in name or "#" in name:
            problems.add(mark, f"{label}: {shown(shown_url(text), 200)} names no file or folder to write")
        return Path(name or "output"), url

    def _miss(self, text: str, mark: Mark, problems: Problems, label: str, *, hub: bool) -> None:
        if (text, hub) not in self._missing:
            self._missing[text, hub] = self._said(text, hub=hub)
        self.lost[mark] = self.absolute(text)
        problems.add(mark, f"{label}: {self._missing[text, hub]}", missing=True)

    def _said(self, text: str, *, hub: bool) -> str:
        path = self.absolute(text)
        there, name = path, ""
        while not there.is_dir() and there != there.parent:
            there, name = there.parent, there.name
        near = self._near(there, name)
        rest = path.relative_to(there / name) if name else Path()
        guess = Path(os.path.relpath(there / near / rest, self.folder)).as_posix() if near else ""
        hint = f'; did you mean "{guess}"?' if guess and os.path.lexists(self.folder / guess) else ""
        if not hint and near:
            hint = f"; {shown(str(there), 200)} has {shown(near)}"
        elsewhere = f"; for the model of that name on the Hub write {text}@main" if hub else ""
        far = local_path(text) or Path(text).is_absolute() or text.startswith("~/")
        where = "" if far else f" in {self.folder}"
        return f"{shown(text, 200)}: no such file or folder{where}{hint}{elsewhere}"

    def _near(self, folder: Path, name: str) -> str:
        """Gives the name in a folder that is nearest to one that is not there."""
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MAX_COMPARED)]
        except OSError:
            return ""
        return next(iter(difflib.get_close_matches(name, sorted(names), n=1, cutoff=_CUTOFF)), "")


def _writable(text: str, mark: Mark, problems: Problems, label: str) -> bool:
    """Whether a text can be a place at all."""
    fits = text.isprintable() and len(text) <= _MAX_LENGTH
    if not fits:
        problems.add(
            mark, f"{label}: {shown(text)}: a place has no control characters, and at most {_MAX_LENGTH} letters"
        )
    return fits


def _elsewhere(text: str) -> bool:
    return is_url(text) and local_path(text) is None
