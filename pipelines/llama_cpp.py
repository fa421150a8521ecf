"""Running a GGUF file with llama.cpp itself, in a process of its own."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.gguf.split import PartName
from quantpress.pipelines import llama_cpp_layouts as layouts
from quantpress.pipelines.llama_cpp_find import HOW_TO_INSTALL, LlamaCpp, find_llama_cpp
from quantpress.pipelines.llama_cpp_process import RefusedError, WorkerDiedError, WorkerProcess
from quantpress.quant.errors import InputError, OutputError, ParityError, QuantpressError

__all__ = [
    "LlamaCpp",
    "LlamaCppModel",
    "LlamaCppRuntime",
    "ModelInfo",
    "default_threads",
    "find_llama_cpp",
    "probe",
]

_OPEN_SECONDS = 60.0
_STEP_SECONDS = 600.0  # one sub-batch of 128 tokens: a 70B model on two slow cores needs a quarter of it
_LOAD_NBYTES_PER_SECOND = 20e6  # a slow disk; added to the step's time
_BATCH = 128  # tokens per decode: small enough to show progress, as fast as 512 (measured on SmolLM2-135M)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What llama.cpp says about a loaded file.

    Attributes:
        description: architecture, size and type in llama.cpp's words.
        file_type: ``general.file_type`` as text, None when the file has none.
        n_params: number of weights, 0 with ``vocab_only``.
        n_ctx_train: positions the model was made for, 0 with ``vocab_only``.
        n_embd: values of a hidden state.
        n_vocab: tokens of the vocabulary.
        bos, eos: token ids, -1 when there is none.
        add_bos, add_eos: whether tokenising adds them by itself.
    """

    description: str
    file_type: str | None
    n_params: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    bos: int
    eos: int
    add_bos: bool
    add_eos: bool


