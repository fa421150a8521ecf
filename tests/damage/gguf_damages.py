"""Damages that are planted in GGUF files by llama.cpp's own package: a copy of a good file, changed in place.

Every damage keeps the file readable and of the same length, as a wrong converter or a broken disk would. One that a
file has no place for (a bias, a second layer of the same types) says so by returning False.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["DAMAGES", "flipped_scale", "planted", "scales_of"]

Reader = gguf.GGUFReader
Plant = Callable[[Reader], bool]

# type -> where its float16 scales stand in a block's bytes
_SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def planted(good: Path, out: Path, plant: Plant) -> bool:
    """Copies a file and damages the copy; says whether there was a place for the damage."""
    shutil.copyfile(good, out)
    reader = Reader(out, "r+")
    done = plant(reader)
    reader.data.flush()
    return done and out.read_bytes() != good.read_bytes()


def tensors(reader: Reader) -> dict[str, gguf.ReaderTensor]:
    """Gives the tensors by name."""
    return {tensor.name: tensor for tensor in reader.tensors}


def blocks(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Gives the blocks of a quantized tensor, (count, bytes); changes go to the file."""
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    found: np.ndarray = tensor.data.reshape(-1, size)
    assert np.shares_memory(found, tensor.data)
    return found


def scales_of(tensor: gguf.ReaderTensor) -> Iterator[np.ndarray]:
    """Gives the float16 scales of a quantized tensor's blocks, (count, 2) bytes each; changes go to the file."""
    for start in _SCALES[tensor.tensor_type.name]:
        yield blocks(tensor)[:, start : start + 2]


def _scaled(tensor: gguf.ReaderTensor, factor: float, rows: slice = slice(None)) -> bool:
    if tensor.tensor_type.name not in _SCALES:
        tensor.data[rows] = (tensor.data[rows].astype(np.float32) * factor).astype(tensor.data.dtype)
        return True
    per_row = len(blocks(tensor)) // len(tensor.data)
    for scale in scales_of(tensor):
        chosen = scale.reshape(-1, per_row, 2)[rows]
        values = np.ascontiguousarray(chosen).view(np.float16).astype(np.float32) * factor
        chosen[...] = values.astype(np.float16).view(np.uint8).reshape(chosen.shape)
    return True


def _first(reader: Reader, *ends: str) -> gguf.ReaderTensor | None:
    found = tensors(reader)
    return next((found[name] for end in ends for name in sorted(found) if name.endswith(end)), None)


def _on(*ends: str) -> Callable[[Callable[[gguf.ReaderTensor], bool]], Plant]:
    """Makes a damage of what is done to the first tensor whose name ends so."""

    def of(change: Callable[[gguf.ReaderTensor], bool]) -> Plant:
        def plant(reader: Reader) -> bool:
            tensor = _first(reader, *ends)
            return tensor is not None and change(tensor)

        return plant

    return of


def _zero(tensor: gguf.ReaderTensor) -> bool:
    tensor.data[...] = 0
    return True


def _zero_row(tensor: gguf.ReaderTensor) -> bool:
    tensor.data[len(tensor.data) // 2] = 0
    return True


def _shift_rows(tensor: gguf.ReaderTensor) -> bool:
    tensor.data[...] = np.roll(tensor.data, 1, axis=0)
    return True


def _shift_norm(tensor: gguf.ReaderTensor) -> bool:
    tensor.data[...] += 1
    return True


def _one_value(tensor: gguf.ReaderTensor) -> bool:
    """Turns the sign of a single value, the greatest of a tensor that is stored in floats."""
    flat = tensor.data.reshape(-1)
    if not np.issubdtype(flat.dtype, np.floating):
        return False
    place = int(np.abs(flat.astype(np.float32)).argmax())
    flat[place] = -flat[place]
    return True


def _exchange(one: str, other: str) -> Plant:
    def plant(reader: Reader) -> bool:
        found = tensors(reader)
        for name in sorted(found):
            second = found.get(name.replace(one, other))
            first = found[name]
            if one not in name or second is None or not _alike(first, second):
                continue
            kept = first.data.copy()
            first.data[...] = second.data
            second.data[...] = kept
            return True
        return False

    return plant


def _alike(one: gguf.ReaderTensor, other: gguf.ReaderTensor) -> bool:
    return one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)


def _layers(reader: Reader) -> bool:
    """Swaps all tensors of the first two layers that are of the same types."""
    found, done = tensors(reader), False
    for name, first in found.items():
        second = found.get(name.replace("blk.0.", "blk.1."))
        if name.startswith("blk.0.") and second is not None and _alike(first, second):
            kept = first.data.copy()
            first.data[...] = second.data
            second.data[...] = kept
            done = True
    return done


def _unpermuted(slot: str, heads_key: str) -> Plant:
    """Puts the rows of q or k into the order that transformers has, as if the exporter had not turned them."""

    def plant(reader: Reader) -> bool:
        arch = reader.fields["general.architecture"].contents()
        tensor, field = _first(reader, slot), reader.fields.get(f"{arch}.attention.{heads_key}")
        if tensor is None or field is None or arch not in ("llama", "mistral"):
            return False
        heads, data = int(field.contents()), tensor.data
        pairs = data.shape[0] // heads // 2
        data[...] = data.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(data.shape).copy()
        return True

    return plant


