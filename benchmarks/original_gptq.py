"""GPTQ by its formula: the column loop in float64, the layers run by transformers; the yardstick for ours.

After Frantar et al., arXiv 2210.17323, algorithm 1, with what their repository adds for Llama: `true_sequential`,
act-order with static groups, damping of 0.01 of the mean diagonal, blocks of 128 columns. Only for small models:
everything is in memory and nothing is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Range = Callable[[Matrix, int], tuple[Matrix, float]]

STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BLOCK, DAMPING, BATCH = 128, 0.01, 8


def symmetric_range(group: Matrix, bits: int) -> tuple[Matrix, float]:
    """Scale (N, 1) and zero of the repository's symmetric grid: codes 0 .. 2^b-1 over [-absmax, absmax]."""
    top = 2**bits - 1
    return np.abs(group).max(axis=1, keepdims=True) * 2 / top, (top + 1) / 2


def full_range(group: Matrix, bits: int) -> tuple[Matrix, float]:
    """Scale (N, 1) and zero of the full-range grid that quantpress uses: the greatest weight is the code 0."""
    greatest = np.take_along_axis(group, np.abs(group).argmax(axis=1)[:, None], axis=1)
    return -greatest / 2 ** (bits - 1), 2.0 ** (bits - 1)


def column_loop(weight: Matrix, hessian: Matrix, bits: int, size: int, grid: Range) -> Matrix:
    """Quantizes one matrix.

    Args:
        weight: (N, K).
        hessian: (K, K), X^T X up to a factor.
        bits: of a code.
        size: columns of a group; K a multiple of it.
        grid: gives scale and zero of a group of columns.

    Returns:
        (N, K) values that the codes stand for.
    """
    weight, hessian = weight.copy(), hessian.copy()
    dead = hessian.diagonal() == 0
    hessian[dead, dead], weight[:, dead] = 1, 0
    groups = [grid(weight[:, start : start + size], bits) for start in range(0, weight.shape[1], size)]
    order = np.argsort(-hessian.diagonal(), kind="stable")
    weight, hessian = weight[:, order], hessian[np.ix_(order, order)]
    hessian[np.diag_indices_from(hessian)] += DAMPING * hessian.diagonal().mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = np.empty((weight.shape[0], stop - start))
        for column in range(start, stop):
            scale, zero = groups[order[column] // size]
            values = weight[:, column]
            safe = np.where(scale[:, 0] == 0, 1, scale[:, 0])
            codes = np.clip(np.rint(values / safe) + zero, 0, 2**bits - 1)
            result[:, column] = scale[:, 0] * (codes - zero)
            errors[:, column - start] = (values - result[:, column]) / upper[column, column]
            weight[:, column:stop] -= np.outer(errors[:, column - start], upper[column, column:stop])
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result[:, np.argsort(order)]


class _Caught(Exception):  # noqa: N818
    """Stops a model at its first layer."""


def _first_inputs(model: Any, windows: NDArray[np.int32]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The inputs of the first layer, batch by batch, and what else a layer is called with."""
    inputs: list[torch.Tensor] = []
    others: dict[str, Any] = {}

    def catch(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(positional[0])
        others.update(named)
        raise _Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for start in range(0, len(windows), BATCH):
        with suppress(_Caught):
            model(torch.from_numpy(windows[start : start + BATCH].astype(np.int64)), use_cache=False)
    hook.remove()
    return inputs, others


@contextmanager
def _gathering(module: torch.nn.Module) -> Iterator[Matrix]:
    """Adds up X^T X of what a module is called with, in float64."""
    total = np.zeros((module.in_features, module.in_features))  # type: ignore[arg-type]

    def add(_: torch.nn.Module, positional: tuple[torch.Tensor, ...]) -> None:
        rows = positional[0].reshape(-1, total.shape[0]).double()
        total[:] += (rows.T @ rows).numpy()

    hook = module.register_forward_pre_hook(add)
    yield total
    hook.remove()


def quantize_folder(
    source: Path, out: Path, windows: NDArray[np.int32], *, bits: int, group_size: int, grid: Range
) -> None:
    """Quantizes a Llama folder with windows of one length, a multiple of `BATCH` of them, into a float32 folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden, others = _first_inputs(model, windows)
        for layer in model.model.layers:
            for step in STEPS:
                with _gathering(layer.get_submodule(step[0])) as hessian:
                    for values in hidden:
                        layer(values, **others)
                for name in step:
                    module = layer.get_submodule(name)
                    size = module.in_features if group_size == -1 else group_size
                    new = column_loop(module.weight.double().numpy(), hessian, bits, size, grid)
                    module.weight.copy_(torch.from_numpy(new))
            hidden = [_output(layer(values, **others)) for values in hidden]
    model.save_pretrained(out)


def _output(result: Any) -> torch.Tensor:
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found
