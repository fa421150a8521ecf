"""The source of the files that are judged: run once, in float32, whatever the number of files.

It runs in the torch decoder; where adapters were merged, the base runs with them beside it, unmerged, so that a wrong
merge has nothing to agree with.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.adapter_share import ShareTally
from quantpress.pipelines.candidate import first_part, open_runtime
from quantpress.pipelines.content_proof import prove_content
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.parity import Parity, compare, unjudged
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.runtime import Runtime
from quantpress.pipelines.tokenizer_proof import prove_tokenizer
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.pipelines.verdicts import failed, with_content, with_share
from quantpress.pipelines.windows import read_text, text_windows, window_sizes
from quantpress.quant.errors import CancelledError, QuantpressError

__all__ = ["Kept", "Reference", "Yardstick", "base_runtime", "held", "knows", "source_runtime"]

log = logging.getLogger(__name__)


class Yardstick(Runtime, Protocol):
    """A model that files are compared with."""

    @property
    def context(self) -> int:
        """Tokens that it was made for."""
        ...

    def prepare(
        self, windows: Sequence[NDArray[np.int32]], first: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Does beforehand what `logits` of these windows from position `first` on will need."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier run found of a source.

    Attributes:
        windows: the windows on which files are judged.
        vocabulary: tokens that the tokenizer knows.
        runtime: the source.
        without: its base, where adapters were merged and the base knows all tokens of the windows.
    """

    windows: Sequence[NDArray[np.int32]]
    vocabulary: int
    runtime: Yardstick
    without: Yardstick | None = None


class Reference:
    """The source model with the windows on which files are judged; what it computes once serves every file."""

    def __init__(
        self,
        source: Checkpoint,
        options: JudgeOptions,
        progress: Progress = no_progress,
        *,
        kept: Kept | None = None,
    ) -> None:
        """Tokenizes the text; the model is run when the first file is judged.

        Args:
            source: the model; where adapters were merged into it, the yardstick is its base with them beside it.
            options: how to judge.
            progress: told how far the work has come.
            kept: what an earlier run found of this source with these options; nothing of it is done again then.

        Raises:
            InputError: the text or the tokenizer cannot be used, or base and adapters cannot be run unmerged.
            UsageError: the windows are longer than the model was made for.
        """
        self.options, self._progress, self._source = options, progress, source
        self.text = read_text(options.text)
        self.runtime = source_runtime(source, options) if kept is None else kept.runtime
        self._without: Yardstick | None = None if kept is None else kept.without
        self._kept = kept is not None
        self.context, chunks = window_sizes(
            options, name=source.name, made_for=self.runtime.context, parameters=source.parameters
        )
        if kept is None:
            self.vocabulary = self.tokenizer.size
            self.windows = text_windows(self.tokenizer, self.text.text, context=self.context, chunks=chunks)
        else:
            self.vocabulary, self.windows = kept.vocabulary, list(kept.windows)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The source's own.

        Raises:
            InputError: it cannot be used.
        """
        return Tokenizer(TokenizerFiles(self._source.tokenizer_files, name=self._source.name))

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
            self.runtime.prepare(self.windows, self.context // 2, progress=partial(self._progress, "source"))
            tally = self._share_tally()
            with open_runtime(artifact, options, context=self.context) as candidate:
                if isinstance(candidate, TorchRuntime):
                    candidate.prepare(self.windows, self.context // 2, progress=partial(self._progress, "file"))
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
                    parity = with_share(parity, tally.result())
                parity = self._with_proofs(parity, artifact, candidate)
            return held(parity, self._source, artifact, ftype, chosen, self._progress)
        except CancelledError:
            raise  # no verdict was asked for any more
        except QuantpressError as error:
            reason = f"could not be judged: {error}"
            return unjudged(reason, limits, text_sha256=self.text.sha256, context=self.context)

    def _share_tally(self) -> ShareTally | None:
        """Makes the base without its adapters ready; None where there are none or the text has tokens it lacks."""
        adapted = self._source.adapted
        if adapted is None or not adapted.applied:
            return None
        if self._without is None and not self._kept:
            self._without = base_runtime(adapted.base, self.options)
        if self._without is None or not knows(self._without, self.windows):
            return None
        progress = partial(self._progress, "source without adapters")
        self._without.prepare(self.windows, self.context // 2, progress=progress)
        return ShareTally(self._without)

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
        proof = prove_tokenizer(self._source, self.tokenizer, candidate, self.text.text, rows=rows)
        if not proof.difference:
            return parity
        if not proof.exact:
            log.warning("%s: %s", artifact.name, proof.difference)
            return parity
        return failed(parity, f"{proof.difference}; is tokenizer.ggml.pre the right one?", "tokenizer")


def held(
    parity: Parity, source: Checkpoint, artifact: Path, ftype: str, chosen: Iterable[str] = (),
    progress: Progress = no_progress,
) -> Parity:  # fmt: skip
    """Compares what a file holds with its source, besides what it computes; see `prove_content`."""
    place = first_part(artifact) if artifact.suffix.lower() == ".gguf" else artifact
    content = prove_content(source, place, chosen, ftype, partial(progress, "compare"))
    return parity if content is None else with_content(parity, content)


def source_runtime(source: Checkpoint, options: JudgeOptions, *, head_only: bool = False) -> TorchRuntime:
    """Opens what files are compared with: the source, or its base with the adapters beside it.

    Args:
        source: the model.
        options: device and memory.
        head_only: only `head` will be asked for, so only the head has to fit the memory.

    Raises:
        InputError: base and adapters cannot be run unmerged, or the source does not fit its family.
    """
    memory = options.max_memory
    if source.adapted is None:
        return TorchRuntime.of_checkpoint(source, device=options.device, max_memory=memory, head_only=head_only)
    return TorchRuntime.of_adapted(source.adapted, device=options.device, max_memory=memory, head_only=head_only)


def base_runtime(base: Checkpoint, options: JudgeOptions, *, head_only: bool = False) -> TorchRuntime:
    """Opens a base without its adapters.

    Raises:
        InputError: it does not fit its family.
    """
    # weights are streamed: those of the base beside its adapters may fill the memory already
    memory = options.max_memory if head_only else 0
    return TorchRuntime.of_checkpoint(base, device=options.device, max_memory=memory, head_only=head_only)


def knows(runtime: Runtime, windows: Sequence[NDArray[np.int32]]) -> bool:
    """Says whether a model has all tokens of these windows."""
    return max(int(window.max()) for window in windows) < runtime.vocab_size
