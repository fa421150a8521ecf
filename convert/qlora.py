"""The base as a QLoRA training saw it: every linear weight quantized as bitsandbytes does, and dequantized again.

An adapter that was trained on a 4-bit base has learned to correct that base's errors, so it may fit the dequantized
weights better than the ones the checkpoint stores. The view is lazy and reads rows in any order: a block needs only its
own values. With double quantization the absmax values of a whole tensor decide together, so a tensor is read once more
for them; the results of the last few tensors are kept, one byte for 64 values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantpress.convert.bitsandbytes import QUANTIZED_TYPES, transposed
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.linears import linear_weights
from quantpress.convert.recent import Recent
from quantpress.quant.bitsandbytes import block_absmax, block_count, check_4bit, round_trip_4bit
from quantpress.quant.dynamic_map import NestedAbsmax, quantize_absmax
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.floats import to_bfloat16, to_float16, to_float32
from quantpress.quant.llm_int8 import dequantize_int8, quantize_int8

__all__ = ["dequantized_base", "detect_training_quantization"]

_TYPES = ("BF16", "F16", "F32")  # what bitsandbytes quantizes
_CHUNK = 1 << 20  # values worked on at a time, about; the caller's rows may be the whole tensor
_KEPT = 8  # tensors whose absmax values are kept: more than are read at the same time

_WHOLE = 2  # Conv1D weights that are kept whole; the largest in use has 10 million values

_TEXTS = (".md", ".yaml", ".yml", ".json")
_MAX_TEXT = 1 << 20  # bytes of a text that are searched
_MAX_NAME = 1000
_FOUR_BIT_NAME = re.compile(r"(?i)(?:^|[-_./])(?:4bit|int4|nf4)(?:$|[-_./])")
_EIGHT_BIT_NAME = re.compile(r"(?i)(?:^|[-_./])(?:8bit|int8)(?:$|[-_./])")
_LINE = r"(?im)^[ \t\-*>#\"']*"
_FOUR_BIT_TEXT = re.compile(
    _LINE + r"(?:load_in_4bit[\"'`]?\s?[:=]\s?true|quantization_bit\s?:\s?4|adapter\s?:\s?qlora)\b"
)
_EIGHT_BIT_TEXT = re.compile(_LINE + r"(?:load_in_8bit[\"'`]?\s?[:=]\s?true|quantization_bit\s?:\s?8)\b")
_TYPE_TEXT = re.compile(r"(?i)bnb_4bit_quant_type[\"'`]?\s?[:=]\s?[\"'`]?(nf4|fp4)\b")


@dataclass(frozen=True, slots=True)
class _Settings:
    quant_type: str
    double_quant: bool
    blocksize: int
    compute_dtype: str | None


def dequantized_base(
    checkpoint: Checkpoint,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: str | None = None,
    skip_modules: Sequence[str] = (),
) -> Checkpoint:
    """Gives the view of a checkpoint that a training on a bitsandbytes-quantized base computed with.

    Args:
        checkpoint: the base in 16 or 32 bits, before any adapter is merged. One that bitsandbytes quantized already
            is returned as it is.
        quant_type: "nf4", "fp4", or "int8" for LLM.int8().
        double_quant: absmax values are quantized too (`bnb_4bit_use_double_quant`).
        blocksize: values per block; transformers always takes 64.
        compute_dtype: type in which the training held the model, a key of `DTYPES`: weights are rounded to it before
            they are quantized and after they are dequantized. None: each tensor's own type.
        skip_modules: modules that were left alone beside the output head, as `llm_int8_skip_modules`.

    Returns:
        The same tensors in the same types; the linear weights (see `linear_weights`) have the rounded values.

    Raises:
        UsageError: an unknown type or block size.
        InputError: a linear weight of a type that bitsandbytes does not quantize, or an adapted checkpoint. While rows
            are read: values that are NaN or infinite.
    """
    if quant_type != "int8":
        check_4bit(quant_type, blocksize)
    if compute_dtype not in (None, *_TYPES):
        raise UsageError(f"compute type {compute_dtype!r} is not one of {', '.join(_TYPES)}")
    if checkpoint.format != "gguf" and QUANTIZED_TYPES & set(checkpoint.storage_types.values()):
        return checkpoint
    if checkpoint.adapted is not None:
        raise InputError(f"{checkpoint.name}: an adapter is merged already; the base is quantized before that")
    settings = _Settings(quant_type, double_quant, blocksize, compute_dtype)
    scales: Recent[NestedAbsmax] = Recent(_KEPT)
    sources: Recent[Array] = Recent(_WHOLE)
    results: Recent[Array] = Recent(_WHOLE)
    tensors = dict(checkpoint.tensors)
    for name, swapped in linear_weights(checkpoint.config, tensors, skip_modules=skip_modules).items():
        tensor = tensors[name]
        if tensor.dtype not in _TYPES:
            raise InputError(
                f"{tensor.source}: tensor {shown(name)} is {tensor.dtype}, but bitsandbytes quantizes"
                f" {', '.join(_TYPES)}; give the base that the adapter was trained on"
            )
        if swapped:  # transformers turns a Conv1D weight round before it is quantized
            tensors[name] = transposed(_view(transposed(tensor, sources), settings, scales), results)
        else:
            tensors[name] = _view(tensor, settings, scales)
    return replace(checkpoint, tensors=tensors)


def _view(tensor: LazyTensor, settings: _Settings, recent: Recent[NestedAbsmax]) -> LazyTensor:
    return _view_int8(tensor, settings) if settings.quant_type == "int8" else _view_4bit(tensor, settings, recent)


def _view_4bit(tensor: LazyTensor, settings: _Settings, recent: Recent[NestedAbsmax]) -> LazyTensor:
    size, blocksize = tensor.size, settings.blocksize
    length = math.prod(tensor.shape[1:])

    def nested() -> NestedAbsmax:
        return quantize_absmax(
            np.concatenate([_absmax(tensor, _flat(tensor, *span, settings), blocksize) for span in _spans(0, size)])
        )

    def read_rows(start: int, stop: int) -> Array:
        first, last = start * length, stop * length
        out = np.empty(last - first, DTYPES[tensor.dtype])
        stored = recent.get(tensor.name, nested) if settings.double_quant and out.size else None
        for begin, end in _spans(first // blocksize * blocksize, min(-(-last // blocksize) * blocksize, size)):
            scales = None if stored is None else stored.values(begin // blocksize, block_count(end, blocksize))
            back = _round_trip(tensor, _flat(tensor, begin, end, settings), settings, scales)
            wanted = slice(max(first, begin), min(last, end))
            out[wanted.start - first : wanted.stop - first] = back[wanted.start - begin : wanted.stop - begin]
        return out.reshape((stop - start, *tensor.shape[1:]))

    return replace(tensor, read_rows=read_rows, wide_rows=None, inner=None)


def _view_int8(tensor: LazyTensor, settings: _Settings) -> LazyTensor:
    def wide_rows(start: int, stop: int) -> Array:
        values = _cast(tensor.read_rows(start, stop), settings.compute_dtype or tensor.dtype)
        try:
            return dequantize_int8(*quantize_int8(values))
        except InputError as error:
            raise InputError(f"{tensor.source}: tensor {shown(tensor.name)}: {error}") from error

    def read_rows(start: int, stop: int) -> Array:
        return _cast(wide_rows(start, stop), tensor.dtype)

    return replace(tensor, read_rows=read_rows, wide_rows=wide_rows, inner=None)


def _spans(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cuts values [first, last) into pieces; a piece is whole blocks because every block size divides `_CHUNK`."""
    for begin in range(first, last, _CHUNK):
        yield begin, min(begin + _CHUNK, last)


