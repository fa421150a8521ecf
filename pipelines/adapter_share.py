"""How much of an adapter's effect is in a file: 1 where it was merged as it was trained, 0 where it was forgotten.

The other figures of a verdict say how far a file is from base + adapter, whatever the reason. A weak adapter may be
forgotten within what quantization is allowed to lose, so its direction is looked at too. With p the probabilities of
base + adapter, a = (logits of base + adapter) - (logits of base) and c = (logits of file) - (logits of base), all at
one token, the share is sum cov_p(a, c) / sum var_p(a) over tokens: the regression of what the file does on what the
adapter does, in the metric that KL divergence has for small differences. Quantization errors have no part in the
adapter's direction but by chance: the standard error says how much of that the text leaves, and `_ALIGNED` allows for
what such errors had in common with the directions of trained adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.perplexity import row_blocks
from quantpress.pipelines.runtime import Runtime

__all__ = ["AdapterShare", "ShareTally"]

_EXACT = 0.1  # a merge without error gives 1.000; one of five layers left out gives 0.80 to 0.87
_ALIGNED = 0.3  # error of the share over `noise`: up to 0.19 was seen (four adapters, weights 1 to 0.005, Q4_0 to BF16)
_SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """What a file has of its adapters.

    Attributes:
        share: 1 where all of their effect is in the file, 0 where none is; NaN where they have no effect.
        stderr: standard error of `share`.
        noise: size of what else the file does to logits, over the size of the adapters' effect.
        effect: mean KL(base + adapter || base), nats per token: what there was to merge.
    """

    share: float
    stderr: float
    noise: float
    effect: float

    @property
    def tolerance(self) -> float:
        """How far from 1 the share of a right merge may lie, given the file's other errors; 1 or more: no telling."""
        return _EXACT + _ALIGNED * self.noise + _SIGMAS * self.stderr

    @property
    def problem(self) -> str:
        """Says what is wrong, "" if nothing is known to be."""
        if not abs(self.share - 1) > self.tolerance:
            return ""
        part = f"{self.share:.0%} of the adapters' effect, wanted 100 % ± {self.tolerance:.0%}"
        return f"the file has {part}; they are not merged as they were trained"

    @property
    def doubt(self) -> str:
        """Says why a file without the adapters would pass too, "" where it would not."""
        if math.isnan(self.share):
            return "the adapters change nothing on this text"
        if self.tolerance < 1:
            return ""
        return "the adapters' effect is too weak beside the file's other errors to be found in it"

    def to_json(self) -> Mapping[str, Any]:
        """Gives the `adapter_share` object of a parity report."""
        figures = {"share": self.share, "tolerance": self.tolerance, "effect_kld": self.effect}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


class ShareTally:
    """Sums per token over the windows of a comparison; no logits are kept."""

    def __init__(self, base: Runtime) -> None:
        """Keeps the model without adapters at hand."""
        self._base = base
        self._parts: list[NDArray[np.float64]] = []

    def watch(self, window: NDArray[np.int32], adapted: NDArray[np.float32], candidate: NDArray[np.float32]) -> None:
        """Takes a window of `parity.compare` in: (n, V) float32 logits of base + adapter and of the file."""
        base = self._base.logits(window, len(window) // 2)[:-1]
        rows = min(base.shape[1], adapted.shape[1])  # adapters may bring tokens that the base does not know
        self.add(base[:, :rows], adapted[:, :rows], candidate[:, :rows])

    def add(self, base: NDArray[np.float32], adapted: NDArray[np.float32], candidate: NDArray[np.float32]) -> None:
        """Takes logits in: (n, V) float32 of the base, of base + adapter and of the file."""
        for rows in row_blocks(*base.shape):
            plain, wide, other = (logits[rows].astype(np.float64) for logits in (base, adapted, candidate))
            weights = np.exp(wide - _log_sum(wide))
            effect, found = wide - plain, other - plain
            mean = np.einsum("nv,nv->n", weights, effect)
            effect -= mean[:, None]
            found -= np.einsum("nv,nv->n", weights, found)[:, None]
            figures = (
                np.einsum("nv,nv,nv->n", weights, effect, found),
                np.einsum("nv,nv,nv->n", weights, effect, effect),
                np.einsum("nv,nv,nv->n", weights, found, found),
                mean - (_log_sum(wide) - _log_sum(plain))[:, 0],
            )
            self._parts.append(np.stack(figures))

    def result(self) -> AdapterShare | None:
        """Gives the share of all tokens together; None if there were none."""
        if not self._parts:
            return None
        both, alone, found, divergence = np.concatenate(self._parts, axis=1)
        total, kld = float(alone.sum()), max(float(divergence.mean()), 0.0)
        if not total > 0:
            return AdapterShare(math.nan, math.nan, math.nan, kld)
        share = float(both.sum()) / total
        # of a ratio of sums, by its linear part; tokens count as independent
        error = math.sqrt(float(np.square(both - share * alone).sum())) / total
        noise = math.sqrt(max(float(found.sum()) / total - share * share, 0.0))
        return AdapterShare(share, error, noise, kld)


def _log_sum(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives log(sum(exp)) of each row, (n, 1)."""
    top = logits.max(axis=1, keepdims=True)
    total: NDArray[np.float64] = np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top
    return total
