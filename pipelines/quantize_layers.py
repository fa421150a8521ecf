"""Quantizes layer by layer with a calibration text, and goes on where a run was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.calibration.site import LayerMethod, LayerResult
from quantpress.convert.checkpoint import Array
from quantpress.convert.pieces import Piece
from quantpress.convert.preflight import Preflight
from quantpress.convert.row_order import RowOrder
from quantpress.pipelines.layer_work import LayerWork, run_layers
from quantpress.pipelines.quantize_calibration import Calibration
from quantpress.pipelines.quantize_weights import joined_rows, pack
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import LayoutError
from quantpress.quant.grid import Grid
from quantpress.quant.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_codes import WeightsJob

__all__ = ["quantize_layers"]


def quantize_layers(job: WeightsJob, calibration: Calibration, spool: Spool, context: RunContext) -> None:
    """Quantizes the layers that the spool lacks, and keeps each there as soon as it is finished.

    Raises:
        InputError: activations that are not finite, or what the method says of a weight.
        LayoutError: values that the format cannot hold.
        OutputError: the disk is full.
    """
    weights = job.weights.weights
    pieces = job.checked.pieces if isinstance(job.checked, Preflight) else {}

    def whole(name: str) -> str:
        return pieces[name].stored if name in pieces else name

    def stored(result: LayerResult) -> Mapping[str, Array]:
        tensors: dict[str, Array] = dict(result.changed)
        found: dict[str, dict[str, QuantizedTensor]] = {}
        for name, quantized in result.quantized.items():
            assert isinstance(quantized, QuantizedTensor)  # these methods give no blocks
            found.setdefault(whole(name), {})[name] = quantized
        for name, parts in found.items():
            tensors |= pack(job.format, weights[name], _together(name, parts, pieces))
        return tensors

    work = LayerWork(
        job.source,
        job.hyper.layers,
        _method(job, context, whole),
        lambda name: whole(name) in weights,
        stored,
        job.stage.calibration_dtype or "f32",
    )
    run_layers(work, calibration, spool, context)


def _together(name: str, parts: Mapping[str, QuantizedTensor], pieces: Mapping[str, Piece]) -> QuantizedTensor:
    """Puts the codes of q, k and v, whose rows a checkpoint stores in one tensor, in the order in which it does.

    Raises:
        LayoutError: the columns of the parts have different orders; one tensor has one.
    """
    if name in parts:
        return parts[name]
    rows = np.concatenate([_rows(pieces[part].order) for part in parts])
    orders = [each.g_idx for each in parts.values() if each.g_idx is not None]
    if any(not np.array_equal(orders[0], order) for order in orders[1:]):
        raise LayoutError(f"tensor {name}: its parts order their columns differently (g_idx)")
    joined = joined_rows(list(parts.values()))
    return replace(joined, g_idx=orders[0] if orders else None).take_rows(np.argsort(rows))


def _rows(order: RowOrder) -> NDArray[np.int64]:
    """Gives the stored row of each row of a piece."""
    numbers = np.arange(order.block * (1 + max(order.blocks)))
    found: NDArray[np.int64] = order.read(lambda start, stop: numbers[start:stop], 0, order.block * len(order.blocks))
    return found


def _method(job: WeightsJob, context: RunContext, whole: Callable[[str], str]) -> LayerMethod:
    from quantpress.convert.calibration import methods
    from quantpress.quant.gptq import GptqOptions

    threads = context.threads

    def grid_of(name: str) -> Grid:
        return job.recipe.grid_of(whole(name))

    if job.recipe.method == "gptq":
        options = GptqOptions(act_order=job.stage.act_order, damping=job.stage.damping)
        return methods.GptqMethod(grid_of, options, threads, drift=job.stage.drift or 0.0, device=context.device)
    kind = methods.AwqMethod if job.recipe.method == "awq" else methods.SmoothMethod
    return kind(grid_of, threads=threads, head_dim=job.hyper.head_dim)
