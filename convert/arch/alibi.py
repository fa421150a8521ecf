"""Slopes of ALiBi, what a head's scores lose per token of distance (arXiv 2108.12409, section 3).

Sources: transformers' modeling_bloom.py, `_get_alibi_slopes`, and modeling_mpt.py, `build_mpt_alibi_tensor`;
llama.cpp's ggml-cpu/ops.cpp, `soft_max_f32`, which has the same numbers for the same `max_alibi_bias`.
"""

from __future__ import annotations

__all__ = ["alibi_slopes"]


def alibi_slopes(heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """Gives the slope of each head: a geometric series, with one of half the step where heads are no power of two.

    Args:
        heads: number of query heads.
        largest: minus the exponent of 2 that the last head has where heads are a power of two.
    """
    whole = 1 << (heads.bit_length() - 1)
    steps = [(head + 1) / whole for head in range(min(heads, whole))]
    steps += [(2 * head + 1) / (2 * whole) for head in range(heads - whole)]
    return tuple(2.0 ** (-largest * step) for step in steps)
