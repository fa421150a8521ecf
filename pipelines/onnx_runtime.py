"""Runs ONNX models in onnxruntime: those of this program, of onnxruntime-genai's builder and of optimum."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.read import OnnxModel, open_onnx
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.onnx_feeds import feeds_of
from quantpress.quant.errors import InputError, OutputError, ParityError, UsageError

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "HOW_TO_INSTALL", "Cache", "OnnxRuntime", "check_operators", "has_onnxruntime", "load_session", "reason_of",
]  # fmt: skip

HOW_TO_INSTALL = "pip install 'quantpress[onnx]'"
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_DOMAINS = ("", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
_FATAL = 4  # onnxruntime's level of log; what it says besides is in its exceptions
_LOGITS_BYTES = 1 << 30  # logits of one run; a longer window is fed piece by piece, with the cache
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |/\S*onnxruntime/\S+\.(?:cc|h):\d+ [^()]*\([^()]*\)(?: const)?[ ,]?"
)
_MAX_REASON = 300  # characters of onnxruntime's own words

Cache = dict[str, Any]
"""Keys and values of the tokens so far: input name -> (B, kv_heads, T, head_dim)."""


def has_onnxruntime() -> bool:
    """Says whether onnxruntime is installed, without loading it."""
    return importlib.util.find_spec("onnxruntime") is not None


class OnnxRuntime:
    """An ONNX model as a `Runtime`; nothing of the exporter's code is used.

    Attributes:
        name: "onnxruntime".
        model: the open file.
        vocab_size: logits per position.
        context: tokens that the model was made for; None where no file says so.
        provider: what computes, onnxruntime's name.
    """

    name = "onnxruntime"

    def __init__(self, model: Path | str | OnnxModel, *, threads: int | None = None, device: str = "cpu") -> None:
        """Checks the file and loads it.

        Args:
            model: a folder, a .onnx file, or an open one.
            threads: processor threads; default all this process may use.
            device: "cpu" or "cuda".

        Raises:
            InputError: it is damaged, no language model, or onnxruntime refuses it.
            OutputError: onnxruntime is not installed, or cannot compute on that device.
        """
        self.model = model if isinstance(model, OnnxModel) else open_onnx(model)
        check_operators(self.model)
        self._feeds = feeds_of(self.model)
        self._session: onnxruntime.InferenceSession | None = None
        self._session, self.provider = load_session(self.model, threads or available_threads(), device)
        self.context = self.model.folder.context
        self._has_cache = bool(self._feeds.past)
        self.vocab_size = self._feeds.vocab or self._probe()

    def _probe(self) -> int:
        """Number of logits where the file does not say it: one token tells."""
        return int(self.prefill(np.zeros((1, 1), np.int64))[0].shape[-1])

    @property
    def has_cache(self) -> bool:
        """Whether the model takes and gives keys and values."""
        return self._has_cache

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window from an empty state; see `Runtime.logits`.

        Raises:
            ParityError: onnxruntime fails while it runs.
        """
        if not 0 <= first < len(tokens):
            raise ValueError(f"first position {first} of a window of {len(tokens)}")
        ids = np.asarray(tokens, np.int64)[None]
        step = max(1, _LOGITS_BYTES // (4 * self.vocab_size)) if self._has_cache else len(tokens)
        rows, cache = [], None
        for start in range(0, len(tokens), step):
            found, cache = self.prefill(ids[:, start : start + step], cache=cache)
            if start + found.shape[1] > first:
                rows.append(np.asarray(found[0, max(first - start, 0) :], np.float32))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def prefill(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None, cache: Cache | None = None
    ) -> tuple[NDArray[Any], Cache]:
        """Runs tokens after those in a cache.

        Args:
            ids: (B, S) token ids.
            mask: (B, T) 1 for tokens, 0 for padding, those of the cache first; None: no padding.
            cache: what the last call gave, or None at the beginning; it may not be used again.

        Returns:
            (B, S, V) logits in the model's own type, and the cache with these tokens.

        Raises:
            ParityError: onnxruntime fails while it runs.
            UsageError: there is a cache, but the model takes none.
        """
        if cache and not self._has_cache:
            raise UsageError(f"{self.model.path}: has no inputs for keys and values of past tokens")
        if self._session is None:
            raise ValueError("the model is closed")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self._feeds.vocab and high >= self._feeds.vocab):
            raise ParityError(f"{self.model.path}: token ids {low} to {high}, vocabulary of {self._feeds.vocab}")
        fed = self._feeds.feed(ids, mask, cache)
        try:
            found = self._session.run(None, fed)
        except Exception as error:  # its classes have no parent of their own
            raise ParityError(f"{self.model.path}: onnxruntime failed while it ran: {reason_of(error)}") from error
        outputs = dict(zip(self._feeds.outputs, found, strict=True))
        logits = outputs[self._feeds.logits]
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ParityError(
                f"{self.model.path}: {self._feeds.logits} has shape {logits.shape} for tokens of shape {ids.shape}"
            )
        return logits, {past: outputs[present] for past, present in self._feeds.past.items()}

    def decode(self, token_ids: NDArray[np.int64], cache: Cache, mask: NDArray[np.int64] | None = None) -> tuple[
        NDArray[np.float32], Cache
    ]:  # fmt: skip
        """Runs one token of each row after those in a cache.

        Args:
            token_ids: (B,) token ids.
            cache: what the last call gave.
            mask: see `prefill`.

        Returns:
            (B, V) float32 logits and the cache.
        """
        found, cache = self.prefill(np.asarray(token_ids, np.int64)[:, None], mask, cache)
        return np.asarray(found[:, 0], np.float32), cache

    def logits_batch(self, rows: Sequence[NDArray[np.int32]], *, padding: str = "left") -> list[NDArray[np.float32]]:
        """Scores texts of different lengths in one run.

        Args:
            rows: (n,) token ids each.
            padding: "left" or "right" of the shorter ones.

        Returns:
            (n, V) float32 of each text.
        """
        if padding not in ("left", "right"):
            raise ValueError(f"padding {padding!r}: wanted left or right")
        width = max(len(row) for row in rows)
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        places = [slice(width - len(row), width) if padding == "left" else slice(0, len(row)) for row in rows]
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            ids[number, place], mask[number, place] = row, 1
        found, _ = self.prefill(ids, mask)
        return [np.asarray(found[number, place], np.float32) for number, place in enumerate(places)]

    def close(self) -> None:
        """Releases the model; twice is harmless."""
        self._session = None

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_operators(model: OnnxModel) -> None:
    """Refuses operators that need libraries of their own, or load files behind our back.

    Raises:
        InputError: naming them.
    """
    unknown = sorted({domain for domain, _ in model.ops} - set(_DOMAINS) - model.functions)
    if unknown:
        ops = sorted(op for domain, op in model.ops if domain == unknown[0])
        raise InputError(
            f"{model.path}: operators of the unknown domain {shown(unknown[0])} ({', '.join(map(shown, ops[:5]))});"
            " onnxruntime has none of them"
        )
    if ("com.microsoft", "EPContext") in model.ops:
        raise InputError(f"{model.path}: operator EPContext: compiled for one accelerator; give the model before that")


