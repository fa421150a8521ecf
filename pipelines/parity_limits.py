"""How far a candidate may be from its source: the limits of a verdict, and their defaults per GGUF file type."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantpress.quant.errors import UsageError

__all__ = ["LIMITS_BY_TYPE", "Limits", "limits_for"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What still passes.

    Attributes:
        max_kld: largest mean KL divergence, nats per token.
        max_ppl_change: largest relative change of perplexity, up or down: |ppl_ratio - 1|. A perplexity that falls
            is as suspicious as one that rises: swapped projections have been seen to lower it.
        min_top1: smallest share of tokens with the same likeliest next token.
    """

    max_kld: float
    max_ppl_change: float
    min_top1: float

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"limit {name}={value}: wanted a finite number that is not negative")
        if self.min_top1 > 1:
            raise UsageError(f"limit min_top1={self.min_top1}: wanted a share between 0 and 1")

    def to_json(self) -> dict[str, float]:
        """The ``limits`` object of reports."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def exceeded(self, *, mean_kld: float, ppl_ratio: float, top1_agreement: float) -> str:
        """What is beyond its limit, in words; "" when nothing is. A figure that is NaN is beyond every limit."""
        change = ppl_ratio - 1
        problems = []
        if not mean_kld <= self.max_kld:
            problems.append(f"mean KL divergence {mean_kld:.3g} is above {self.max_kld:g}")
        if not abs(change) <= self.max_ppl_change:
            problems.append(f"perplexity changes by {change:+.2%}, more than {self.max_ppl_change:.2%}")
        if not top1_agreement >= self.min_top1:
            problems.append(f"top-1 agreement {top1_agreement:.2%} is below {self.min_top1:.2%}")
        return "; ".join(problems)


# First values, for models of 135M parameters and more down to 0.26M ones, from the figures in
# docs/decisions.md; a type's limits leave room for small models, which suffer most.
LIMITS_BY_TYPE: dict[str, Limits] = {
    "F32": Limits(1e-4, 0.002, 0.99),
    "F16": Limits(1e-4, 0.002, 0.99),
    "BF16": Limits(2e-3, 0.01, 0.96),
    "Q8_0": Limits(2e-3, 0.01, 0.96),
    "Q6_K": Limits(0.02, 0.03, 0.92),
    "Q5_1": Limits(0.04, 0.05, 0.90),
    "Q5_0": Limits(0.04, 0.05, 0.90),
    "Q5_K_M": Limits(0.03, 0.05, 0.90),
    "Q5_K_S": Limits(0.04, 0.05, 0.90),
    "Q4_K_M": Limits(0.10, 0.12, 0.83),
    "Q4_K_S": Limits(0.12, 0.14, 0.82),
    "IQ4_NL": Limits(0.12, 0.14, 0.82),
    "IQ4_XS": Limits(0.12, 0.14, 0.82),
    "Q4_1": Limits(0.15, 0.15, 0.80),
    "Q4_0": Limits(0.20, 0.20, 0.78),
    "MXFP4_MOE": Limits(0.20, 0.20, 0.78),
    "Q3_K_L": Limits(0.30, 0.30, 0.72),
    "Q3_K_M": Limits(0.35, 0.35, 0.70),
    "Q3_K_S": Limits(0.60, 0.60, 0.62),
    "Q2_K": Limits(1.5, 2.0, 0.45),
    "Q2_K_S": Limits(2.0, 3.0, 0.40),
    "TQ2_0": Limits(8.0, 1000.0, 0.0),
    "TQ1_0": Limits(8.0, 1000.0, 0.0),
}


def limits_for(file_type: str) -> Limits:
    """Default limits of a GGUF file type by its name in any case, ``Q4_K_M`` or ``q4_k_m``.

    Raises:
        UsageError: no such type.
    """
    limits = LIMITS_BY_TYPE.get(file_type.upper())
    if limits is None:
        raise UsageError(f"no parity limits for type {file_type!r}; known: {', '.join(LIMITS_BY_TYPE)}")
    return limits
