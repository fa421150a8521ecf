"""The account of an adapter: every tensor of it is consumed exactly once, and this says by what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.lora.adapter import Adapter
from quantpress.convert.lora.edits import Changed, Edit, Twin
from quantpress.convert.lora.merged_tensor import MergedTensor
from quantpress.convert.lora.reading import Norms, check_twin, untrained

__all__ = ["Adapted", "Applied", "LedgerEntry"]


@dataclass(frozen=True, slots=True)
class Applied:
    """An adapter with the weight that the user gave it."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What became of one tensor of an adapter.

    Attributes:
        adapter: name of the adapter.
        weight: the user's factor.
        name: the tensor's name in the adapter's file.
        shape: its shape.
        dtype: its type, as safetensors names it.
        target: the tensor of the base that it changes; where a fused tensor is apart in the base, the first and how
            many more.
        kind: "lora", "dora", "embedding", "bias", "adalora", "loha", "lokr", "expert", "tokens" or "whole".
        rank, alpha, scale: what its delta was made with, the scale without `weight`; None for what replaces values.
        delta_norm: Frobenius norm of the change of the target over the norm of the target before it; None where a
            replaced tensor has another shape.
    """

    adapter: str
    weight: float
    name: str
    shape: tuple[int, ...]
    dtype: str
    target: str
    kind: str
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    delta_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Gives plain values for the sidecar and for `--json`; a norm that is not finite becomes None."""
        values = dataclasses.asdict(self)
        finite = self.delta_norm is None or math.isfinite(self.delta_norm)
        return {**values, "shape": list(self.shape), "delta_norm": self.delta_norm if finite else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LedgerEntry:
        """Gives what `to_json` was made of, but for a norm that was not finite."""
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class Adapted:
    """What `merge_lora` did to a checkpoint.

    Attributes:
        base: the checkpoint before any adapter.
        applied: the adapters, in the order they are applied.
        notes: what a user must read: modules that were not trained, tied weights that were separated, and the like.
        changed: name in the merged checkpoint -> what was done to the tensor.
        merged: the same tensors as they are after all adapters; they record norms while they are read.
        edits: of each adapter, with the names of the tensors that each edit was done to.
        twins: of each adapter, tensors that its file holds twice.
    """

    base: Checkpoint
    applied: tuple[Applied, ...]
    notes: tuple[str, ...] = ()
    changed: Mapping[str, Changed] = field(default_factory=dict, repr=False)
    merged: Mapping[str, MergedTensor] = field(default_factory=dict, repr=False)
    edits: tuple[tuple[tuple[Edit, tuple[str, ...]], ...], ...] = field(default=(), repr=False)
    twins: tuple[tuple[Twin, ...], ...] = field(default=(), repr=False)

    def check(self) -> tuple[str, ...]:
        """Reads the adapters' small tensors and looks for what headers do not show.

        Returns:
            Notes, e.g. that an adapter changes nothing because no `lora_B` was ever trained.

        Raises:
            InputError: NaN or infinity in an adapter; names file, tensor and count. Or the two copies of a tensor that
                the file holds for both of tied embeddings differ.
        """
        notes: list[str] = []
        for applied, edits, twins in zip(self.applied, self.edits, self.twins, strict=True):
            for twin in twins:
                check_twin(twin)
            if note := untrained(edit for edit, _ in edits):
                notes.append(f"{applied.adapter.name}: {note}")
        return tuple(notes)

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Gives the account, one entry per tensor of each adapter; reads what nobody has read yet for the norms."""
        norms = Norms(self.changed, self.merged)
        return tuple(entry for number in range(len(self.applied)) for entry in self._entries(number, norms))

    def _entries(self, number: int, norms: Norms) -> Iterator[LedgerEntry]:
        uses: dict[str, list[tuple[Edit, str]]] = {}
        targets = dict(self.edits[number])
        pairs = [(tensor, edit) for edit in targets for tensor in edit.tensors]
        pairs += [(twin.tensor, twin.edit) for twin in self.twins[number] if twin.tensor not in twin.edit.tensors]
        for tensor, edit in pairs:
            # of tied embeddings that stay tied only one is there
            names = [name for name in targets[edit] if name in self.changed]
            uses.setdefault(tensor.name, []).extend((edit, name) for name in names)
        applied = self.applied[number]
        for tensor in applied.adapter.tensors:
            yield _entry(applied, tensor, uses[tensor.name], norms)


def _entry(applied: Applied, tensor: LazyTensor, uses: list[tuple[Edit, str]], norms: Norms) -> LedgerEntry:
    edit, target = uses[0]
    return LedgerEntry(
        adapter=applied.adapter.name,
        weight=applied.weight,
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        target=target if len(uses) == 1 else f"{target} and {len(uses) - 1} more",
        kind=edit.kind,
        rank=edit.rank,
        alpha=edit.alpha,
        scale=edit.scale,
        delta_norm=norms.of(uses),
    )
