"""Rows and importances for the tests of searched types, and how a difference from libggml is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantpress.quant.ggml.types import ggml_type

ROWS, COLUMNS = 24, 1536  # six super-blocks to a row; 1152 blocks of 32 are eighteen tiles of 64


def normal(rng: np.random.Generator) -> np.ndarray:
    """Of the size that weights have."""
    return rng.standard_normal((ROWS, COLUMNS)) * 0.02


def heavy_tailed(rng: np.random.Generator) -> np.ndarray:
    """Fifth powers: most values are next to nothing beside a few."""
    return rng.standard_normal((ROWS, COLUMNS)) ** 5


def with_ties(rng: np.random.Generator) -> np.ndarray:
    """Multiples of 1/4: halves are met, and several values are the greatest."""
    return np.round(rng.standard_normal((ROWS, COLUMNS)) * 3) / 4


def negative(rng: np.random.Generator) -> np.ndarray:
    """Below 0, away from it."""
    return -1 - np.abs(rng.standard_normal((ROWS, COLUMNS)))


def positive(rng: np.random.Generator) -> np.ndarray:
    """Above 0, away from it."""
    return 1 + np.abs(rng.standard_normal((ROWS, COLUMNS)))


def constant_and_zero(rng: np.random.Generator) -> np.ndarray:
    """A constant for each block of 32; some are 0 or -0."""
    steps = rng.choice([0.0, -0.0, 0.7, -0.7, 1e-3], (ROWS, COLUMNS // 32))
    return np.repeat(steps, 32, axis=1)


def single_outlier(rng: np.random.Generator) -> np.ndarray:
    """One value of 30 in each row."""
    rows = rng.standard_normal((ROWS, COLUMNS)) * 0.02
    rows[np.arange(ROWS), rng.integers(0, COLUMNS, ROWS)] = 30
    return rows


def tiny(rng: np.random.Generator) -> np.ndarray:
    """On both sides of 1e-15, below which libggml calls a block zero."""
    return rng.standard_normal((ROWS, COLUMNS)) * np.logspace(-13, -20, ROWS)[:, None]


def almost_nothing(rng: np.random.Generator) -> np.ndarray:
    """Of sizes whose inverse overflows, and subnormal ones."""
    return rng.standard_normal((ROWS, COLUMNS)) * np.logspace(-30, -44, ROWS)[:, None]


def large(rng: np.random.Generator) -> np.ndarray:
    """As large as scales of float16 allow in every type."""
    return np.clip(rng.standard_normal((ROWS, COLUMNS)) * 1e4, -6e4, 6e4)


DISTRIBUTIONS = [
    normal, heavy_tailed, with_ties, negative, positive, constant_and_zero, single_outlier, tiny, almost_nothing, large,
]  # fmt: skip


def importances() -> dict[str, np.ndarray]:
    """Importances of the columns, by what is special in them."""
    rng = np.random.default_rng(5)
    one = np.zeros(COLUMNS)
    one[:: 32 * 7] = 3
    kinds = {
        "random": rng.random(COLUMNS) ** 4,
        "of squares": rng.standard_normal(COLUMNS) ** 2 * rng.gamma(0.3, 1, COLUMNS),
        "zeros": np.zeros(COLUMNS),
        "one column of many": one,
        "half of zeros": rng.random(COLUMNS) * (rng.random(COLUMNS) < 0.5),
        "great": rng.random(COLUMNS) * 1e6,
    }
    return {name: values.astype(np.float32) for name, values in kinds.items()}


def trained_rows(shared: Path, width: int) -> list[np.ndarray]:
    """64 rows of each matrix of a trained model whose rows divide by `width`, float32."""
    path = shared / "models/mix6m-hf/model.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    matrices = [values for _, values in sorted(load_file(path).items()) if values.ndim == 2]
    return [np.ascontiguousarray(rows[:64], np.float32) for rows in matrices if rows.shape[1] % width == 0]


def corners(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of 32 that are made of one to four numbers and their negatives, special ones among them, (count, 32)."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1.1754944e-38, 2.0**-125, 2.0**-14, 6e4]
    sizes = np.exp(rng.uniform(np.log(1e-40), np.log(6e4), (count, 4)))
    sizes = np.where(rng.random((count, 4)) < 0.5, rng.uniform(-1, 1, (count, 4)), sizes)
    few = np.where(rng.random((count, 4)) < 0.3, rng.choice(special, (count, 4)), sizes)
    chosen = rng.integers(0, 1 + rng.integers(0, 4, (count, 1)), (count, 32))
    return np.float32(np.take_along_axis(few, chosen, axis=1) * rng.choice([-1, 1], (count, 32)))


def assert_same_blocks(name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    """Compares block by block, and says how many differ and what the first is."""
    width = ggml_type(name).block_bytes
    found, wanted = found.reshape(-1, width), wanted.reshape(-1, width)
    bad = np.flatnonzero((found != wanted).any(axis=1))
    first = [rows[bad[:1]].tolist() for rows in (found, wanted)]
    assert not bad.size, f"{name}: {bad.size} of {len(found)} blocks differ, first {bad[0]}: found, wanted {first}"
