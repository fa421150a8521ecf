"""Weights and importance for the K-quant kernels, shared by the tests on the processor and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
COLUMNS = 512
NAMES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def weights(kind: str, rows: int, columns: int = COLUMNS) -> Array:
    """Rows of one kind."""
    rng = np.random.default_rng([rows, columns])
    return np.ascontiguousarray(KINDS[kind](rng, (rows, columns)), np.float32)


def _outliers(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """One in 300 weights is so great that scales of whole sub-blocks are stored as 0."""
    values = rng.standard_normal(shape) * 1e-3
    values[:, ::300] = 50
    return values


def _one(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    values = np.zeros(shape)
    values[:, 5] = -3
    return values


def _mixed(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Sizes differ between rows and between sub-blocks; some steps are subnormal or 0 in float16, some infinite."""
    sizes = 10.0 ** rng.integers(-3, 3, (shape[0], shape[1] // 16)).repeat(16, axis=1)
    return rng.standard_normal(shape) * sizes * 10.0 ** rng.integers(-12, 5, (shape[0], 1))


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "heavy-tailed": lambda rng, shape: rng.standard_normal(shape) ** 5,
    "ties": lambda rng, shape: np.round(rng.standard_normal(shape) * 3) / 4,
    "positive and sparse": lambda rng, shape: np.abs(rng.standard_normal(shape)) * (rng.random(shape) < 0.3),
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)) - 1,
    "constant": lambda rng, shape: np.full(shape, 0.37),
    "negative constant": lambda rng, shape: np.full(shape, -0.37),
    "zero": lambda rng, shape: np.zeros(shape),
    "outliers": _outliers,
    "one weight": _one,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "at the least size": lambda rng, shape: rng.standard_normal(shape) * 1e-15,
    "small": lambda rng, shape: rng.standard_normal(shape) * 1e-8,
    "overflowing": lambda rng, shape: rng.standard_normal(shape) * 1e30,
    "mixed": _mixed,
}


def everything(rows: int) -> Array:
    """Rows of all kinds below each other."""
    return np.concatenate([weights(kind, rows) for kind in KINDS])


def importance(kind: str | None, columns: int = COLUMNS) -> Array | None:
    """None, "smooth", or "gaps": 0 for half of the weights and for all of the first 288."""
    rng = np.random.default_rng(columns)
    if kind is None:
        return None
    found = rng.random(columns) ** 4 * 3
    if kind == "gaps":
        found[rng.random(columns) < 0.5] = 0
        found[:288] = 0
    return found.astype(np.float32)