def _flat(tensor: LazyTensor, first: int, last: int, settings: _Settings) -> Array:
    """Values [first, last) of a tensor, row after row, in the type that was quantized."""
    length = tensor.size // tensor.rows
    row = first // length
    values = tensor.read_rows(row, -(-last // length)).reshape(-1)
    return _cast(values[first - row * length : last - row * length], settings.compute_dtype or tensor.dtype)


def _absmax(tensor: LazyTensor, values: Array, blocksize: int) -> Array:
    try:
        return block_absmax(values, blocksize)
    except InputError as error:
        raise InputError(f"{tensor.source}: tensor {shown(tensor.name)}: {error}") from error


def _round_trip(tensor: LazyTensor, values: Array, settings: _Settings, scales: Array | None) -> Array:
    try:
        back = round_trip_4bit(
            values, quant_type=settings.quant_type, blocksize=settings.blocksize, stored_absmax=scales
        )
    except InputError as error:
        raise InputError(f"{tensor.source}: tensor {shown(tensor.name)}: {error}") from error
    return _cast(back, tensor.dtype)


def _cast(values: Array, dtype: str) -> Array:
    return {"BF16": to_bfloat16, "F16": to_float16, "F32": to_float32}[dtype](values)


def detect_training_quantization(config: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> str | None:
    """Guesses from what lies in an adapter's folder whether its base was quantized in training; good for a note.

    What is looked at: the settings that older PEFT wrote into README.md, recipes of trainers (Axolotl, LLaMA-Factory),
    a LoftQ initialisation, and the name of the base ("unsloth/llama-3-8b-bnb-4bit").

    Args:
        config: contents of adapter_config.json.
        files: file name -> bytes of README.md and of other texts beside it (.md, .yaml, .yml, .json).

    Returns:
        "nf4", "fp4", "int8", or None if nothing says so. Four bits of an unnamed kind are "nf4", which every trainer
        takes.
    """
    for name, data in sorted((files or {}).items()):
        if name.lower().endswith(_TEXTS) and (kind := _in_text(data[:_MAX_TEXT].decode("utf-8", "replace"))):
            return kind
    settings = config.get("quantization_config")
    if isinstance(settings, Mapping) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        kind = settings.get("bnb_4bit_quant_type", "nf4")
        return "int8" if not settings.get("load_in_4bit") else "fp4" if kind == "fp4" else "nf4"
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        return None
    if config.get("init_lora_weights") == "loftq" or _FOUR_BIT_NAME.search(base[:_MAX_NAME]):
        return "nf4"
    return "int8" if _EIGHT_BIT_NAME.search(base[:_MAX_NAME]) else None


def _in_text(text: str) -> str | None:
    if _FOUR_BIT_TEXT.search(text):
        kind = _TYPE_TEXT.search(text)
        return kind[1].lower() if kind else "nf4"
    return "int8" if _EIGHT_BIT_TEXT.search(text) else None
