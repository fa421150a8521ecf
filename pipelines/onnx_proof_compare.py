"""Weights of a file beside its source's, by slot: limits, and scales that a method has folded into others.

AWQ and SmoothQuant scale the columns of a weight and divide the norm, or the rows of the weight, before it. Such a
change is no damage if both ends have it; it is looked for where a norm differs, or a weight and the one before it do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Layout, Role
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.preflight import Preflight
from quantpress.convert.traits import traits_of
from quantpress.convert.weights import CheckpointWeights
from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.onnx_proof_measures import (
    LOOSE,
    Array,
    Figures,
    ReadRows,
    judge_codes,
    judge_floats,
    judge_loose,
    measure,
)
from quantpress.pipelines.onnx_proof_read import HeldWeight

__all__ = ["Comparison", "Key"]

Key = tuple[str, int]
"""Slot and layer of a weight, as the decoder asks for it."""

_FEWEST_NEAREST = 0.6  # of the layers' matrices without a single code off, for all to be wanted so
_GREATEST_SCALE = 64.0  # that a method folds into rows
_LATENT_NORMS = {  # beginnings of slots -> the norm before them
    "attn_q_b": "attn_q_a_norm.weight", "attn_kv_b": "attn_kv_a_norm.weight", "attn_k_b": "attn_kv_a_norm.weight",
    "attn_v_b": "attn_kv_a_norm.weight",
}  # fmt: skip
_BEHIND_ROWS = ("attn_output", "ffn_down")
_BETTER = 0.9  # of squared errors of a weight that did not fit before
_NO_WORSE = 1.01  # that squared errors of either weight may be with factors that come from codes


@dataclass
class Comparison:
    """A source, and what its weights are called.

    Attributes:
        source: the model.
        checked: the same, bound to its family.
        spec: its table; by default the one of `checked`.
    """

    source: Checkpoint
    checked: Preflight
    spec: ArchSpec | None = None
    names: dict[Key, str] = field(init=False)
    roles: dict[str, Role] = field(init=False)

    def __post_init__(self) -> None:
        """Sorts the table; reads nothing."""
        self._read = CheckpointWeights(self.source, self.spec or self.checked.spec, self.checked.hyper)
        self.names = {(row.slot, layer): tensor.name for row, layer, tensor in self.checked.bindings}
        # a norm multiplies with its values and what is added to them, also where files are compared without that
        self._offsets = {row.slot: row.offset if self.spec else 0.0 for row, _, _ in self.checked.bindings}
        self.roles = {row.slot: row.role for row, _, _ in self.checked.bindings}
        self._shapes = {
            (row.slot, layer): tensor.shape[::-1] if row.layout is Layout.TRANSPOSED else tensor.shape
            for row, layer, tensor in self.checked.bindings
        }

    def compare(self, pairs: Mapping[Key, HeldWeight]) -> list[Finding]:
        """Measures everything; what does not fit is looked at once more for scales that were folded."""
        wrong = [key for key, held in pairs.items() if (shape := self._shape(key)) != held.shape and shape is not None]
        findings = [
            Finding("weights", pairs[key].name, f"shape {pairs[key].shape}", f"shape {self._shape(key)}")
            for key in wrong
        ]
        usable = {key: held for key, held in pairs.items() if key not in wrong}
        folds = self._norm_folds(usable)
        columns = {key: fold for key in usable if (fold := self._fold_of(key, usable[key], folds)) is not None}
        figures = {key: self._measure(key, held, columns.get(key)) for key, held in usable.items()}
        layers = [each for key, each in figures.items() if each.bits and key[1] >= 0 and "_exps." not in key[0]]
        nearest = sum(each.nearest for each in layers) >= _FEWEST_NEAREST * len(layers)
        found = {
            key: self._judge(key, each, nearest=nearest and "_exps." not in key[0]) for key, each in figures.items()
        }
        self._excuse_rows(usable, columns, figures, found)
        self._excuse_norms(usable, folds, columns, found)
        return findings + [each for key in found for each in found[key]]

    def _judge(self, key: Key, figures: Figures, *, nearest: bool) -> list[Finding]:
        if figures.dtype in LOOSE:
            return judge_loose(figures)
        if not figures.bits:
            return judge_floats(figures)
        return judge_codes(figures, nearest=nearest, kept=self.names.get(key) in self.source.quantized)

    def _rows(self, key: Key) -> ReadRows:
        tensor = self._read(*key)
        assert tensor is not None, "the source has it"
        return lambda start, stop: tensor[start:stop].float().numpy()

    def _shape(self, key: Key) -> tuple[int, ...] | None:
        return self._shapes.get(key)

    def _measure(self, key: Key, held: HeldWeight, columns: Array | None = None, rows: Array | None = None) -> Figures:
        return measure(held, self._rows(key), columns=columns, rows=rows, name=held.name)

    def _norm_folds(self, pairs: Mapping[Key, HeldWeight]) -> dict[Key, Array]:
        """Gives what the columns behind a norm have been multiplied by, for norms that differ from the source's."""
        found: dict[Key, Array] = {}
        for key, held in pairs.items():
            if self.roles.get(key[0]) is not Role.NORM or len(held.shape) != 1 or not key[0].endswith(".weight"):
                continue
            if key[1] < 0 or not judge_floats(self._measure(key, held)):
                continue
            old, new = self._rows(key)(0, held.shape[0]), held.read(0, held.shape[0]).numbers.reshape(-1)
            old, new = (each.reshape(-1) + np.float32(self._offsets[key[0]]) for each in (old, new))
            if np.isfinite(new).all() and new.all() and old.all():
                found[key] = (old / new).astype(np.float32)
        return found

    def _fold_of(self, key: Key, held: HeldWeight, folds: Mapping[Key, Array]) -> Array | None:
        slot, layer = key
        if self.roles.get(slot) not in (Role.LINEAR, Role.ROUTER) or slot.startswith(_BEHIND_ROWS):
            return None
        if self.checked.spec.kind == "encoder_decoder":  # no method scales these
            return None
        traits = traits_of(self.checked.spec, self.checked.hyper, layer)
        before = {**_LATENT_NORMS, "attn_": f"{traits.attention_norm}.weight", "ffn_": f"{traits.mlp_norm}.weight"}
        for begins, norm in before.items():
            fold = folds.get((norm, layer))
            if slot.startswith(begins):
                return fold if fold is not None and held.shape[-1] == len(fold) else None
        return None

    def _excuse_norms(
        self, pairs: Mapping[Key, HeldWeight], folds: Mapping[Key, Array], columns: Mapping[Key, Array],
        found: dict[Key, list[Finding]],
    ) -> None:  # fmt: skip
        """A norm whose change the weights behind it make up for is right; else these are judged without it."""
        for norm, fold in folds.items():
            behind = [key for key, each in columns.items() if each is fold]
            if behind and not all(found[key] for key in behind):
                found[norm] = []
                bias = norm[0].replace(".weight", ".bias"), norm[1]
                if found.get(bias):
                    found[bias] = judge_floats(self._measure(bias, pairs[bias], None, 1 / fold))
                continue
            for key in behind:
                found[key] = self._judge(key, self._measure(key, pairs[key]), nearest=False)

    def _excuse_rows(
        self, pairs: Mapping[Key, HeldWeight], columns: Mapping[Key, Array], figures: Mapping[Key, Figures],
        found: dict[Key, list[Finding]],
    ) -> None:  # fmt: skip
        """Two weights of which the second makes up for the rows of the first are right, by the row's own factors."""
        for after in [key for key in found if key[0].startswith(_BEHIND_ROWS) and key[0].endswith(".weight")]:
            before = self._before(after, pairs) if len(pairs[after].shape) == 2 else None  # BERT's norms are called so
            if before is None or not figures[before].bits:
                continue
            bias = before[0].replace(".weight", ".bias"), before[1]
            place = self._place(before, after, pairs)
            if place is None or not (found[before] or found[after] or found.get(bias)):
                continue
            scale = self._row_scale(figures[before], np.unique(place), pairs.get(bias), bias)
            if scale is None:
                continue
            first = self._measure(before, pairs[before], columns.get(before), scale)
            second = self._measure(after, pairs[after], 1 / scale[place])
            judged = [self._judge(key, each, nearest=False) for key, each in ((before, first), (after, second))]
            pair = ((before, first), (after, second))
            limits = {key: _BETTER if found[key] else _NO_WORSE for key, _ in pair}
            if any(judged) or any(new.square.mean() > limits[key] * figures[key].square.mean() for key, new in pair):
                continue
            found[after] = found[before] = []
            if found.get(bias):
                found[bias] = judge_floats(self._measure(bias, pairs[bias], None, scale))

    def _row_scale(self, figures: Figures, used: Array, bias: HeldWeight | None, key: Key) -> Array | None:
        """Gives what rows were multiplied by: exactly where there is a bias, else as the codes say."""
        factors = figures.row_factors
        if bias is not None:
            old, new = self._rows(key)(0, bias.shape[0]), bias.read(0, bias.shape[0]).numbers.reshape(-1)
            factors = np.where(old != 0, np.divide(new, old, out=np.ones_like(new), where=old != 0), factors)
        scale = np.ones(len(factors), np.float32)
        with np.errstate(over="ignore"):  # not usable then
            scale[used] = factors[used]
        usable = (scale > 1 / _GREATEST_SCALE) & (scale < _GREATEST_SCALE)
        return scale if usable.all() else None

    def _before(self, after: Key, pairs: Mapping[Key, HeldWeight]) -> Key | None:
        slot, layer = after
        names = (
            ["attn_v.weight", "attn_qkv.weight", "attn_v_b.weight"]
            if slot.startswith("attn_")
            else [slot.replace("_down", "_up")]
        )
        return next(((name, layer) for name in names if (name, layer) in pairs), None)

    def _place(self, before: Key, after: Key, pairs: Mapping[Key, HeldWeight]) -> Array | None:
        """Gives the row of the first weight for each column of the second."""
        hyper, rows, columns = self.checked.hyper, pairs[before].shape[0], pairs[after].shape[1]
        if not after[0].startswith("attn_"):
            return rows - columns + np.arange(columns) if rows in (columns, 2 * columns) else None
        if rows == columns:
            return np.arange(columns)
        kept = hyper.kv_heads * hyper.head_dim
        if hyper.latent is not None or columns != hyper.heads * hyper.head_dim or rows < kept:
            return None
        heads = np.arange(columns) // hyper.head_dim // (hyper.heads // hyper.kv_heads)
        return rows - kept + heads * hyper.head_dim + np.arange(columns) % hyper.head_dim
