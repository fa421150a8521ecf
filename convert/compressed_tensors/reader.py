"""Opens what compressed-tensors stores as `pack-quantized` and `int-quantized`: codes, scales and zeros of each weight.

A packed weight is `X.weight_packed` with `X.weight_scale`, `X.weight_shape` and, as its config group says,
`X.weight_zero_point` and `X.weight_g_idx`. An unpacked one is `X.weight` of int8 with `X.weight_scale` and perhaps a
zero point of int8. See pack.py for the layouts; older spellings that the library reads are read too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.compressed_tensors.parts import open_weight
from quantpress.convert.compressed_tensors.scheme import read_schemes
from quantpress.convert.files import shown
from quantpress.convert.quant_state import STATE_TYPES
from quantpress.convert.quantized import LazyQuantized, with_quantized
from quantpress.quant.errors import InputError

__all__ = ["is_compressed_tensors", "opened"]

log = logging.getLogger(__name__)

# Of the cache and of static rounding of inputs and outputs: nothing of that is computed here.
_ACTIVATIONS = frozenset(
    f"{what}_{part}" for what in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point", "global_scale")
)
_PARTS = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_packed", "weight_global_scale")


def is_compressed_tensors(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that compressed-tensors stored the weights."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") in (
        "compressed-tensors",
        "compressed_tensors",
    )


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose compressed-tensors weights are read as the numbers they stand for, codes beside.

    Args:
        checkpoint: as its files say; its config is one that `is_compressed_tensors`.

    Raises:
        InputError: parts that are missing, unexpected or do not fit each other or the config, and kinds of
            compressed-tensors checkpoints that are not opened here.
    """
    schemes = read_schemes(checkpoint.config["quantization_config"], checkpoint.name)
    tensors = dict(checkpoint.tensors)
    quantized: dict[str, LazyQuantized] = {}
    other_inputs = False
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        stored_as_bytes = part == "weight" and f"{module}.weight_scale" in tensors
        if name not in tensors or not (part == "weight_packed" or stored_as_bytes):
            continue
        scheme = schemes.of(module)
        other_inputs |= scheme.other_inputs
        parts = open_weight(checkpoint.name, tensors, module, scheme)
        streams = parts.streams if parts.streamed else None
        quantized[f"{module}.weight"] = LazyQuantized(
            f"{module}.weight", parts.form, parts.weight.source, parts.read, streams
        )
    dropped = [name for name in tensors if name.rpartition(".")[2] in _ACTIVATIONS]
    for name in dropped:
        del tensors[name]
    if left := [name for name in tensors if name.rpartition(".")[2] in _PARTS]:
        raise InputError(f"{tensors[left[0]].source}: tensor {shown(left[0], 200)} belongs to no quantized weight")
    if dropped or other_inputs:
        log.warning(
            "%s: its inputs or its cache are quantized in a way that is not imitated here; the weights are opened",
            checkpoint.name,
        )
    dtype = _config_dtype(checkpoint.config, quantized)
    return with_quantized(checkpoint, tensors, quantized, dtype=dtype, kind="compressed-tensors")


def _config_dtype(config: Mapping[str, Any], quantized: Mapping[str, LazyQuantized]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str) and dtype in STATE_TYPES:
        return STATE_TYPES[dtype]
    return next((lazy.form.scale_type for lazy in quantized.values()), "F16")