def default_threads() -> int:
    """CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def probe(library: LlamaCpp | None = None) -> str:
    """Start the library once and ask for its version.

    Returns:
        the version the running library gives, or the package's when it gives none.

    Raises:
        OutputError: no library, or one that cannot be used, and why.
    """
    found = _library(library)
    worker = WorkerProcess()
    try:
        version, _, _ = _open(worker, found)
    finally:
        worker.close()
    return version


def _library(library: LlamaCpp | None) -> LlamaCpp:
    found = library or find_llama_cpp()
    if found is None:
        raise OutputError(f"llama.cpp was not found; {HOW_TO_INSTALL}")
    return found


def _open(worker: WorkerProcess, library: LlamaCpp) -> tuple[str, bytes, bytes]:
    """Load the library; returns its version and the default model and context parameters."""
    try:
        header, blobs = worker.request({"op": "open", "library": str(library.path)}, seconds=_OPEN_SECONDS)
    except (RefusedError, WorkerDiedError) as error:
        raise OutputError(f"{library.path} ({library.origin}): {error}; {HOW_TO_INSTALL}") from error
    half = len(blobs) // 2
    model, context = blobs[:half], blobs[half:]
    layouts.model_params(model, vocab_only=False)
    layouts.context_params(context, context=512, batch=_BATCH, threads=1)
    return header["version"] or library.version, model, context


class LlamaCppModel:
    """A GGUF file held by llama.cpp on the CPU: tokenising, scoring and greedy text."""

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        vocab_only: bool = False,
        at_once: bool = False,
        pooling: int | None = None,
        library: LlamaCpp | None = None,
    ) -> None:
        """Load the file (memory-mapped), on the CPU only, with an F32 cache and without flash attention.

        Args:
            path: GGUF file; of a split model the first part.
            context: longest window in tokens.
            threads: CPU threads, default all this process may use.
            vocab_only: tokeniser only, no weights; ``logits`` and ``generate`` are then errors.
            at_once: a text is read in one step, whatever its length, as encoders must; takes more memory.
            pooling: llama.cpp's number of a pooling in place of the file's; 0 for none.
            library: which llama.cpp; default ``find_llama_cpp()``.

        Raises:
            InputError: no regular file there, or llama.cpp refuses or dies of it.
            OutputError: no usable llama.cpp, or not enough memory.
        """
        self.path = Path(path)
        self.context = 0 if vocab_only else context
        nbytes = _nbytes(self.path)
        library = _library(library)
        self._worker = WorkerProcess()
        try:
            self.version, model_blob, context_blob = _open(self._worker, library)
            self.info = self._load(model_blob, vocab_only, _STEP_SECONDS + nbytes / _LOAD_NBYTES_PER_SECOND)
            if not vocab_only:
                batch = context if at_once else min(_BATCH, context)
                self._make_context(context_blob, context, batch, threads or default_threads(), pooling)
        except BaseException:
            self._worker.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    def _load(self, blob: bytes, vocab_only: bool, seconds: float) -> ModelInfo:
        params, devices_offset = layouts.model_params(blob, vocab_only=vocab_only)
        header = {"op": "load", "path": str(self.path), "devices_offset": devices_offset}
        answer = self._ask(header, params, InputError, seconds=seconds)[0]
        return ModelInfo(**{name: answer[name] for name in ModelInfo.__dataclass_fields__})

    def _make_context(self, blob: bytes, context: int, batch: int, threads: int, pooling: int | None) -> None:
        params = layouts.context_params(blob, context=context, batch=batch, threads=threads, pooling=pooling)
        took = self._ask({"op": "context"}, params, InputError)[0]
        wanted = {"n_batch": batch, "n_ubatch": batch, "n_threads": threads, "n_threads_batch": threads}
        differing = {name: took[name] for name, value in wanted.items() if took[name] != value}
        if differing or took["n_ctx"] < context:  # it rounds the context up
            raise OutputError(
                f"llama.cpp {self.version} took other parameters than it was given ({differing or took['n_ctx']}); "
                "install another version, for example xllamacpp or llama-cpp-python"
            )

    def _ask(
        self,
        header: dict[str, Any],
        payload: bytes,
        kind: type[QuantpressError],
        *,
        seconds: float = _STEP_SECONDS,
        rows: memoryview | None = None,
    ) -> tuple[dict[str, Any], bytes]:
        """One request; failures become ``kind`` with the file's name and llama.cpp's last words."""
        try:
            return self._worker.request(header, payload, seconds=seconds, rows=rows)
        except RefusedError as error:
            raise kind(f"{self.path}: {error}{self._worker.log_tail()}") from error
        except WorkerDiedError as error:
            raise (OutputError if error.out_of_memory else kind)(f"{self.path}: {error}") from error

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> NDArray[np.int32]:
        """Text to (n,) int32 ids; ``add_special`` adds BOS/EOS as the file says, ``parse_special`` reads ``<...>``."""
        header = {"op": "tokenize", "add_special": add_special, "parse_special": parse_special}
        return np.frombuffer(self._ask(header, text.encode("utf-8"), InputError)[1], np.int32)

    def detokenize(self, tokens: NDArray[np.int32], *, special: bool = False) -> str:
        """(n,) int32 ids to text; ``special`` also writes control tokens. Broken UTF-8 becomes U+FFFD."""
        header = {"op": "detokenize", "special": special}
        return self._ask(header, self._checked(tokens), InputError)[1].decode("utf-8", "replace")

    def encode(self, tokens: NDArray[np.int32]) -> None:
        """Let the encoder of an encoder-decoder read (n,) int32 tokens; ``logits`` then look at them.

        Raises:
            ParityError: llama.cpp refused, crashed or hung.
            OutputError: the system killed it.
        """
        if not 0 < len(tokens) <= self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a context of {self.context}")
        self._ask({"op": "encode"}, self._checked(tokens), ParityError)

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores of positions first .. n-1 of one window; see ``Runtime.logits``.

        Raises:
            ParityError: llama.cpp refused, crashed or hung.
            OutputError: the system killed it.
        """
        if not 0 <= first < len(tokens) <= self.context:
            raise ValueError(f"positions {first} to {len(tokens) - 1} do not fit a context of {self.context}")
        rows = np.empty((len(tokens) - first, self.info.n_vocab), np.float32)
        view = rows.data.cast("B")
        self._ask({"op": "logits", "first": first}, self._checked(tokens), ParityError, rows=view)
        return rows

    def embed(self, tokens: NDArray[np.int32], *, pooled: bool) -> NDArray[np.float32]:
        """Gives the last hidden states of (n,) int32 tokens, (n, hidden), or ``pooled`` their one vector, (1, hidden).

        Raises:
            ParityError: llama.cpp refused, crashed or hung, or the file names no pooling.
            OutputError: the system killed it.
        """
        if not 0 < len(tokens) <= self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a context of {self.context}")
        rows = np.empty((1 if pooled else len(tokens), self.info.n_embd), np.float32)
        view = rows.data.cast("B")
        self._ask({"op": "embed", "pooled": pooled}, self._checked(tokens), ParityError, rows=view)
        return rows

    def generate(self, tokens: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """Up to ``count`` ids that greedily continue (n,) int32 ``tokens``; ends after an end-of-text token."""
        if not 0 < len(tokens) <= self.context - count:
            raise ValueError(f"{len(tokens)} + {count} tokens do not fit a context of {self.context}")
        header = {"op": "generate", "count": count}
        return np.frombuffer(self._ask(header, self._checked(tokens), ParityError)[1], np.int32)

    def _checked(self, tokens: NDArray[np.int32]) -> bytes:
        ids = np.ascontiguousarray(tokens, np.int32)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.info.n_vocab:
            raise ValueError(f"token ids {ids.min()} to {ids.max()}, vocabulary of {self.info.n_vocab}")
        return ids.tobytes()

    def close(self) -> None:
        """End the worker process; twice is harmless."""
        self._worker.close()


class LlamaCppRuntime(LlamaCppModel):
    """A ``LlamaCppModel`` as a ``Runtime``."""

    name = "llama.cpp"

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        return self.info.n_vocab

    def __enter__(self) -> LlamaCppRuntime:
        """Return the runtime itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker process."""
        self.close()


def _nbytes(path: Path) -> int:
    """Gives the bytes of a file, or of all parts of a split model that are there."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: wanted a GGUF file, found something that is not a regular file")
        name = PartName.of(path)
        others = [] if name is None else [path.with_name(each) for each in name.names() if each != path.name]
        return status.st_size + sum(each.stat().st_size for each in others if each.exists())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
