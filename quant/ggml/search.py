"""The types whose scales are searched: which function does that. It is loaded when it is first asked for, with numba.

A search takes blocks and gives bytes. Sources of the algorithms: quantize_q*_K, quantize_iq4_nl and their family in
llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["FAST", "SEARCHED", "WEIGHTED", "Search", "searcher"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]


class Search(Protocol):
    """Quantizes blocks; several threads may call it at once, and the bytes of a block depend on it alone."""

    def __call__(self, values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
        """Quantizes blocks.

        Args:
            values: (B, weights of a block) float32, finite, C-contiguous; not changed.
            importance: (P, weights of a block) float32 for the P blocks of a row, or None.
            first: number of the first block, from the start of a row: block b has `importance[(first + b) % P]`.
            out: (B, bytes of a block) uint8, C-contiguous; written.

        Returns:
            How many blocks need a scale beyond float16, and were not stored rightly.
        """
        ...


SEARCHED: Final = MappingProxyType(
    {
        "Q2_K": ("kquants", "search_q2_k"),
        "Q3_K": ("kquants", "search_q3_k"),
        "Q4_K": ("kquants", "search_q4_k"),
        "Q5_K": ("kquants", "search_q5_k"),
        "Q6_K": ("kquants", "search_q6_k"),
        "IQ4_NL": ("iq4", "search_iq4_nl"),
        "IQ4_XS": ("iq4", "search_iq4_xs"),
        "TQ1_0": ("ternary_search", "search_tq1_0"),
        "TQ2_0": ("ternary_search", "search_tq2_0"),
        "MXFP4": ("fp4_search", "search_mxfp4"),
    }
)
"""Type -> module of this package and function in it; with importance or without."""

WEIGHTED: Final = MappingProxyType(
    {
        "Q4_0": ("legacy_search", "search_q4_0"),
        "Q4_1": ("legacy_search", "search_q4_1"),
        "Q5_0": ("legacy_search", "search_q5_0"),
        "Q5_1": ("legacy_search", "search_q5_1"),
    }
)
"""Types that are searched where an importance is given, and only then."""

FAST: Final = MappingProxyType(
    {
        "Q4_0": ("legacy_fast", "encode_q4_0"),
        "Q4_1": ("legacy_fast", "encode_q4_1"),
        "Q5_0": ("legacy_fast", "encode_q5_0"),
        "Q5_1": ("legacy_fast", "encode_q5_1"),
    }
)
"""Types that are encoded by numpy or, with the same bytes, by numba."""

_WORTH_LOADING: Final = 1 << 26  # values of one tensor: encoding them takes as long as loading numba


def searcher(name: str, *, weighted: bool, values: int = 0) -> Search | None:
    """Gives the search of a type; None where it has none.

    Args:
        name: of the type.
        weighted: whether an importance is given.
        values: how many are to be encoded; of types in `FAST`, few of them are left to numpy until numba is loaded.
    """
    place = SEARCHED.get(name) or (WEIGHTED.get(name) if weighted else None)
    if place is None and (values >= _WORTH_LOADING or "numba" in sys.modules):
        place = FAST.get(name)
    if place is None:
        return None
    found: Search = getattr(import_module(f"quantpress.quant.ggml.{place[0]}"), place[1])
    return found
