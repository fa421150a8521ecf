"""Encoder-decoders in torch and in llama.cpp, as `Runtime`s that score windows of a text; see `seq2seq_windows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.layer import Adapt
from quantpress.convert.seq2seq import EncoderDecoder
from quantpress.convert.weights import Weight
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.seq2seq_windows import split_window
from quantpress.pipelines.torch_runtime import FLOAT32_BYTES, TorchRuntime, weight_limit
from quantpress.quant.errors import InputError
from quantpress.quant.gptq_cuda import full_float32

__all__ = ["LlamaCppSeq2Seq", "Seq2SeqRuntime"]

_GROUP_BYTES = 256 << 20  # of scores that windows take which pass through the layers together


class Seq2SeqRuntime(TorchRuntime):
    """An encoder-decoder in torch, in float32."""

    def __init__(
        self, weight: Weight, spec: ArchSpec, hyper: Hyperparameters, *, nbytes: int, device: str,
        max_memory: int | None, adapt: Adapt | None = None, name: str = "torch", **served: Any,
    ) -> None:  # fmt: skip
        """Reads nothing yet; see `TorchRuntime`. Codes are run as the numbers they stand for, inputs are never rounded.

        Raises:
            InputError: the model has no decoder.
        """
        del served
        if hyper.seq2seq is None:
            raise InputError(f"{spec.family} has no decoder beside its encoder")
        self.name, self._hyper, self._stacks = name, hyper, hyper.seq2seq
        self.vocab_size, self.context, self.hidden_size = hyper.vocab, hyper.context, hyper.hidden
        self.layers = hyper.layers + hyper.seq2seq.layers
        self._model = EncoderDecoder(
            weight, spec, hyper, device=device, resident=nbytes <= weight_limit(device, max_memory), adapt=adapt
        )
        self._prepared: dict[tuple[bytes, int], torch.Tensor] = {}

    def prepare(
        self, windows: Sequence[NDArray[np.int32]], first: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs all windows, as many at a time as memory is meant for, and keeps what `logits` needs."""
        wanted = [window for window in windows if (window.tobytes(), first) not in self._prepared]
        step = max(1, _GROUP_BYTES // self._scores_bytes(len(windows[0]))) if wanted else 1
        for begin in range(0, len(wanted), step):
            group = wanted[begin : begin + step]
            for window, states in zip(group, self._states(group, first), strict=True):
                self._prepared[window.tobytes(), first] = states.clone()
            if progress is not None:
                progress(min(begin + step, len(wanted)), len(wanted))

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`."""
        states = self._prepared.get((tokens.tobytes(), first))
        return self.head(self._states([tokens], first)[0] if states is None else states)

    def head(self, hidden: torch.Tensor) -> NDArray[np.float32]:
        """Gives the logits (n, vocab_size) float32 of the last layer's output (n, hidden) float32."""
        with full_float32():
            found = self._model.head(hidden[None].to(self._model.device))
        values: NDArray[np.float32] = found[0].cpu().numpy()
        return values

    def _states(self, windows: Sequence[NDArray[np.int32]], first: int) -> torch.Tensor:
        pairs = [split_window(window, first, self._stacks.start) for window in windows]
        asked, given = (torch.from_numpy(np.stack(each).astype(np.int64)) for each in zip(*pairs, strict=True))
        with full_float32():
            return self._model.states(given, self._model.encode(asked))

    def _scores_bytes(self, length: int) -> int:
        return FLOAT32_BYTES * self._hyper.heads * length * length


class LlamaCppSeq2Seq(LlamaCppRuntime):
    """An encoder-decoder's GGUF file in llama.cpp."""

    def __init__(self, path: Path, *, context: int, threads: int, start: int) -> None:
        """Loads the file; see `LlamaCppModel`.

        Args:
            path: GGUF file.
            context: longest window in tokens.
            threads: CPU threads.
            start: token that the decoder begins with.
        """
        super().__init__(path, context=context, threads=threads, at_once=True)
        self._start = start

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`.

        Raises:
            ParityError: llama.cpp refused, crashed or hung.
            OutputError: the system killed it.
        """
        asked, given = split_window(tokens, first, self._start)
        self.encode(asked)
        return super().logits(given, 0)
