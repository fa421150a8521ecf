"""What an error in an embedding's rows costs: the Fisher information of a model's predictions about its first inputs.

To second order the KL divergence between a model's predictions and those after a change e of the vector that enters
the first layer at a token is e^T F e / 2, with F = E[g g^T] and g the gradient of log p(y) where y is drawn from the
model's own prediction (Martens, arXiv 1412.1193, section 5). With F in the place of the inputs' Hessian, GPTQ rounds
rows of an embedding as it rounds rows of a linear: columns that are still to be rounded make up for errors of those
that are.

The model is run forward and backward layer by layer, the weights of one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from quantpress.convert.calibration.activations import ActivationStore, Field
from quantpress.convert.calibration.embedded import embedded
from quantpress.convert.calibration.layer_weights import ModelWeights
from quantpress.convert.calibration.powers import HeadInput
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.layer import Layer, Turns
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.errors import InputError

__all__ = ["embedding_sensitivity"]

Progress = Callable[[int, int], None]

_HEAD_ROWS = 16384  # of the head that are converted to float32 at once
_HEAD_TOKENS = 128  # whose logits a thread holds at once


def embedding_sensitivity(
    checkpoint: Checkpoint, windows: Sequence[NDArray[np.int32]], *, threads: int, folder: Path, seed: int = 0,
    max_memory: int | None = None, progress: Progress | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Gives F for the rows of a model's token embedding.

    Peak memory is the weights of a layer or the head, `max_memory` for what layers begin with, and the activations of a
    layer for a window per thread. The result does not depend on the number of threads.

    Args:
        checkpoint: the model, of a known family.
        windows: (T,) int32 token ids, all of the same length.
        threads: number of threads to compute with.
        folder: an existing folder for what does not fit into memory; it is removed at the end.
        seed: of the draws from the model's predictions.
        max_memory: bytes of memory for what layers begin with; None for as much as they need.
        progress: told the steps that are done and how many there are.

    Returns:
        (K, K) float32, symmetric, the mean over all tokens; K is the width of the embedding.

    Raises:
        InputError: the model does not fit its family or lacks a token; gradients that are not finite.
        OutputError: the folder cannot be written.
    """
    checked = preflight(checkpoint)
    weights = ModelWeights(checked)
    decoder = Decoder(weights, checked.spec, checked.hyper)
    layers, length = checked.hyper.layers, len(windows[0])
    with Workers(threads) as workers, ActivationStore(folder, len(windows) * length, max_memory) as store:
        fields = [store.field(f"layer-{layer}", checked.hyper.dims["hidden"]) for layer in range(layers + 1)]
        run = _Run(weights, decoder, workers, fields, len(windows), length, progress)
        for start, values in embedded(weights, windows, decoder.device):
            fields[0].write(start, values)
        for layer in range(layers):
            run.forward(layer)
        run.predict(_Head.of(checkpoint, decoder, weights), seed)
        for layer in reversed(range(layers)):
            run.backward(layer)
        found = fields[0]
        if decoder.embedding_norm or checked.hyper.embedding_width:
            found = store.field("rows", checked.hyper.dims["embedding"])
            run.into_rows(windows, found)
        return _outer(checkpoint.name, found, len(windows), length)


