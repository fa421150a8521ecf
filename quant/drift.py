"""Makes up for drift: inputs that are no longer what they were, because the weights before them were quantized.

A linear of the source computes X' W^T; in the quantized model its input is X. The weights that come nearest to the
source's outputs, by least squares over the tokens, are W + W (X' - X)^T X (X^T X)^-1. GPTQ then rounds these instead of
W. The idea is that of Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (arXiv
2504.02692); theirs spreads the correction over GPTQ's column loop, here it is done before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.workers import Workers, chunks

if TYPE_CHECKING:
    import torch

    from quantpress.quant.gptq import Factor

__all__ = ["SHARE", "check_share", "made_up"]

SHARE = 1.0
"""Share of the correction that is made by default: all of it."""

_ROWS = 128  # of a chunk


def check_share(share: float) -> None:
    """Refuses what is no share.

    Raises:
        UsageError: less than 0, more than 1, or no number.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"drift {share}: must be a share from 0 to 1")


def made_up(
    weights: Sequence[NDArray[np.float32]], factor: Factor, drift: NDArray[np.float32], share: float, threads: int = 1
) -> list[NDArray[np.float32]]:
    """Gives W + share * W D H^-1 of matrices with the same input.

    Args:
        weights: (N, K) float32 each; not changed.
        factor: of H = X^T X / tokens, with its damping.
        drift: (K, K) float32, D = (X' - X)^T X / tokens.
        share: from 0 to 1.
        threads: workers; the bytes do not depend on it.

    Raises:
        InputError: the result is not finite.
    """
    import torch

    results = [np.empty_like(weight) for weight in weights]
    upper, drifted = torch.from_numpy(factor.upper), torch.empty(drift.shape).copy_(torch.from_numpy(drift))
    with Workers(threads) as workers:
        workers.run(
            partial(_chunk, weight[rows], factor, upper, drifted, share, result[rows])
            for weight, result in zip(weights, results, strict=True)
            for rows in chunks(len(weight), _ROWS)
        )
    if not all(np.isfinite(result).all() for result in results):
        raise InputError("the correction for drift is not finite: the weights or their inputs are beyond float32")
    return results


def _chunk(
    weight: NDArray[np.float32], factor: Factor, upper: torch.Tensor, drift: torch.Tensor, share: float,
    result: NDArray[np.float32],
) -> None:  # fmt: skip
    import torch

    # all in torch's own memory: a product may differ in the last bit with the alignment of what it reads
    order = torch.from_numpy(factor.order)
    moved = torch.empty(weight.shape).copy_(torch.from_numpy(weight)) @ drift
    correction = (moved[:, order] @ upper.T @ upper).numpy()
    result[:, factor.order] = weight[:, factor.order] + np.float32(share) * correction
