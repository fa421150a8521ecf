"""Measures what llama.cpp's importance matrix holds: per linear weight and input column, the sum of squared inputs.

Nothing is quantized, so a layer is run from its input to its output for some windows at a time, and only its output is
kept for every token: a quarter of what `walk.calibrate` carries on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.activations import ActivationStore, Field
from quantpress.convert.calibration.embedded import embedded
from quantpress.convert.calibration.hessian import finite, power_of
from quantpress.convert.calibration.layer_weights import ModelWeights
from quantpress.convert.calibration.precision import products
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.gguf.importance_names import head_name, layer_name
from quantpress.convert.layer import STEPS, Layer, State, normalize, steps_of
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError

__all__ = ["HeadInput", "Powers", "measure_powers"]

_SLICE_TOKENS = 512  # that a thread takes at once, where windows are shorter; see `passes`
_SLICE_VALUES = 2 << 20  # of the widest activation of a slice

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class Powers:
    """What was measured.

    Attributes:
        sums: name of a weight in GGUF -> (K,) float64 sum of squares of its inputs over all tokens.
        tokens: that were seen.
    """

    sums: Mapping[str, NDArray[np.float64]]
    tokens: int


class HeadInput:
    """What the head sees of the last layer's output.

    Attributes:
        name: of the head's weight in GGUF, which is the embedding's where it stands for the head.
    """

    def __init__(self, weights: ModelWeights, device: torch.device) -> None:
        """Reads the last norm."""
        self.name = head_name(weights.spec, weights.hyper)
        self._kind, self._eps = weights.spec.norm, weights.hyper.norm_eps
        norm, bias = weights("output_norm.weight", -1), weights("output_norm.bias", -1)
        assert norm is not None, "every table has an output norm"
        self._norm, self._bias = norm.to(device), None if bias is None else bias.to(device)

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives (..., hidden) float32 from the last layer's output of the same shape."""
        return normalize(hidden, self._norm, self._bias, kind=self._kind, eps=self._eps)


def measure_powers(
    checkpoint: Checkpoint, windows: Sequence[NDArray[np.int32]], *, threads: int, folder: Path, device: str = "cpu",
    max_memory: int | None = None, precision: str = "f32", progress: Progress | None = None,
) -> Powers:  # fmt: skip
    """Runs a model on windows of tokens and measures the inputs of every linear weight and of the head.

    Peak memory is the weights of a layer, `max_memory` for what goes from layer to layer, and what the slices under
    way need. The numbers are the same for any number of threads and any budget.

    Args:
        checkpoint: the model; its tensors are read as exact as they are known, a layer at a time.
        windows: (T,) int32 token ids, all of the same length.
        threads: number of threads to compute with.
        folder: an existing folder for activations that do not fit, which are removed at the end.
        device: where to compute.
        max_memory: bytes of memory for activations; None for as much as they need.
        precision: of the products, one of `precision.PRECISIONS`; squares are those of float32 values, and are summed
            in float64.
        progress: told the layers that are done and how many there are.

    Raises:
        InputError: the model does not fit its family or lacks a token, or activations are not finite.
        OutputError: activations cannot be written.
    """
    if not windows or len({len(window) for window in windows}) != 1:
        raise InputError("measuring wants at least one window, and all of the same length")
    checked = preflight(checkpoint)
    weights = ModelWeights(checked)
    decoder = Decoder(weights, checked.spec, checked.hyper, device=device)
    length, sums = len(windows[0]), dict[str, NDArray[np.float64]]()
    tokens = len(windows) * length
    with Workers(threads) as workers, ActivationStore(folder, tokens, max_memory) as store:
        hidden = store.field("hidden", decoder.hyper.hidden)
        for start, values in embedded(weights, windows, decoder.device):
            hidden.write(start, values.float().cpu())
        for number in range(decoder.hyper.layers):
            if progress is not None:
                progress(number, decoder.hyper.layers)
            run = _LayerRun.of(number, decoder, weights, hidden, length, precision == "bf16")
            with products(precision):
                found = run.measure(workers, tokens)
            _check(checkpoint.name, number, found)
            sums |= found
        if progress is not None:
            progress(decoder.hyper.layers, decoder.hyper.layers)
    return Powers(sums, tokens)


def _check(model: str, number: int, found: Mapping[str, NDArray[np.float64]]) -> None:
    for name, power in found.items():
        if not finite({"power": power}):
            raise InputError(f"{model}: layer {number}: {shown(name)}: its inputs are not finite")


@dataclass(frozen=True, eq=False, slots=True)
class _LayerRun:
    """A layer that takes its input from a field and leaves its output there."""

    layer: Layer
    names: tuple[tuple[str, ...], ...]
    head: HeadInput | None
    turns: Any
    hidden: Field
    length: int
    widths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(
        cls, number: int, decoder: Decoder, weights: ModelWeights, hidden: Field, length: int, narrow: bool
    ) -> _LayerRun:
        """Reads the weights of a layer."""
        loaded, dims = weights.layer(number, decoder.device), decoder.hyper.dims
        layer = Layer(
            number, decoder.traits, decoder.hyper, loaded.narrow(loaded.values) if narrow else loaded.values,
            attention_type=torch.bfloat16 if narrow else None,
        )  # fmt: skip
        names = tuple(tuple(layer_name(number, slot) for slot in slots) for slots in steps_of(decoder.traits))
        head = HeadInput(weights, decoder.device) if number + 1 == decoder.hyper.layers else None
        widths = (dims["hidden"], dims["q"], dims["hidden"], dims["ffn"], *([dims["hidden"]] if head else []))
        turns = decoder.turns(number, 0, length)
        return cls(layer, names, head, turns, hidden, length, widths, decoder.device)

    def measure(self, workers: Workers, tokens: int) -> dict[str, NDArray[np.float64]]:
        """Runs all tokens through the layer; sums are taken in the order of the tokens."""
        size = max(1, min(_SLICE_TOKENS, _SLICE_VALUES // max(self.widths)))
        size = max(1, size // self.length) * self.length
        tasks = [partial(self._slice, start, min(start + size, tokens)) for start in range(0, tokens, size)]
        totals = [np.zeros(width) for width in self.widths]
        for powers in workers.in_order("forward", tasks):
            for total, power in zip(totals, powers, strict=True):
                total += power
        named = {name: totals[step] for step in STEPS for name in self.names[step]}
        return named if self.head is None else {**named, self.head.name: totals[-1]}

    def _slice(self, start: int, stop: int) -> list[NDArray[np.float64]]:
        values = self.hidden.read(start, stop).to(self.device)
        state: State = {"hidden": values.view(-1, self.length, values.shape[-1])}
        powers = []
        for step in STEPS:
            inputs = self.layer.begin(step, state)
            powers.append(power_of(inputs.flatten(0, 1)))
            state = self.layer.finish(step, state, inputs, self.turns)
            state = {name: values.float() for name, values in state.items()}
        output = state["hidden"]
        if self.head is not None:
            powers.append(power_of(self.head.of(output).flatten(0, 1)))
        self.hidden.write(start, output.reshape(stop - start, -1).cpu())
        return powers
