"""The `general.*` part of a GGUF file's metadata: what the model is called, how it was made, how to sample from it.

Keys: gguf package, constants.Keys.General; what llama.cpp's converter writes: gguf-py/gguf/metadata.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.model_card import read_card
from quantpress.quant.errors import InputError

Metadata = dict[str, MetadataValue]

QUANTIZATION_VERSION = 2  # GGML_QUANT_VERSION, the generation of the block layouts

# key of generation_config.json -> key in GGUF after `general.sampling.`, and its type
SAMPLING = {
    "sequence": ("sequence", "string"),
    "top_k": ("top_k", "int32"),
    "top_p": ("top_p", "float32"),
    "min_p": ("min_p", "float32"),
    "xtc_probability": ("xtc_probability", "float32"),
    "xtc_threshold": ("xtc_threshold", "float32"),
    "temperature": ("temp", "float32"),
    "penalty_last_n": ("penalty_last_n", "int32"),
    "repetition_penalty": ("penalty_repeat", "float32"),
    "penalty_repeat": ("penalty_repeat", "float32"),  # llama.cpp's own spelling goes before the usual one
    "mirostat": ("mirostat", "int32"),
    "mirostat_tau": ("mirostat_tau", "float32"),
    "mirostat_eta": ("mirostat_eta", "float32"),
}
# What describes one particular file, and so is never copied from one to another.
_OF_ONE_FILE = ("general.alignment", "general.file_type", "general.quantization_version", "general.architecture")


def general_metadata(
    checkpoint: Checkpoint, architecture: str, *, parameters: int, file_type: int, quantized: bool, name: str = ""
) -> Metadata:
    """Gives the `general.*` pairs of a file, in its order.

    Args:
        checkpoint: the model; a README.md among its `tokenizer_files` gives licence, base model, tags and languages,
            and the metadata of a GGUF source are kept.
        architecture: llama.cpp's name of it.
        parameters: number of values in the file.
        file_type: llama.cpp's number of the file's type.
        quantized: whether any tensor is stored in blocks.
        name: what the model is called; the checkpoint's name by default.

    Raises:
        InputError: generation_config.json holds a sampling default of a wrong type.
    """
    kept = {
        key: value
        for key, value in checkpoint.metadata.items()
        if key.startswith("general.") and key not in _OF_ONE_FILE
    }
    metadata: Metadata = {"general.architecture": ("string", architecture), "general.type": ("string", "model")}
    metadata |= sampling_metadata(checkpoint.generation_config)
    metadata["general.name"] = ("string", checkpoint.name)
    if parameters:
        metadata["general.size_label"] = ("string", size_label(parameters))
    metadata |= read_card(checkpoint.tokenizer_files.get("README.md", b""))
    metadata |= kept
    if name:
        metadata["general.name"] = ("string", name)
    metadata["general.file_type"] = ("uint32", file_type)
    if quantized:
        metadata["general.quantization_version"] = ("uint32", QUANTIZATION_VERSION)
    return metadata


def sampling_metadata(generation_config: Mapping[str, Any]) -> Metadata:
    """Gives the sampling defaults of generation_config.json as `general.sampling.*`.

    Raises:
        InputError: one of them is neither null nor of its type.
    """
    metadata: Metadata = {}
    for key, (gguf, kind) in SAMPLING.items():
        value = generation_config.get(key)
        if value is None:
            continue
        if kind == "float32" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not {"string": str, "int32": int, "float32": float}[kind]:
            raise InputError(f"generation_config.json: {key!r} is {shown(value)}, a value for {kind} is wanted")
        metadata[f"general.sampling.{gguf}"] = (kind, value)
    return metadata


def size_label(parameters: int) -> str:
    """Gives a number of parameters as people say it: 135M, 8.0B, 260K (gguf-py/gguf/utility.py writes the same)."""
    units = ((10**12, "T"), (10**9, "B"), (10**6, "M"))
    unit, suffix = next((each for each in units if parameters > each[0]), (10**3, "K"))
    scaled = parameters / unit
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{suffix}"


def described(kind: str, entries: Sequence[Mapping[str, Any]]) -> Metadata:
    """Gives `general.<kind>.count` and the fields of each entry.

    Args:
        kind: "base_model" or "dataset".
        entries: fields such as name, organization and repo_url, as texts.
    """
    metadata: Metadata = {f"general.{kind}.count": ("uint32", len(entries))}
    for number, entry in enumerate(entries):
        metadata |= {f"general.{kind}.{number}.{field}": ("string", text) for field, text in entry.items()}
    return metadata
