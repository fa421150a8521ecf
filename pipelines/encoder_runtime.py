"""Encoders in torch and in llama.cpp: from texts to the last hidden states of their tokens, and to their vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.encoder_rows import MASKED_HEAD
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.weights import Weight
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp import LlamaCppModel
from quantpress.pipelines.torch_runtime import TorchRuntime

__all__ = ["EncoderRuntime", "LlamaCppEncoder", "States", "TorchEncoder"]

States = NDArray[np.float32]
"""(n, hidden) float32: the last hidden state of each token of a text."""

Told = Callable[[int, int], None]


class EncoderRuntime(Protocol):
    """A loaded encoder; closed after use."""

    @property
    def name(self) -> str:
        """What ran the model: "torch", "llama.cpp" or "onnxruntime"."""
        ...

    def states(self, texts: Sequence[NDArray[np.int32]], progress: Told | None = None) -> list[States]:
        """Runs texts, each by itself.

        Args:
            texts: (n,) int32 token ids each.
            progress: told how far the work has come.

        Raises:
            QuantpressError: the runtime failed.
        """
        ...

    def vector(self, text: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """Gives the vector (hidden,) that the file itself makes of a text; None where it makes none."""
        ...

    def close(self) -> None:
        """Releases the model; calling it twice is harmless."""
        ...

    def __enter__(self) -> EncoderRuntime:
        """Return the runtime itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the runtime."""
        ...


class TorchEncoder(TorchRuntime):
    """An encoder in torch, in float32.

    Attributes:
        pooling: as `Hyperparameters.pooling`.
        masked_head: whether it has a head that fills in masked tokens; `head` is of use only then.
    """

    def __init__(self, weight: Weight, spec: ArchSpec, hyper: Hyperparameters, **more: Any) -> None:
        """Reads nothing yet; see `TorchRuntime`."""
        super().__init__(weight, spec, hyper, **more)
        self.pooling, self.masked_head = hyper.pooling, MASKED_HEAD in hyper.flags

    @classmethod
    def of_source(cls, source: Checkpoint, options: JudgeOptions) -> TorchEncoder:
        """Runs a checkpoint; where adapters were merged into it, its base with them beside it. See `TorchRuntime`."""
        more: dict[str, Any] = {"device": options.device, "max_memory": options.max_memory}
        found = cls.of_checkpoint(source, **more) if source.adapted is None else cls.of_adapted(source.adapted, **more)
        return cast("TorchEncoder", found)

    @classmethod
    def of_file(cls, path: Path, options: JudgeOptions) -> TorchEncoder:
        """Runs a checkpoint folder as it would be served, or a GGUF file read back. See `TorchRuntime`."""
        more: dict[str, Any] = {"device": options.device, "max_memory": options.max_memory}
        if path.suffix.lower() == ".gguf":
            return cast("TorchEncoder", cls.of_gguf(path, **more))
        return cast("TorchEncoder", cls.of_checkpoint(open_checkpoint(path), as_served=True, **more))

    def states(self, texts: Sequence[NDArray[np.int32]], progress: Told | None = None) -> list[States]:
        """Runs texts layer by layer, so that each layer is read once; see `EncoderRuntime`."""
        hidden = [self._decoder.embed(torch.from_numpy(text[None].astype(np.int64))) for text in texts]
        for layer in range(self.layers):
            self._run_all(layer, hidden)
            if progress is not None:
                progress(layer + 1, self.layers)
        return [values[0].cpu().numpy() for values in hidden]

    def vector(self, text: NDArray[np.int32]) -> None:
        """Gives None: pooling is done outside, see `EncoderRuntime`."""
        del text

    def __enter__(self) -> TorchEncoder:
        return self


class LlamaCppEncoder:
    """A GGUF file in llama.cpp; pooling is switched off for states, and is the file's own for vectors."""

    name = "llama.cpp"

    def __init__(self, path: Path, *, context: int, threads: int, pooled: bool) -> None:
        """Loads the file; see `LlamaCppModel`.

        Args:
            path: GGUF file.
            context: tokens of the longest text.
            threads: CPU threads.
            pooled: the file says how vectors are made.
        """
        self._path, self._pooled = path, pooled
        self._settings: dict[str, Any] = {"context": context, "threads": threads, "at_once": True}
        self.model = LlamaCppModel(path, pooling=0, **self._settings)
        self._pooling: LlamaCppModel | None = None

    def states(self, texts: Sequence[NDArray[np.int32]], progress: Told | None = None) -> list[States]:
        """Runs texts; see `EncoderRuntime`."""
        found = []
        for text in texts:
            found.append(self.model.embed(text, pooled=False))
            if progress is not None:
                progress(len(found), len(texts))
        return found

    def vector(self, text: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """Gives the file's own vector; see `EncoderRuntime`."""
        if not self._pooled:
            return None
        if self._pooling is None:
            self._pooling = LlamaCppModel(self._path, **self._settings)
        found: NDArray[np.float32] = self._pooling.embed(text, pooled=True)[0]
        return found

    def close(self) -> None:
        """Ends both processes."""
        self.model.close()
        if self._pooling is not None:
            self._pooling.close()

    def __enter__(self) -> LlamaCppEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
