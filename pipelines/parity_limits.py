"""How far a candidate may be from its source: the limits of a verdict, and their defaults per type and model size.

One figure per type, the mean KL divergence that still passes; the other two limits follow from it. docs/parity.md has
the measurements behind every number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantpress.quant.errors import UsageError

__all__ = ["KLD_BY_TYPE", "Limits", "limits_for"]


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

    def problems(self, *, mean_kld: float, ppl_ratio: float, top1_agreement: float) -> dict[str, str]:
        """Measure -> in words, what is beyond its limit. A figure that is NaN is beyond every limit."""
        change = ppl_ratio - 1
        problems = {}
        if not mean_kld <= self.max_kld:
            problems["mean_kld"] = f"mean KL divergence {mean_kld:.3g} is above {self.max_kld:.3g}"
        if not abs(change) <= self.max_ppl_change:
            problems["ppl_change"] = f"perplexity changes by {change:+.2%}, more than {self.max_ppl_change:.2%}"
        if not top1_agreement >= self.min_top1:
            problems["top1"] = f"top-1 agreement {top1_agreement:.2%} is below {self.min_top1:.2%}"
        return problems


# Mean KL divergence, nats per token, that passes for a model of 8 billion parameters or more: twice what llama.cpp's
# own figures for Llama 3 8B are where there are any (tools/quantize/README.md; three times for Q5_K_M, once for Q2_K,
# after what small models showed), the others by their ratio to Q4_0 on small models.
KLD_BY_TYPE: dict[str, float] = {
    "F32": 1e-5,
    "F16": 1e-4,
    "BF16": 1e-3,
    "Q8_0": 3e-3,
    "Q6_K": 0.012,
    "Q5_1": 0.045,
    "Q5_K_M": 0.035,
    "Q5_K_S": 0.04,
    "Q5_0": 0.045,
    "Q4_K_M": 0.065,
    "Q4_K_S": 0.09,
    "IQ4_NL": 0.09,
    "IQ4_XS": 0.095,
    "Q4_1": 0.14,
    "Q4_0": 0.15,
    "MXFP4_MOE": 0.15,
    "Q3_K_L": 0.17,
    "Q3_K_M": 0.2,
    "Q3_K_S": 0.3,
    "Q2_K": 0.45,
    "Q2_K_S": 0.6,
    "TQ2_0": 8.0,
    "TQ1_0": 8.0,
    "W8A8": 0.03,
    "INT8": 0.006,
    "INT4": 0.2,
    "INT3": 0.45,
    "INT2": 2.0,
}
_UNSCALED = ("F32", "F16")  # rounding, not quantization: it does not grow as models shrink
_LARGE = 8e9  # parameters from which the figures above hold
_EXPONENT = 0.31  # Q4_0: 0.072 at 8e9 parameters and 0.26 at 135e6
_MOST = 4.0  # how much more than a large model the smallest one may lose
_CEILING = 0.6  # below what gate and up swapped did to a random model (0.67); ternary types are meant for their own
_STEADY_CHANGE = 0.002  # change of perplexity that a few thousand tokens show without any loss
_CHANGE = 1.5  # relative change of perplexity over the KL divergence: up to 1.3 was seen
_TOP1 = 0.8  # share of tokens that change their likeliest successor, over the root of the KL divergence: 0.45 to 0.6


def limits_for(file_type: str, parameters: int = 0) -> Limits:
    """Default limits.

    Args:
        file_type: name of a type in any case, ``Q4_K_M`` or ``q4_k_m``.
        parameters: values in the model; small ones lose more, and 0 counts as the smallest.

    Raises:
        UsageError: no such type.
    """
    name = file_type.upper()
    if name not in KLD_BY_TYPE:
        raise UsageError(f"no parity limits for type {file_type!r}; known: {', '.join(KLD_BY_TYPE)}")
    smaller = 1.0 if name in _UNSCALED else min(_MOST, max(1.0, (_LARGE / max(parameters, 1)) ** _EXPONENT))
    ceiling = max(_CEILING, KLD_BY_TYPE[name])
    kld = float(f"{min(ceiling, KLD_BY_TYPE[name] * smaller):.3g}")
    return Limits(
        max_kld=kld,
        max_ppl_change=round(_STEADY_CHANGE + _CHANGE * kld, 5),
        min_top1=round(max(0.0, 1 - _TOP1 * math.sqrt(kld)), 3),
    )
