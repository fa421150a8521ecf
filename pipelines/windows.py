"""The windows of tokens on which models are judged: which text they are cut from, how long and how many they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.files import read_bounded
from quantpress.convert.tokenizer import Tokenizer
from quantpress.pipelines.default_text import Text, default_text
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.perplexity import cut_windows, plain_text
from quantpress.quant.errors import InputError, UsageError

__all__ = ["DEFAULT_CONTEXT", "default_chunks", "read_text", "text_windows", "window_sizes"]

DEFAULT_CONTEXT = 512
_MAX_TEXT = 256 << 20  # bytes of a text file; wikitext-103 has 540 MB, and nobody judges a file on all of it


def read_text(path: Path | None, purpose: str = "judge") -> Text:
    """Reads a UTF-8 text to judge or to calibrate on, or the built-in one.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        return default_text()
    data = read_bounded(path, _MAX_TEXT)
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


def window_sizes(options: JudgeOptions, *, name: str, made_for: int, parameters: int) -> tuple[int, int]:
    """Gives the tokens of a window and the most windows that a model is judged on.

    Args:
        options: what the user asked for.
        name: the model, for messages.
        made_for: tokens that it was made for.
        parameters: values of all its tensors.

    Raises:
        UsageError: the windows are longer than the model was made for.
    """
    context = options.context or min(DEFAULT_CONTEXT, made_for)
    if context > made_for:
        raise UsageError(f"--context {context}: {name} was made for {made_for} tokens")
    return context, options.chunks or default_chunks(parameters)


def text_windows(tokenizer: Tokenizer, text: str, *, context: int, chunks: int | None) -> list[NDArray[np.int32]]:
    """Cuts a text into the windows that llama.cpp's perplexity would score, with the checkpoint's own tokenizer."""
    ids = tokenizer.encode(plain_text(text), special=False)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    if bos is not None:
        ids = np.concatenate([np.array([bos], np.int32), ids])
    return cut_windows(ids, context=context, chunks=chunks, bos=bos)
