"""What adapters do to tensors of a base: single edits, and a tensor with everything that was done to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.changes import Change
from quantpress.convert.lora.merged_tensor import MergedTensor
from quantpress.quant.errors import InputError

__all__ = ["Changed", "Edit", "Twin", "error_at"]

_GROWN = "for a vocabulary that has grown and must be in the adapter whole (save_embedding_layers=True)"


def error_at(tensor: LazyTensor, text: str) -> InputError:
    """Makes an error that names a tensor of an adapter and its file."""
    return InputError(f"{tensor.source}: {shown(tensor.name, 200)} {text}")


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One thing that one adapter does to one tensor; equal only to itself.

    Attributes:
        target: name of the tensor in the checkpoint.
        kind: as `LedgerEntry.kind`.
        tensors: the adapter's tensors that it is made of.
        shape: what shape the target must have; () where only its number of rows counts.
        change: what is done to the target's values; None where they are replaced.
        whole: what replaces the target.
        copied: `whole` was not trained: PEFT saves a copy of the base's embeddings beside what it adapts.
        ids: numbers of the rows that are overwritten.
        shared: where the base's embedding and head are tied, it is done to both.
        rank, alpha, scale: what a delta was made with, the scale without the user's weight.
    """

    target: str
    kind: str
    tensors: tuple[LazyTensor, ...]
    shape: tuple[int, ...] = ()
    change: Change | None = None
    whole: LazyTensor | None = None
    copied: bool = False
    ids: tuple[int, ...] = ()
    shared: bool = False
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """A tensor that an adapter's file holds twice, once for each of two tied modules.

    Attributes:
        tensor: the one that is not used.
        used: the one that is, or the base's tensor that it is a copy of.
        transposed: it is the other's transpose.
        edit: what the used one is for.
    """

    tensor: LazyTensor
    used: LazyTensor
    transposed: bool
    edit: Edit


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor of the base and what one adapter after another did to it.

    Attributes:
        base: the tensor before any adapter.
        source: the values that changes are applied to: the base's or what replaced them.
        edits: everything that was done, in order.
    """

    base: LazyTensor
    source: LazyTensor
    edits: tuple[Edit, ...] = ()

    @property
    def changes(self) -> tuple[Edit, ...]:
        """Those edits that change `source`; the others replaced it."""
        return tuple(edit for edit in self.edits if edit.change is not None)

    def merged(self, *, compiled: bool = False) -> MergedTensor:
        """Gives the tensor after all edits, in the base's name and type; `compiled` as for `MergedTensor`."""
        changes = tuple(edit.change for edit in self.edits if edit.change is not None)
        return MergedTensor(self.base.name, self.source, changes, self.base.dtype, compiled=compiled)

    def with_edit(self, edit: Edit) -> Changed:
        """Gives the tensor after one more edit.

        Raises:
            InputError: the edit does not fit, or would undo what was done before it.
        """
        edits = (*self.edits, edit)
        if edit.whole is None:
            self._check_fit(edit)
            return replace(self, edits=edits)
        if edit.whole.shape[1:] != self.base.shape[1:] or len(edit.whole.shape) != len(self.base.shape):
            raise error_at(edit.whole, f"has shape {edit.whole.shape}, {self._described()}; it is for another model")
        if self.edits:
            raise error_at(
                edit.whole,
                f"replaces {shown(self.base.name, 200)}, which was changed before; what was done before would be lost",
            )
        return replace(self, edits=edits, source=edit.whole)

    def _check_fit(self, edit: Edit) -> None:
        tensor, rows = edit.tensors[0], self.source.rows
        if edit.shape and edit.shape != self.source.shape:
            grown = edit.shape[0] != rows and edit.shape[1:] == self.source.shape[1:]
            reason = "it is for another model" + (f", or {_GROWN}" if grown else "")
            raise error_at(tensor, f"is for a weight of shape {edit.shape}, {self._described()}; {reason}")
        if edit.ids and max(edit.ids) >= rows:
            raise error_at(
                tensor,
                f"is for token {max(edit.ids)}, {self._described()}; it is {_GROWN}",
            )
        for other in self.edits:
            if twice := sorted(set(edit.ids).intersection(other.ids)):
                raise error_at(tensor, f"is for token {twice[0]}, which another adapter before it replaces too")

    def _described(self) -> str:
        return f"{shown(self.base.name, 200)} of the base has {self.source.shape}"
