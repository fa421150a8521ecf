"""Quantizes weights one by one, without a text: by rounding, by HQQ, as LLM.int8() does, or by keeping their codes."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array, Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.quantized import PackFormat
from quantpress.pipelines.quantize_plan import PlannedWeight, QuantizePlan
from quantpress.pipelines.quantize_recipe import Recipe
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import count_nonfinite, to_float32
from quantpress.quant.grid import SCALE_TYPES, Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["joined_rows", "made", "pack", "quantize_weights"]

_CHUNK = 16 << 20  # bytes of float32 values that are quantized at a time; rows do not depend on each other
_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")

Rounder = Callable[[NDArray[np.float32], Grid, int], QuantizedTensor]


def quantize_weights(
    source: Checkpoint, plan: QuantizePlan, recipe: Recipe, form: PackFormat, spool: Spool, context: RunContext
) -> None:
    """Quantizes what the spool lacks, layer by layer, and keeps it there.

    Raises:
        InputError: NaN or infinity in a weight.
        LayoutError: values that the format cannot hold.
    """
    total = sum(weight.tensor.size for weight in plan.weights.values())
    done = 0
    for step, weights in _steps(plan).items():
        if step not in spool.steps:
            start = time.perf_counter()
            tensors: dict[str, Array] = {}
            reports: dict[str, Any] = {}
            for weight in weights:
                if recipe.method is None:
                    quantized, reports[weight.name] = _kept(source, weight), {}
                else:
                    quantized, reports[weight.name] = made(weight, recipe, context.threads)
                tensors |= pack(form, weight, quantized)
                done += weight.tensor.size
                context.progress("quantizing", done, total)
            seconds = round(time.perf_counter() - start, 3)
            spool.add(step, tensors, {"reports": reports, "seconds": {"quantize": seconds}})
        else:
            done += sum(weight.tensor.size for weight in weights)
            context.progress("quantizing", done, total)


def pack(form: PackFormat, weight: PlannedWeight, quantized: QuantizedTensor) -> dict[str, Array]:
    """Packs a weight; errors name it.

    Raises:
        LayoutError: values that the format cannot hold.
    """
    try:
        return form.pack(weight.name, quantized, weight.form)
    except LayoutError as error:
        where = shown(weight.name, 200)
        text = str(error) if where in str(error) else f"tensor {where}: {error}"
        raise LayoutError(f"{weight.tensor.source}: {text}") from error


def _steps(plan: QuantizePlan) -> dict[str, list[PlannedWeight]]:
    """Weights by layer; what is outside layers stands alone."""
    steps: dict[str, list[PlannedWeight]] = {}
    for weight in plan.weights.values():
        layer = _LAYER.search(weight.name)
        steps.setdefault(f"layer {layer[1]}" if layer else weight.name, []).append(weight)
    return steps


def made(weight: PlannedWeight, recipe: Recipe, threads: int) -> tuple[QuantizedTensor, Mapping[str, float | None]]:
    """Quantizes a weight by a method that needs no text.

    Returns:
        Codes, (N, K), and figures for the sidecar: "relative_error".

    Raises:
        InputError: NaN or infinity in it.
    """
    assert recipe.method is not None, "codes are to be made"
    rounder = _rounder(recipe.method)
    parts: list[QuantizedTensor] = []
    error = power = 0.0
    for values in _rows(weight):
        if wrong := count_nonfinite(values):
            raise InputError(
                f"{weight.tensor.source}: tensor {shown(weight.name, 200)}: {wrong} values are NaN or infinite, which"
                " no code stands for; leave the weight out with --skip"
            )
        parts.append(rounder(values, weight.grid, threads))
        difference = parts[-1].dequantize()
        difference -= values
        error += _square_sum(difference)
        power += _square_sum(values)
    relative = math.sqrt(error / power) if power else 0.0
    return joined_rows(parts), {"relative_error": relative}


def _square_sum(values: NDArray[np.float32]) -> float:
    """Sum of squares in float64, on one thread so that it is always added in the same order."""
    flat = values.reshape(-1)
    return float(np.einsum("k,k->", flat, flat, dtype=np.float64))


def _rows(weight: PlannedWeight) -> Iterator[NDArray[np.float32]]:
    """The weight in the decoder's form, (N, K) float32, by rows; what is stored as (K, N) is read whole."""
    rows, columns = weight.form.shape
    step = max(1, _CHUNK // (4 * max(columns, 1)))
    whole = None
    if weight.transposed:
        whole = np.ascontiguousarray(to_float32(weight.tensor.exact_rows(0, columns)).T)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield to_float32(weight.tensor.exact_rows(start, stop)) if whole is None else whole[start:stop]


def joined_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Gives matrices of the same columns one below the other; their columns are in order."""
    if len(parts) == 1:
        return parts[0]
    codes = np.concatenate([part.codes for part in parts])
    scale = np.concatenate([part.scale for part in parts])
    zeros = [part.zero for part in parts if part.zero is not None]
    first = parts[0]
    return QuantizedTensor(codes, scale, np.concatenate(zeros) if zeros else None, first.bits, first.group_size)


def _rounder(method: str) -> Rounder:
    if method == "hqq":
        from quantpress.quant.hqq import half_quadratic

        hqq: Rounder = half_quadratic
        return hqq
    return _llm_int8 if method == "llm_int8" else round_to_nearest


def _llm_int8(weight: NDArray[np.float32], grid: Grid, threads: int) -> QuantizedTensor:
    from quantpress.quant.llm_int8 import quantize_int8

    del threads
    codes, absmax = quantize_int8(weight)
    unsigned = (codes.view(np.uint8) ^ np.uint8(128)).reshape(codes.shape)  # code + 128
    return QuantizedTensor(unsigned, (absmax / np.float32(127))[:, None], None, grid.bits, weight.shape[1])


def _kept(source: Checkpoint, weight: PlannedWeight) -> QuantizedTensor:
    """The codes of a quantized source, with scales in the type that the new format keeps."""
    found = source.quantized[weight.name].read()
    wanted = SCALE_TYPES[weight.form.scale_type]
    if found.scale.dtype == wanted:
        return found
    with np.errstate(over="ignore"):
        scale = found.scale.astype(np.float32).astype(wanted)
    if not np.array_equal(scale.astype(np.float32), found.scale.astype(np.float32)):
        raise LayoutError(
            f"{weight.tensor.source}: tensor {shown(weight.name, 200)}: scales in {_type_name(found.scale)} are not"
            f" exact in {weight.form.scale_type}; another --format or --scale-type keeps them"
        )
    return dataclasses.replace(found, scale=scale)


def _type_name(values: Array) -> str:
    if values.dtype == np.dtype(ml_dtypes.bfloat16):
        return "BF16"
    return "F16" if values.dtype == np.float16 else "F32"
