"""The account of an adapter: every tensor of it is consumed exactly once, and this says by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.lora.adapter import Adapter

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
        target: the tensor of the base that it changes.
        kind: "lora", "dora", "embedding", "bias", "adalora", "loha", "lokr", "expert", "tokens" or "whole".
        rank, alpha, scale: what its delta was made with, the scale without `weight`; None for what replaces values.
        delta_norm: Frobenius norm of the change of the target over the norm of the target before it.
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
        """Gives plain values for the sidecar and for `--json`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Adapted:
    """What `merge_lora` did to a checkpoint.

    Attributes:
        base: the checkpoint before any adapter.
        applied: the adapters, in the order they are applied.
        notes: what a user must read: modules that were not trained, tied weights that were separated, and the like.
    """

    base: Checkpoint
    applied: tuple[Applied, ...]
    notes: tuple[str, ...] = ()
    changed: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check(self) -> tuple[str, ...]:
        """Reads the adapters' small tensors and looks for what headers do not show.

        Returns:
            Notes, e.g. that an adapter changes nothing because no `lora_B` was ever trained.

        Raises:
            InputError: NaN or infinity in an adapter; names file, tensor and count.
        """
        raise NotImplementedError

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Gives the account, one entry per tensor of each adapter; reads what nobody has read yet for the norms."""
        raise NotImplementedError
