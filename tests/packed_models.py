"""Tiny models with linears in codes, and the same in transformers on the numbers that the codes stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantpress.convert.linears import linear_weights
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import Quantize, write_packed

Codes = dict[str, QuantizedTensor]


def ordered(grid: Grid) -> Quantize:
    """Rounds, and lets columns belong to groups in a random order, as act-order leaves them."""

    def one(_name: str, weight: np.ndarray) -> QuantizedTensor:
        columns = weight.shape[1]
        order = np.random.default_rng(columns).permutation(columns)
        rounded = round_to_nearest(np.ascontiguousarray(weight[:, order]), grid)
        codes, g_idx = np.empty_like(rounded.codes), np.empty(columns, np.int32)
        codes[:, order] = rounded.codes
        g_idx[order] = np.arange(columns, dtype=np.int32) // rounded.group_size
        return replace(rounded, codes=codes, g_idx=g_idx)

    return one


def quantized_model(source: Path, target: Path, fmt: PackFormat, quantize: Quantize, **options: Any) -> Codes:
    """Writes `target` with the linears of `source` in codes, and gives them."""
    target.mkdir(exist_ok=True)
    return write_packed(source, target, fmt, quantize, **options)


def values_of(tensor: QuantizedTensor) -> np.ndarray:
    """The formula, in float64: scale * (code - zero)."""
    group = np.arange(tensor.columns) // tensor.group_size if tensor.g_idx is None else tensor.g_idx
    zero = tensor.zeros().astype(np.float64)[:, group]
    values: np.ndarray = tensor.scale.astype(np.float64)[:, group] * (tensor.codes - zero)
    return values


def reference(source: Path, codes: Codes) -> Any:
    """Gives transformers' model of `source` in float32, its linears replaced by what the codes stand for."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", dtype=torch.float32).eval()
    checkpoint = open_checkpoint(source)
    swapped = linear_weights(json.loads((source / "config.json").read_text()), checkpoint.tensors)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in codes.items():
            values = torch.from_numpy(values_of(tensor).astype(np.float32))
            parameters[name].copy_(values.T if swapped.get(name, False) else values)
    return model
