"""Fetches models from the Hugging Face Hub into its own cache; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path
from typing import cast

from quantpress.convert.files import shown
from quantpress.convert.hf_folder import EXTRA_TEMPLATES, MODEL_CARD, TOKENIZER_FILES
from quantpress.quant.errors import InputError, OutputError, QuantpressError

__all__ = ["download", "download_adapter", "is_hub_id"]

# org/name or org/name@revision, the characters that the Hub allows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)
_SMALL = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",  # so that an adapter's id gets a message that says so
    *TOKENIZER_FILES,
    MODEL_CARD,
    f"{EXTRA_TEMPLATES}/*.jinja",
)
_SAFETENSORS = (*_SMALL, "*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Second copies of the weights that many models carry: in folders, and in the form of Mistral's own loader.
_COPIES = ("*/*.safetensors", "consolidated*.safetensors")
_ADAPTER = ("adapter_config.json", *TOKENIZER_FILES, f"{EXTRA_TEMPLATES}/*.jinja")
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG})


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id, `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith(".gguf")


def download(model_id: str) -> Path:
    """Fetches what is needed of a model: configuration, tokenizer and safetensors, or .bin where there are none.

    Args:
        model_id: `org/name` or `org/name@revision`, a branch, tag or commit.

    Returns:
        The folder in the Hub's cache.

    Raises:
        InputError: no such model or revision, no permission to read it, or the Hub cannot be reached and the model is
            not in the cache.
        OutputError: the cache cannot be written.
    """
    return _fetch(model_id, _SAFETENSORS, _COPIES, "*.safetensors", (*_SMALL, *_BIN))


def download_adapter(adapter_id: str) -> Path:
    """Fetches an adapter: its configuration, its weights as safetensors or else .bin, and tokenizer files beside them.

    Args:
        adapter_id: `org/name` or `org/name@revision`, a branch, tag or commit.

    Returns:
        The folder in the Hub's cache.

    Raises:
        InputError, OutputError: as `download`.
    """
    weights = "adapter_model.safetensors"
    return _fetch(adapter_id, (*_ADAPTER, "config.json", weights), (), weights, (*_ADAPTER, "adapter_model.bin"))


def _fetch(
    model_id: str, patterns: tuple[str, ...], but: tuple[str, ...], wanted_file: str, fallback: tuple[str, ...]
) -> Path:
    """Fetches files by `patterns` without `but`, then, if `wanted_file` is not among them, by `fallback`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, _, revision = model_id.partition("@")
    wanted = revision or None
    # Errors of the connection: the parent of HfHubHTTPError is the HTTP library's own, and which library that is
    # depends on the version of huggingface_hub; with requests it is an OSError.
    failures = (OSError, ValueError, cast(type[Exception], HfHubHTTPError.__mro__[1]))
    try:
        folder = Path(
            snapshot_download(name, revision=wanted, allow_patterns=list(patterns), ignore_patterns=list(but))
        )
        if not any(folder.glob(wanted_file)):
            folder = Path(snapshot_download(name, revision=wanted, allow_patterns=list(fallback)))
    except failures as error:
        raise _explain(model_id, error) from error
    return folder


def _explain(model_id: str, error: Exception) -> QuantpressError:
    from huggingface_hub import errors

    reason = shown((str(error).strip().splitlines() or [""])[0], 160)
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{model_id}: access must be granted: accept its terms on the Hub and log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{model_id}: no such folder here and no such model on the Hub; a private one needs `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{model_id}: the model has no such branch, tag or commit")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return InputError(
            f"{model_id}: no such folder here, not whole in the Hub's cache, and the Hub cannot be reached; check the"
            " connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder"
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return OutputError(
            f"{model_id}: the Hub's cache cannot be written: {error.strerror}; free space or set HF_HOME"
        )
    return InputError(f"{model_id}: cannot be fetched from the Hub: {type(error).__name__} {reason}")
