"""Runs models in torch: a checkpoint, quantized or not, or a GGUF file read back with the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.layer import Adapt, Observe
from quantpress.convert.lora.ledger import Adapted
from quantpress.convert.lora.unmerged import unmerged
from quantpress.convert.model import Decoder, Linears
from quantpress.convert.preflight import Preflight, check_tied_head, preflight
from quantpress.convert.weights import CheckpointWeights, Weight
from quantpress.pipelines.machine import free_memory
from quantpress.pipelines.rounded_inputs import rounded_inputs
from quantpress.quant.gptq_cuda import full_float32

if TYPE_CHECKING:
    from quantpress.convert.packed_weights import PackedWeights

FLOAT32_BYTES = 4
UNMERGED = "torch (base + adapter, unmerged)"
STREAM_BATCH = 4  # windows that run through a layer together when weights are streamed

Read = TypeVar("Read")


class _OneLayer(Generic[Read]):
    """Keeps what was read of the layer in use, so that several windows run on one reading of it."""

    def __init__(self, read: Callable[[str, int], Read | None], keep: Callable[[Read], Read] = lambda found: found):
        self._read, self._keep = read, keep
        self._layer, self._kept = -1, dict[str, "Read | None"]()

    def __call__(self, slot: str, layer: int) -> Read | None:
        if layer < 0:
            return self._read(slot, layer)
        if layer != self._layer:
            self._layer, self._kept = layer, {}
        if slot not in self._kept:
            found = self._read(slot, layer)
            self._kept[slot] = None if found is None else self._keep(found)
        return self._kept[slot]


class TorchRuntime:
    """The decoder as a `Runtime`, in float32."""

    def __init__(
        self, weight: Weight, spec: ArchSpec, hyper: Hyperparameters, *, nbytes: int, device: str,
        max_memory: int | None, rounded_input: Callable[[int, str, torch.Tensor], torch.Tensor] | None = None,
        adapt: Adapt | None = None, linears: Linears | None = None, name: str = "torch",
    ) -> None:  # fmt: skip
        """Reads nothing yet; weights stay in memory if `nbytes` fit `max_memory` (default: half of what is free).

        `rounded_input` gives layer (-1: the head), slot and input of a linear as another runtime would round it;
        `adapt` are adapters that run beside the weights; `linears` stand in the place of weights.
        """
        self.name = name
        resident = nbytes <= _limit(device, max_memory)
        self.vocab_size, self.context = hyper.vocab, hyper.context
        self._layers = hyper.layers
        self._batch = 1 if resident else STREAM_BATCH
        if not resident:
            weight = _OneLayer(weight, torch.Tensor.float)
            linears = None if linears is None else _OneLayer(linears)
        self._rounded_input = rounded_input
        self._decoder = Decoder(
            weight, spec, hyper, device=device, resident=resident, adapt=adapt, linears=linears
        )  # fmt: skip
        self._prepared: dict[tuple[bytes, int], torch.Tensor] = {}

    @classmethod
    def of_checkpoint(
        cls, source: Checkpoint, *, device: str = "cpu", max_memory: int | None = None, as_served: bool = False
    ) -> TorchRuntime:
        """Runs an open checkpoint.

        Weights that the checkpoint has in codes stay codes on a CUDA device, where the kernels multiply by them. On a
        processor they do so only where they fit memory that their float32 values do not fit.

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
        linears, nbytes = _packed(source, checked, device, _limit(device, max_memory))
        return cls(
            weight, checked.spec, checked.hyper, nbytes=nbytes, device=device, max_memory=max_memory,
            rounded_input=rounded_inputs(source, checked) if as_served else None, linears=linears,
        )  # fmt: skip

    @classmethod
    def of_adapted(cls, adapted: Adapted, *, device: str = "cpu", max_memory: int | None = None) -> TorchRuntime:
        """Runs a base with its adapters beside it; nothing that merges is used.

        Raises:
            InputError: base and adapters do not fit, or the decoder cannot run an adapter of this kind.
        """
        model = unmerged(adapted.base, adapted.applied)
        return cls(
            model.weight, model.spec, model.hyper, nbytes=model.parameters * FLOAT32_BYTES, device=device,
            max_memory=max_memory, adapt=model.adapt, name=UNMERGED,
        )  # fmt: skip

    @classmethod
    def of_gguf(cls, path: Path, *, device: str = "cpu", max_memory: int | None = None) -> TorchRuntime:
        """Runs a GGUF file that the `gguf` package reads; nothing of the exporter's code is used.

        Raises:
            InputError: the package cannot read the file, or its metadata make no sense.
        """
        from quantpress.pipelines.gguf_readback import read_back  # the package is needed for nothing else here

        read = read_back(path)
        return cls(
            read.weight, read.spec, read.hyper, nbytes=read.parameters * FLOAT32_BYTES, device=device,
            max_memory=max_memory, rounded_input=read.rounded_input,
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
                hidden[number] = self._run_layer(layer, values)
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
                whole = self._run_layer(layer, whole)
            hidden = whole[0, first:]
        with full_float32():
            found = self._decoder.head(hidden[None], observe=self._observe(-1))
        values: NDArray[np.float32] = found[0].cpu().numpy()
        return values

    def _run_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        with full_float32():
            return self._decoder.run_layer(layer, hidden, observe=self._observe(layer))

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


def _limit(device: str, max_memory: int | None) -> int:
    """Gives the bytes that weights may take."""
    if max_memory is not None:
        return max_memory
    return (torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else free_memory()) // 2


def _packed(source: Checkpoint, checked: Preflight, device: str, limit: int) -> tuple[PackedWeights | None, int]:
    """Gives the linears that are to stay in codes, if any, and the bytes of all weights."""
    dense = source.parameters * FLOAT32_BYTES
    if not source.quantized:
        return None, dense
    from quantpress.convert.packed_weights import PackedWeights  # registers operators, which takes a tenth of a second

    linears = PackedWeights(source, checked, device)
    nbytes = linears.resident_bytes(FLOAT32_BYTES)
    kernels = _is_cuda(device) and find_spec("triton") is not None
    return (linears, nbytes) if kernels or dense > limit >= nbytes else (None, dense)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda" and torch.cuda.is_available()
