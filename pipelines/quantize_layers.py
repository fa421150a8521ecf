"""Quantizes layer by layer with a calibration text, and goes on where a run was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantpress.convert.calibration.site import LayerMethod, LayerResult
from quantpress.convert.checkpoint import Array
from quantpress.pipelines.layer_work import LayerWork, run_layers
from quantpress.pipelines.quantize_calibration import Calibration
from quantpress.pipelines.quantize_weights import pack
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
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

    def stored(result: LayerResult) -> Mapping[str, Array]:
        tensors: dict[str, Array] = dict(result.changed)
        for name, quantized in result.quantized.items():
            assert isinstance(quantized, QuantizedTensor)  # these methods give no blocks
            tensors |= pack(job.format, weights[name], quantized)
        return tensors

    work = LayerWork(
        job.source,
        job.hyper.layers,
        _method(job, context),
        weights.__contains__,
        stored,
        job.stage.calibration_dtype or "f32",
    )
    run_layers(work, calibration, spool, context)


def _method(job: WeightsJob, context: RunContext) -> LayerMethod:
    from quantpress.convert.calibration import methods
    from quantpress.quant.gptq import GptqOptions

    grid_of, threads = job.recipe.grid_of, context.threads
    if job.recipe.method == "gptq":
        options = GptqOptions(act_order=job.stage.act_order, damping=job.stage.damping)
        return methods.GptqMethod(grid_of, options, threads, drift=job.stage.drift or 0.0, device=context.device)
    kind = methods.AwqMethod if job.recipe.method == "awq" else methods.SmoothMethod
    return kind(grid_of, threads=threads, head_dim=job.hyper.head_dim)
