"""The flags of `convert --to gguf`; one that is not given is None, so that the stage's own default holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.pipelines.commands.method_options import METHOD_FLAGS
from quantpress.quant.errors import UsageError

__all__ = ["GGUF_FLAGS", "gguf_options", "gguf_values"]

Command = TypeVar("Command", bound=Callable[..., Any])
_TYPES = ", ".join(name.lower() for name in FILE_TYPES)

_OPTIONS = (
    click.option("--outtype", default="auto", show_default=True, help=f"GGUF type: {_TYPES}, or auto (16 bit)."),
    click.option("--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches."),
    click.option("--output-tensor-type", metavar="TYPE", help="Type of the head."),
    click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding."),
    click.option("--leave-output-tensor", is_flag=True, help="Keep the head in the type it is stored in."),
    click.option("--pure", is_flag=True, help="The same type for every matrix."),
    click.option("--imatrix", type=click.Path(path_type=Path), help="GGUF: importance matrix, llama.cpp's file."),
    click.option("--split-max-size", metavar="N(M|G)", help="GGUF: bytes of tensors in a file, for several files."),
    click.option("--split-max-tensors", type=click.IntRange(min=0), help="GGUF: tensors in a file, likewise."),
    click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Replace a metadata value."),
    click.option("--metadata", type=click.Path(path_type=Path), help="JSON file of general.* metadata."),
    click.option("--vocab-only", is_flag=True, help="Write the vocabulary and no tensor."),
    click.option("--model-name", help="Name of the model in the file."),
)

GGUF_FLAGS = (
    "outtype", "tensor_type", "output_tensor_type", "token_embedding_type", "leave_output_tensor", "pure", "imatrix",
    "split_max_size", "split_max_tensors", "override_kv", "metadata", "vocab_only", "model_name", *METHOD_FLAGS,
)  # fmt: skip


def gguf_options(command: Command) -> Command:
    """Adds them to a command, those of ONNX outputs too that are called the same."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def gguf_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the fields of the stage `Gguf` that were given.

    Raises:
        UsageError: a --tensor-type that is none.
    """
    given = {name: flags[name] for name in GGUF_FLAGS if name != "tensor_type" and flags[name] is not None}
    return {**given, "tensor_types": _pairs(flags["tensor_type"])}


def _pairs(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for value in values:
        pattern, separator, kind = value.rpartition("=")
        if not separator or not pattern or not kind:
            raise UsageError(f"--tensor-type {value!r}: wanted REGEX=TYPE, as in ffn_down=q8_0")
        pairs.append((pattern, kind))
    return tuple(pairs)
