"""Encoders of the K-quants, byte for byte libggml's: scales are searched for sixteen blocks side by side.

Sources: quantize_row_q2_K_ref to quantize_row_q6_K_ref (without importance) and quantize_row_q2_K_impl to
quantize_row_q6_K_impl (with it) in llama.cpp's ggml-quants.c; `kquants_lanes` has the searches they call. Each function
is a `search.Search`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.kernels.kquants.types import KQUANTS, Steps
from quantpress.quant.ggml.kquants_blocks import Recipe, encode_signed, encode_with_minimum
from quantpress.quant.ggml.kquants_tiles import make_tiles

__all__ = ["search_q2_k", "search_q3_k", "search_q4_k", "search_q5_k", "search_q6_k"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_NOTHING: Final = np.empty(0, np.float32)


def search_q2_k(values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    """Writes blocks of Q2_K."""
    return _with_minimum("Q2_K", values, importance, first, out)


def search_q3_k(values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    """Writes blocks of Q3_K."""
    return _signed("Q3_K", values, importance, first, out)


def search_q4_k(values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    """Writes blocks of Q4_K."""
    return _with_minimum("Q4_K", values, importance, first, out)


def search_q5_k(values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    """Writes blocks of Q5_K."""
    return _with_minimum("Q5_K", values, importance, first, out)


def search_q6_k(values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    """Writes blocks of Q6_K."""
    return _signed("Q6_K", values, importance, first, out)


def _with_minimum(name: str, values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    tiles = make_tiles(KQUANTS[name].block_bytes)
    recipe = _recipe(name, weighted=importance is not None)
    return int(encode_with_minimum(_plain(values), _flat(importance), first, _bytes(out), recipe, tiles))


def _signed(name: str, values: Floats, importance: Floats | None, first: int, out: Bytes) -> int:
    tiles = make_tiles(KQUANTS[name].block_bytes)
    recipe = _recipe(name, weighted=importance is not None)
    return int(encode_signed(_plain(values), _flat(importance), first, _bytes(out), recipe, tiles))


@lru_cache
def _recipe(name: str, *, weighted: bool) -> Recipe:
    kind = KQUANTS[name]
    steps = kind.weighted if weighted else kind.plain
    if steps is None:
        tried, scale_tried = _spread(kind.top, 9), _spread(kind.scale_top, 9)
    else:
        numerators = (_numerator(kind.top, steps, step) for step in range(steps.last + 1))
        tried, scale_tried = np.array([kind.top, *numerators], np.float32), _spread(kind.scale_top, 4)
    return Recipe(
        block_bytes=kind.block_bytes,
        size=kind.size,
        tried=tried,
        scale_tried=scale_tried,
        by_size=steps is not None and steps.absolute,
        # libggml bounds the codes of scales in some of its functions only; it matters where a scale is negative
        capped=name == "Q5_K" or (name == "Q4_K" and not weighted),
        energy=np.float32(kind.energy),
    )


def _numerator(top: int, steps: Steps, step: int) -> np.float32:
    return np.float32(steps.first) + np.float32(steps.delta) * np.float32(step) + np.float32(top)


def _spread(top: int, reach: int) -> Floats:
    """The numerators of make_qx_quants and make_qp_quants: `top`, then tenths below and above it."""
    near = [step for step in range(-reach, reach + 1) if step]
    return np.array([top, *(np.float32(0.1) * np.float32(step) + np.float32(top) for step in near)], np.float32)


def _plain(array: Floats) -> Floats:
    """A flat array that compiled code takes as it is, so that there is one compiled form for all."""
    return np.require(array, np.float32, ["C", "A", "W"]).reshape(-1)


def _flat(importance: Floats | None) -> Floats:
    return _NOTHING if importance is None else _plain(importance)


def _bytes(out: Bytes) -> NDArray[Any]:
    assert out.flags.c_contiguous, "out is written in place"
    return out.reshape(-1)
