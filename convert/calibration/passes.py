"""Takes all tokens of a calibration text from one step of a layer to the next, slice by slice, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantpress.convert.calibration.activations import ActivationStore, Field
from quantpress.convert.calibration.chain import ChainWriter
from quantpress.convert.calibration.hessian import Measured, Statistics
from quantpress.convert.calibration.precision import products
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.layer import DOWN, OUTPUT, QKV, UP, Layer, State
from quantpress.convert.model import Decoder

__all__ = ["Pair", "Passes"]

# Tokens that a thread takes at once: enough for fast products. With twice as many a calibration takes as long, and each
# thread holds twice the memory; with 2048 what is computed between two products leaves the cache.
_SLICE_TOKENS = 512
_SLICE_VALUES = 2 << 20  # of the widest activation of a slice: 8 MiB, of which a thread has up to four


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer with the weights to compute with, and the same with the source's weights; None: these are not run."""

    layer: Layer
    source: Layer | None = None

    @property
    def streams(self) -> tuple[Layer, ...]:
        """Both, the one to compute with first."""
        return (self.layer,) if self.source is None else (self.layer, self.source)


class _Stream:
    """What is carried on for every token (`layer.State`).

    The residual has a field of its own; `inner` is that of the attention's output or of the MLP, whichever is next.
    """

    def __init__(self, decoder: Decoder, store: ActivationStore, length: int, name: str) -> None:
        dims = decoder.hyper.dims
        self._length, self._device = length, decoder.device
        self._inner_widths = {QKV: dims["q"], UP: dims["ffn"]}
        self._fields: dict[str, Field] = {"hidden": store.field(f"{name}hidden", dims["hidden"])}
        self._fields["inner"] = store.field(f"{name}inner", max(self._inner_widths.values()))
        if decoder.hyper.parallel_residual:
            self._fields["attended"] = store.field(f"{name}attended", dims["hidden"])

    def prepare(self, after: int | None) -> None:
        """Sets the width of what the step leaves."""
        if after in self._inner_widths:
            self._fields["inner"].width = self._inner_widths[after]

    def begin(self, start: int, values: torch.Tensor) -> None:
        """Takes inputs of a layer, (n, hidden)."""
        self._fields["hidden"].write(start, values.cpu())

    def read(self, after: int | None, start: int, stop: int) -> State:
        """Reads what a step needs: (windows, length, width) for the attention, (1, n, width) for all others."""
        names = ["hidden", *(["inner"] if after in (OUTPUT, DOWN) else [])]
        if after == DOWN and "attended" in self._fields:
            names.append("attended")
        rows = self._length if after == QKV else stop - start
        parts = {name: self._fields[name].read(start, stop).to(self._device) for name in names}
        return {name: values.view(-1, rows, values.shape[-1]) for name, values in parts.items()}

    def finish(self, layer: Layer, after: int | None, turns: Any, start: int, stop: int) -> State:
        """Finishes a step for some tokens and keeps what it leaves."""
        state = self.read(after, start, stop)
        if after is not None:
            before = state
            finished = layer.finish(after, before, layer.begin(after, before), turns)
            state = {name: values.float() for name, values in finished.items()}
            for name, values in state.items():
                if values is not before.get(name):
                    self._fields[name].write(start, values.reshape(stop - start, -1).cpu())
        return state


Look = Callable[[Layer, State], torch.Tensor]
"""Gives the inputs to be measured from what a step has left."""


class Passes:
    """How what is carried on gets from step to step."""

    def __init__(
        self, decoder: Decoder, store: ActivationStore, workers: Workers, *, windows: int, length: int,
        both: bool = False, precision: str = "f32",
    ) -> None:  # fmt: skip
        """Takes memory for all fields.

        Args:
            decoder: of the model, for its sizes and positions.
            store: for the fields.
            workers: who computes.
            windows: number of windows.
            length: tokens of each.
            both: whether what the source's weights give is carried on too.
            precision: of products, one of `precision.PRECISIONS`.
        """
        self._decoder, self._workers, self._precision = decoder, workers, precision
        self._tokens, self._length = windows * length, length
        dims = decoder.hyper.dims
        self.widths = {QKV: dims["hidden"], OUTPUT: dims["q"], UP: dims["hidden"], DOWN: dims["ffn"]}
        self._streams = [_Stream(decoder, store, length, name) for name in ("", "source-")[: 1 + both]]

    @property
    def chain_width(self) -> int:
        """Values per token that a layer begins with."""
        return len(self._streams) * self.widths[QKV]

    def begin(self, rows: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Takes a layer's inputs: number of a first token, and (n, `chain_width`) or (n, hidden) for all streams."""
        for start, values in rows:
            width = self.widths[QKV]
            for number, stream in enumerate(self._streams):
                first = number * width % values.shape[1]
                stream.begin(start, values[:, first : first + width])

    def run(
        self, pair: Pair, *, after: int | None = None, step: int | None = None,
        statistics: Statistics | None = None, chain: ChainWriter | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Finishes one step for all tokens and looks at the inputs of another.

        Args:
            pair: the layer.
            after: step to finish; None at the start of a layer.
            step: step whose inputs are looked at; None at the end of a layer.
            statistics: of these inputs.
            chain: takes the residual after the step.
            head: gives what is to be looked at from the residual, where that is no step's input.
        """
        turns = self._decoder.turns(pair.layer.index, 0, self._length) if after == QKV else None
        for stream in self._streams:
            stream.prepare(after)
        look = None if statistics is None else _look(step, head)
        tasks = [
            partial(self._slice, pair, after, turns, look, statistics, chain, start, stop)
            for start, stop in self._slices(whole_windows=after == QKV)
        ]
        submit = partial(self._workers.submit, "hessian")
        with products(self._precision):
            for seen in self._workers.in_order("forward", tasks):
                if seen is not None and statistics is not None:
                    statistics.add(seen, submit)
            if statistics is not None:
                statistics.wait()

    def _slices(self, *, whole_windows: bool) -> Sequence[tuple[int, int]]:
        """Cuts the tokens, the same way whatever the threads and the budget."""
        widest = max(self.widths.values())
        size = max(1, min(_SLICE_TOKENS, _SLICE_VALUES // widest))
        if whole_windows:
            size = max(1, size // self._length) * self._length
        return [(start, min(start + size, self._tokens)) for start in range(0, self._tokens, size)]

    def _slice(
        self, pair: Pair, after: int | None, turns: Any, look: Look | None, statistics: Statistics | None,
        chain: ChainWriter | None, start: int, stop: int,
    ) -> Measured | None:  # fmt: skip
        layers = pair.streams
        states = [
            stream.finish(layer, after, turns, start, stop) for layer, stream in zip(layers, self._streams, strict=True)
        ]
        if chain is not None:
            rows = [state["hidden"].reshape(stop - start, -1).cpu() for state in states]
            chain.write(start, rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
        if look is None or statistics is None:
            return None
        seen = [look(layer, state).reshape(stop - start, -1) for layer, state in zip(layers, states, strict=True)]
        return statistics.measure(*seen)


def _look(step: int | None, head: Callable[[torch.Tensor], torch.Tensor] | None) -> Look | None:
    if head is not None:
        return lambda _layer, state: head(state["hidden"])
    return None if step is None else lambda layer, state: layer.begin(step, state)