def _set(end: str, change: Callable[[Any], Any]) -> Plant:
    """Changes a number of the metadata."""

    def plant(reader: Reader) -> bool:
        arch = reader.fields["general.architecture"].contents()
        for key in (f"{arch}.{end}", end):
            if (field := reader.fields.get(key)) is not None:
                part = field.parts[field.data[0]]
                part[0] = change(part[0])
                return True
        return False

    return plant


def _swap_tokens(reader: Reader) -> bool:
    """Swaps two tokens of one length, rare ones: the last two that are."""
    field = reader.fields["tokenizer.ggml.tokens"]
    last: dict[int, np.ndarray] = {}
    for index in reversed(field.data):
        part = field.parts[index]
        other = last.setdefault(len(part), part)
        if other is not part and bytes(other) != bytes(part) and not bytes(part).startswith((b"<", b"[")):
            kept = part.copy()
            part[:] = other
            other[:] = kept
            return True
    return False


def _hide_token(reader: Reader) -> bool:
    """Makes the last token that is text one that is never text."""
    field = reader.fields["tokenizer.ggml.token_type"]
    parts = [field.parts[index] for index in field.data]
    last = next((part for part in reversed(parts) if part[0] == gguf.TokenType.NORMAL), None)
    if last is not None:
        last[0] = gguf.TokenType.CONTROL
    return last is not None


def flipped_scale(name: str, bit: int, *, block: int | None, minimum: bool = False) -> Plant:
    """Flips one bit of the scales of a tensor: of one block, or of all.

    Args:
        name: end of the tensor's name.
        bit: of the float16 scale: 0 to 9 its mantissa, 10 to 14 its exponent, 15 its sign.
        block: its number, counted from 0; None for all.
        minimum: the second scale of types that have one.
    """

    def plant(reader: Reader) -> bool:
        tensor = _first(reader, name)
        if tensor is None or tensor.tensor_type.name not in _SCALES:
            return False
        fields = list(scales_of(tensor))
        if minimum and len(fields) == 1:
            return False
        chosen = fields[-1 if minimum else 0]
        chosen[slice(None) if block is None else block, bit // 8] ^= np.uint8(1 << bit % 8)
        return True

    return plant


def _copy_expert(reader: Reader) -> bool:
    tensor = _first(reader, "ffn_down_exps.weight")
    if tensor is None:
        return False
    tensor.data[1] = tensor.data[0]
    return True


MATRIX = "ffn_up.weight", "ffn_up_exps.weight"
DAMAGES: dict[str, Plant] = {
    "tensor zeroed": _on(*MATRIX)(_zero),
    "tensor x 1.1": _on(*MATRIX)(lambda tensor: _scaled(tensor, 1.1)),
    "v x 1.1": _on("attn_v.weight")(lambda tensor: _scaled(tensor, 1.1)),
    "embedding x 1.1": _on("token_embd.weight")(lambda tensor: _scaled(tensor, 1.1)),
    "rows shifted": _on("attn_output.weight")(_shift_rows),
    "embedding rows shifted": _on("token_embd.weight")(_shift_rows),
    "one row zeroed": _on("attn_v.weight")(_zero_row),
    "one row x 1.5": _on(*MATRIX)(lambda tensor: _scaled(tensor, 1.5, slice(3, 4))),
    "q rows not turned": _unpermuted("attn_q.weight", "head_count"),
    "k rows not turned": _unpermuted("attn_k.weight", "head_count_kv"),
    "gate and up swapped": _exchange("ffn_gate.", "ffn_up."),
    "q of two layers swapped": _exchange("blk.0.attn_q.weight", "blk.1.attn_q.weight"),
    "layers swapped": _layers,
    "one expert twice": _copy_expert,
    "norm + 1": _on("attn_norm.weight")(_shift_norm),
    "last norm zeroed": _on("output_norm.weight")(_zero),
    "one value of a norm": _on("ffn_norm.weight")(_one_value),
    "bias dropped": _on("attn_k.bias", "attn_q.bias", "attn_v.bias")(_zero),
    "head zeroed": _on("output.weight")(_zero_row),
    "one rope factor": _on("rope_freqs.weight")(_one_value),
    "rope base": _set("rope.freq_base", lambda value: value * 2),
    "norm epsilon": _set("attention.layer_norm_rms_epsilon", lambda value: value * 10),
    "context": _set("context_length", lambda value: value * 2),
    "rotated values": _set("rope.dimension_count", lambda value: value // 2),
    "two tokens swapped": _swap_tokens,
    "BOS id": _set("tokenizer.ggml.bos_token_id", lambda value: value + 1),
    "EOS id": _set("tokenizer.ggml.eos_token_id", lambda value: value + 1),
    "type of a token": _hide_token,
    "scale of one block, greatest bit": flipped_scale("ffn_up.weight", 14, block=5),
    "scale of one block, middle bit": flipped_scale("ffn_up.weight", 11, block=5),
    "scales of all blocks, middle bit": flipped_scale("ffn_up.weight", 9, block=None),
    "sign of one block's scale": flipped_scale("ffn_up.weight", 15, block=5),
}  # fmt: skip
"""Name -> what does it; every one must be caught in every file that has a place for it."""
