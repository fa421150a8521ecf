"""What an ONNX language model wants to be fed: told from the names and types of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.read import OnnxModel, OnnxValue
from quantpress.quant.errors import InputError

__all__ = ["Feeds", "feeds_of"]

_TYPES: Mapping[str, Any] = {
    "INT64": np.int64, "INT32": np.int32, "FLOAT": np.float32, "FLOAT16": np.float16, "DOUBLE": np.float64,
}  # fmt: skip
_IDS, _MASK, _POSITIONS, _LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_PAST, _PRESENT = "past_key_values.", "present."
_REFUSED = {
    "use_cache_branch": "merged from a graph with and one without cache, as older optimum did; export it again, or give"
    " decoder_with_past_model.onnx",
    "inputs_embeds": "starts from embeddings; give the model whose input is input_ids",
    "encoder_hidden_states": "the decoder of an encoder-decoder model, which is not judged here",
}


@dataclass(frozen=True)
class Feeds:
    """The names and types of inputs and outputs.

    Attributes:
        types: input -> numpy type.
        past: input for past keys or values -> the output that becomes it.
        empty: input for past keys or values -> (kv_heads, head_dim).
        outputs: all outputs in the graph's order.
        logits: which of them are the logits.
        vocab: logits per position; 0 where the file does not say.
    """

    types: Mapping[str, Any]
    past: Mapping[str, str]
    empty: Mapping[str, tuple[int, int]]
    outputs: tuple[str, ...]
    logits: str
    vocab: int

    def feed(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None, cache: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Gives what to feed for tokens after those in a cache.

        Args:
            ids: (B, S) token ids.
            mask: (B, T) or None for no padding; T counts the cache's tokens too.
            cache: input name -> (B, kv_heads, T - S, head_dim), or None.
        """
        batch, length = ids.shape
        past = next(iter(cache.values())).shape[2] if cache else 0
        if mask is None:
            mask = np.ones((batch, past + length), np.int64)
        if mask.shape != (batch, past + length):
            raise ValueError(f"mask of shape {mask.shape} for {batch} rows of {past} + {length} tokens")
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        values = {_IDS: ids, _MASK: mask, _POSITIONS: positions}
        fed = {name: values[name].astype(self.types[name], copy=False) for name in values if name in self.types}
        for name, (heads, width) in self.empty.items():
            fed[name] = cache[name] if cache else np.zeros((batch, heads, 0, width), self.types[name])
        return fed


def feeds_of(model: OnnxModel) -> Feeds:
    """Tells what a model wants to be fed.

    Raises:
        InputError: it is no decoder of text that can be run here; the message names the input or output.
    """
    inputs = {value.name: value for value in model.inputs}
    outputs = {value.name: value for value in model.outputs}
    for name, why in _REFUSED.items():
        if name in inputs:
            raise InputError(f"{model.path}: input {name!r}: {why}")
    if _IDS not in inputs or _LOGITS not in outputs:
        missing = f"input {_IDS!r}" if _IDS not in inputs else f"output {_LOGITS!r}"
        found = shown(list(inputs if _IDS not in inputs else outputs), 200)
        raise InputError(f"{model.path}: not a language model: no {missing}; it has {found}")
    known = {_IDS, _MASK, _POSITIONS}
    past = {name: _PRESENT + name.removeprefix(_PAST) for name in inputs if name.startswith(_PAST)}
    if stray := [name for name in inputs if name not in known and name not in past]:
        raise InputError(f"{model.path}: what to feed as {shown(stray[0])} is not known here")
    if lost := [present for present in past.values() if present not in outputs]:
        raise InputError(f"{model.path}: no output {shown(lost[0])} for the keys and values that it takes")
    types = {name: _type(model, value) for name, value in inputs.items()}
    empty = {name: _cache_shape(model, inputs[name]) for name in past}
    shape = outputs[_LOGITS].shape or ()
    rows = shape[-1] if shape else 0
    return Feeds(types, past, empty, tuple(outputs), _LOGITS, rows if isinstance(rows, int) else 0)


def _type(model: OnnxModel, value: OnnxValue) -> Any:
    if value.dtype not in _TYPES:
        raise InputError(f"{model.path}: input {shown(value.name)} is of type {value.dtype or 'unknown'}")
    return _TYPES[value.dtype]


def _cache_shape(model: OnnxModel, value: OnnxValue) -> tuple[int, int]:
    """Heads and width of past keys or values, (B, kv_heads, T, head_dim); what the graph leaves open the files say."""
    shape = value.shape or ()
    if len(shape) != 4:
        raise InputError(f"{model.path}: input {shown(value.name)} has shape {shape}, wanted 4 dimensions")
    heads = shape[1] if isinstance(shape[1], int) else _stated(model, "num_key_value_heads", "num_key_value_heads")
    width = shape[3] if isinstance(shape[3], int) else _stated(model, "head_size", "head_dim")
    for size, what in ((heads, "heads"), (width, "values per head")):
        if not 0 < size <= 1 << 16:
            raise InputError(f"{model.path}: input {shown(value.name)} has {size or 'an unknown number of'} {what}")
    return heads, width


def _stated(model: OnnxModel, genai_key: str, config_key: str) -> int:
    """Gives a size from genai_config.json or config.json; 0 where neither has it."""
    genai = model.folder.genai.get("model")
    decoder = genai.get("decoder") if isinstance(genai, dict) else None
    found = decoder.get(genai_key) if isinstance(decoder, dict) else None
    if not isinstance(found, int):
        found = model.folder.config.get(config_key)
    if not isinstance(found, int) and config_key == "head_dim":
        hidden, heads = (model.folder.config.get(key) for key in ("hidden_size", "num_attention_heads"))
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            found = hidden // heads
    return found if isinstance(found, int) and not isinstance(found, bool) else 0
