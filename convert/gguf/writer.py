"""Writes GGUF files front to back: the whole header first, then tensor after tensor, hashed on the way to the disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path

from quantpress.convert.atomic import atomic_file, new_file, require_space
from quantpress.convert.atomic_files import atomic_files
from quantpress.convert.checkpoint import Array
from quantpress.convert.gguf.container import align
from quantpress.convert.gguf.file_plan import FilePlan, Slot
from quantpress.convert.gguf.split import check_parts, part_paths, whole_path
from quantpress.convert.hashed_output import HashedOutput, Written, hashed_output

__all__ = ["FilePlan", "Slot", "write_container", "write_parts"]

_Chunks = Iterable[tuple[int, Array]]


def write_container(path: Path | str, plan: FilePlan, chunks: _Chunks, *, force: bool, held: bool = False) -> Written:
    """Writes a GGUF file atomically.

    Args:
        path: the output.
        plan: header and table.
        chunks: number of the slot and the next bytes of it as a C-contiguous array, slot after slot.
        force: replace an existing file.
        held: the caller has the output's lock already, see `held_output`.

    Raises:
        UsageError, BusyError, OutputError: see `atomic_file`.
        ValueError: the chunks are not what the plan promised.
    """
    require_space(path, plan.nbytes())
    with atomic_file(path, force=force, held=held) as file, hashed_output(file) as output:
        return _write(output, plan, chunks)


def write_parts(
    path: Path, plans: Sequence[FilePlan], chunks: _Chunks, *, force: bool, held: bool = False
) -> dict[Path, Written]:
    """Writes a model as one GGUF file or as several parts, so that all of them appear or none.

    Args:
        path: the output as a whole, or its first part.
        plans: what `split_files` gave.
        chunks: as `write_container`; slots are counted through all parts.
        force: replace existing files.
        held: the caller has the lock of the whole output already, see `held_output` and `whole_path`.

    Returns:
        The files, in the order of the parts.

    Raises:
        UsageError, BusyError, OutputError: see `atomic_files` and `check_parts`.
        ValueError: the chunks are not what the plans promised.
    """
    if len(plans) == 1:
        return {path: write_container(path, plans[0], chunks, force=force, held=held)}
    paths, written = part_paths(path, len(plans)), dict[Path, Written]()
    check_parts(path, len(plans), force=force)
    require_space(path, sum(plan.nbytes() for plan in plans))
    with atomic_files(whole_path(path), [each.name for each in paths], force=force, held=held) as folder:
        check_parts(path, len(plans), force=force)  # once more: nobody else writes this output now
        for place, plan, data in zip(paths, plans, _by_part(plans, chunks), strict=True):
            with new_file(folder / place.name, place) as file, hashed_output(file) as output:
                written[place] = _write(output, plan, data)
    return written


def _by_part(plans: Sequence[FilePlan], chunks: _Chunks) -> Iterator[_Chunks]:
    """Gives the chunks of each part, slots counted in the part; each is to be used up before the next is asked for."""
    ends = list(accumulate(len(plan.slots) for plan in plans))
    groups = groupby(chunks, key=lambda chunk: bisect_right(ends, chunk[0]))
    waiting = next(groups, None)
    for part, (plan, end) in enumerate(zip(plans, ends, strict=True)):
        if waiting is None or waiting[0] != part:
            yield ()
            continue
        yield _counted_from(end - len(plan.slots), waiting[1])
        waiting = next(groups, None)


def _counted_from(first: int, chunks: _Chunks) -> _Chunks:
    return ((number - first, data) for number, data in chunks)


def _write(output: HashedOutput, plan: FilePlan, chunks: _Chunks) -> Written:
    output.write(plan.header)
    _write_data(output, plan, chunks)
    return output.finish()


def _write_data(output: HashedOutput, plan: FilePlan, chunks: _Chunks) -> None:
    current, filled = 0, 0
    for number, data in chunks:
        while current < number:
            _end_slot(output, plan, current, filled)
            current, filled = current + 1, 0
        filled += data.nbytes
        output.write(data.reshape(-1).view("u1").data)
    while current < len(plan.slots):
        _end_slot(output, plan, current, filled)
        current, filled = current + 1, 0


def _end_slot(output: HashedOutput, plan: FilePlan, number: int, filled: int) -> None:
    slot = plan.slots[number]
    if filled != slot.nbytes:
        raise ValueError(f"tensor {slot.name!r} got {filled} bytes where {slot.nbytes} were planned")
    padding = align(filled, plan.alignment) - filled
    if padding:
        output.write(bytes(padding))
