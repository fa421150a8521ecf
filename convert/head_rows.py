"""Tensors that a checkpoint stores head by head and everybody else in one: StableLM 2 12B's norms of q and k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, TensorSpec
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.pieces import find_stored, stacked
from quantpress.quant.errors import InputError

__all__ = ["find_tensor", "heads_apart"]


def find_tensor(
    spec: ArchSpec, row: TensorSpec, layer: int, hyper: Hyperparameters, tensors: Mapping[str, LazyTensor]
) -> tuple[TensorSpec, LazyTensor | None, list[str]]:
    """Finds what a checkpoint has for a row; tensors of all heads as one, (heads, ...), under the name of the first.

    Args:
        spec: the family.
        row: of its table.
        layer: its layer.
        hyper: the sizes.
        tensors: of the checkpoint.

    Returns:
        The row, or the one that the checkpoint has in its place (see `find_stored`); the tensor, None where it or one
        of its heads is missing; the names found, more than one where a tensor is there twice or head by head.

    Raises:
        InputError: heads differ in shape or type.
    """
    if not row.per_head:
        held, names = find_stored(spec, row, layer, tensors)
        return held, tensors[names[0]] if names else None, names
    heads = spec.heads_of(row, hyper)
    names = [name for one in heads for name in spec.names(one, layer) if name in tensors]
    found = [tensors[name] for name in names]
    for tensor in found:
        if (tensor.shape, tensor.dtype) != (found[0].shape, found[0].dtype):
            raise InputError(
                f"{tensor.source}: tensor {shown(tensor.name)} is {tensor.dtype} {tensor.shape} and "
                f"{shown(found[0].name)} {found[0].dtype} {found[0].shape}; the heads of a layer are alike"
            )
    return row, stacked(found) if len(found) == len(heads) else None, names


def heads_apart(
    spec: ArchSpec, row: TensorSpec, layer: int, hyper: Hyperparameters, whole: LazyTensor
) -> Iterator[LazyTensor]:
    """Gives one tensor for each head, under the checkpoint's names, of one that holds them all."""

    def rows(head: int, start: int, stop: int) -> Array:
        values: Array = whole.read_rows(head, head + 1)[0][start:stop]
        return values

    for head, one in enumerate(spec.heads_of(row, hyper)):
        name = one.hf.format(layer=layer)
        yield LazyTensor(name, whole.shape[1:], whole.dtype, whole.source, partial(rows, head))
