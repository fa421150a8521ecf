"""Takes all tokens of a calibration text from one step of a layer to the next, slice by slice, on several threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.activations import ActivationStore, Field
from quantpress.convert.calibration.chain import ChainWriter
from quantpress.convert.calibration.hessian import Statistics
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.layer import DOWN, OUTPUT, QKV, UP, Layer, State
from quantpress.convert.model import Decoder

__all__ = ["Passes"]

# Tokens that a thread takes at once: enough for fast products; with 1024 what is computed between two products leaves
# the cache and takes three times as long (SmolLM2-135M).
_SLICE_TOKENS = 512
_SLICE_VALUES = 4 << 20  # of the widest activation of a slice: 16 MiB, of which a thread has up to four

Seen = tuple[torch.Tensor, tuple[NDArray[Any] | None, NDArray[Any] | None]]
"""The inputs of a step's linears for a slice, (n, K), and what was measured of them."""


class Passes:
    """What is carried on for every token (`layer.State`), and how it gets from step to step.

    The residual has a field of its own; `inner` is that of the attention's output or of the MLP, whichever is next.
    """

    def __init__(
        self, decoder: Decoder, store: ActivationStore, workers: Workers, *, windows: int, length: int
    ) -> None:
        """Takes memory for all fields.

        Args:
            decoder: of the model, for its sizes and positions.
            store: for the fields.
            workers: who computes.
            windows: number of windows.
            length: tokens of each.
        """
        self._decoder, self._workers = decoder, workers
        self._tokens, self._length = windows * length, length
        dims = decoder.hyper.dims
        self._inner_widths = {QKV: dims["q"], UP: dims["ffn"]}
        self.widths = {QKV: dims["hidden"], OUTPUT: dims["q"], UP: dims["hidden"], DOWN: dims["ffn"]}
        self._fields: dict[str, Field] = {"hidden": store.field("hidden", dims["hidden"])}
        self._fields["inner"] = store.field("inner", max(self._inner_widths.values()))
        if decoder.hyper.parallel_residual:
            self._fields["attended"] = store.field("attended", dims["hidden"])

    def begin(self, rows: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Takes the first layer's inputs: number of a first token, (n, hidden) float32."""
        for start, values in rows:
            self._fields["hidden"].write(start, values.cpu())

    def run(
        self, layer: Layer, *, after: int | None = None, step: int | None = None,
        statistics: Statistics | None = None, chain: ChainWriter | None = None,
    ) -> None:  # fmt: skip
        """Finishes one step for all tokens and looks at the inputs of another.

        Args:
            layer: with the weights to compute with.
            after: step to finish; None at the start of a layer.
            step: step whose inputs are looked at; None at the end of a layer.
            statistics: of these inputs.
            chain: takes the residual after the step.
        """
        turns = self._decoder.turns(layer.index, 0, self._length) if after == QKV else None
        if after in self._inner_widths:
            self._fields["inner"].width = self._inner_widths[after]
        tasks = [
            partial(self._slice, layer, after, turns, step if statistics else None, statistics, chain, start, stop)
            for start, stop in self._slices(whole_windows=after == QKV)
        ]
        submit = partial(self._workers.submit, "hessian")
        for seen in self._workers.in_order("forward", tasks):
            if seen is not None and statistics is not None:
                statistics.add(*seen, submit)

    def _slices(self, *, whole_windows: bool) -> Sequence[tuple[int, int]]:
        """Cuts the tokens, the same way whatever the threads and the budget."""
        widest = max(self.widths.values())
        size = max(1, min(_SLICE_TOKENS, _SLICE_VALUES // widest))
        if whole_windows:
            size = max(1, size // self._length) * self._length
        return [(start, min(start + size, self._tokens)) for start in range(0, self._tokens, size)]

    def _slice(
        self, layer: Layer, after: int | None, turns: Any, step: int | None, statistics: Statistics | None,
        chain: ChainWriter | None, start: int, stop: int,
    ) -> Seen | None:  # fmt: skip
        state = self._read(after, start, stop)
        if after is not None:
            before = state
            state = layer.finish(after, before, layer.begin(after, before), turns)
            for name, values in state.items():
                if values is not before.get(name):
                    self._fields[name].write(start, values.reshape(stop - start, -1).cpu())
        if chain is not None:
            chain.write(start, state["hidden"].reshape(stop - start, -1).cpu())
        if step is None or statistics is None:
            return None
        seen = layer.begin(step, state).reshape(stop - start, -1)
        return seen, statistics.measure(seen)

    def _read(self, after: int | None, start: int, stop: int) -> State:
        """Reads what a step needs: (windows, length, width) for the attention, (1, n, width) for all others."""
        names = ["hidden", *(["inner"] if after in (OUTPUT, DOWN) else [])]
        if after == DOWN and "attended" in self._fields:
            names.append("attended")
        rows = self._length if after == QKV else stop - start
        device = self._decoder.device
        parts = {name: self._fields[name].read(start, stop).to(device) for name in names}
        return {name: values.view(-1, rows, values.shape[-1]) for name, values in parts.items()}
