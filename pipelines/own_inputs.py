"""Refuses an output that would take the place of what the same run reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantpress.quant.errors import UsageError

__all__ = ["paths_in", "refuse_own_input"]

_Identity = tuple[int, int]


def refuse_own_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output that is an input of the run, or a folder that holds one; --force does not change that.

    Places are compared by what they are on the disk, not by name: links, `..` and letter case make no difference.

    Args:
        output: where the run would write.
        inputs: the files that it reads; those that are not there are passed over.

    Raises:
        UsageError: naming both.
    """
    place = _identity(output)
    if place is None:  # nothing stands there, so nothing can be replaced
        return
    for path in inputs:
        for spelling in _spellings(path):
            if _identity(spelling) == place:
                raise UsageError(f"{output}: the output would replace {path}, an input of this run; choose another one")
            if any(_identity(folder) == place for folder in spelling.parents):
                raise UsageError(
                    f"{output}: the output folder would be replaced, and {path}, an input of this run, is in it;"
                    " choose another one"
                )


def paths_in(options: object, *, but: str = "") -> list[Path]:
    """Gives the paths among the fields of a dataclass, without the field `but`."""
    if not dataclasses.is_dataclass(options):
        return []
    values = (getattr(options, field.name) for field in dataclasses.fields(options) if field.name != but)
    return [value for value in values if isinstance(value, Path)]


def _spellings(path: Path) -> Iterator[Path]:
    """A file's place with every link followed, and with the last one kept: a folder of links is lost with the links."""
    yield Path(os.path.realpath(path))
    yield Path(os.path.realpath(path.parent)) / path.name


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
