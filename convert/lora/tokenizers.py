"""The tokenizer of a merged model: an adapter that was trained with new tokens or another template brings its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.lora.adapter import Adapter

__all__ = ["with_tokenizer"]

log = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
_OF_THE_MODEL = ("config.json", "generation_config.json", "README.md")


def with_tokenizer(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Gives a checkpoint with the tokenizer files that lie beside an adapter.

    A whole tokenizer replaces the base's; templates and settings alone are laid over it.
    """
    new = {name: data for name, data in adapter.tokenizer_files.items() if name not in _OF_THE_MODEL}
    if not new:
        return checkpoint
    whole = any(name in new for name in _VOCABULARIES)
    old: Mapping[str, bytes] = checkpoint.tokenizer_files
    if all(name in old and old[name] == data for name, data in new.items()):
        return checkpoint
    kept = {name: data for name, data in old.items() if not whole or name in _OF_THE_MODEL}
    log.info(
        "%s: its tokenizer %s (%s)",
        adapter.name,
        "replaces the base's" if whole else "files are laid over the base's",
        ", ".join(sorted(new)),
    )
    # A GGUF source's own metadata would speak for the old tokenizer.
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith("tokenizer.")}
    return replace(checkpoint, tokenizer_files={**kept, **new}, metadata=metadata)
