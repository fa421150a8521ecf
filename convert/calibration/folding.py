"""Takes scales on the inputs of linears back in the operation before them: a norm, or the rows of another linear.

Scaling the columns of a weight by s changes nothing if its input is divided by s, and where the input comes straight
out of a norm or of a linear, that division is a change of their values. AWQ and SmoothQuant live of it.

All that read a norm get one scale: q, k and v; gate and up, of all experts and of what every token goes to beside them;
in parallel layers with one norm all of these. So do the columns of routers, which are not quantized.
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


@dataclass
class Folding:
    """A layer while scales are folded into it, from its last site to its first.

    Attributes:
        sites: in the order of the computation.
        plain: slot -> float32 values of norms, biases and routers, in the decoder's form.
        head_dim: values per head; without it several query heads that share a value head cannot be scaled.
        weights: slot -> (N, K) float32 weight as it is to be quantized.
        changed: slot -> norms, biases and routers whose values changed, as they will be read back.
    """

    sites: Sequence[Site]
    plain: Mapping[str, Array]
    head_dim: int | None = None
    weights: dict[str, NDArray[np.float32]] = field(init=False)
    changed: dict[str, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Begins with the weights as they are."""
        self.weights = {slot: weight for site in self.sites for slot, weight in site.weights.items()}

    def groups(self) -> list[list[Site]]:
        """Gives the sites that must have the same scale, in the order of the computation."""
        found: dict[object, list[Site]] = {}
        for number, site in enumerate(self.sites):
            found.setdefault(site.before if f"{site.before}.weight" in self.plain else number, []).append(site)
        return list(found.values())

    def fold(self, group: Sequence[Site], search: Search) -> NDArray[np.float32] | None:
        """Scales the inputs of sites and folds the scale into what comes before them.

        The groups after it must be done: their scales change rows of this one's weights.

        Args:
            group: one of `groups`.
            search: gives the scale; only called if it can be folded.

        Returns:
            The scale that `weights` of the sites were multiplied by (norms round theirs), None if nothing was folded.
        """
        if any(site.left for site in group):  # a weight that stays as it is would need the scale too
            return None
        if not any(site.tokens for site in group) or not any(site.weights for site in group):
            return None
        if f"{group[0].before}.weight" in self.plain:
            scale: NDArray[np.float32] | None = self._into_norm(group, search)
        else:
            scale = self._into_rows(group[0], search)
        if scale is not None:
            for slot in (slot for site in group for slot in site.weights):
                self.weights[slot] = self.weights[slot] * scale
        return scale

    def _into_norm(self, group: Sequence[Site], search: Search) -> NDArray[np.float32]:
        slot, bias = f"{group[0].before}.weight", f"{group[0].before}.bias"
        read_back = group[0].read_back
        old = np.asarray(self.plain[slot], np.float32)
        with np.errstate(over="ignore"):
            new = read_back(slot, old / search(None))
        usable = np.isfinite(new) & (new != 0) & (old != 0)
        new = np.where(usable, new, old)
        # the quotient of what is stored, not what was searched for: the norm's rounding costs nothing then
        scale: NDArray[np.float32] = np.divide(old, new, out=np.ones_like(old), where=usable)
        self.changed[slot] = new
        if bias in self.plain:
            self.changed[bias] = read_back(bias, np.asarray(self.plain[bias], np.float32) / scale)
        for router in (router for site in group for router in site.routers):
            self.changed[router] = read_back(router, np.asarray(self.plain[router], np.float32) * scale)
        return scale

    def _into_rows(self, site: Site, search: Search) -> NDArray[np.float32] | None:
        source = self._source(site)
        if source is None:
            return None
        first, tie = source
        scale = search(tie)
        rows = np.zeros(len(scale) if tie is None else int(tie.max()) + 1, np.float32)
        rows[np.arange(len(scale)) if tie is None else tie] = scale
        self._divide_rows(site, f"{site.before}.weight", first, rows)
        return scale

    def _divide_rows(self, site: Site, slot: str, first: int, scale: NDArray[np.float32]) -> None:
        weight, bias = self.weights[slot].copy(), slot.replace(".weight", ".bias")
        weight[first : first + len(scale)] /= scale[:, None]
        self.weights[slot] = weight
        if bias in self.plain:
            values = np.array(self.changed.get(bias, self.plain[bias]), np.float32)
            values[first : first + len(scale)] /= scale
            self.changed[bias] = site.read_back(bias, values)

    def _source(self, site: Site) -> tuple[int, NDArray[np.int64] | None] | None:
        """Gives the row of the linear before a site that is its first input, and the ties between columns."""
        if f"{site.before}.weight" not in self.weights:
            return None
        columns, rows = next(iter(site.weights.values())).shape[1], len(self.weights[f"{site.before}.weight"])
        if not site.before.startswith("attn"):
            return rows - columns, None  # where gate and up are rows of one matrix, up's are the second half
        first = 0
        if site.before == "attn_qkv":  # q has as many rows as it has columns, and v as many as k
            rows = (rows - columns) // 2
            first = columns + rows
        if rows == columns:
            return first, None
        if self.head_dim is None or rows % self.head_dim or columns % rows:
            return None
        heads = np.arange(columns) // self.head_dim // (columns // rows)
        return first, heads * self.head_dim + np.arange(columns) % self.head_dim
