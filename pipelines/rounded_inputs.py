"""The inputs of linears as the kernels of int8 checkpoints round them while a model runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.compressed_tensors.activations import round_inputs
from quantpress.convert.preflight import Preflight

__all__ = ["llm_int8_inputs", "rounded_inputs"]

Round = Callable[[int, str, torch.Tensor], torch.Tensor]

_BITSANDBYTES_INT8 = "int8"  # in Checkpoint.storage_types; the packed formats say more there: "int8 row"
_THRESHOLD = 6.0  # transformers' default of llm_int8_threshold


def rounded_inputs(source: Checkpoint, checked: Preflight) -> Round | None:
    """Gives what a real runtime of a quantized checkpoint does to the inputs of its linears.

    Args:
        source: the checkpoint.
        checked: its tensors by the family's table.

    Returns:
        `(layer, slot, input (B, T, K)) -> input`, or None where nothing is rounded: weights of W8A8 checkpoints round
        a scale per token, those of LLM.int8() keep columns of outliers.
    """
    rounds: dict[tuple[int, str], Callable[[torch.Tensor], torch.Tensor]] = {}
    quantized = checked.codes(source)
    for row, layer, tensor in checked.bindings:
        if tensor.name in quantized and quantized[tensor.name].form.input_bits is not None:
            rounds[layer, row.slot] = round_inputs
        elif source.storage_types.get(tensor.name) == _BITSANDBYTES_INT8:
            rounds[layer, row.slot] = llm_int8_inputs

    def rounded(layer: int, slot: str, values: torch.Tensor) -> torch.Tensor:
        change = rounds.get((layer, slot))
        return values if change is None else change(values)

    return rounded if rounds else None


def llm_int8_inputs(values: torch.Tensor) -> torch.Tensor:
    """Rounds inputs to int8 with a scale per token, and leaves columns with an outlier as they are.

    Source: LLM.int8() (arXiv 2208.07339), section 3; bitsandbytes backends/default/ops.py (int8_vectorwise_quant) and
    autograd/_functions.py (MatMul8bitLt). An outlier is a magnitude of 6 or more; it does not count for the scale of
    its token. bitsandbytes looks for outliers in all texts of a batch together, here each text is alone.

    Args:
        values: (B, T, K) floating-point.

    Returns:
        (B, T, K) of the same type.
    """
    outliers = values.abs() >= _THRESHOLD
    columns = outliers.any(dim=-2, keepdim=True)
    absmax = values.abs().masked_fill(outliers, 0).amax(dim=-1, keepdim=True)
    codes = torch.round(values * (127.0 / absmax)).nan_to_num_(0.0, 0.0, 0.0)
    return torch.where(columns, values, codes * (absmax / 127.0))
