"""What one GGUF file will be: everything about it but its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantpress.convert.gguf.container import ALIGNMENT, ALIGNMENT_KEY, MetadataValue, align, encode_header

__all__ = ["FilePlan", "Slot"]


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

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data.

        Raises:
            LayoutError: something does not fit the format.
        """
        table = [(slot.name, slot.shape, slot.type_id, slot.nbytes) for slot in self.slots]
        return encode_header(self.metadata, table)

    def nbytes(self) -> int:
        """Gives the size of the file."""
        return len(self.header) + sum(align(slot.nbytes, self.alignment) for slot in self.slots)
