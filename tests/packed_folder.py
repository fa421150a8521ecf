"""Writes tiny checkpoints in a quantized format, weight by weight, as the formats' own tests need them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor
from quantpress.convert.linears import linear_weights
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.convert.safetensors_writer import write_checkpoint
from quantpress.quant.floats import to_float32
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor

Quantize = Callable[[str, Array], "QuantizedTensor | None"]
"""Gives codes for a weight (N, K) float32, or None for one that is left alone."""


def rounded(bits: int, group_size: int, *, symmetric: bool, scale_type: str = "F16") -> Quantize:
    """Rounds every weight to nearest."""
    grid = Grid(bits, group_size, symmetric, scale_type)
    return lambda _name, weight: round_to_nearest(weight, grid)


def lazy_array(name: str, values: Array) -> LazyTensor:
    """Gives an array as a tensor of a checkpoint."""
    dtype = next(key for key, kind in DTYPES.items() if kind == values.dtype)
    return LazyTensor(
        name, values.shape, dtype, "model.safetensors", lambda a, b: values[a:b] if values.shape else values
    )


def write_packed(
    source: Path,
    target: Path,
    pack_format: PackFormat,
    quantize: Quantize,
    *,
    input_bits: int | None = None,
    **details: Any,
) -> dict[str, QuantizedTensor]:
    """Packs the linear weights of a checkpoint and writes the folder as it will be.

    Returns:
        Weight name -> what was packed.
    """
    checkpoint = open_checkpoint(source)
    tensors: dict[str, LazyTensor] = {}
    made: dict[str, QuantizedTensor] = {}
    swapped = linear_weights(checkpoint.config, checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        values = to_float32(tensor.read()) if name in swapped else np.zeros(0, np.float32)
        codes = quantize(name, np.ascontiguousarray(values.T if swapped.get(name) else values)) if values.size else None
        if codes is None:
            tensors[name] = tensor
            continue
        made[name] = codes
        stored = pack_format.pack(name, codes, replace(codes.form, input_bits=input_bits))
        tensors |= {part: lazy_array(part, array) for part, array in stored.items()}
    forms = {name: replace(codes.form, input_bits=input_bits) for name, codes in made.items()}
    left = [name for name, tensor in checkpoint.tensors.items() if name not in made and len(tensor.shape) == 2]
    config = {**checkpoint.config, "quantization_config": pack_format.settings(forms, left, details)}
    files = {**checkpoint.tokenizer_files, "config.json": json.dumps(config).encode()}
    write_checkpoint(replace(checkpoint, config=config, tensors=tensors, tokenizer_files=files), target)
    for name, data in pack_format.files(config["quantization_config"]).items():
        target.joinpath(name).write_bytes(data)
    return made
