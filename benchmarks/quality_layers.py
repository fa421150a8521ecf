"""How far the hidden states of a quantized model are from its source's, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights


def _decoder(checkpoint: Checkpoint) -> Decoder:
    checked = preflight(checkpoint)
    return Decoder(CheckpointWeights(checkpoint, checked.spec, checked.hyper), checked.spec, checked.hyper)


def layer_errors(source: Checkpoint, candidate: Checkpoint, windows: Sequence[NDArray[np.int32]]) -> list[float]:
    """Gives, after each layer, the squared error of the hidden states over their squared deviation from the mean.

    Errors add up: those of a layer hold what all layers before it did.
    """
    ours, theirs = _decoder(source), _decoder(candidate)
    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    errors = []
    with torch.inference_mode():
        wanted, found = ours.embed(tokens), theirs.embed(tokens)
        for layer in range(ours.hyper.layers):
            wanted, found = ours.run_layer(layer, wanted), theirs.run_layer(layer, found)
            spread = (wanted - wanted.mean(dim=(0, 1))).square().sum()
            errors.append(float((found - wanted).square().sum() / spread))
    return errors
