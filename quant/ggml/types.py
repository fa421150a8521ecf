"""Ids and sizes of every tensor type that a GGUF file can name.

Sources: enum ggml_type in llama.cpp's ggml.h, block layouts in ggml-common.h. They are all here, also those that this
package cannot decode, because a reader must know a tensor's size to check a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from quantpress.quant.errors import InputError, LayoutError

__all__ = ["GGML_TYPES", "GGMLType", "ggml_type", "row_bytes"]


@dataclass(frozen=True, slots=True)
class GGMLType:
    """One tensor type of ggml.

    Attributes:
        name: as ggml spells it, "Q8_0".
        type_id: the number in a GGUF tensor info.
        block_size: weights per block.
        block_bytes: bytes per block.
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included: 8.5 for Q8_0."""
        return 8 * self.block_bytes / self.block_size


# name, id, weights per block, bytes per block written as the sum of the block's fields
_TABLE: Final = (
    GGMLType("F32", 0, 1, 4),
    GGMLType("F16", 1, 1, 2),
    GGMLType("Q4_0", 2, 32, 2 + 16),
    GGMLType("Q4_1", 3, 32, 2 + 2 + 16),
    GGMLType("Q5_0", 6, 32, 2 + 4 + 16),
    GGMLType("Q5_1", 7, 32, 2 + 2 + 4 + 16),
    GGMLType("Q8_0", 8, 32, 2 + 32),
    GGMLType("Q8_1", 9, 32, 2 + 2 + 32),  # the gguf package says 40: its sizes keep the float32 scales of 2023
    GGMLType("Q2_K", 10, 256, 16 + 64 + 2 + 2),
    GGMLType("Q3_K", 11, 256, 32 + 64 + 12 + 2),
    GGMLType("Q4_K", 12, 256, 2 + 2 + 12 + 128),
    GGMLType("Q5_K", 13, 256, 2 + 2 + 12 + 32 + 128),
    GGMLType("Q6_K", 14, 256, 128 + 64 + 16 + 2),
    GGMLType("Q8_K", 15, 256, 4 + 256 + 32),
    GGMLType("IQ2_XXS", 16, 256, 2 + 64),
    GGMLType("IQ2_XS", 17, 256, 2 + 64 + 8),
    GGMLType("IQ3_XXS", 18, 256, 2 + 64 + 32),
    GGMLType("IQ1_S", 19, 256, 2 + 32 + 16),
    GGMLType("IQ4_NL", 20, 32, 2 + 16),
    GGMLType("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),
    GGMLType("IQ2_S", 22, 256, 2 + 64 + 8 + 8),
    GGMLType("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
    GGMLType("I8", 24, 1, 1),
    GGMLType("I16", 25, 1, 2),
    GGMLType("I32", 26, 1, 4),
    GGMLType("I64", 27, 1, 8),
    GGMLType("F64", 28, 1, 8),
    GGMLType("IQ1_M", 29, 256, 32 + 16 + 8),
    GGMLType("BF16", 30, 1, 2),
    GGMLType("TQ1_0", 34, 256, 48 + 4 + 2),
    GGMLType("TQ2_0", 35, 256, 64 + 2),
    GGMLType("MXFP4", 39, 32, 1 + 16),
    GGMLType("NVFP4", 40, 64, 4 + 32),
    GGMLType("Q1_0", 41, 128, 2 + 16),
    GGMLType("Q2_0", 42, 64, 2 + 16),
)

GGML_TYPES: Final = MappingProxyType({kind.name: kind for kind in _TABLE})

_BY_ID: Final = MappingProxyType({kind.type_id: kind for kind in _TABLE})

# Ids that old files carry and that no current reader accepts: the layouts were dropped, not renamed.
_REMOVED: Final = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)


def ggml_type(name_or_id: str | int) -> GGMLType:
    """Find a type by its name, in any case, or by its GGUF id.

    Raises:
        InputError: there is no such type, or llama.cpp removed it.
    """
    if isinstance(name_or_id, str):
        kind = GGML_TYPES.get(name_or_id.upper())
        if kind is None:
            near = get_close_matches(name_or_id.upper(), GGML_TYPES, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise InputError(f"unknown ggml type {name_or_id!r}{hint}; known: {', '.join(GGML_TYPES)}")
        return kind
    kind = _BY_ID.get(name_or_id)
    if kind is None and name_or_id in _REMOVED:
        raise InputError(f"ggml type id {name_or_id} ({_REMOVED[name_or_id]}) was removed from GGUF; convert again")
    if kind is None:
        raise InputError(f"unknown ggml type id {name_or_id}; the highest known is {max(_BY_ID)}")
    return kind


def row_bytes(kind: GGMLType, columns: int) -> int:
    """Bytes of one row of `columns` weights.

    Raises:
        LayoutError: `columns` is not a multiple of the block.
    """
    blocks, rest = divmod(columns, kind.block_size)
    if rest or columns < 0:
        raise LayoutError(
            f"{kind.name} stores blocks of {kind.block_size} weights; a row of {columns} does not divide by it"
        )
    return blocks * kind.block_bytes
