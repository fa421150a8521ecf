"""Runs models in torch: a checkpoint, quantized or not, or a GGUF file read back with the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.layer import Adapt, Observe
from quantpress.convert.lora.ledger import Adapted
from quantpress.convert.lora.unmerged import unmerged
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import check_tied_head, preflight
from quantpress.convert.weights import CheckpointWeights, Weight
from quantpress.pipelines.gguf_readback import read_back
from quantpress.pipelines.machine import free_memory
from quantpress.pipelines.rounded_inputs import rounded_inputs

FLOAT32_BYTES = 4
UNMERGED = "torch (base + adapter, unmerged)"
STREAM_BATCH = 4  # windows that run through a layer together when weights are streamed


class _OneLayer:
    """Keeps the float32 weights of the layer in use, so that several windows run on one reading of it."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._layer, self._kept = -1, dict[str, "torch.Tensor | None"]()

    def __call__(self, slot: str, layer: int) -> torch.Tensor | None:
        if layer < 0:
            return self._weight(slot, layer)
        if layer != self._layer:
            self._layer, self._kept = layer, {}
        if slot not in self._kept:
            found = self._weight(slot, layer)
            self._kept[slot] = None if found is None else found.float()
        return self._kept[slot]


class TorchRuntime:
    """The decoder as a `Runtime`, in float32."""

    def __init__(
        self, weight: Weight, spec: ArchSpec, hyper: Hyperparameters, *, parameters: int, device: str,
        max_memory: int | None, rounded_input: Callable[[int, str, torch.Tensor], torch.Tensor] | None = None,
        adapt: Adapt | None = None, name: str = "torch",
    ) -> None:  # fmt: skip
        """Reads nothing yet; weights stay in memory if they fit `max_memory` (default: half of what is free).

        `rounded_input` gives layer (-1: the head), slot and input of a linear as another runtime would round it;
        `adapt` are adapters that run beside the weights.
        """
        self.name = name
        limit = free_memory() // 2 if max_memory is None else max_memory
        resident = parameters * FLOAT32_BYTES <= limit
        self.vocab_size, self.context = hyper.vocab, hyper.context
        self._layers = hyper.layers
        self._batch = 1 if resident else STREAM_BATCH
        weights = weight if resident else _OneLayer(weight)
        self._rounded_input = rounded_input
        self._decoder = Decoder(weights, spec, hyper, device=device, resident=resident, adapt=adapt)
        self._prepared: dict[tuple[bytes, int], torch.Tensor] = {}

    @classmethod
    def of_checkpoint(
        cls, source: Checkpoint, *, device: str = "cpu", max_memory: int | None = None, as_served: bool = False
    ) -> TorchRuntime:
        """Runs an open checkpoint.

        Args:
            source: the checkpoint; of a quantized one its codes, in float32.
            device: where to compute.
            max_memory: see `__init__`.
            as_served: round the inputs of linears too where the kernels for such a checkpoint do; else the inputs are
                exact, as befits a source that others are compared with.

        Raises:
            InputError: it does not fit its family.
        """
        checked = preflight(source)
        check_tied_head(checked)
        weight = CheckpointWeights(source, checked.spec, checked.hyper)
        return cls(
            weight, checked.spec, checked.hyper, parameters=source.parameters, device=device, max_memory=max_memory,
            rounded_input=rounded_inputs(source, checked) if as_served else None,
        )  # fmt: skip

    @classmethod
    def of_adapted(cls, adapted: Adapted, *, device: str = "cpu", max_memory: int | None = None) -> TorchRuntime:
        """Runs a base with its adapters beside it; nothing that merges is used.

        Raises:
            InputError: base and adapters do not fit, or the decoder cannot run an adapter of this kind.
        """
        model = unmerged(adapted.base, adapted.applied)
        return cls(
            model.weight, model.spec, model.hyper, parameters=model.parameters, device=device, max_memory=max_memory,
            adapt=model.adapt, name=UNMERGED,
        )  # fmt: skip

    @classmethod
    def of_gguf(cls, path: Path, *, device: str = "cpu", max_memory: int | None = None) -> TorchRuntime:
        """Runs a GGUF file that the `gguf` package reads; nothing of the exporter's code is used.

        Raises:
            InputError: the package cannot read the file, or its metadata make no sense.
        """
        read = read_back(path)
        return cls(
            read.weight, read.spec, read.hyper, parameters=read.parameters, device=device, max_memory=max_memory,
            rounded_input=read.rounded_input,
        )  # fmt: skip

    def prepare(
        self, windows: Sequence[NDArray[np.int32]], first: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs all windows through all layers, reading each layer once, and keeps what `logits` needs.

        Args:
            windows: windows of equal length.
            first: the position that `logits` will be asked from.
            progress: told the layers that are done.
        """
        wanted = [window for window in windows if (window.tobytes(), first) not in self._prepared]
        if not wanted:
            return
        groups = [wanted[start : start + self._batch] for start in range(0, len(wanted), self._batch)]
        hidden = [self._decoder.embed(torch.from_numpy(np.stack(group).astype(np.int64))) for group in groups]
        for layer in range(self._layers):
            for number, values in enumerate(hidden):
                hidden[number] = self._decoder.run_layer(layer, values, observe=self._observe(layer))
            if progress is not None:
                progress(layer + 1, self._layers)
        for group, values in zip(groups, hidden, strict=True):
            for window, last in zip(group, values, strict=True):
                self._prepared[window.tobytes(), first] = last[first:].clone()

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`."""
        hidden = self._prepared.get((tokens.tobytes(), first))
        if hidden is None:
            whole = self._decoder.embed(torch.from_numpy(tokens[None].astype(np.int64)))
            for layer in range(self._layers):
                whole = self._decoder.run_layer(layer, whole, observe=self._observe(layer))
            hidden = whole[0, first:]
        found = self._decoder.head(hidden[None], observe=self._observe(-1))
        values: NDArray[np.float32] = found[0].cpu().numpy()
        return values

    def _observe(self, layer: int) -> Observe | None:
        return None if self._rounded_input is None else partial(self._rounded_input, layer)

    def close(self) -> None:
        """Forgets what was prepared."""
        self._prepared.clear()

    def __enter__(self) -> TorchRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
