"""Runs a base with adapters beside it, as they were trained: the yardstick by which a merge is judged.

Nothing here is shared with the merge but the reader of the adapter's file: modules are found by the family's table,
scales are computed here, and activations.py adds to outputs what the merge adds to weights. What an adapter replaces
(modules_to_save, trained biases and tokens) stands in the place of the base's tensors.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from quantpress.convert.arch.fused_rows import FUSED
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.activations import Branch, Factors, Lookup, LowRank
from quantpress.convert.lora.adapter import AdapterModule
from quantpress.convert.lora.ledger import Applied
from quantpress.convert.lora.targets import BaseNames
from quantpress.convert.lora.trained import Trained, values_of
from quantpress.convert.lora.unmerged_parameters import is_parameter, parameter_changes, parameter_rows
from quantpress.convert.pieces import piece_row
from quantpress.convert.preflight import check_tied_head, preflight
from quantpress.convert.weights import CheckpointWeights, canonical
from quantpress.quant.errors import InputError
from quantpress.quant.floats import to_float32

__all__ = ["Unmerged", "unmerged"]

log = logging.getLogger(__name__)

Place = tuple[str, int]
"""A slot of the decoder (`attn_q.weight`) and its layer, -1 outside layers."""

_TOKENS = "trainable_tokens_delta"
_AROUND = frozenset({"model", "language_model", "text_model", "transformer", "base_model", "gpt_neox"})
_HEAD, _EMBEDDING = ("output.weight", -1), ("token_embd.weight", -1)


@dataclass
class Beside:
    """The adapters' branches by place; what `layer.Adapt` asks for."""

    branches: dict[Place, list[Branch]] = field(default_factory=dict)
    lookups: dict[str, list[Lookup]] = field(default_factory=dict)

    def linear(
        self,
        place: Place,
        values: torch.Tensor,
        result: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Adds what the adapters compute at a linear; see `layer.Adapt`."""
        for branch in self.branches.get(place, ()):
            result = branch.run(values, result, weight, bias)
        return result

    def rows(self, slot: str, index: torch.Tensor, result: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds what the adapters compute at an embedding; see `layer.Adapt`."""
        for lookup in self.lookups.get(slot, ()):
            result = lookup.look_up(index, result, weight)
        return result


@dataclass(frozen=True)
class Unmerged:
    """A base with its adapters, ready for `Decoder`.

    Attributes:
        spec: the family.
        hyper: sizes, after what the adapters replace.
        weight: the base's weights with what the adapters replace.
        adapt: what the adapters add.
        parameters: values of all tensors.
    """

    spec: ArchSpec
    hyper: Hyperparameters
    weight: CheckpointWeights
    adapt: Beside
    parameters: int


def unmerged(base: Checkpoint, applied: Sequence[Applied]) -> Unmerged:
    """Puts adapters beside a base; reads headers only.

    Args:
        base: the model without adapters.
        applied: adapters and weights, in the order in which they act.

    Raises:
        InputError: the base is of no known family or does not fit it, an adapter does not fit the base, or is of a kind
            that the decoder cannot run.
    """
    checked = preflight(base)
    check_tied_head(checked)
    builder = _Builder(base, checked.spec, checked.hyper)
    for one in applied:
        builder.add(one)
    return builder.finish()


class _Builder:
    """Collects what adapters replace and add."""

    def __init__(self, base: Checkpoint, spec: ArchSpec, hyper: Hyperparameters) -> None:
        self.base, self.spec, self.hyper = base, spec, hyper
        self.beside = Beside()
        self.whole: dict[Place, LazyTensor] = {}
        self.tied = hyper.tied and any(row.tied_to for row in spec.tensors)
        self.rows_by_place = {(row.slot, layer): row for row, layer in spec.rows(hyper)}
        self.rows_by_name: dict[str, list[tuple[TensorSpec, int]]] = {}  # several are parts of one tensor
        for row, layer in spec.rows(hyper):
            for form in (row, *spec.others(row)):
                names = set(spec.names(form, layer))
                if row.role is Role.HEAD:
                    names |= {name.replace("embed_out", "lm_head") for name in names}  # GPT-NeoX's two names
                for name in names:
                    held = self.rows_by_name.setdefault(name, [])
                    if all(other.slot != row.slot for other, _ in held):
                        held.append((form, layer))

    def add(self, applied: Applied) -> None:
        """Takes an adapter in."""
        adapter, one = applied.adapter, Trained(applied, self.tied)
        names = BaseNames(self.base)
        parameters = [module for module in adapter.modules if is_parameter(applied, names, module)]
        for edit in parameter_changes(applied, names, parameters):
            for place, added in parameter_rows(edit, self.rows_by_name[edit.target], self.hyper):
                self.beside.branches.setdefault(place, []).append(added)
        for module in (module for module in adapter.modules if module not in parameters):
            if self.spec.foreign and module.path.startswith(self.spec.foreign):
                log.warning("%s: %s is not part of the language model and is not judged", adapter.name, module.path)
            elif module.depth:
                raise InputError(f"{adapter.name}: {shown(module.path)} is adapted twice over (base_layer)")
            else:
                self._add_module(one, module)

    def _add_module(self, one: Trained, module: AdapterModule) -> None:
        parts = dict(module.parts)
        for name in [part for part in parts if not part.startswith(("lora_", "hada_", "lokr_", _TOKENS))]:
            self._replace(one, f"{module.path}.{name}", parts.pop(name))
        if _TOKENS in parts:
            self._replace_tokens(one, module.path, parts.pop(_TOKENS))
        if not parts:
            return
        for row, layer in self._rows(one, f"{module.path}.weight"):
            self._add_beside(one, module, parts, row, layer)

    def _add_beside(
        self, one: Trained, module: AdapterModule, parts: Mapping[str, LazyTensor], row: TensorSpec, layer: int
    ) -> None:
        if "lora_embedding_A" in parts:
            if row.role not in (Role.EMBEDDING, Role.POSITION):
                raise InputError(f"{one.name}: {shown(module.path)} is no embedding, but has lora_embedding_A")
            lookup = one.lookup(module.path, parts, self._size(row))
            self.beside.lookups.setdefault(row.slot, []).append(lookup)
            if one.tying and row.role is Role.EMBEDDING and "lora_magnitude_vector" not in parts:
                self._follow(parts, lookup.scale)
        elif row.role not in (Role.LINEAR, Role.HEAD, Role.ROUTER):
            raise InputError(f"{one.name}: {shown(module.path)} is no linear, which the decoder cannot run")
        else:
            if one.tying and row.slot == _HEAD[0]:
                return  # repeats the embedding's, which the head follows
            branch = one.branch(module.path, parts, self._size(row), self._order(row))
            self.beside.branches.setdefault((row.slot, layer), []).append(branch)

    def _follow(self, parts: Mapping[str, LazyTensor], scale: float) -> None:
        """Gives a tied head the embedding's adapter (tuners/lora/model.py, `tied_adapter`)."""
        read = {
            "lora_A": lambda: values_of(parts["lora_embedding_B"]).T.contiguous(),
            "lora_B": lambda: values_of(parts["lora_embedding_A"]).T.contiguous(),
        }
        self.beside.branches.setdefault(_HEAD, []).append(LowRank(Factors(read), scale))

    def _replace(self, one: Trained, name: str, tensor: LazyTensor) -> None:
        row, layer = self._rows(one, name)[0]
        places = [(row.slot, layer)]
        if one.tying and places[0] in (_EMBEDDING, _HEAD):
            places = [_EMBEDDING, _HEAD]
        for place in places:
            if place in self.whole and not _same(self.whole[place], tensor):
                raise InputError(f"{one.name}: {shown(name)} is replaced by an earlier adapter already")
            self.whole[place] = tensor

    def _replace_tokens(self, one: Trained, path: str, delta: LazyTensor) -> None:
        row, layer = self._rows(one, f"{path}.weight")[0]
        ids = one.token_ids(path)
        one.wants(delta, (len(ids), self.hyper.hidden))
        place = (row.slot, layer)
        places = [place, _HEAD] if place == _EMBEDDING and self.tied and one.tokens_are_tied() else [place]
        for changed in places:
            self.whole[changed] = _with_rows(self._now(changed), ids, delta)

    def _now(self, place: Place) -> LazyTensor:
        """Gives the tensor of a place as it is so far; that of a tied head is the embedding's."""
        if place in self.whole:
            return self.whole[place]
        row = self.rows_by_place[_EMBEDDING if place == _HEAD and self.tied else place]
        names = self.spec.names(row, place[1])
        return self.base.tensor(next((name for name in names if name in self.base.tensors), names[0]))

    def _rows(self, one: Trained, name: str) -> list[tuple[TensorSpec, int]]:
        inner = name
        while inner not in self.rows_by_name and (parts := inner.partition("."))[0] in _AROUND:
            inner = parts[2]  # trained inside a larger model, or inside another class of the same one
        if inner not in self.rows_by_name:
            raise InputError(f"{one.name}: the base has no tensor {shown(name)}")
        return self.rows_by_name[inner]

    def _size(self, row: TensorSpec) -> tuple[int, int]:
        """Gives (N, K) of a linear, (V, H) of an embedding."""
        first, second = (self.hyper.dims[dim] for dim in row.shape)
        return (second, first) if row.layout is Layout.TRANSPOSED else (first, second)

    def _order(self, row: TensorSpec) -> torch.Tensor | None:
        if row.part:
            piece, order = piece_row(row, self.hyper)
            count = self.hyper.dims[piece.shape[0]]
            return torch.from_numpy(order.read(lambda start, stop: np.arange(start, stop), 0, count))
        if row.layout not in FUSED:
            return None
        return canonical(torch.arange(self.hyper.dims[row.shape[0]]), row, self.hyper)

    def finish(self) -> Unmerged:
        """Gives the base with all that was collected."""
        hyper, tensors = self.hyper, dict(self.base.tensors)
        if self.tied and self.whole.get(_HEAD) is not self.whole.get(_EMBEDDING):
            hyper = dataclasses.replace(hyper, tied=False)
            self.whole[_HEAD] = self._now(_HEAD)
        if _EMBEDDING in self.whole:
            hyper = dataclasses.replace(hyper, vocab=self.whole[_EMBEDDING].rows)
        for (slot, layer), tensor in self.whole.items():
            row = self.rows_by_place[slot, layer]
            for name in self.spec.names(row, layer):
                tensors.pop(name, None)
            tensors[self.spec.names(row, layer)[0]] = tensor
        view = dataclasses.replace(self.base, tensors=tensors)
        return Unmerged(self.spec, hyper, CheckpointWeights(view, self.spec, hyper), self.beside, view.parameters)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same values: PEFT saves a base's embedding with every adapter that acts on it."""
    return one.shape == other.shape and bool(torch.equal(values_of(one), values_of(other)))


def _with_rows(tensor: LazyTensor, ids: Sequence[int], values: LazyTensor) -> LazyTensor:
    """Gives a tensor some of whose rows are others (tuners/trainable_tokens/layer.py get_merged_weights)."""

    def read(start: int, stop: int) -> Array:
        rows = to_float32(tensor.read_rows(start, stop)).copy()
        given = to_float32(values.read())
        for number, token in enumerate(ids):
            if start <= token < stop:
                rows[token - start] = given[number]
        return np.ascontiguousarray(rows)

    return LazyTensor(tensor.name, tensor.shape, "F32", values.source, read)
