"""Proves a file: runs it in its real runtime on the same tokens as its source and compares what both say.

The source runs in the torch decoder, in float32; where adapters were merged, the base runs with them beside it,
unmerged, so that a wrong merge has nothing to agree with. A GGUF file runs in llama.cpp; where that is not installed,
it is read back by the `gguf` package into the torch decoder, and the report says so by its runtime. An ONNX model runs
in onnxruntime, whole chunks at once, and the end of the first one also token by token with the cache.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.json_reader import read_json
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.cancel import cancellable
from quantpress.pipelines.candidate import check_runtime, ftype_of, open_runtime
from quantpress.pipelines.content_proof import chosen_keys
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.manifest import changed_weights
from quantpress.pipelines.parity import Parity
from quantpress.pipelines.perplexity import Perplexity
from quantpress.pipelines.perplexity import perplexity as score_windows
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.reference import Reference
from quantpress.pipelines.references import reference_for
from quantpress.pipelines.sidecar import sidecar_path
from quantpress.pipelines.verdicts import failed
from quantpress.pipelines.windows import DEFAULT_CONTEXT, default_chunks, read_text, text_windows
from quantpress.quant.errors import InputError

__all__ = ["Reference", "default_chunks", "perplexity", "read_text", "text_windows", "verify"]


def verify(
    artifact: Path | str,
    against: Checkpoint | Path | str,
    *,
    adapters: Sequence[tuple[Path | str, float]] = (),
    text: Path | str | None = None,
    options: JudgeOptions | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Parity:
    """Compares a file with the model it was made from (INTERFACE: verify).

    Args:
        artifact: GGUF file, ONNX folder or file, or checkpoint folder.
        against: the source, opened or not; merged or not.
        adapters: adapters with their weights that the artifact is to hold besides, in the order they were merged.
        text: UTF-8 file, or None for the built-in text; stands before `options.text`.
        options: how to judge.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work.

    Returns:
        The verdict; `passed` is False with a reason where nothing could be judged.

    Raises:
        InputError: the source, the text or the artifact cannot be opened.
        UsageError: the runtime that was asked for does not run such files.
        CancelledError: `cancel` was set.
    """
    progress = cancellable(progress, cancel)
    chosen = options or JudgeOptions()
    if text is not None:
        chosen = dataclasses.replace(chosen, text=Path(text))
    source = against if isinstance(against, Checkpoint) else open_checkpoint(against)
    for adapter, weight in adapters:
        source = merge_lora(source, adapter, weight)
    check_runtime(Path(artifact), chosen.runtime)
    ftype = ftype_of(Path(artifact))
    parity = reference_for(source, chosen, progress).judge(Path(artifact), ftype, chosen=_set_by_hand(Path(artifact)))
    problem = changed_weights(Path(artifact), progress)
    return failed(parity, problem, "manifest") if problem else parity


def _set_by_hand(artifact: Path) -> frozenset[str]:
    """Gives the metadata keys that the file's sidecar says were set with --override-kv; none where there is none."""
    try:
        contents = read_json(sidecar_path(artifact))  # a stranger's, as the file is
    except InputError:
        return frozenset()
    return chosen_keys(contents.get("stages")) if isinstance(contents, dict) else frozenset()


def perplexity(
    model: Checkpoint | Path | str,
    *,
    options: JudgeOptions | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Perplexity:
    """Scores a text by llama.cpp's method (INTERFACE: perplexity).

    Args:
        model: an open checkpoint, a folder, a GGUF file, an ONNX folder or file, or a Hub id.
        options: text, context, chunks, runtime and device; limits are not used.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work.

    Raises:
        InputError: the model or the text cannot be used.
        ParityError: the model gives values that are not finite.
        CancelledError: `cancel` was set.
    """
    progress = cancellable(progress, cancel)
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
    spec = find_arch(source.config)
    if spec.kind == "encoder":
        raise InputError(f"{source.name}: {spec.family} is an encoder, which predicts no next tokens; verify judges it")
    place: Checkpoint | Path = source.files[0].path if source.format == "gguf" else source
    made_for = spec.read_config(source.config).context
    return place, source.name, source.tokenizer_files, made_for
