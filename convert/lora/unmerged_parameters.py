"""Adapters of whole parameters, the fused weights of experts, run beside the weights of single experts.

What is added is what `convert.lora.experts` says of the parameter; it is multiplied with the inputs instead of being
added to the weights, so that all that comes after the addition (rounding, writing, reading, naming) is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantpress.convert.arch.spec import Hyperparameters, Layout, TensorSpec
from quantpress.convert.lora.adapter import AdapterModule
from quantpress.convert.lora.changes import Add
from quantpress.convert.lora.deltas import Delta
from quantpress.convert.lora.edits import Edit
from quantpress.convert.lora.experts import parameter_edits
from quantpress.convert.lora.ledger import Applied
from quantpress.convert.lora.targets import BaseNames
from quantpress.convert.pieces import piece_row

__all__ = ["AddedMatrix", "is_parameter", "parameter_changes", "parameter_rows"]


@dataclass(frozen=True, eq=False, slots=True)
class AddedMatrix:
    """A matrix to add to a weight, made anew each time so that none of many experts' stays in memory.

    Attributes:
        delta: of the stored tensor.
        start, stop: lines of it that are the expert's, (stop - start, width).
        transposed: they are (K, N).
        order: rows of (N, K) that the weight has; None for all.
    """

    delta: Delta
    start: int
    stop: int
    transposed: bool
    order: torch.Tensor | None

    def run(
        self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds x M^T."""
        del weight, bias
        lines = np.empty((self.stop - self.start, self.delta.shape[-1]))
        self.delta.lines(self.start, self.stop, lines)
        matrix = torch.from_numpy(lines.T if self.transposed else lines)
        matrix = matrix if self.order is None else matrix[self.order]
        return result + x @ matrix.to(x.device, x.dtype).T


def is_parameter(applied: Applied, names: BaseNames, module: AdapterModule) -> bool:
    """Whether what an adapter has of a module belongs to parameters of it (`target_parameters`)."""
    config, path = applied.adapter.config, module.path
    if not config.parameters_of(path) or "lora_A" not in module.parts:
        return False
    return names.find(f"{path}.weight") is None or not config.targets(path)


def parameter_changes(applied: Applied, names: BaseNames, modules: Sequence[AdapterModule]) -> Iterator[Edit]:
    """Gives what is added to the tensors of parameters.

    Args:
        applied: the adapter.
        names: of the base.
        modules: of it, those that belong to parameters.

    Raises:
        InputError: as `parameter_edits`.
    """
    for path in dict.fromkeys(module.path for module in modules):
        group = [module for module in modules if module.path == path]
        yield from parameter_edits(applied.adapter, applied.weight, names, group)


def parameter_rows(
    edit: Edit, rows: Iterable[tuple[TensorSpec, int]], hyper: Hyperparameters
) -> Iterator[tuple[tuple[str, int], AddedMatrix]]:
    """Gives for each row of a tensor its slot and layer, and what is added to it."""
    if not isinstance(edit.change, Add):
        return
    delta = edit.change.delta
    for row, layer in rows:
        lines = delta.shape[-2]
        start = row.expert * lines if len(delta.shape) == 3 else 0
        order = None
        if row.part:
            piece, picked = piece_row(row, hyper)
            count = hyper.dims[piece.shape[1] if piece.layout is Layout.TRANSPOSED else piece.shape[0]]
            order = torch.from_numpy(picked.read(lambda first, last: np.arange(first, last), 0, count))
        transposed = row.layout in (Layout.TRANSPOSED, Layout.STACKED_TRANSPOSED)
        yield (row.slot, layer), AddedMatrix(delta, start, start + lines, transposed, order)
