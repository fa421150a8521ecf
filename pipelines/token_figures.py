"""What two rows of logits say of one token: KL divergence and both losses, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.perplexity import row_blocks

__all__ = ["TokenFigures", "token_figures"]


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """What is kept of scored tokens, (n,) float64 nats each.

    Attributes:
        divergence: KL(baseline || candidate), >= 0 but for rounding (about 1e-15).
        baseline: negative log-likelihood of the target under the baseline.
        candidate: the same under the candidate.
    """

    divergence: NDArray[np.float64]
    baseline: NDArray[np.float64]
    candidate: NDArray[np.float64]


def token_figures(
    baseline: NDArray[np.float32], candidate: NDArray[np.float32], targets: NDArray[np.int32]
) -> TokenFigures:
    """Compare two rows of logits per token, in float64.

    With logits a and b shifted so that their largest is 0, and p = softmax(a):
    ``KL = log(sum exp(b)) - log(sum exp(a)) - sum(p * (b - a))``, ``loss = log(sum exp(a)) - a[target]``.

    Args:
        baseline: (n, V) float32 logits.
        candidate: (n, V) float32 logits.
        targets: (n,) int32 tokens that follow, in [0, V).

    Returns:
        figures per token; NaN where logits are not finite.
    """
    figures = TokenFigures(*(np.empty(len(targets), np.float64) for _ in range(3)))
    with np.errstate(invalid="ignore"):  # inf - inf
        for rows in row_blocks(*baseline.shape):
            a, b = baseline[rows].astype(np.float64), candidate[rows].astype(np.float64)
            a -= a.max(axis=1, keepdims=True)
            b -= b.max(axis=1, keepdims=True)
            chosen = np.arange(len(a)), targets[rows]
            chosen_a, chosen_b = a[chosen], b[chosen]
            weights = np.exp(a)
            total = weights.sum(axis=1)
            change = np.einsum("nv,nv->n", weights, np.subtract(b, a, out=a)) / total
            log_a, log_b = np.log(total), np.log(np.exp(b, out=b).sum(axis=1))
            figures.divergence[rows] = log_b - log_a - change
            figures.baseline[rows] = log_a - chosen_a
            figures.candidate[rows] = log_b - chosen_b
    return figures
