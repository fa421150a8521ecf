"""Runs models in torch: a checkpoint, quantized or not, or a GGUF file read back with the `gguf` package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

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
from quantpress.quant.workers import Workers

if TYPE_CHECKING:
    from quantpress.convert.packed_weights import PackedWeights

FLOAT32_BYTES = 4
_SIDE_BY_SIDE_BYTES = 1 << 30  # of what layers compute on several windows at a time
UNMERGED = "torch (base + adapter, unmerged)"


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
        self.vocab_size, self.context, self.hidden_size = hyper.vocab, hyper.context, hyper.hidden
        self.layers = hyper.layers
        self._rounded_input = rounded_input
        self._decoder = Decoder(
            weight, spec, hyper, device=device, resident=nbytes <= weight_limit(device, max_memory), adapt=adapt,
            linears=linears,
        )  # fmt: skip
        self._prepared: dict[tuple[bytes, int], torch.Tensor] = {}

    @classmethod
    def of_checkpoint(
        cls, source: Checkpoint, *, device: str = "cpu", max_memory: int | None = None, as_served: bool = False,
        head_only: bool = False,
    ) -> TorchRuntime:  # fmt: skip
        """Runs an open checkpoint.

        Weights that the checkpoint has in codes stay codes on a CUDA device, where the kernels multiply by them. On a
        processor they do so only where they fit memory that their float32 values do not fit.

        Args:
            source: the checkpoint; of a quantized one its codes, in float32.
            device: where to compute.
            max_memory: see `__init__`.
            as_served: round the inputs of linears too where the kernels for such a checkpoint do; else the inputs are
                exact, as befits a source that others are compared with.
            head_only: only `head` will be asked for, so only its weights have to fit `max_memory`.

        Raises:
            InputError: it does not fit its family.
        """
        checked = preflight(source)
        check_tied_head(checked)
        weight = CheckpointWeights(source, checked.spec, checked.hyper)
        linears, nbytes = _packed(source, checked, device, weight_limit(device, max_memory))
        if head_only:
            nbytes = _head_bytes(checked.hyper)
        return cls._of_kind(checked.spec)(
            weight, checked.spec, checked.hyper, nbytes=nbytes, device=device, max_memory=max_memory,
            rounded_input=rounded_inputs(source, checked) if as_served else None, linears=linears,
        )  # fmt: skip

    @classmethod
    def of_adapted(
        cls, adapted: Adapted, *, device: str = "cpu", max_memory: int | None = None, head_only: bool = False
    ) -> TorchRuntime:
        """Runs a base with its adapters beside it; nothing that merges is used. See `of_checkpoint`.

        Raises:
            InputError: base and adapters do not fit, or the decoder cannot run an adapter of this kind.
        """
        model = unmerged(adapted.base, adapted.applied)
        nbytes = _head_bytes(model.hyper) if head_only else model.parameters * FLOAT32_BYTES
        return cls._of_kind(model.spec)(
            model.weight, model.spec, model.hyper, nbytes=nbytes, device=device, max_memory=max_memory,
            adapt=model.adapt, name=UNMERGED,
        )  # fmt: skip

    @classmethod
    def of_gguf(cls, path: Path, *, device: str = "cpu", max_memory: int | None = None) -> TorchRuntime:
        """Runs a GGUF file that the `gguf` package reads; nothing of the exporter's code is used.

        Raises:
            InputError: the package cannot read the file, or its metadata make no sense.
        """
        from quantpress.pipelines.gguf_readback import read_back  # the package is needed for nothing else here

        read = read_back(path)
        return cls._of_kind(read.spec)(
            read.weight, read.spec, read.hyper, nbytes=read.parameters * FLOAT32_BYTES, device=device,
            max_memory=max_memory, rounded_input=read.rounded_input,
        )  # fmt: skip

    @classmethod
    def _of_kind(cls, spec: ArchSpec) -> type[TorchRuntime]:
        """Gives the class that runs models of a family's kind."""
        if spec.kind != "encoder_decoder":
            return cls
        from quantpress.pipelines.seq2seq_runtime import Seq2SeqRuntime  # is made of this class

        return Seq2SeqRuntime

    def prepare(
        self, windows: Sequence[NDArray[np.int32]], first: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs all windows through all layers, one layer at a time, and keeps what `logits` needs.

        Each layer is read once and forgotten: of these windows `logits` will ask the head alone.

        Args:
            windows: windows of equal length.
            first: the position that `logits` will be asked from.
            progress: told the layers that are done.
        """
        wanted = [window for window in windows if (window.tobytes(), first) not in self._prepared]
        if not wanted:
            return
        # embedded all at once: where weights are streamed, each call reads the whole embedding
        embedded = self._decoder.embed(torch.from_numpy(np.stack(wanted).astype(np.int64)))
        hidden = [embedded[number : number + 1] for number in range(len(wanted))]
        del embedded
        threads = self._threads(len(wanted), len(wanted[0]))
        with Workers(threads) if threads > 1 else contextlib.nullcontext() as workers:
            for layer in range(self.layers):
                self._run_all(layer, hidden, workers)
                self._decoder.release(layer)
                if progress is not None:
                    progress(layer + 1, self.layers)
        for window, last in zip(wanted, hidden, strict=True):
            self._prepared[window.tobytes(), first] = last[0, first:].clone()

    def _run_all(self, layer: int, hidden: list[torch.Tensor], workers: Workers | None = None) -> None:
        """Runs a layer on several texts of one length, (1, n, hidden) each, and puts its output in their place."""
        with full_float32():
            found = self._decoder.layer(layer, self._observe(layer))
            turns = self._decoder.turns(layer, 0, hidden[0].shape[1])
            if workers is not None:
                hidden[:] = workers.run([partial(found.run, values, turns, None) for values in hidden])
                return
            for number, values in enumerate(hidden):
                hidden[number] = found.run(values, turns, None)

    def _threads(self, windows: int, length: int) -> int:
        """Gives the threads that take windows side by side, each alone; 1: all threads work on one window.

        Side by side they never wait for each other: on a machine with other work that is ten times as fast where the
        products are small. But few windows would leave processors idle, and long ones take much memory.
        """
        if self._decoder.device.type != "cpu":
            return 1
        hyper = self._decoder.hyper
        each = length * FLOAT32_BYTES * (4 * hyper.intermediate + 2 * hyper.heads * length)
        threads = torch.get_num_threads()
        taken = min(threads, windows, _SIDE_BY_SIDE_BYTES // each)
        return taken if 2 * taken > threads else 1

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`."""
        hidden = self._prepared.get((tokens.tobytes(), first))
        if hidden is None:
            whole = [self._decoder.embed(torch.from_numpy(tokens[None].astype(np.int64)))]
            for layer in range(self.layers):
                self._run_all(layer, whole)
            hidden = whole[0][0, first:]
        return self.head(hidden)

    def prepared(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Gives what `prepare` has kept of a window: (n - first, hidden) float32, the output of the last layer."""
        values: NDArray[np.float32] = self._prepared[tokens.tobytes(), first].cpu().numpy()
        return values

    def head(self, hidden: torch.Tensor) -> NDArray[np.float32]:
        """Gives the logits (n, vocab_size) float32 of the last layer's output (n, hidden) float32."""
        with full_float32():
            found = self._decoder.head(hidden[None].to(self._decoder.device), observe=self._observe(-1))
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


def weight_limit(device: str, max_memory: int | None) -> int:
    """Gives the bytes that weights may take."""
    if max_memory is not None:
        return max_memory
    return (torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else free_memory()) // 2


def _head_bytes(hyper: Hyperparameters) -> int:
    return hyper.vocab * hyper.hidden * FLOAT32_BYTES


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
