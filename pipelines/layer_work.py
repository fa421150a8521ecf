"""Takes layers to a method one after the other, keeps what is finished, and goes on where a run was stopped."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantpress.convert.calibration.chain import load_chain
from quantpress.convert.calibration.site import LayerMethod, LayerResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.pipelines.machine import save_memory
from quantpress.pipelines.quantize_calibration import Calibration, activation_budget
from quantpress.pipelines.quantize_work import LIVE
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite

__all__ = ["LayerWork", "run_layers", "with_checks"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class LayerWork:
    """What is to be done with a model's layers.

    Attributes:
        source: the model.
        layers: how many it has.
        method: what makes something of them.
        targets: says of a linear weight's name whether it is to be quantized.
        stored: tensors, by their names in the spool, that a finished layer comes to.
        precision: of products, "f32" or "bf16".
        powers: measure the inputs of every linear weight and of the head, see `calibrate`.
        embedding: gives the token embedding as the quantized model has it, where it is quantized too; called before the
            first layer.
    """

    source: Checkpoint
    layers: int
    method: LayerMethod
    targets: Callable[[str], bool]
    stored: Callable[[LayerResult], Mapping[str, Array]]
    precision: str = "f32"
    powers: bool = False
    embedding: Callable[[], LazyTensor] | None = None


def run_layers(work: LayerWork, calibration: Calibration, spool: Spool, context: RunContext) -> None:
    """Quantizes the layers that the spool lacks, and keeps each there as soon as it is finished.

    Raises:
        InputError: activations that are not finite, or what the method says of a weight.
        LayoutError: values that the format cannot hold.
        OutputError: the disk is full.
    """
    live = spool.folder / LIVE
    first = _first_layer(work.layers, spool)
    if first is None:
        return
    live.mkdir(exist_ok=True)
    save_memory()  # the text has been tokenized, and no worker has started
    embedding = work.embedding() if work.embedding is not None and not first else None
    results = calibrate(
        with_checks(work.source),
        calibration.windows,
        work.method,
        targets=work.targets,
        threads=context.threads,
        folder=live,
        device=context.device,
        max_memory=activation_budget(context.max_memory),
        precision=work.precision,
        first_layer=first,
        powers=work.powers,
        embedding=embedding,
        progress=partial(context.progress, "quantizing"),
    )
    for result in results:
        seconds = {name: round(value, 3) for name, value in result.seconds.items()}
        spool.add(_step(result.layer), work.stored(result), {"reports": _plain(result.reports), "seconds": seconds})
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


def _first_layer(layers: int, spool: Spool) -> int | None:
    """Gives the layer to begin with, after the finished ones; None where all are."""
    first = next((layer for layer in range(layers) if _step(layer) not in spool.steps), None)
    if not first:
        return first
    if load_chain(spool.folder / LIVE, first) is None:
        log.warning("%s: the inputs of layer %d are missing or damaged: starting anew", spool.folder, first)
        spool.clear()
        return 0
    log.warning("%d of %d layers are finished already: going on with layer %d", first, layers, first)
    return first


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
