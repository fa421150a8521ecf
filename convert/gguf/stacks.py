"""Experts of a layer as one tensor, as GGUF holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.pieces import stacked
from quantpress.convert.preflight import Binding
from quantpress.convert.row_order import ReadRows

__all__ = ["is_stack", "router_vector", "stack_experts"]


def stack_experts(bindings: Iterable[Binding]) -> list[Binding]:
    """Puts the experts of each layer together, as the file holds them: (E, N, K), or (E, K, N) of transposed rows."""
    rows: list[Binding] = []
    stacks: dict[tuple[str, int], tuple[int, list[LazyTensor]]] = {}
    for row, layer, tensor in bindings:
        if row.expert < 0:
            rows.append((row, layer, tensor))
            continue
        tensors = stacks.setdefault((row.gguf, layer), (len(rows), []))[1]
        if not tensors:
            rows.append((replace(row, shape=("experts", *row.shape), expert=-1), layer, tensor))
        tensors.append(tensor)
    for place, tensors in stacks.values():
        rows[place] = (*rows[place][:2], stacked(tensors))
    return rows


def is_stack(binding: Binding) -> bool:
    """Whether a row holds all experts of its layer."""
    row = binding[0]
    return row.shape[0] == "experts" and len(row.shape) > 1 and row.role is not Role.ROUTER


def router_vector(binding: Binding) -> Binding:
    """Gives a router of one row as a vector, which llama.cpp's converter makes of it; other rows as they are."""
    row, layer, tensor = binding
    if row.role is not Role.ROUTER or tensor.shape[0] != 1 or len(tensor.shape) != 2:
        return binding

    def flat(read: ReadRows) -> ReadRows:
        return lambda start, stop: read(0, 1)[0, start:stop]

    wide = None if tensor.wide_rows is None else flat(tensor.wide_rows)
    vector = LazyTensor(tensor.name, tensor.shape[1:], tensor.dtype, tensor.source, flat(tensor.read_rows), wide)
    return replace(row, shape=row.shape[1:]), layer, vector
