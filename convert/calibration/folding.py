"""Takes scales on the inputs of linears back in the operation before them: a norm, or the rows of another linear.

Scaling the columns of a weight by s changes nothing if its input is divided by s, and where the input comes straight
out of a norm or of a linear, that division is a change of their values. AWQ and SmoothQuant live of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.calibration.site import Site

__all__ = ["Folding"]

Array = NDArray[Any]
Search = Callable[["NDArray[np.int64] | None"], NDArray[np.float32]]
"""Ties between columns (None: each for itself) -> (K,) scale that the weights' columns are to be multiplied by."""

_NORMS = {"attn_q.weight": "attn_norm", "attn_qkv.weight": "attn_norm", "ffn_up.weight": "ffn_norm"}


@dataclass
class Folding:
    """A layer while scales are folded into it, from its last site to its first.

    Attributes:
        sites: in the order of the computation.
        plain: slot -> float32 values of norms and biases, in the decoder's form.
        head_dim: values per head; without it several query heads that share a value head cannot be scaled.
        weights: slot -> (N, K) float32 weight as it is to be quantized.
        changed: slot -> norms and biases whose values changed, as they will be read back.
    """

    sites: Sequence[Site]
    plain: Mapping[str, Array]
    head_dim: int | None = None
    weights: dict[str, NDArray[np.float32]] = field(init=False)
    changed: dict[str, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Begins with the weights as they are."""
        self.weights = {slot: weight for site in self.sites for slot, weight in site.weights.items()}

    def fold(self, site: Site, search: Search) -> NDArray[np.float32] | None:
        """Scales the inputs of a site and folds the scale into what comes before it.

        The sites after it must be done: their scales change rows of this one's weights.

        Args:
            site: one of `sites`.
            search: gives the scale; only called if it can be folded.

        Returns:
            The scale that `weights` of the site were multiplied by (norms round theirs), None if nothing was folded.
        """
        if site.left or not site.tokens:  # a weight that stays as it is would need the scale too
            return None
        norm = next((_NORMS[slot] for slot in site.weights if slot in _NORMS), None)
        scale = self._into_rows(site, search) if norm is None else self._into_norm(site, norm, search)
        if scale is not None:
            for slot in site.weights:
                self.weights[slot] = self.weights[slot] * scale
        return scale

    def _into_norm(self, site: Site, norm: str, search: Search) -> NDArray[np.float32] | None:
        slot, bias = f"{norm}.weight", f"{norm}.bias"
        if slot not in self.plain:
            return None
        old = np.asarray(self.plain[slot], np.float32)
        with np.errstate(over="ignore"):
            new = site.read_back(slot, old / search(None))
        usable = np.isfinite(new) & (new != 0) & (old != 0)
        new = np.where(usable, new, old)
        # the quotient of what is stored, not what was searched for: the norm's rounding costs nothing then
        scale: NDArray[np.float32] = np.divide(old, new, out=np.ones_like(old), where=usable)
        self.changed[slot] = new
        if bias in self.plain:
            self.changed[bias] = site.read_back(bias, np.asarray(self.plain[bias], np.float32) / scale)
        return scale

    def _into_rows(self, site: Site, search: Search) -> NDArray[np.float32] | None:
        source = self._source(site)
        if source is None:
            return None
        slot, first, tie = source
        scale = search(tie)
        rows = np.zeros(len(scale) if tie is None else int(tie.max()) + 1, np.float32)
        rows[np.arange(len(scale)) if tie is None else tie] = scale
        self._divide_rows(site, slot, first, rows)
        return scale

    def _divide_rows(self, site: Site, slot: str, first: int, scale: NDArray[np.float32]) -> None:
        weight, bias = self.weights[slot].copy(), slot.replace(".weight", ".bias")
        weight[first : first + len(scale)] /= scale[:, None]
        self.weights[slot] = weight
        if bias in self.plain:
            values = np.array(self.changed.get(bias, self.plain[bias]), np.float32)
            values[first : first + len(scale)] /= scale
            self.changed[bias] = site.read_back(bias, values)

    def _source(self, site: Site) -> tuple[str, int, NDArray[np.int64] | None] | None:
        """Gives the linear whose rows are the site's input, its first such row, and the ties between columns."""
        columns = next(iter(site.weights.values())).shape[1]
        if "attn_output.weight" in site.weights:
            return self._values(columns)
        if "ffn_down.weight" not in site.weights or "ffn_up.weight" not in self.weights:
            return None
        rows = len(self.weights["ffn_up.weight"])
        if rows == 2 * columns:  # gate and up are rows of one matrix, up's are the second half
            return "ffn_up.weight", columns, None
        gated = any("ffn_gate.weight" in (*other.weights, *other.left) for other in self.sites)
        return ("ffn_up.weight", 0, None) if gated and rows == columns else None  # an activation is not linear

    def _values(self, columns: int) -> tuple[str, int, NDArray[np.int64] | None] | None:
        if "attn_v.weight" in self.weights:
            slot, first = "attn_v.weight", 0
            rows = len(self.weights[slot])
        elif "attn_qkv.weight" in self.weights:
            slot = "attn_qkv.weight"
            rows = (len(self.weights[slot]) - columns) // 2
            first = columns + rows
        else:
            return None
        if rows == columns:
            return slot, first, None
        if self.head_dim is None or rows % self.head_dim or columns % rows:
            return None
        heads = np.arange(columns) // self.head_dim // (columns // rows)
        return slot, first, heads * self.head_dim + np.arange(columns) % self.head_dim
