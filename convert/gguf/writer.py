"""Writes GGUF files front to back: the whole header first, then tensor after tensor, hashed on the way to the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantpress.convert.atomic import atomic_file, require_space
from quantpress.convert.checkpoint import Array
from quantpress.convert.gguf.container import ALIGNMENT, ALIGNMENT_KEY, MetadataValue, align, encode_header
from quantpress.convert.hashed_output import HashedOutput, Written, hashed_output


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a tensor in a file.

    Attributes:
        name: in GGUF.
        shape: outermost dimension first.
        type_id: ggml's number of the type.
        nbytes: bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


@dataclass(frozen=True)
class FilePlan:
    """Everything about one GGUF file but its data; a split model is several of these.

    Attributes:
        metadata: pairs in the order of the file.
        slots: tensors in the order of the file.
    """

    metadata: Mapping[str, MetadataValue]
    slots: Sequence[Slot]

    @property
    def alignment(self) -> int:
        """Bytes that the place of every tensor is a multiple of."""
        return int(self.metadata.get(ALIGNMENT_KEY, ("uint32", ALIGNMENT))[1])

    def header(self) -> bytes:
        """Gives the bytes before the data.

        Raises:
            LayoutError: something does not fit the format.
        """
        table = [(slot.name, slot.shape, slot.type_id, slot.nbytes) for slot in self.slots]
        return encode_header(self.metadata, table)

    def nbytes(self) -> int:
        """Gives the size of the file."""
        return len(self.header()) + sum(align(slot.nbytes, self.alignment) for slot in self.slots)


def write_container(path: Path | str, plan: FilePlan, chunks: Iterable[tuple[int, Array]], *, force: bool) -> Written:
    """Writes a GGUF file atomically.

    Args:
        path: the output.
        plan: header and table.
        chunks: number of the slot and the next bytes of it as a C-contiguous array, slot after slot.
        force: replace an existing file.

    Raises:
        UsageError, BusyError, OutputError: see `atomic_file`.
        ValueError: the chunks are not what the plan promised.
    """
    header = plan.header()
    require_space(path, len(header) + sum(align(slot.nbytes, plan.alignment) for slot in plan.slots))
    with atomic_file(path, force=force) as file, hashed_output(file) as output:
        output.write(header)
        _write_data(output, plan, chunks)
        return output.finish()


def _write_data(output: HashedOutput, plan: FilePlan, chunks: Iterable[tuple[int, Array]]) -> None:
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
