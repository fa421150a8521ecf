"""SmoothQuant: moves the large values of inputs into the weights, so that both fit int8.

Source: Xiao et al., "SmoothQuant" (arXiv 2211.10438), section 4, equation 4: s_j = max|X_j|^alpha / max|W_j|^(1-alpha).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "migration_scale"]

ALPHA = 0.5  # the paper's choice for most models
_LEAST = 1e-5  # of the largest, so that columns without input or weight stay finite


def migration_scale(
    weights: Sequence[NDArray[np.float32]],
    max_abs: NDArray[np.float32],
    *,
    alpha: float = ALPHA,
    tie: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Gives the scale that weights are multiplied by and inputs divided by, (K,) float32.

    Args:
        weights: (N, K) float32, all that read the input.
        max_abs: (K,) float32 greatest |x| of the input's columns.
        alpha: share of the difficulty that moves into the weights.
        tie: (K,) number of the shared scale of each column; columns of their own by default.
    """
    inputs = max_abs.astype(np.float64)
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0).astype(np.float64)
    if tie is not None:
        inputs, largest = _tied(inputs, tie), _tied(largest, tie)
    if not inputs.any() or not largest.any():
        return np.ones(len(inputs), np.float32)
    inputs = np.maximum(inputs, _LEAST * inputs.max())
    largest = np.maximum(largest, _LEAST * largest.max())
    scale: NDArray[np.float32] = (inputs**alpha / largest ** (1 - alpha)).astype(np.float32)
    return scale


def _tied(values: NDArray[np.float64], tie: NDArray[np.int64]) -> NDArray[np.float64]:
    most = np.zeros(int(tie.max()) + 1)
    np.maximum.at(most, tie, values)
    return most[tie]
