"""The K-quants that can be searched: grids, sizes of sub-blocks and what libggml tries for each.

Sources: quantize_row_q*_K_ref (without importance) and quantize_row_q*_K_impl (with it) in llama.cpp's ggml-quants.c,
block layouts in ggml-common.h. A super-block has 256 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["KQUANTS", "SUPER", "TINY", "KQuant", "Steps"]

SUPER: Final = 256
"""Weights of a super-block."""

TINY: Final = 1e-15
"""GROUP_MAX_EPS of ggml-quants.c: sub-blocks that stay below are zero."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The scales that are tried for a sub-block with a minimum: top + first + delta * step over the range.

    Attributes:
        first: rmin of make_qkx2_quants.
        delta: rdelta.
        last: nstep; steps 0 to `last` are tried.
        absolute: errors are weighted by their size, not by their square (use_mad).
    """

    first: float
    delta: float
    last: int
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class KQuant:
    """One type.

    Attributes:
        name: as ggml spells it.
        block_bytes: bytes of a super-block.
        size: weights of a sub-block.
        top: greatest code of types with a minimum; for the others codes go from -top to top - 1.
        scale_top: greatest code of a sub-block's scale (and minimum); for the others as `top`.
        plain: what is tried without importance; None for types without a minimum.
        weighted: what is tried with importance.
        energy: the mean square of a super-block is multiplied by this in the weights with importance; 0: not used.
    """

    name: str
    block_bytes: int
    size: int
    top: int
    scale_top: int
    plain: Steps | None = None
    weighted: Steps | None = None
    energy: int = 0


_TABLE: Final = (
    KQuant("Q2_K", 84, 16, 3, 15, Steps(-0.5, 0.1, 15, absolute=True), Steps(-0.9, 0.05, 36), 1),
    KQuant("Q3_K", 110, 16, 4, 32, energy=2),
    KQuant("Q4_K", 144, 32, 15, 63, Steps(-1.0, 0.1, 20), Steps(-0.9, 0.05, 36), 2),
    KQuant("Q5_K", 176, 32, 31, 63, Steps(-0.5, 0.1, 15), Steps(-0.9, 0.05, 36), 2),
    KQuant("Q6_K", 210, 16, 32, 128),
)

KQUANTS: Final = MappingProxyType({kind.name: kind for kind in _TABLE})
