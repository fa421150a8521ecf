"""GGUF files by the gguf package: a Llama and a GPT-2 with their tokenizers, split ones, importance matrices."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["GGUF_WORDS", "gguf_seeds", "imatrix_seeds", "split_seeds"]

_WIDTH, _WIDE, _HEADS = 32, 32, 2
_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "the", "▁the"]
_KINDS = [2, 3, 3, *([6] * 256), *([1] * 7)]

GGUF_WORDS: tuple[bytes, ...] = (
    b"general.alignment", b"general.architecture", b"llama", b"gpt2", b"gemma", b"bert", b"t5", b"llama.block_count",
    b"llama.rope.dimension_count", b"llama.attention.head_count_kv", b"llama.rope.scaling.type", b"yarn",
    b"llama.expert_count", b"llama.attention.key_length", b"llama.rope.freq_base", b"tokenizer.ggml.model", b"unigram",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.precompiled_charsmap", b"tokenizer.ggml.pre", b"tokenizer.chat_template", b"general.sampling.temp",
    b"blk.0.attn_q.weight", b"token_embd.weight", b"output.weight", b"rope_freqs.weight", b"blk.0.ffn_gate_exps.weight",
)  # fmt: skip


def _written(fill: Callable[[gguf.GGUFWriter], None], architecture: str = "llama") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _llama(writer: gguf.GGUFWriter) -> None:
    writer.add_name("seed")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDE)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(_PIECES))
    writer.add_file_type(1)
    _pieces(writer)
    shapes = {
        "token_embd": (len(_PIECES), _WIDTH), "output_norm": (_WIDTH,), "blk.0.attn_norm": (_WIDTH,),
        "blk.0.ffn_norm": (_WIDTH,), "blk.0.attn_q": (_WIDTH, _WIDTH), "blk.0.attn_k": (_WIDTH // 2, _WIDTH),
        "blk.0.attn_v": (_WIDTH // 2, _WIDTH), "blk.0.attn_output": (_WIDTH, _WIDTH), "blk.0.ffn_gate": (_WIDE, _WIDTH),
        "blk.0.ffn_up": (_WIDE, _WIDTH), "blk.0.ffn_down": (_WIDTH, _WIDE),
    }  # fmt: skip
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            packed = gguf.quants.quantize(np.zeros(shape, np.float32), gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def _pieces(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_PIECES)
    writer.add_token_scores([float(-index) for index in range(len(_PIECES))])
    writer.add_token_types(_KINDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0].content }}")


def _letters(writer: gguf.GGUFWriter) -> None:
    """A vocabulary only, of the kind of GPT-2."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*"abcdefghijklmnopqrstuvwxyzĠ", "th", "the", "<|endoftext|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(tokens) - 1)


def _every_type(writer: gguf.GGUFWriter) -> None:
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 1)
    writer.add_float32("x.f", 0.5)
    writer.add_float64("x.d", 0.5)
    writer.add_bool("x.b", True)
    for name, values in {"i": [1, 2], "f": [0.5], "s": ["a", "b"], "b": [True, False]}.items():
        writer.add_array(f"x.{name}s", values)
    writer.add_tensor("t", np.zeros((2, 3, 4), np.float32))
    writer.add_tensor("one", np.zeros(1, np.float16))


def gguf_seeds() -> Mapping[str, bytes]:
    """Gives a whole model, vocabularies, and files that promise more than they hold."""
    model = _written(_llama)
    head = b"GGUF\x03\x00\x00\x00"
    pair = struct.pack("<Q", 1) + b"k"
    return {
        "good-model": model, "vocabulary": _written(_letters, "gpt2"), "types": _written(_every_type),
        "cut": model[:-100], "version": model[:4] + b"\x02" + model[5:], "empty": head + struct.pack("<QQ", 0, 0),
        "tensors": head + struct.pack("<QQ", (1 << 64) - 1, 0), "pairs": head + struct.pack("<QQ", 0, 1 << 40),
        "array": head + struct.pack("<QQ", 0, 1) + pair + struct.pack("<IIQ", 9, 4, 1 << 60),
        "strings": head + struct.pack("<QQ", 0, 1) + pair + struct.pack("<IIQ", 9, 8, 5000) + bytes(8 * 4000),
        "nested": head + struct.pack("<QQ", 0, 1) + pair + struct.pack("<IIQ", 9, 9, 1) * 50,
        "other-end": b"GGUF\x00\x00\x00\x03" + bytes(16),
    }  # fmt: skip


def split_seeds() -> Mapping[str, bytes]:
    """Gives the two parts of a model, by their names."""

    def part(number: int) -> bytes:
        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", 2)
            writer.add_tensor(f"t{number}", np.zeros((2, 3), np.float32))

        return _written(fill)

    return {f"model-0000{number + 1}-of-00002.gguf": part(number) for number in range(2)}


def imatrix_seeds() -> Mapping[str, bytes]:
    """Gives importance matrices of both forms, and some with holes in them."""

    def matrix(counts: bool = True, **tensors: Any) -> bytes:
        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", ["text"])
            writer.add_uint32("imatrix.chunk_count", 3)
            writer.add_uint32("imatrix.chunk_size", 512)
            for name, values in tensors.items():
                writer.add_tensor(f"{name}.in_sum2", values)
                if counts:
                    writer.add_tensor(f"{name}.counts", np.full((len(values), 1), 5, np.float32))

        return _written(fill)

    entry = struct.pack("<i", 7) + b"blk.0.w" + struct.pack("<ii", 2, 4) + np.ones(4, "<f4").tobytes()
    return {
        "good": matrix(a=np.ones((1, 32), np.float32), b=np.ones((4, 8), np.float32)),
        "good-old": struct.pack("<i", 1) + entry, "old-twice": struct.pack("<i", 2) + entry * 2,
        "good-old-text": struct.pack("<i", 1) + entry + struct.pack("<ii", 3, 4) + b"text",
        "nan": matrix(a=np.full((1, 4), np.nan, np.float32)), "minus": matrix(a=-np.ones((1, 4), np.float32)),
        "alone": matrix(counts=False, a=np.ones((1, 4), np.float32)), "halves": matrix(a=np.ones((1, 4), np.float16)),
        "old-many": struct.pack("<i", (1 << 31) - 1) + entry,
        "old-cut": (struct.pack("<i", 1) + entry)[:-3], "none": b"",
    }  # fmt: skip
