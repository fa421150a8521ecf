"""Judges encoders: by the cosine of the vectors they make of texts, and by what a head makes of masked tokens.

The source's own head reads the hidden states of the file where that has no head (GGUF, ONNX for feature extraction). A
model without a head for masked tokens is judged by its vectors alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles, special_ids
from quantpress.pipelines.adapter_share import ShareTally
from quantpress.pipelines.candidate import check_runtime, first_part
from quantpress.pipelines.encoder_runtime import EncoderRuntime, LlamaCppEncoder, States, TorchEncoder
from quantpress.pipelines.encoder_windows import (
    DEFAULT_CHUNKS,
    DEFAULT_CONTEXT,
    encoder_windows,
    gathered,
    masked,
    texts_of,
)
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp_find import HOW_TO_INSTALL, find_llama_cpp
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.parity import Judged, Parity, compare, unjudged
from quantpress.pipelines.parity_limits import Limits
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.reference import held
from quantpress.pipelines.tokenizer_proof import prove_tokenizer
from quantpress.pipelines.vector_figures import VectorFigures, pooled, vector_figures
from quantpress.pipelines.verdicts import failed, with_share
from quantpress.pipelines.windows import read_text
from quantpress.quant.errors import CancelledError, OutputError, QuantpressError, UsageError

__all__ = ["EncoderReference", "open_encoder"]

log = logging.getLogger(__name__)

_PADDING = 0.1  # of the states' size; with inputs rounded to 8 bits they were seen to move by 0.02

Head = Callable[[torch.Tensor], NDArray[np.float32]]


class EncoderReference:
    """The source with the texts on which files are judged; what it computes once serves every file."""

    def __init__(self, source: Checkpoint, options: JudgeOptions, progress: Progress = no_progress) -> None:
        """Tokenizes the text; the model is run when the first file is judged.

        Args:
            source: the model; where adapters were merged into it, the yardstick is its base with them beside it.
            options: how to judge.
            progress: told how far the work has come.

        Raises:
            InputError: the text or the tokenizer cannot be used, or base and adapters cannot be run unmerged.
            UsageError: the windows are longer than the model was made for.
        """
        self.options, self._progress, self._source = options, progress, source
        self.text = read_text(options.text)
        self.runtime = TorchEncoder.of_source(source, options)
        made_for = self.runtime.context
        self.context = options.context or min(DEFAULT_CONTEXT, made_for)
        if self.context > made_for:
            raise UsageError(f"--context {self.context}: {source.name} was made for {made_for} tokens")
        files = TokenizerFiles(source.tokenizer_files, name=source.name)
        self.tokenizer = Tokenizer(files)
        self._mask = special_ids(files, self.tokenizer.token_id).get("mask")
        chunks = options.chunks or DEFAULT_CHUNKS
        self.windows = encoder_windows(self.tokenizer, self.text.text, context=self.context, chunks=chunks)
        self.texts = texts_of(self.windows)

    def judge(
        self, artifact: Path, ftype: str, *, runtime: str | None = None, chosen: Iterable[str] = ()
    ) -> Parity:  # fmt: skip
        """Runs a file and compares; what cannot be judged is a verdict that is not passed.

        Args:
            artifact: the file or folder.
            ftype: name of its type, for the default limits.
            runtime: in place of the one in the options.
            chosen: metadata keys that the user has set by hand, which may differ from the source.
        """
        options = self.options if runtime is None else dataclasses.replace(self.options, runtime=runtime)
        limits = self.options.limits(ftype, self._source.parameters)
        try:
            with open_encoder(artifact, options, context=self.context, pooled=bool(self.runtime.pooling)) as candidate:
                parity = self._vocabulary_parity(candidate, limits)
                parity = self._with_vectors(parity, candidate, limits)
                parity = self._with_proofs(parity, artifact, candidate)
            return held(parity, self._source, artifact, ftype, chosen, self._progress)
        except CancelledError:
            raise  # no verdict was asked for any more
        except QuantpressError as error:
            reason = f"could not be judged: {error}"
            return unjudged(reason, limits, text_sha256=self.text.sha256, context=self.context)

    @property
    def _fills(self) -> bool:
        """Whether the source has what masked tokens are predicted with."""
        return self.runtime.masked_head and self._mask is not None

    @cached_property
    def _passes(self) -> list[NDArray[np.int32]]:
        assert self._mask is not None, "asked only where there is a mask"
        return [form for window in self.windows for form in masked(window, self.context // 2, self._mask)]

    @cached_property
    def _predicted(self) -> list[States]:
        return self.runtime.states(self._passes, partial(self._progress, "source"))

    @cached_property
    def _vectors(self) -> list[NDArray[np.float32]]:
        states = self.runtime.states(self.texts, partial(self._progress, "source"))
        return [pooled(each, self.runtime.pooling) for each in states]

    def _vocabulary_parity(self, candidate: EncoderRuntime, limits: Limits) -> Parity:
        """Compares what the head makes of masked tokens; a verdict without figures where there is no head."""
        names = self.runtime.name, candidate.name
        if not self._fills:
            sides = Judged(names[0]), Judged(names[1])
            empty = unjudged("", limits, text_sha256=self.text.sha256, context=self.context, sides=sides)
            return dataclasses.replace(empty, tokens=sum(map(len, self.texts)), passed=True, failures=())
        head = candidate.head if isinstance(candidate, TorchEncoder) and candidate.masked_head else self.runtime.head
        states = candidate.states(self._passes, partial(self._progress, "file"))
        tally = self._share_tally()
        parity = compare(
            _Filled(names[0], self, self._predicted, self.runtime.head),
            _Filled(names[1], self, states, head),
            self.windows,
            limits,
            text_sha256=self.text.sha256,
            vocabulary=self.tokenizer.size,
            progress=partial(self._progress, "prove"),
            watch=tally,
        )
        return parity if tally is None else with_share(parity, tally.result())

    def _with_vectors(self, parity: Parity, candidate: EncoderRuntime, limits: Limits) -> Parity:
        """Adds the vectors' figures, and turns a verdict into a failure where they are too far."""
        if parity.reason.startswith("could not"):
            return parity
        pooling = self.runtime.pooling
        states = candidate.states(self.texts, partial(self._progress, "file"))
        ours = [pooled(each, pooling) for each in states]
        own = [candidate.vector(text) for text in self.texts]
        theirs = [each if vector is None else vector for each, vector in zip(ours, own, strict=True)]
        figures = vector_figures(self._vectors, theirs, pooling=pooling, max_kld=limits.max_kld)
        return _with_figures(parity, figures)

    def _share_tally(self) -> ShareTally | None:
        """Makes the base without its adapters ready; None where there are none or the text has tokens it lacks."""
        adapted = self._source.adapted
        if adapted is None or not adapted.applied:
            return None
        base = TorchEncoder.of_source(adapted.base, self.options)
        if not base.masked_head or max(int(text.max()) for text in self._passes) >= base.vocab_size:
            return None
        states = base.states(self._passes, partial(self._progress, "source without adapters"))
        return ShareTally(_Filled(base.name, self, states, base.head))

    def _with_proofs(self, parity: Parity, artifact: Path, candidate: EncoderRuntime) -> Parity:
        """Turns a verdict into a failure where padding changes an ONNX model's states, or llama.cpp's tokens differ."""
        if isinstance(candidate, LlamaCppEncoder):
            rows = self.runtime.vocab_size
            proof = prove_tokenizer(self._source, self.tokenizer, candidate.model, self.text.text, rows=rows)
            if not proof.difference:
                return parity
            if not proof.exact:
                log.warning("%s: %s", artifact.name, proof.difference)
                return parity
            return failed(parity, f"{proof.difference}; is tokenizer.ggml.pre the right one?", "tokenizer")
        batch = getattr(candidate, "batch", None)
        problem = "" if batch is None else _padding_problem(candidate, batch, self.texts)
        return failed(parity, problem, "padding") if problem else parity


