"""Takes all tokens of a calibration text from one step of a layer to the next, slice by slice, on several threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantpress.convert.calibration.activations import ActivationStore, Field
from quantpress.convert.calibration.chain import ChainWriter
from quantpress.convert.calibration.precision import products
from quantpress.convert.calibration.watch import Seen, Taker, Watch
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.layer import DOWN, OUTPUT, QKV, UP, Layer, State
from quantpress.convert.model import Decoder

__all__ = ["Pair", "Passes", "inner_width"]

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
        self._decoder, self._length, self._device = decoder, length, decoder.device
        hyper = decoder.hyper
        hidden, widest = hyper.dims["hidden"], 0
        for layer in range(hyper.layers):
            widest = max(widest, *(inner_width(decoder, layer, step) for step in (QKV, UP)))
        self._fields: dict[str, Field] = {"hidden": store.field(f"{name}hidden", hidden)}
        self._fields["inner"] = store.field(f"{name}inner", widest)
        if hyper.parallel_residual:
            self._fields["attended"] = store.field(f"{name}attended", hidden)
        if hyper.experts is not None:
            self._fields["routes"] = store.field(f"{name}routes", 2 * hyper.experts.used + 1)

    def prepare(self, layer: int, after: int | None) -> None:
        """Sets the width of what the step leaves."""
        if after in (QKV, UP):
            self._fields["inner"].width = inner_width(self._decoder, layer, after)

    def begin(self, start: int, values: torch.Tensor) -> None:
        """Takes inputs of a layer, (n, hidden)."""
        self._fields["hidden"].write(start, values.cpu())

    def read(self, layer: Layer, after: int | None, step: int | None, start: int, stop: int) -> State:
        """Reads what a step needs: (windows, length, width) for the attention, (1, n, width) for all others.

        Args:
            layer: the layer.
            after: step to be finished; None where one is only looked at.
            step: step that is looked at.
            start: first token.
            stop: behind the last one.
        """
        needing = step if after is None else after
        names = ["hidden", *(["inner"] if needing in (OUTPUT, DOWN) else [])]
        if after == DOWN and "attended" in self._fields:
            names.append("attended")
        if needing == DOWN and layer.traits.experts:
            names.append("routes")
        rows = self._length if after == QKV else stop - start
        parts = {name: self._fields[name].read(start, stop).to(self._device) for name in names}
        return {name: values.view(-1, rows, values.shape[-1]) for name, values in parts.items()}

    def finish(self, layer: Layer, after: int | None, step: int | None, turns: Any, start: int, stop: int) -> State:
        """Finishes a step for some tokens and keeps what it leaves."""
        state = self.read(layer, after, step, start, stop)
        if after is not None:
            before = state
            finished = layer.finish(after, before, layer.begin(after, before), turns)
            state = {name: values.float() for name, values in finished.items()}
            for name, values in state.items():
                if values is not before.get(name):
                    self._fields[name].write(start, values.reshape(stop - start, -1).cpu())
        return state


def inner_width(decoder: Decoder, layer: int, step: int) -> int:
    """Gives the values per token that a step of a layer leaves for an output projection.

    Args:
        decoder: of the model.
        layer: its number.
        step: `QKV` or `UP`.
    """
    dims, experts = decoder.hyper.dims, decoder.hyper.experts
    if step == QKV:
        return dims["attended"]
    if experts is None or not decoder.hyper.has_experts(layer):
        return dims["ffn"]
    return experts.used * experts.intermediate + experts.shared


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
        self._hidden = decoder.hyper.dims["hidden"]
        widths = (inner_width(decoder, layer, step) for layer in range(decoder.hyper.layers) for step in (QKV, UP))
        self._widest = max(self._hidden, *widths)
        self._streams = [_Stream(decoder, store, length, name) for name in ("", "source-")[: 1 + both]]

    @property
    def chain_width(self) -> int:
        """Values per token that a layer begins with."""
        return len(self._streams) * self._hidden

    def begin(self, rows: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Takes a layer's inputs: number of a first token, and (n, `chain_width`) or (n, hidden) for all streams."""
        for start, values in rows:
            width = self._hidden
            for number, stream in enumerate(self._streams):
                first = number * width % values.shape[1]
                stream.begin(start, values[:, first : first + width])

    def run(
        self, pair: Pair, *, after: int | None = None, step: int | None = None, watch: Watch | None = None,
        chain: ChainWriter | None = None,
    ) -> None:  # fmt: skip
        """Finishes one step for all tokens and looks at the inputs of another.

        Args:
            pair: the layer.
            after: step to finish; None where it is finished already, and at the start of a layer.
            step: step whose inputs are looked at; None at the end of a layer.
            watch: these inputs, or what is looked at instead at the end.
            chain: takes the residual after the step.
        """
        turns = self._decoder.turns(pair.layer.index, 0, self._length) if after == QKV else None
        for stream in self._streams:
            stream.prepare(pair.layer.index, after)
        tasks = [
            partial(self._slice, pair, after, step, turns, watch, chain, start, stop)
            for start, stop in self._slices(whole_windows=after == QKV)
        ]
        with products(self._precision):
            taker = None if watch is None else Taker(watch, self._workers)
            for seen in self._workers.in_order("forward", tasks):
                if taker is not None:
                    taker.take(seen)
            if taker is not None:
                taker.finish()

    def _slices(self, *, whole_windows: bool) -> Sequence[tuple[int, int]]:
        """Cuts the tokens, the same way whatever the threads and the budget."""
        size = max(1, min(_SLICE_TOKENS, _SLICE_VALUES // self._widest))
        if whole_windows:
            size = max(1, size // self._length) * self._length
        return [(start, min(start + size, self._tokens)) for start in range(0, self._tokens, size)]

    def _slice(
        self, pair: Pair, after: int | None, step: int | None, turns: Any, watch: Watch | None,
        chain: ChainWriter | None, start: int, stop: int,
    ) -> Seen:  # fmt: skip
        layers = pair.streams
        states = [
            stream.finish(layer, after, step, turns, start, stop)
            for layer, stream in zip(layers, self._streams, strict=True)
        ]
        if chain is not None:
            rows = [state["hidden"].reshape(stop - start, -1).cpu() for state in states]
            chain.write(start, rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
        return [] if watch is None else watch.seen(layers, states)
