"""Scales that a method has folded from one tensor of a GGUF file into another: a change at both ends is no damage.

AWQ and SmoothQuant multiply the columns of weights and divide the norm, or the rows of the weight, before them. Such a
change is believed only where the tensors at both ends fit the source once it is taken back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.preflight import Preflight
from quantpress.convert.traits import Place, places_of, traits_of
from quantpress.convert.weights import CheckpointWeights
from quantpress.pipelines.gguf_proof_measures import ERRORS, Limits, differing_floats, measure
from quantpress.pipelines.gguf_readback import ReadBack

__all__ = ["Folds"]

Array = NDArray[Any]
Key = tuple[str, int]
_GREATEST = 64.0  # scale that a method folds
_ROUNDED = 2.0**-7  # relative: a bias may have been rounded to bfloat16 once more


@dataclass
class Folds:
    """A source and a file between whose tensors scales are looked for.

    Attributes:
        weights: of the source.
        read: the file.
        checked: the source's table.
        wrong: names of tensors that do not fit as they are.
    """

    weights: CheckpointWeights
    read: ReadBack
    checked: Preflight
    wrong: Collection[str]

    def excused(self) -> set[str]:
        """Gives the names of the tensors that fit once scales are taken back."""
        found, columns = set[str](), dict[Key, Array]()
        if self.checked.spec.kind == "encoder_decoder":  # no method scales these
            return found
        places = list(self._places())
        for layer, norm in dict.fromkeys((layer, place.before) for layer, place in places):
            if norm.endswith("norm") and self._is_wrong(f"{norm}.weight", layer):
                behind = [(slot, layer) for at, place in places if (at, place.before) == (layer, norm)
                          for slot in place.slots if self._has(slot, layer)]  # fmt: skip
                found |= self._norm(f"{norm}.weight", layer, behind, columns)
        if not found:
            return found
        for layer, place in places:
            if place.before and not place.before.endswith("norm"):
                found |= self._rows((f"{place.before}.weight", layer), (place.slots[0], layer), columns)
        return found

    def _places(self) -> Iterator[tuple[int, Place]]:
        for layer in range(self.checked.hyper.layers):
            for place in places_of(traits_of(self.checked.spec, self.checked.hyper, layer)):
                yield layer, place

    def _norm(self, norm: str, layer: int, behind: list[Key], columns: dict[Key, Array]) -> set[str]:
        """Takes back the scale of a norm; the names that it explains, none where the weights behind do not fit."""
        old, new = self._pair((norm, layer))
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = old / new
        if not behind or not _usable(scale) or not all(self._fits_by_rows(key, scale) for key in behind):
            return set()
        columns |= dict.fromkeys(behind, scale)
        names = {self.read.name_of(norm, layer)}
        names |= {self.read.name_of(*key) for key in behind if self._fits(key, scale)}
        bias = norm.replace(".weight", ".bias")
        if self._has(bias, layer):
            before, after = self._pair((bias, layer))
            if np.allclose(after * scale, before, rtol=_ROUNDED, atol=_ROUNDED * float(np.abs(before).mean())):
                names.add(self.read.name_of(bias, layer))
        return names

    def _rows(self, before: Key, after: Key, columns: Mapping[Key, Array]) -> set[str]:
        """Takes back what the rows of a weight and the columns of the next were scaled by."""
        if not (self._has(*before) and self._has(*after)):
            return set()
        if not (self._is_wrong(*before) or self._is_wrong(*after)):
            return set()
        old, new = self._pair(before)
        old = old * columns.get(before, np.float32(1))
        place = self._place(after, len(old))
        if place is None:
            return set()
        scale = _row_factors(old, new, np.unique(place))
        if not _usable(scale) or not self._fits(before, columns.get(before), scale):
            return set()
        if not self._fits(after, 1 / scale[place]):
            return set()
        bias = before[0].replace(".weight", ".bias"), before[1]
        names = {self.read.name_of(*before), self.read.name_of(*after)}
        return names | ({self.read.name_of(*bias)} if self._has(*bias) and self._bias_fits(bias, scale) else set())

    def _fits_by_rows(self, key: Key, columns: Array) -> bool:
        """Whether a tensor is its source's but for factors on the rows that the weight behind it may take back."""
        if self._fits(key, columns):
            return True
        slot, layer = key
        after = next((each for at, each in self._places() if at == layer and f"{each.before}.weight" == slot), None)
        if after is None or not self._has(after.slots[0], layer):
            return False
        wanted, found = self._pair(key)
        place = self._place((after.slots[0], layer), len(wanted))
        return place is not None and self._fits(key, columns, _row_factors(wanted * columns, found, np.unique(place)))

    def _bias_fits(self, bias: Key, scale: Array) -> bool:
        old, new = self._pair(bias)
        return bool(np.allclose(new, old * scale, rtol=_ROUNDED * 8, atol=_ROUNDED * float(np.abs(old).mean())))

    def _place(self, after: Key, rows: int) -> Array | None:
        """Gives the row of the first weight for each column of the second."""
        hyper, columns = self.checked.hyper, self._pair(after)[0].shape[1]
        if not after[0].startswith("attn_"):
            return rows - columns + np.arange(columns) if rows in (columns, 2 * columns) else None
        kept = hyper.kv_heads * hyper.head_dim
        if hyper.latent is not None or columns != hyper.heads * hyper.head_dim or rows < kept:
            return None
        heads = np.arange(columns) // hyper.head_dim // (hyper.heads // hyper.kv_heads)
        return rows - kept + heads * hyper.head_dim + np.arange(columns) % hyper.head_dim

    def _fits(self, key: Key, columns: Array | None = None, rows: Array | None = None) -> bool:
        """Whether a tensor is its source's once columns and rows are scaled."""
        wanted, found = self._pair(key)
        wanted = wanted if columns is None else wanted * columns.astype(np.float32)
        wanted = wanted if rows is None else wanted * rows[:, None].astype(np.float32)
        kind = self.read.types[self.read.name_of(*key)]
        if kind in ERRORS:
            return measure(wanted, found, kind).problem(Limits.of(kind, plain=False)) is None
        return differing_floats(wanted, found, kind, merged=True) is None

    def _pair(self, key: Key) -> tuple[Array, Array]:
        wanted, found = self.weights(*key), self.read.weight(*key)
        assert wanted is not None, "it was compared before"
        assert found is not None, "it was compared before"
        return wanted.float().numpy(), found.float().numpy().reshape(tuple(wanted.shape))

    def _has(self, slot: str, layer: int) -> bool:
        return self.read.name_of(slot, layer) in self.read.types and self.weights(slot, layer) is not None

    def _is_wrong(self, slot: str, layer: int) -> bool:
        return self.read.name_of(slot, layer) in self.wrong


def _row_factors(wanted: Array, found: Array, used: Array) -> Array:
    """Gives what each of some rows seems to have been multiplied by, 1 for the others."""
    one, other = wanted[used], found[used]
    size = np.einsum("nk,nk->n", one, one)
    factors = np.ones(len(wanted), np.float32)
    factors[used] = np.divide(np.einsum("nk,nk->n", one, other), size, out=np.ones_like(size), where=size > 0)
    return factors


def _usable(scale: Array) -> bool:
    return bool(np.isfinite(scale).all() and (scale > 1 / _GREATEST).all() and (scale < _GREATEST).all())
