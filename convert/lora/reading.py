"""Reads what headers do not show: values that are no numbers, factors that are zero, copies that differ, norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import DTYPES, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.edits import Changed, Edit, Twin, error_at
from quantpress.convert.lora.factors import to_float64
from quantpress.convert.lora.merged_tensor import MergedTensor
from quantpress.quant.float64 import from_float64
from quantpress.quant.floats import count_nonfinite

__all__ = ["Norms", "check_twin", "untrained"]

_PIECE = 1 << 20  # values that are compared at once
_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # no factor of what is added


def untrained(edits: Iterable[Edit]) -> str:
    """Reads the small tensors of an adapter.

    Args:
        edits: of one adapter.

    Returns:
        A note on what adds nothing because one of its factors is all zero; "" if there is nothing to say.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    zero: dict[str, bool] = {}
    idle, count = list[Edit](), 0
    for edit in edits:
        count += 1
        if edit.whole is not None:
            continue
        for tensor in edit.tensors:
            if tensor.name not in zero:
                zero[tensor.name] = _is_zero(tensor)
        factors = [tensor for tensor in edit.tensors if not tensor.name.endswith(_MAGNITUDE)]
        if edit.kind != "tokens" and any(zero[tensor.name] for tensor in factors):
            idle.append(edit)
    if not idle:
        return ""
    if len(idle) < count:
        return f"{len(idle)} of {count} changes add nothing: a factor is all zero, first for {idle[0].target}"
    if any(edit.kind == "dora" for edit in idle):
        return f"a factor of each of its {count} changes is all zero; only the magnitudes of DoRA can change anything"
    return f"the adapter changes nothing: a factor of each of its {count} changes is all zero"


def _is_zero(tensor: LazyTensor) -> bool:
    values = tensor.read()
    if bad := count_nonfinite(values):
        raise error_at(tensor, f"has {bad} of {tensor.size} values that are NaN or infinite; the training diverged")
    return not values.any()


def check_twin(twin: Twin) -> None:
    """Compares a tensor that a file holds twice.

    Raises:
        InputError: they differ.
    """
    tensor, used = twin.tensor, twin.used
    shape = tensor.shape[::-1] if twin.transposed else tensor.shape
    same = shape == used.shape
    # A copy may have been saved in another type: the values are compared in the narrower one.
    dtype = min(DTYPES[tensor.dtype], DTYPES[used.dtype], key=lambda one: one.itemsize)
    if same and twin.transposed:
        same = np.array_equal(
            from_float64(to_float64(tensor.read()).T, dtype), from_float64(to_float64(used.read()), dtype)
        )
    elif same:
        same = all(
            np.array_equal(from_float64(one, dtype), from_float64(other, dtype)) for one, other in _pieces(tensor, used)
        )
    if not same:
        raise error_at(tensor, f"differs from {shown(used.name, 200)}, which it must equal where embeddings are tied")


def _pieces(one: LazyTensor, other: LazyTensor) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Gives the rows of two tensors of one shape, some at a time."""
    step = max(1, _PIECE * one.rows // max(one.size, 1))
    for start in range(0, one.rows, step):
        stop = min(start + step, one.rows)
        yield to_float64(one.exact_rows(start, stop)), to_float64(other.exact_rows(start, stop))


class Norms:
    """Norms of what edits changed, relative to what was there before them."""

    def __init__(self, changed: Mapping[str, Changed], merged: Mapping[str, MergedTensor]) -> None:
        self._changed, self._merged = changed, merged
        self._known: dict[tuple[Edit, str], tuple[float, float] | None] = {}

    def of(self, edits: Iterable[tuple[Edit, str]]) -> float | None:
        """Gives the Frobenius norm of what edits changed of tensors over the norm of these tensors before.

        Args:
            edits: edits with the name of a tensor each.

        Returns:
            Infinite where the tensors were 0; None where one was replaced by another shape.
        """
        total_before = total_moved = 0.0
        for edit, name in edits:
            if (edit, name) not in self._known:
                self._known[edit, name] = self._squares(edit, self._changed[name], self._merged[name])
            if (found := self._known[edit, name]) is None:
                return None
            total_before, total_moved = total_before + found[0], total_moved + found[1]
        if total_before:
            return math.sqrt(total_moved / total_before)
        return math.inf if total_moved else 0.0

    def _squares(self, edit: Edit, state: Changed, merged: MergedTensor) -> tuple[float, float] | None:
        if edit.change is not None:
            before, moved = merged.squared_norms()[state.changes.index(edit)].tolist()
            return before, moved
        if state.source.shape != state.base.shape:
            return None
        before = moved = 0.0
        for base, whole in _pieces(state.base, state.source):
            before += float(np.sum(np.square(base)))
            moved += float(np.sum(np.square(whole - base)))
        return before, moved
