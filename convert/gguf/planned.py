"""What a GGUF file will hold: its tensors, and where their values come from."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.codes import CodeRows
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.convert.gguf.mixture_rules import MODEL_RULES
from quantpress.convert.gguf.writer import FilePlan, Slot
from quantpress.convert.row_order import IN_PLACE, ReadRows, RowOrder, Transposed
from quantpress.quant.ggml.types import ggml_type

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["OfExperts", "PlannedTensor", "TensorPlan"]

_CHUNK_VALUES = 1 << 20  # values that one task reads and encodes: 2 MB of bf16, and a few MB beside it


@dataclass(frozen=True, slots=True)
class OfExperts:
    """What the source has of experts beside their values, by the names of their weights; see `PlannedTensor`."""

    codes: Mapping[str, LazyQuantized]
    blocks: Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file to be written.

    Attributes:
        name: in GGUF.
        shape: in the file, outermost dimension first.
        type: name of the type it will have.
        nbytes: bytes of its data.
        note: why the type is not the one that was asked for, or empty.
        source: where the values come from.
        order: how the rows are reordered.
        transposed: the source is (K, N) and the file holds (N, K).
        offset: added to every value.
        codes: what the source has them as, where it is quantized and the type may hold the codes as they are.
        importance: (E, K) float32, what an error of a column costs, for each expert; None where nothing is known.
        blocks: (N, row bytes) uint8, rows in the order of the source: found before by a method, to be written as they
            are; None where the values are to be encoded.
        experts: codes and blocks of each expert, by the experts' names in the source, where the tensor is a stack of
            (E, N, K); it has none of its own then, and `source.inner` gives each expert. None: no stack.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    note: str
    source: LazyTensor = field(repr=False)
    order: RowOrder = field(default=IN_PLACE, repr=False)
    transposed: bool = False
    offset: float = 0.0
    codes: LazyQuantized | None = field(default=None, repr=False)
    importance: Array | None = field(default=None, repr=False)
    blocks: LazyTensor | None = field(default=None, repr=False)
    experts: OfExperts | None = field(default=None, repr=False)

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        """The tensors that the values come from: one, or one for each expert."""
        if self.experts is None or self.source.inner is None:
            return (self.source,)
        return tuple(map(self.source.inner, range(self.shape[0])))

    @property
    def held_bytes(self) -> int:
        """Bytes of the source that are in memory at once: all of a matrix that is to be transposed."""
        if not self.transposed:
            return 0
        return self.source.nbytes // (1 if self.experts is None else self.shape[0])

    def with_blocks(self, blocks: Mapping[str, LazyTensor]) -> PlannedTensor:
        """Gives the same with blocks that were found, by the names of weights in the source."""
        if self.experts is not None:
            return replace(self, experts=replace(self.experts, blocks=blocks))
        return replace(self, blocks=blocks.get(self.source.name))

    def is_of(self, names: Collection[str]) -> bool:
        """Whether a source of it is among these."""
        return any(source.name in names for source in self.sources)

    @property
    def keeps_codes(self) -> bool:
        """Whether the source has codes of it, or of an expert, that the type may hold."""
        if self.experts is None:
            return self.codes is not None
        return any(source.name in self.experts.codes for source in self.sources)

    def parts(self) -> Iterator[PlannedTensor]:
        """Gives what is written one after another: the tensor itself, or its experts, (N, K) each."""
        if self.experts is None:
            yield self
            return
        for expert, source in enumerate(self.sources):
            yield replace(
                self,
                shape=self.shape[1:],
                nbytes=self.nbytes // self.shape[0],
                source=source,
                codes=self.experts.codes.get(source.name),
                importance=None if self.importance is None else self.importance[expert : expert + 1],
                blocks=self.experts.blocks.get(source.name),
                experts=None,
            )

    def code_rows(self) -> CodeRows | None:
        """Gives what reads rows as blocks with the source's codes, or None; it holds the codes while it lives."""
        return None if self.codes is None else CodeRows(self.codes, self.order, self.type)

    def reader(self) -> ReadRows:
        """Gives a function that reads rows as the file holds them; a transposed tensor stays in memory with it."""
        read = Transposed(self.source).read_rows if self.transposed else self.source.exact_rows
        return partial(self.order.read, read)

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Gives the rows to be read together; independent of the number of threads."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, _CHUNK_VALUES // max(1, math.prod(self.shape[1:])))
        step = max(1, step // self.order.block) * self.order.block
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Every tensor of a file, in its order, the type that the file is named after, and whose rules chose the types."""

    outtype: str
    tensors: tuple[PlannedTensor, ...]
    rules: str = MODEL_RULES

    @property
    def file_type(self) -> int:
        """llama.cpp's number of the file type."""
        return FILE_TYPES[self.outtype]

    @property
    def parameters(self) -> int:
        """Number of values in the file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def quantized(self) -> bool:
        """Whether any tensor is stored in blocks."""
        return any(ggml_type(tensor.type).block_size > 1 for tensor in self.tensors)

    def file(self, metadata: Mapping[str, MetadataValue]) -> FilePlan:
        """Gives header and table of the file, for its size and for writing it."""
        slots = [Slot(each.name, each.shape, ggml_type(each.type).type_id, each.nbytes) for each in self.tensors]
        return FilePlan(metadata, slots)
