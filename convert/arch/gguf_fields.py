"""Metadata that all architectures share, from hyperparameters to GGUF and from GGUF to config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantpress.convert.arch.fields import short
from quantpress.convert.arch.gguf_rotary import Entries, rope_metadata
from quantpress.convert.arch.gguf_values import Metadata, real, whole
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.quant.errors import InputError

__all__ = [
    "capped_context",
    "capped_note",
    "decoder_sizes",
    "epsilon_config",
    "general_config",
    "layer_types",
    "real",
    "size_metadata",
    "turned_share",
    "vocabulary",
    "whole",
]

# LlamaFileType (llama.h) of files that are one type throughout -> torch's name; anything else was quantized, and
# float16 is what its values are usually kept in
_FILE_TYPES: Mapping[int, str] = MappingProxyType({0: "float32", 1: "float16", 32: "bfloat16"})
_IDS = ("bos", "eos", "padding")


def size_metadata(hyper: Hyperparameters, *, norm: str, context: int | None = None) -> Entries:
    """Gives the sizes that llama.cpp reads for every architecture, and the rotary keys where positions turn.

    Args:
        hyper: what config.json says.
        norm: "rms" or "layer".
        context: tokens up to which llama.cpp agrees with transformers, where that is fewer than config.json's.
    """
    epsilon = "attention.layer_norm_rms_epsilon" if norm == "rms" else "attention.layer_norm_epsilon"
    entries: Entries = {
        "block_count": ("uint32", hyper.layers),
        "context_length": ("uint32", hyper.context if context is None else context),
        "embedding_length": ("uint32", hyper.hidden),
        "feed_forward_length": ("uint32", hyper.intermediate),
        "attention.head_count": ("uint32", hyper.heads),
        "attention.head_count_kv": ("uint32", hyper.kv_heads),
        epsilon: ("float32", hyper.norm_eps),
    }
    if hyper.rope is not None:
        entries["attention.key_length"] = ("uint32", hyper.head_dim)
        entries["attention.value_length"] = ("uint32", hyper.head_dim)
        entries.update(rope_metadata(hyper.rope, hyper.context))
    entries["vocab_size"] = ("uint32", hyper.vocab)
    return entries


def general_config(metadata: Metadata, names: frozenset[str], class_name: str, model_type: str) -> dict[str, Any]:
    """Gives the keys of config.json that do not depend on the family.

    Args:
        metadata: full keys, plain values.
        names: tensors in the file; without `output.weight` the embeddings are tied.
        class_name: for `architectures`.
        model_type: as in config.json.
    """
    file_type = metadata.get("general.file_type", 0)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "torch_dtype": _FILE_TYPES.get(file_type, "float16") if isinstance(file_type, int) else "float16",
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": vocabulary(metadata),
    }
    for kind in _IDS:
        token = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if isinstance(token, int) and 0 <= token < config["vocab_size"]:  # llama.cpp passes over others, too
            config[f"{'pad' if kind == 'padding' else kind}_token_id"] = token
    return config


def vocabulary(metadata: Metadata) -> int:
    """Gives the number of embedding rows: as many as the file's tokenizer has tokens.

    Raises:
        InputError: the file has neither a token list nor `vocab_size`, or its tokens are no list.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, str):
        raise InputError(f"GGUF: key 'tokenizer.ggml.tokens' is {short(tokens)}, wanted an array of texts")
    if tokens is not None and hasattr(tokens, "__len__") and len(tokens):
        return len(tokens)
    return whole(metadata, f"{metadata.get('general.architecture')}.vocab_size")


def decoder_sizes(metadata: Metadata, arch: str, *, norm: str = "rms") -> dict[str, Any]:
    """Gives sizes under the names that most families use in config.json.

    Args:
        metadata: full keys, plain values.
        arch: `general.architecture`.
        norm: "rms" or "layer", for the names of the epsilon.
    """
    hidden, heads = whole(metadata, f"{arch}.embedding_length"), whole(metadata, f"{arch}.attention.head_count")
    return {
        "hidden_size": hidden,
        "intermediate_size": whole(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": whole(metadata, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": whole(metadata, f"{arch}.attention.key_length", hidden // heads),
        "max_position_embeddings": whole(metadata, f"{arch}.context_length"),
        **epsilon_config(metadata, arch, norm=norm),
    }


def epsilon_config(metadata: Metadata, arch: str, *, norm: str) -> dict[str, Any]:
    """Gives the epsilon of the norms, "rms" or "layer", under the name that it has in config.json."""
    if norm == "rms":
        return {"rms_norm_eps": real(metadata, f"{arch}.attention.layer_norm_rms_epsilon")}
    return {"layer_norm_eps": real(metadata, f"{arch}.attention.layer_norm_epsilon")}


def layer_types(metadata: Metadata, arch: str, layers: int, *, pattern: int) -> list[str]:
    """Gives `layer_types` of a file with a sliding window.

    Args:
        metadata: full keys, plain values.
        arch: `general.architecture`.
        layers: their number.
        pattern: each such layer sees all, where the file does not say which do.
    """
    key = f"{arch}.attention.sliding_window_pattern"
    stored: Any = metadata.get(key)
    if hasattr(stored, "__len__"):
        slides = [bool(value) for value in stored[:layers]]
    else:
        every = whole(metadata, key, pattern)
        slides = [bool((layer + 1) % every) for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def turned_share(turned: int, head_dim: int) -> float:
    """Gives the share of a head whose product with `head_dim`, cut to a whole number, is `turned` again."""
    share = turned / head_dim
    return share if int(head_dim * share) == turned else math.nextafter(share, 2.0)


def capped_context(hyper: Hyperparameters) -> int:
    """Gives the length up to which attention without a window equals the model's."""
    if hyper.sliding_window is None or not any(hyper.sliding_layers):
        return hyper.context
    return min(hyper.context, hyper.sliding_window)


def capped_note(hyper: Hyperparameters, family: str) -> tuple[str, ...]:
    """Says that the window is missing in the file, if config.json has one that its context outgrows."""
    context = capped_context(hyper)
    if context == hyper.context:
        return ()
    note = (
        f"llama.cpp has no sliding window for {family}: context_length is {context}, the window, instead of "
        f"{hyper.context}; beyond it the file would differ from the model"
    )
    return (note,)
