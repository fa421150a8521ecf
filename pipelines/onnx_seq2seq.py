"""Runs an encoder-decoder's two ONNX graphs in onnxruntime, as `Runtime` that scores windows; see `seq2seq_windows`.

Graphs are those of this program and of optimum: `encoder_model.onnx` beside `decoder_model_merged.onnx`, or beside
`decoder_model.onnx`, which takes no cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.files import shown
from quantpress.convert.onnx.read import OnnxModel, OnnxValue, open_onnx
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.onnx_runtime import Cache, OnnxRuntime, check_operators, load_session, reason_of
from quantpress.pipelines.seq2seq_windows import split_window
from quantpress.quant.errors import InputError, ParityError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["ENCODER", "OnnxSeq2Seq", "open_onnx_runtime"]

ENCODER = "encoder_model.onnx"
_MEMORY, _SEEN, _CACHED = "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"
_PAST, _PRESENT = "past_key_values.", "present."
_TYPES: dict[str, Any] = {"INT64": np.int64, "INT32": np.int32, "FLOAT": np.float32, "FLOAT16": np.float16}


def open_onnx_runtime(path: Path, *, threads: int | None = None, device: str = "cpu") -> OnnxRuntime:
    """Opens an ONNX model and loads it into what runs models of its kind; see `OnnxRuntime`."""
    model = open_onnx(path)
    seq2seq = any(value.name == _MEMORY for value in model.inputs)
    return (OnnxSeq2Seq if seq2seq else OnnxRuntime)(model, threads=threads, device=device)


class OnnxSeq2Seq(OnnxRuntime):
    """An encoder-decoder; nothing of the exporter's code is used."""

    def __init__(self, model: OnnxModel, *, threads: int | None = None, device: str = "cpu") -> None:
        """Checks the files and loads them.

        Args:
            model: the decoder's graph; the encoder's lies beside it.
            threads: processor threads; default all this process may use.
            device: "cpu" or "cuda".

        Raises:
            InputError: a file is damaged, lacks an input or output, or onnxruntime refuses it.
            OutputError: onnxruntime is not installed, or cannot compute on that device.
        """
        self.model, self._encoder = model, open_onnx(model.path.parent / ENCODER)
        self._inputs = {value.name: value for value in model.inputs}
        for each in (self.model, self._encoder):
            check_operators(each)
        self._check()
        count = threads or available_threads()
        self._reader: onnxruntime.InferenceSession | None
        self._session: onnxruntime.InferenceSession | None
        self._reader, _ = load_session(self._encoder, count, device)
        self._session, self.provider = load_session(model, count, device)
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        self._has_cache = bool(self._past)
        self.context = model.folder.context
        self._start = _start_token(model)
        shape = next(value.shape for value in model.outputs if value.name == "logits")
        last = shape[-1] if shape else None
        self.vocab_size = last if isinstance(last, int) else int(self.logits(np.zeros(2, np.int32), 0).shape[-1])

    def _check(self) -> None:
        outputs = {value.name for value in self.model.outputs}
        wanted = {"input_ids", _MEMORY} - self._inputs.keys()
        if wanted or "logits" not in outputs:
            raise InputError(f"{self.model.path}: no decoder: no {min(wanted, default='logits')}")
        if not any(value.name == "last_hidden_state" for value in self._encoder.outputs):
            raise InputError(f"{self._encoder.path}: no encoder: no output last_hidden_state")
        known = {"input_ids", _MEMORY, _SEEN, _CACHED}
        if stray := [name for name in self._inputs if name not in known and not name.startswith(_PAST)]:
            raise InputError(f"{self.model.path}: what to feed as {shown(stray[0])} is not known here")
        if any(name.startswith(_PAST) for name in self._inputs) and _CACHED not in self._inputs:
            raise InputError(f"{self.model.path}: always wants a cache; give decoder_model_merged.onnx")

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`.

        Raises:
            ParityError: onnxruntime fails while it runs.
        """
        asked, given = split_window(tokens, first, self._start)
        found, _ = self._answer(given.astype(np.int64)[None], self.encode(asked.astype(np.int64)[None]), None)
        return np.asarray(found[0], np.float32)

    def prefill(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None, cache: Cache | None = None
    ) -> tuple[NDArray[Any], Cache]:
        """Takes the text that `decode` goes on with; there are no logits of it, for the encoder reads one token more.

        Args:
            ids: (B, S) token ids.
            mask: there is no padding here.
            cache: nor what came before.

        Returns:
            (B, 0, V) logits, and the text.
        """
        if mask is not None or cache is not None:
            raise ValueError("a text is read at once and without padding")
        return np.zeros((len(ids), 0, self.vocab_size), np.float32), {"text": ids}

    def decode(self, token_ids: NDArray[np.int64], cache: Cache, mask: NDArray[np.int64] | None = None) -> tuple[
        NDArray[np.float32], Cache
    ]:  # fmt: skip
        """Runs one token of each row; after `prefill` it is the last one that the encoder reads, and the answer begins.

        Args:
            token_ids: (B,) token ids.
            cache: what the last call gave.
            mask: there is no padding here.

        Returns:
            (B, V) float32 logits and the cache.
        """
        if mask is not None:
            raise ValueError("a text is read without padding")
        given = np.asarray(token_ids, np.int64)[:, None]
        if "text" in cache:
            memory = self.encode(np.concatenate([cache["text"], given], axis=1))
            found, kept = self._answer(np.full_like(given, self._start), memory, None)
        else:
            found, kept = self._answer(given, cache["memory"], cache)
            memory = cache["memory"]
        return np.asarray(found[:, 0], np.float32), {**kept, "memory": memory}

    def encode(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Gives what the encoder says of (B, S) tokens: (B, S, hidden).

        Raises:
            ParityError: onnxruntime fails while it runs.
        """
        fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        types = {value.name: value for value in self._encoder.inputs}
        fed = {name: values.astype(_type(types[name])) for name, values in fed.items() if name in types}
        found = self._run(self._reader, self._encoder, ["last_hidden_state"], fed)
        memory: NDArray[Any] = found[0]
        return memory

    def _answer(self, ids: NDArray[np.int64], memory: NDArray[Any], cache: Cache | None) -> tuple[NDArray[Any], Cache]:
        """Runs the decoder on (B, T) tokens after those in the cache."""
        values: dict[str, Any] = {
            "input_ids": ids,
            _MEMORY: memory,
            _SEEN: np.ones(memory.shape[:2], np.int64),
            _CACHED: np.array([cache is not None]),
        }
        fed = {
            name: values[name].astype(np.bool_ if name == _CACHED else _type(value), copy=False)
            for name, value in self._inputs.items()
            if name in values
        }
        for name in self._past:
            fed[name] = self._empty(name, len(ids)) if cache is None else cache[name]
        presents = {name: _PRESENT + name.removeprefix(_PAST) for name in self._past}
        found = self._run(self._session, self.model, ["logits", *presents.values()], fed)
        kept = dict(zip(presents, found[1:], strict=True))
        if cache is not None:  # optimum's graphs give nothing of use for the encoder's part then
            kept |= {name: cache[name] for name in kept if ".encoder." in name}
        return found[0], kept

    def _empty(self, name: str, rows: int) -> NDArray[Any]:
        value = self._inputs[name]
        sizes = [size for size in (value.shape or ()) if isinstance(size, int)]
        if len(sizes) < 2:
            raise InputError(f"{self.model.path}: input {shown(name)} does not say how many heads of what size it is")
        return np.zeros((rows, sizes[-2], 0, sizes[-1]), _type(value))

    def _run(
        self, session: onnxruntime.InferenceSession | None, model: OnnxModel, outputs: list[str], fed: dict[str, Any]
    ) -> list[Any]:
        if session is None:
            raise ValueError("the model is closed")
        try:
            found: list[Any] = session.run(outputs, fed)
        except Exception as error:  # its classes have no parent of their own
            raise ParityError(f"{model.path}: onnxruntime failed while it ran: {reason_of(error)}") from error
        return found

    def close(self) -> None:
        """Releases both models; twice is harmless."""
        self._session = self._reader = None


def _type(value: OnnxValue) -> Any:
    if value.dtype not in _TYPES:
        raise InputError(f"input {shown(value.name)} is of type {value.dtype}, which is not fed here")
    return _TYPES[value.dtype]


def _start_token(model: OnnxModel) -> int:
    """Gives the token that the decoder begins with, by config.json."""
    stacks = find_arch(model.folder.config).read_config(model.folder.config).seq2seq
    if stacks is None:
        raise InputError(f"{model.path}: config.json is of no encoder-decoder")
    return stacks.start
