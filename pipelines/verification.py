"""Proves a file: runs it in its real runtime on the same tokens as its source and compares what both say.

The source runs in the torch decoder, in float32; where adapters were merged, the base runs with them beside it,
unmerged, so that a wrong merge has nothing to agree with. A GGUF file runs in llama.cpp; where that is not installed,
it is read back by the `gguf` package into the torch decoder, and the report says so by its runtime. An ONNX model runs
in onnxruntime, whole chunks at once, and the end of the first one also token by token with the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import read_bounded
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.adapter_share import ShareTally
from quantpress.pipelines.candidate import check_runtime, ftype_of, open_runtime
from quantpress.pipelines.default_text import Text, default_text
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.parity import Parity, compare, unjudged
from quantpress.pipelines.perplexity import Perplexity, cut_windows, plain_text
from quantpress.pipelines.perplexity import perplexity as score_windows
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.runtime import Runtime
from quantpress.pipelines.tokenizer_proof import prove_tokenizer
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.quant.errors import InputError, QuantpressError, UsageError

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 512
MAX_TEXT = 256 << 20  # bytes of a text file; wikitext-103 has 540 MB, and nobody judges a file on all of it


def read_text(path: Path | None, purpose: str = "judge") -> Text:
    """Reads a UTF-8 text to judge or to calibrate on, or the built-in one.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        return default_text()
    data = read_bounded(path, MAX_TEXT)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; give a plain text to {purpose} on") from error
    if not text.strip():
        raise InputError(f"{path}: the text is empty, there is nothing to {purpose} on")
    return Text(text, hashlib.sha256(data).hexdigest(), path.name)


def default_chunks(parameters: int) -> int:
    """Gives the windows that `convert` judges on: enough tokens for steady figures, few enough for a laptop."""
    return 8 if parameters < 2_000_000_000 else 4 if parameters < 10_000_000_000 else 2


def text_windows(tokenizer: Tokenizer, text: str, *, context: int, chunks: int | None) -> list[NDArray[np.int32]]:
    """Cuts a text into the windows that llama.cpp's perplexity would score, with the checkpoint's own tokenizer."""
    ids = tokenizer.encode(plain_text(text), special=False)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    if bos is not None:
        ids = np.concatenate([np.array([bos], np.int32), ids])
    return cut_windows(ids, context=context, chunks=chunks, bos=bos)