@dataclass
class _Run:
    """A pass through all layers and back: what a layer begins with is replaced by the gradient there."""

    weights: ModelWeights
    decoder: Decoder
    workers: Workers
    fields: list[Field]
    windows: int
    length: int
    progress: Progress | None
    done: int = 0

    def forward(self, layer: int) -> None:
        """Computes a layer for all windows."""
        self._each(partial(self._forward, self._layer(layer), self.decoder.turns(layer, 0, self.length)))

    def predict(self, head: _Head, seed: int) -> None:
        """Draws tokens from the predictions, and puts the gradients of their probabilities behind the last layer."""
        self._each(partial(self._predict, head, seed))

    def backward(self, layer: int) -> None:
        """Computes the gradients before a layer from those behind it."""
        self._each(partial(self._backward, self._layer(layer), self.decoder.turns(layer, 0, self.length)))

    def into_rows(self, windows: Sequence[NDArray[np.int32]], found: Field) -> None:
        """Computes the gradients at rows of the embedding from those of what a norm or a projection makes of them."""
        self._each(partial(self._into_rows, windows, found))

    def _into_rows(self, windows: Sequence[NDArray[np.int32]], found: Field, window: int, span: slice) -> None:
        ids, places = np.unique(windows[window], return_inverse=True)
        known = self.weights.some_rows("token_embd.weight", ids).float()
        rows = known[torch.from_numpy(places)].requires_grad_()
        decoder = Decoder(
            lambda slot, layer: rows if slot == "token_embd.weight" else self.weights(slot, layer),
            self.decoder.spec, self.decoder.hyper,
        )  # fmt: skip
        order = torch.arange(self.length)
        with torch.enable_grad():
            hidden = decoder.embed_at(order[None], order)
            (gradient,) = torch.autograd.grad(hidden, rows, self.fields[0].read(span.start, span.stop)[None])
        found.write(span.start, gradient)

    def _layer(self, number: int) -> Layer:
        loaded = self.weights.layer(number, self.decoder.device)
        return Layer(number, self.decoder.traits(number), self.decoder.hyper, loaded.values)

    def _each(self, work: Callable[[int, slice], None]) -> None:
        spans = [slice(start * self.length, (start + 1) * self.length) for start in range(self.windows)]
        self.workers.run(partial(_detached, work, number, span) for number, span in enumerate(spans))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, 2 * len(self.fields) - 1)

    def _forward(self, layer: Layer, turns: Turns | None, _window: int, span: slice) -> None:
        hidden = self.fields[layer.index].read(span.start, span.stop)
        self.fields[layer.index + 1].write(span.start, layer.run(hidden[None], turns, None)[0])

    def _predict(self, head: _Head, seed: int, window: int, span: slice) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + window)
        hidden = self.fields[-1].read(span.start, span.stop).clone()
        for start in range(0, self.length, _HEAD_TOKENS):
            rows = slice(start, min(start + _HEAD_TOKENS, self.length))
            hidden[rows] = head.gradient(hidden[rows], generator)
        self.fields[-1].write(span.start, hidden)

    def _backward(self, layer: Layer, turns: Turns | None, _window: int, span: slice) -> None:
        hidden = self.fields[layer.index].read(span.start, span.stop).clone()[None].requires_grad_()
        behind = self.fields[layer.index + 1].read(span.start, span.stop)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(layer.run(hidden, turns, None), hidden, behind[None])
        self.fields[layer.index].write(span.start, gradient[0])


def _detached(work: Callable[[int, slice], None], window: int, span: slice) -> None:
    with torch.no_grad():
        work(window, span)


@dataclass(frozen=True, eq=False)
class _Head:
    """The last norm and the head, whose rows stay in the type they are stored in."""

    inputs: HeadInput
    rows: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    cap: float | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, decoder: Decoder, weights: ModelWeights) -> _Head:
        stored = CheckpointWeights(checkpoint, weights.spec, weights.hyper)
        slot = "token_embd.weight" if decoder.tied else "output.weight"
        rows = stored(slot, -1)
        if rows is None:
            raise InputError(f"{checkpoint.name}: the model has no {slot}")
        bias, hyper = weights("output.bias", -1), weights.hyper
        return cls(HeadInput(weights, decoder.device), rows, bias, hyper.logit_scale, hyper.logit_softcap)

    def gradient(self, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws a token after each, and gives the gradients of -log of their probabilities, (T, K)."""
        inputs = hidden.clone().requires_grad_()
        with torch.enable_grad():
            normal = self.inputs.of(inputs)
        logits = torch.cat(
            [F.linear(normal.detach(), part.float()) for part in torch.split(self.rows, _HEAD_ROWS)], dim=1
        )
        logits = (logits if self.bias is None else logits + self.bias) * self.scale
        slope = None
        if self.cap is not None:
            bent = torch.tanh(logits / self.cap)
            logits, slope = bent * self.cap, 1 - bent.square()
        behind = logits.softmax(dim=1)
        drawn = torch.multinomial(behind, 1, generator=generator)
        behind.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
        behind *= self.scale if slope is None else slope * self.scale
        before = torch.zeros_like(normal)
        for part, share in zip(torch.split(self.rows, _HEAD_ROWS), torch.split(behind, _HEAD_ROWS, dim=1), strict=True):
            before.addmm_(share, part.float())
        (gradient,) = torch.autograd.grad(normal, inputs, before)
        return gradient


def _outer(name: str, field: Field, windows: int, length: int) -> NDArray[np.float32]:
    """Means of g g^T, window after window."""
    total = np.zeros((field.width, field.width))
    for window in range(windows):
        values = field.read(window * length, (window + 1) * length)
        total += (values.T @ values).numpy()
    if not np.isfinite(total).all():
        raise InputError(f"{name}: the gradients of its predictions are not finite")
    mean = total / (windows * length)
    found: NDArray[np.float32] = ((mean + mean.T) / 2).astype(np.float32)
    return found
