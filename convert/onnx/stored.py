"""What the data file of an ONNX model holds: tensors of known size, whose bytes are made when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quantpress.convert.checkpoint import Array
from quantpress.convert.gguf.stream import in_order

__all__ = ["ITEM_BITS", "Piece", "StoredGroup", "StoredTensor", "in_order"]

# names of onnx.TensorProto.DataType that are stored -> bits of a value
ITEM_BITS = {
    "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "INT64": 64, "INT32": 32, "UINT8": 8, "INT8": 8, "UINT4": 4, "INT4": 4,
}  # fmt: skip

Piece = tuple[Array, ...]
"""The next rows of every tensor of a group as C-contiguous arrays: their bytes are what is stored."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the data file.

    Attributes:
        name: of the initializer.
        dtype: a key of `ITEM_BITS`.
        shape: outermost dimension first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file: two 4-bit values to a byte, the first in the low bits."""
        return -(-math.prod(self.shape) * ITEM_BITS[self.dtype] // 8)


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Tensors that come out of one reading of a weight: a matrix, or codes with scales and zeros.

    Attributes:
        tensors: what is stored; the first one is the largest, and is written while the others are gathered.
        tasks: gives functions, each of which gives the next `Piece`; they run on threads, their results are taken in
            order. The pieces of a tensor together have exactly its bytes.
        label: type of the weight for tables and the sidecar: "F32", "F16", "BF16", "INT8", "INT4 g32".
        source: name of the weight in the checkpoint, "" for what is made here (rotary tables).
        held: bytes of the source that have to be in memory at once while it is written, beyond a chunk.
        note: why its type is not the one that was asked for.
    """

    tensors: tuple[StoredTensor, ...]
    tasks: Callable[[], Iterator[Callable[[], Piece]]] = field(repr=False)
    label: str
    source: str = ""
    held: int = 0
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)
