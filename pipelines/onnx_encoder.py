"""Encoders in onnxruntime: models whose output is `last_hidden_state`, of this program and of optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.read import OnnxModel, open_onnx
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.onnx_runtime import check_operators, load_session, reason_of
from quantpress.quant.errors import InputError, ParityError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxEncoder"]

_IDS, _MASK, _TYPES, _POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"
_STATES = ("last_hidden_state", "token_embeddings")
_INTEGERS = {"INT64": np.int64, "INT32": np.int32}


class OnnxEncoder:
    """An ONNX encoder as an `EncoderRuntime`; nothing of the exporter's code is used."""

    name = "onnxruntime"

    def __init__(self, model: Path | str | OnnxModel, *, threads: int | None = None, device: str = "cpu") -> None:
        """Checks the file and loads it.

        Args:
            model: a folder, a .onnx file, or an open one.
            threads: processor threads; default all this process may use.
            device: "cpu" or "cuda".

        Raises:
            InputError: it is damaged, no encoder, or onnxruntime refuses it.
            OutputError: onnxruntime is not installed, or cannot compute on that device.
        """
        self.model = model if isinstance(model, OnnxModel) else open_onnx(model)
        check_operators(self.model)
        self._types = {value.name: value.dtype for value in self.model.inputs}
        self._outputs = [value.name for value in self.model.outputs]
        path = self.model.path
        if stray := [name for name in self._types if name not in (_IDS, _MASK, _TYPES, _POSITIONS)]:
            raise InputError(f"{path}: what to feed as {shown(stray[0])} is not known here")
        if wrong := [name for name, kind in self._types.items() if kind not in _INTEGERS]:
            raise InputError(f"{path}: input {shown(wrong[0])} is of type {self._types[wrong[0]] or 'unknown'}")
        self._output = next((name for name in _STATES if name in self._outputs), "")
        if _IDS not in self._types or not self._output:
            raise InputError(f"{path}: not an encoder: it has outputs {shown(self._outputs, 200)}, not {_STATES[0]!r}")
        self._session: onnxruntime.InferenceSession | None = None
        self._session, self.provider = load_session(self.model, threads or available_threads(), device)

    def states(
        self, texts: Sequence[NDArray[np.int32]], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.float32]]:
        """Runs texts, each by itself; see `EncoderRuntime`."""
        found = []
        for text in texts:
            found.append(self.batch([text])[0])
            if progress is not None:
                progress(len(found), len(texts))
        return found

    def batch(self, texts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Runs texts of different lengths in one run, the shorter ones with padding behind them.

        Args:
            texts: (n,) int32 token ids each.

        Returns:
            (n, hidden) float32 of each.

        Raises:
            ParityError: onnxruntime fails while it runs.
        """
        if self._session is None:
            raise ValueError("the model is closed")
        shape = len(texts), max(len(text) for text in texts)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, text in enumerate(texts):
            ids[number, : len(text)], mask[number, : len(text)] = text, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        values = {_IDS: ids, _MASK: mask, _TYPES: np.zeros(shape, np.int64), _POSITIONS: positions}
        fed = {name: values[name].astype(_INTEGERS[kind]) for name, kind in self._types.items()}
        try:
            (found,) = self._session.run([self._output], fed)
        except Exception as error:  # its classes have no parent of their own
            raise ParityError(f"{self.model.path}: onnxruntime failed while it ran: {reason_of(error)}") from error
        if found.ndim != 3 or found.shape[:2] != shape:
            raise ParityError(f"{self.model.path}: {self._output} has shape {found.shape} for tokens of shape {shape}")
        return [np.asarray(found[number, : len(text)], np.float32) for number, text in enumerate(texts)]

    def vector(self, text: NDArray[np.int32]) -> None:
        """Gives None: such models give states of tokens, see `EncoderRuntime`."""
        del text

    def close(self) -> None:
        """Releases the model; twice is harmless."""
        self._session = None

    def __enter__(self) -> OnnxEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