class _Filled:
    """Predictions of masked tokens as a `Runtime`: hidden states that were found before, and a head."""

    def __init__(self, name: str, reference: EncoderReference, states: Sequence[States], head: Head) -> None:
        self.name, self.vocab_size, self._head = name, reference.runtime.vocab_size, head
        step = len(states) // len(reference.windows)
        numbers = range(len(reference.windows))
        self._states = {reference.windows[n].tobytes(): states[n * step : (n + 1) * step] for n in numbers}

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores one window; see `Runtime.logits`."""
        return self._head(torch.from_numpy(gathered(self._states[tokens.tobytes()], first)))

    def close(self) -> None:
        """Does nothing: the model is not this object's."""

    def __enter__(self) -> _Filled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_encoder(model: Path, options: JudgeOptions, *, context: int, pooled: bool) -> EncoderRuntime:
    """Loads an encoder into the runtime that was asked for, or into the one it is made for.

    Args:
        model: file or folder.
        options: runtime, device and memory.
        context: tokens of the longest text.
        pooled: a GGUF file says how vectors are made.

    Raises:
        UsageError: the runtime cannot run files of this kind.
        OutputError: the runtime is not installed.
        InputError: the file is refused by the runtime.
    """
    check_runtime(model, options.runtime)
    if is_onnx(model):
        from quantpress.pipelines.onnx_encoder import OnnxEncoder

        return OnnxEncoder(model, threads=options.threads, device=options.device)
    if model.suffix.lower() != ".gguf":
        return TorchEncoder.of_file(model, options)
    model = first_part(model)
    if options.runtime != "torch":
        if find_llama_cpp() is not None:
            threads = options.threads or available_threads()
            return LlamaCppEncoder(model, context=context, threads=threads, pooled=pooled)
        if options.runtime == "llama.cpp":
            raise OutputError(f"--runtime llama.cpp: not found; {HOW_TO_INSTALL}")
        log.warning("llama.cpp is not installed: reading %s back with the gguf package instead", model.name)
    return TorchEncoder.of_file(model, options)


def _with_figures(parity: Parity, figures: VectorFigures) -> Parity:
    found = dataclasses.replace(parity, vectors=figures)
    if figures.problem:
        return failed(found, figures.problem, "vectors")
    return found if found.reason else dataclasses.replace(found, reason="all figures are within the limits")


def _padding_problem(
    alone: EncoderRuntime, batch: Callable[[list[NDArray[np.int32]]], list[States]], texts: list[NDArray[np.int32]]
) -> str:
    """Says how much padding changes hidden states, "" where it is no more than rounding does."""
    chosen = sorted(texts, key=len)
    pair = [chosen[0], chosen[-1]]
    apart, together = np.concatenate(alone.states(pair)), np.concatenate(batch(pair))
    moved, size = (math.sqrt(float(np.mean(np.square(each)))) for each in (apart - together, apart))
    return (
        "" if moved <= _PADDING * size else f"padding moves hidden states of root mean square {size:.3g} by {moved:.3g}"
    )