class Reference:
    """The source model with the windows on which files are judged; what it computes once serves every file."""

    def __init__(self, source: Checkpoint, options: JudgeOptions, progress: Progress = no_progress) -> None:
        """Tokenizes the text; the model is run when the first file is judged.

        Args:
            source: the model; where adapters were merged into it, the yardstick is its base with them beside it.
            options: how to judge.
            progress: told how far the work has come.

        Raises:
            InputError: the text or the tokenizer cannot be used, or base and adapters cannot be run unmerged.
        """
        self.options, self._progress = options, progress
        self.text = read_text(options.text)
        tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
        self._source, self._tokenizer = source, tokenizer
        self.vocabulary, self._parameters = tokenizer.size, source.parameters
        self.runtime = _yardstick(source, options)
        self._without: TorchRuntime | None = None
        self.context = options.context or min(DEFAULT_CONTEXT, self.runtime.context)
        if self.context > self.runtime.context:
            raise UsageError(f"--context {self.context}: {source.name} was made for {self.runtime.context} tokens")
        chunks = options.chunks or default_chunks(source.parameters)
        self.windows = text_windows(tokenizer, self.text.text, context=self.context, chunks=chunks)

    def judge(self, artifact: Path, ftype: str, *, runtime: str | None = None) -> Parity:
        """Runs a file and compares; what cannot be judged is a verdict that is not passed.

        Args:
            artifact: the file or folder.
            ftype: name of its type, for the default limits.
            runtime: in place of the one in the options.
        """
        options = self.options if runtime is None else dataclasses.replace(self.options, runtime=runtime)
        limits = self.options.limits(ftype, self._parameters)
        try:
            self.runtime.prepare(self.windows, self.context // 2, progress=partial(self._progress, "source"))
            tally = self._share_tally()
            with open_runtime(artifact, options, context=self.context) as candidate:
                parity = compare(
                    self.runtime,
                    candidate,
                    self.windows,
                    limits,
                    text_sha256=self.text.sha256,
                    vocabulary=self.vocabulary,
                    progress=partial(self._progress, "prove"),
                    watch=tally,
                )
                if tally is not None:
                    parity = _with_share(parity, tally)
                return self._with_proofs(parity, artifact, candidate)
        except QuantpressError as error:
            reason = f"could not be judged: {error}"
            return unjudged(reason, limits, text_sha256=self.text.sha256, context=self.context)

    def _share_tally(self) -> ShareTally | None:
        """Makes the base without its adapters ready; None where there are none or the text has tokens it lacks."""
        adapted = self._source.adapted
        if adapted is None or not adapted.applied:
            return None
        if self._without is None:
            # weights are streamed: those of the base beside its adapters may fill the memory already
            self._without = TorchRuntime.of_checkpoint(adapted.base, device=self.options.device, max_memory=0)
            if max(int(window.max()) for window in self.windows) < self._without.vocab_size:
                progress = partial(self._progress, "source without adapters")
                self._without.prepare(self.windows, self.context // 2, progress=progress)
        known = max(int(window.max()) for window in self.windows) < self._without.vocab_size
        return ShareTally(self._without) if known else None

    def _with_proofs(self, parity: Parity, artifact: Path, candidate: Runtime) -> Parity:
        """Turns a verdict into a failure where the cache of an ONNX model is wrong, or llama.cpp's tokenizer."""
        if candidate.name == "onnxruntime" and parity.tokens:
            from quantpress.pipelines.cache_proof import with_cache_proof
            from quantpress.pipelines.onnx_runtime import OnnxRuntime

            return (
                with_cache_proof(parity, candidate, self.windows[0]) if isinstance(candidate, OnnxRuntime) else parity
            )
        if not isinstance(candidate, LlamaCppRuntime):
            return parity
        rows = self.runtime.vocab_size
        proof = prove_tokenizer(self._source, self._tokenizer, candidate, self.text.text, rows=rows)
        if not proof.difference:
            return parity
        if not proof.exact:
            log.warning("%s: %s", artifact.name, proof.difference)
            return parity
        problem = f"{proof.difference}; is tokenizer.ggml.pre the right one?"
        reason = problem if parity.passed else f"{parity.reason}; {problem}"
        return dataclasses.replace(parity, passed=False, reason=reason)


def _yardstick(source: Checkpoint, options: JudgeOptions) -> TorchRuntime:
    if source.adapted is None:
        return TorchRuntime.of_checkpoint(source, device=options.device, max_memory=options.max_memory)
    return TorchRuntime.of_adapted(source.adapted, device=options.device, max_memory=options.max_memory)


def _with_share(parity: Parity, tally: ShareTally) -> Parity:
    """Turns a verdict into a failure where the adapters' effect is not in the file."""
    share = tally.result()
    if share is None or not parity.tokens:
        return parity
    said = share.problem or (share.doubt if parity.passed else "")
    return dataclasses.replace(
        parity,
        passed=parity.passed and not share.problem,
        reason="; ".join(filter(None, ("" if parity.passed and share.problem else parity.reason, said))),
        adapter_share=share,
    )


def verify(
    artifact: Path | str,
    against: Checkpoint | Path | str,
    *,
    adapters: Sequence[tuple[Path | str, float]] = (),
    text: Path | str | None = None,
    options: JudgeOptions | None = None,
    progress: Progress = no_progress,
) -> Parity:
    """Compares a file with the model it was made from (INTERFACE: verify).

    Args:
        artifact: GGUF file, ONNX folder or file, or checkpoint folder.
        against: the source, opened or not; merged or not.
        adapters: adapters with their weights that the artifact is to hold besides, in the order they were merged.
        text: UTF-8 file, or None for the built-in text; stands before `options.text`.
        options: how to judge.
        progress: told how far the work has come.

    Returns:
        The verdict; `passed` is False with a reason where nothing could be judged.

    Raises:
        InputError: the source, the text or the artifact cannot be opened.
        UsageError: the runtime that was asked for does not run such files.
    """
    chosen = options or JudgeOptions()
    if text is not None:
        chosen = dataclasses.replace(chosen, text=Path(text))
    source = against if isinstance(against, Checkpoint) else open_checkpoint(against)
    for adapter, weight in adapters:
        source = merge_lora(source, adapter, weight)
    check_runtime(Path(artifact), chosen.runtime)
    ftype = ftype_of(Path(artifact))
    return Reference(source, chosen, progress).judge(Path(artifact), ftype)


def perplexity(
    model: Checkpoint | Path | str, *, options: JudgeOptions | None = None, progress: Progress = no_progress
) -> Perplexity:
    """Scores a text by llama.cpp's method (INTERFACE: perplexity).

    Args:
        model: an open checkpoint, a folder, a GGUF file, an ONNX folder or file, or a Hub id.
        options: text, context, chunks, runtime and device; limits are not used.
        progress: told how far the work has come.

    Raises:
        InputError: the model or the text cannot be used.
        ParityError: the model gives values that are not finite.
    """
    chosen = options or JudgeOptions()
    place, name, files, made_for = _to_score(model)
    check_runtime(place, chosen.runtime)
    tokenizer = Tokenizer(TokenizerFiles(files, name=name))
    text = read_text(chosen.text)
    context = chosen.context or min(DEFAULT_CONTEXT, made_for)
    windows = text_windows(tokenizer, text.text, context=context, chunks=chosen.chunks)
    with open_runtime(place, chosen, context=context) as runtime:
        result = score_windows(runtime, windows, model=name, progress=partial(progress, "perplexity"))
    return dataclasses.replace(result, seconds=round(result.seconds, 3))


def _to_score(model: Checkpoint | Path | str) -> tuple[Checkpoint | Path, str, Mapping[str, bytes], int]:
    """Opens a model: what is to be run, its name, the tokenizer's files and the tokens that it was made for."""
    if not isinstance(model, Checkpoint) and is_onnx(model):
        from quantpress.convert.onnx.read import open_onnx

        onnx = open_onnx(model)
        return Path(model), onnx.name, onnx.folder.tokenizer_files, onnx.folder.context or DEFAULT_CONTEXT
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    place: Checkpoint | Path = source.files[0].path if source.format == "gguf" else source
    made_for = find_arch(source.config).read_config(source.config).context
    return place, source.name, source.tokenizer_files, made_for
