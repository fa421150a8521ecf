"""What a model makes of a calibration text before its first layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.layer_weights import ModelWeights
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.model import Decoder
from quantpress.quant.errors import InputError

__all__ = ["embedded", "first_inputs"]


def embedded(
    weights: ModelWeights,
    windows: Sequence[NDArray[np.int32]],
    device: torch.device,
    embedding: LazyTensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives the first layer's inputs; holds the embedding rows that occur, not the embedding.

    Args:
        weights: of the model.
        windows: (T,) int32 token ids.
        device: where to compute.
        embedding: rows that stand for the model's own.

    Yields:
        Number of a window's first token, and (T, hidden) float32.

    Raises:
        InputError: a token has no embedding row, or a window outgrows learned positions.
    """
    spec, hyper = weights.spec, weights.hyper
    ids, places = np.unique(np.stack(windows), return_inverse=True)
    if ids[0] < 0 or ids[-1] >= hyper.vocab:
        raise InputError(f"token ids go from {ids[0]} to {ids[-1]}, the model has {hyper.vocab} tokens")
    rows = weights.some_rows("token_embd.weight", ids, embedding)
    decoder = Decoder(
        lambda slot, layer: rows if slot == "token_embd.weight" else weights(slot, layer), spec, hyper,
        device=device, resident=True,
    )  # fmt: skip
    start = 0
    for window in places.reshape(len(windows), -1):
        yield start, decoder.embed(torch.from_numpy(window[None].astype(np.int64)))[0]
        start += len(window)


def first_inputs(
    weights: ModelWeights, windows: Sequence[NDArray[np.int32]], embedding: LazyTensor | None, both: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives the first layer's inputs in memory.

    Args:
        weights: of the model.
        windows: (T,) int32 token ids.
        embedding: rows that stand for the model's own.
        both: those of the model's own rows are wanted too.

    Yields:
        Number of a window's first token, and (T, hidden) float32; (T, 2 * hidden) where two streams begin otherwise.
    """
    device = torch.device("cpu")
    inputs = embedded(weights, windows, device, embedding)
    if embedding is None or not both:
        yield from inputs
        return
    for (start, values), (_, own) in zip(inputs, embedded(weights, windows, device), strict=True):
        yield start, torch.cat((values, own), dim=1)
