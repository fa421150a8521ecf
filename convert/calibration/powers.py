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
from quantpress.convert.calibration.inputs import inputs_of
from quantpress.convert.calibration.layer_weights import ModelWeights
from quantpress.convert.calibration.passes import inner_width
from quantpress.convert.calibration.precision import products
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.gguf.importance_names import head_name, is_measured, layer_name
from quantpress.convert.layer import QKV, STEPS, UP, Layer, State
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.convert.traits import Place, places_of
from quantpress.quant.errors import InputError

__all__ = ["HeadInput", "PowerSums", "Powers", "measure_powers"]

_SLICE_TOKENS = 512  # that a thread takes at once, where windows are shorter; see `passes`
_SLICE_VALUES = 2 << 20  # of the widest activation of a slice

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class Powers:
    """What was measured.

    Attributes:
        sums: name of a weight in GGUF -> (E, K) float64 sums of squares of its inputs over the tokens that each of its
            experts saw; E is 1 for a matrix.
        counts: the same names -> (E,) int64 tokens.
        tokens: of the text.
    """

    sums: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, NDArray[np.int64]]
    tokens: int


class PowerSums:
    """Collects sums of squares by the names of weights in GGUF, those of experts one after another."""

    def __init__(self) -> None:
        """Begins with none."""
        self._sums: dict[str, list[NDArray[np.float64]]] = {}
        self._counts: dict[str, list[int]] = {}

    def add(self, name: str, power: NDArray[np.float64], tokens: int) -> None:
        """Takes (K,) of a matrix, or of the next expert."""
        self._sums.setdefault(name, []).append(power)
        self._counts.setdefault(name, []).append(tokens)

    def of_place(self, layer: int, place: Place, power: NDArray[np.float64], tokens: int) -> None:
        """Takes (K,) of all weights of a place."""
        if is_measured(place):
            for slot in place.slots:
                self.add(layer_name(layer, slot), power, tokens)

    @property
    def sums(self) -> dict[str, NDArray[np.float64]]:
        """As `Powers.sums`."""
        return {name: np.stack(rows) for name, rows in self._sums.items()}

    @property
    def counts(self) -> dict[str, NDArray[np.int64]]:
        """As `Powers.counts`."""
        return {name: np.array(counts, np.int64) for name, counts in self._counts.items()}


class HeadInput:
    """What the head sees of the last layer's output.

    Attributes:
        name: of the head's weight in GGUF, which is the embedding's where it stands for the head.
        columns: values per token.
    """

    def __init__(self, weights: ModelWeights, device: torch.device) -> None:
        """Reads nothing yet."""
        self.name = head_name(weights.spec, weights.hyper)
        self.columns = weights.hyper.dims["embedding"]
        self._decoder = Decoder(weights, weights.spec, weights.hyper, device=device, resident=True)

    @classmethod
    def of_model(cls, weights: ModelWeights, device: torch.device) -> HeadInput | None:
        """Gives it for a model that has a head."""
        found = cls(weights, device)
        return found if found.name else None

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives (..., columns) float32 from the last layer's output, (..., hidden)."""
        return self._decoder.final(hidden)


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
    length, sums = len(windows[0]), PowerSums()
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
                run.measure(workers, tokens, sums, checkpoint.name)
        if progress is not None:
            progress(decoder.hyper.layers, decoder.hyper.layers)
    return Powers(sums.sums, sums.counts, tokens)


@dataclass(frozen=True, eq=False, slots=True)
class _LayerRun:
    """A layer that takes its input from a field and leaves its output there."""

    layer: Layer
    places: tuple[Place, ...]
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
            number, decoder.traits(number), decoder.hyper, loaded.narrow(loaded.values) if narrow else loaded.values,
            attention_type=torch.bfloat16 if narrow else None,
        )  # fmt: skip
        places = tuple(filter(is_measured, places_of(layer.traits)))
        head = HeadInput.of_model(weights, decoder.device) if number + 1 == decoder.hyper.layers else None
        widths = (
            *(dims[place.columns] for place in places),
            *(inner_width(decoder, number, step) for step in (QKV, UP)),
        )
        turns = decoder.turns(number, 0, length)
        return cls(layer, places, head, turns, hidden, length, widths, decoder.device)

    def measure(self, workers: Workers, tokens: int, sums: PowerSums, model: str) -> None:
        """Runs all tokens through the layer; sums are taken in the order of the tokens.

        Raises:
            InputError: inputs that are not finite.
        """
        size = max(1, min(_SLICE_TOKENS, _SLICE_VALUES // max(self.widths)))
        size = max(1, size // self.length) * self.length
        tasks = [partial(self._slice, start, min(start + size, tokens)) for start in range(0, tokens, size)]
        totals: list[NDArray[np.float64]] = []
        counts = np.zeros(0, np.int64)
        for powers, seen in workers.in_order("forward", tasks):
            totals = [total + power for total, power in zip(totals, powers, strict=True)] if totals else powers
            counts = counts + seen if len(counts) else seen
        for place, power, count in zip(self.places, totals, counts, strict=False):
            if not finite({"power": power}):
                name = shown(layer_name(self.layer.index, place.slots[0]))
                raise InputError(f"{model}: layer {self.layer.index}: {name}: its inputs are not finite")
            sums.of_place(self.layer.index, place, power, int(count))
        if self.head is not None:
            if not finite({"power": totals[-1]}):
                raise InputError(f"{model}: {self.head.name}: its inputs are not finite")
            sums.add(self.head.name, totals[-1], tokens)

    def _slice(self, start: int, stop: int) -> tuple[list[NDArray[np.float64]], NDArray[np.int64]]:
        values = self.hidden.read(start, stop).to(self.device)
        state: State = {"hidden": values.view(-1, self.length, values.shape[-1])}
        powers, counts = list[NDArray[np.float64]](), list[int]()
        for step in STEPS:
            places = [place for place in self.places if place.step == step]
            for inputs, _ in inputs_of(step, places, (self.layer,), (state,)):
                powers.append(power_of(inputs))
                counts.append(len(inputs))
            state = self.layer.finish(step, state, self.layer.begin(step, state), self.turns)
            state = {name: values.float() for name, values in state.items()}
        output = state["hidden"]
        if self.head is not None:
            powers.append(power_of(self.head.of(output).flatten(0, 1)))
        self.hidden.write(start, output.reshape(stop - start, -1).cpu())
        return powers, np.array(counts, np.int64)
