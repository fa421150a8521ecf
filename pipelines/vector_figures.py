"""How far vectors of texts are from those of the source: their cosines, and whether they are told apart as before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["VectorFigures", "cosine_limit", "pooled", "vector_figures"]

Vectors = NDArray[np.float32]

_SHARE = 0.25  # distance of a vector from 1 over the KL divergence that is allowed; about 0.05 was seen
_EXACT = 1e-5  # what another order of float32 sums and llama.cpp's table of gelu do: 1e-6 was seen


@dataclass(frozen=True, slots=True)
class VectorFigures:
    """Figures of the vectors of several texts.

    Attributes:
        texts: how many.
        pooling: how they were made: "mean", "cls" or "last".
        mean_cosine, min_cosine: cosine between the file's vector and the source's, of all texts and of the worst.
        nearest: share of texts whose vector in the file is nearest to the source's vector of the same text.
        min_allowed: the smallest cosine that passes.
    """

    texts: int
    pooling: str
    mean_cosine: float
    min_cosine: float
    nearest: float
    min_allowed: float

    @property
    def problem(self) -> str:
        """Says what is wrong, "" if nothing is. A figure that is NaN is wrong."""
        if not self.min_cosine >= self.min_allowed:
            return f"the cosine of a text's vectors is {self.min_cosine:.6f}, below {self.min_allowed:.6f}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Gives the `vectors` object of a parity report."""
        figures = {"mean_cosine": self.mean_cosine, "min_cosine": self.min_cosine, "nearest": self.nearest}
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return {"texts": self.texts, "pooling": self.pooling, **plain, "min_allowed": self.min_allowed}


def cosine_limit(max_kld: float) -> float:
    """Gives the smallest cosine that passes where so much KL divergence would."""
    return 1 - max(_EXACT, min(1.0, _SHARE * max_kld))


def pooled(states: NDArray[np.float32], pooling: str) -> Vectors:
    """Makes one vector (hidden,) of the hidden states (n, hidden) of a text.

    Args:
        states: of all its tokens, those around it too.
        pooling: "cls" for the first, "last" for the last; else their mean.
    """
    found: Vectors = states.mean(axis=0) if pooling not in ("cls", "last") else states[0 if pooling == "cls" else -1]
    return found


def vector_figures(
    source: Sequence[Vectors], candidate: Sequence[Vectors], *, pooling: str, max_kld: float
) -> VectorFigures:
    """Compares vectors of the same texts.

    Args:
        source: (hidden,) of each text.
        candidate: the same from the file.
        pooling: how they were made.
        max_kld: the limit of KL divergence, from which that of the cosine follows.
    """
    ours, theirs = _unit(source), _unit(candidate)
    cosines = np.einsum("th,th->t", ours, theirs)
    nearest = (theirs @ ours.T).argmax(axis=1) == np.arange(len(ours))
    return VectorFigures(
        texts=len(ours),
        pooling=pooling or "mean",
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        nearest=float(nearest.mean()),
        min_allowed=cosine_limit(max_kld),
    )


def _unit(vectors: Sequence[Vectors]) -> NDArray[np.float64]:
    """Gives vectors of length 1, (texts, hidden) float64."""
    stacked = np.stack(vectors).astype(np.float64)
    found: NDArray[np.float64] = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    return found