def load_session(model: OnnxModel, threads: int, device: str) -> tuple[onnxruntime.InferenceSession, str]:
    """Gives a session, and onnxruntime's name of what computes; see `OnnxRuntime`."""
    if not has_onnxruntime():
        raise OutputError(f"onnxruntime is not installed, and nothing else runs ONNX models; {HOW_TO_INSTALL}")
    import onnxruntime

    providers = [_CPU]
    if device.startswith("cuda"):
        if _CUDA not in onnxruntime.get_available_providers():
            raise OutputError("this onnxruntime cannot compute on CUDA devices; pip install onnxruntime-gpu")
        providers = [_CUDA, _CPU]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _FATAL
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other programs run here too
    try:
        session = onnxruntime.InferenceSession(str(model.path), options, providers=providers)
    except Exception as error:  # its classes have no parent of their own
        raise InputError(f"{model.path}: onnxruntime refuses it: {reason_of(error)}") from error
    return session, str(session.get_providers()[0])


def reason_of(error: Exception) -> str:
    """Gives onnxruntime's words on one line, without places in its source; of long ones the beginning and the end."""
    text = _NOISE.sub("", " ".join(str(error).split()))
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    half = _MAX_REASON // 2
    return text if len(text) <= _MAX_REASON else f"{text[:half]} ... {text[-half:]}"
