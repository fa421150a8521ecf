"""Quantizes layer by layer with a calibration text, and goes on where a run was stopped."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quantpress.convert.calibration.chain import load_chain
from quantpress.convert.calibration.site import LayerMethod, LayerResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.pipelines.machine import save_memory
from quantpress.pipelines.quantize_calibration import Calibration, activation_budget
from quantpress.pipelines.quantize_weights import pack
from quantpress.pipelines.quantize_work import LIVE
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_codes import WeightsJob

__all__ = ["quantize_layers", "with_checks"]

log = logging.getLogger(__name__)


def quantize_layers(job: WeightsJob, calibration: Calibration, spool: Spool, context: RunContext) -> None:
    """Quantizes the layers that the spool lacks, and keeps each there as soon as it is finished.

    Raises:
        InputError: activations that are not finite, or what the method says of a weight.
        LayoutError: values that the format cannot hold.
        OutputError: the disk is full.
    """
    live = spool.folder / LIVE
    first = _first_layer(job, spool)
    if first is None:
        return
    live.mkdir(exist_ok=True)
    save_memory()  # the text has been tokenized, and no worker has started
    weights = job.weights.weights
    results = calibrate(
        with_checks(job.source),
        calibration.windows,
        _method(job, context),
        targets=weights.__contains__,
        threads=context.threads,
        folder=live,
        device=context.device,
        max_memory=activation_budget(context.max_memory),
        precision=job.stage.calibration_dtype or "f32",
        first_layer=first,
        progress=partial(context.progress, "quantizing"),
    )
    for result in results:
        tensors: dict[str, Array] = dict(result.changed)
        for name, quantized in result.quantized.items():
            tensors |= pack(job.format, weights[name], quantized)
        seconds = {name: round(value, 3) for name, value in result.seconds.items()}
        spool.add(_step(result.layer), tensors, {"reports": _plain(result.reports), "seconds": seconds})
        _tell(result)


def with_checks(source: Checkpoint) -> Checkpoint:
    """Gives a model whose tensors are refused, by their names, where they hold what no model can compute with."""
    tensors = {
        name: replace(
            tensor,
            read_rows=_checked(tensor, tensor.read_rows),
            wide_rows=None if tensor.wide_rows is None else _checked(tensor, tensor.wide_rows),
        )
        for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def _checked(tensor: LazyTensor, read: Callable[[int, int], Array]) -> Callable[[int, int], Array]:
    def read_rows(start: int, stop: int) -> Array:
        values = read(start, stop)
        if wrong := count_nonfinite(values):
            raise InputError(
                f"{tensor.source}: tensor {shown(tensor.name, 200)}: {wrong} values are NaN or infinite, and a model"
                " that holds them cannot be run"
            )
        return values

    return read_rows


def _step(layer: int) -> str:
    return f"layer {layer}"


def _first_layer(job: WeightsJob, spool: Spool) -> int | None:
    """Gives the layer to begin with, after the finished ones; None where all are."""
    layers = job.hyper.layers
    first = next((layer for layer in range(layers) if _step(layer) not in spool.steps), None)
    if not first:
        return first
    if load_chain(spool.folder / LIVE, first) is None:
        log.warning("%s: the inputs of layer %d are missing or damaged: starting anew", spool.folder, first)
        spool.clear()
        return 0
    log.warning("%d of %d layers are finished already: going on with layer %d", first, layers, first)
    return first


def _method(job: WeightsJob, context: RunContext) -> LayerMethod:
    from quantpress.convert.calibration import methods
    from quantpress.quant.gptq import GptqOptions

    grid_of, threads = job.recipe.grid_of, context.threads
    if job.recipe.method == "gptq":
        options = GptqOptions(act_order=job.stage.act_order, damping=job.stage.damping)
        return methods.GptqMethod(grid_of, options, threads, drift=job.stage.drift or 0.0, device=context.device)
    kind = methods.AwqMethod if job.recipe.method == "awq" else methods.SmoothMethod
    return kind(grid_of, threads=threads, head_dim=job.hyper.head_dim)


def _plain(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures as JSON has them: numpy's numbers become Python's."""
    return {
        name: {key: value.item() if hasattr(value, "item") else value for key, value in report.items()}
        for name, report in reports.items()
    }


def _tell(result: LayerResult) -> None:
    for name, report in result.reports.items():
        figures = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in report.items()
        )
        module = re.sub(r".*\.\d+\.", "", name).removesuffix(".weight")
        log.info("layer %d: %s: %s", result.layer, module, ", ".join(figures))
    log.info("layer %d: %s", result.layer, ", ".join(f"{key} {value:.2f} s" for key, value in result.seconds.items()))
