"""Writes several files beside each other so that all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantpress.convert.atomic import check_replaceable, held_output, output_errors, temporary_beside
from quantpress.convert.moved_files import half_moved, move_beside
from quantpress.convert.temporary_names import leftovers
from quantpress.quant.errors import UsageError

__all__ = ["atomic_files", "check_all_replaceable"]


@contextlib.contextmanager
def atomic_files(
    path: Path | str, names: Sequence[str], *, force: bool = False, wait: float = 5.0, held: bool = False
) -> Iterator[Path]:
    """Gives an empty folder for files that get their places when the block ends without an error.

    Older files of these names stay until the new ones are whole and synced. Then they go first and the first of the
    new ones comes last, so that at no instant old and new ones are opened together.

    Args:
        path: what the output is called as a whole; it names the lock and the temporary folder, and is not written. A
            link of that name is not followed.
        names: of the files, in the folder of `path`; those that open the others first.
        force: whether existing files are replaced.
        wait: seconds to wait for another run that writes the same output.
        held: the caller has the output's lock already, from `held_output`.

    Raises:
        UsageError: a file exists and `force` is not given.
        BusyError: another run is still writing it after `wait` seconds.
        OutputError: disk full, no permission.
    """
    with contextlib.ExitStack() as stack:
        if not held:
            stack.enter_context(held_output(path, wait=wait))
        target = _place(path)
        folder = stack.enter_context(temporary_beside(target))
        check_all_replaceable(target, names, force=force)
        with output_errors(target):
            folder.mkdir()
        yield folder
        with output_errors(target):
            move_beside(folder, names)


def check_all_replaceable(path: Path | str, names: Sequence[str], *, force: bool) -> None:
    """Checks that files may be written beside each other; what a dead run of this output has half moved may.

    Args:
        path: what the output is called as a whole.
        names: of the files.
        force: whether existing files are replaced.

    Raises:
        UsageError: one is there and `force` is not given, or it is no regular file.
    """
    target = _place(path)
    known = {name for folder in leftovers(target) for name in half_moved(folder)}
    for name in names:
        place = target.parent / name
        if name in known:
            continue
        if place.is_dir():
            raise UsageError(f"{place}: the output is a folder, a file is to be written")
        check_replaceable(place, force=force)


def _place(path: Path | str) -> Path:
    return Path(os.path.realpath(Path(path).parent)) / Path(path).name
