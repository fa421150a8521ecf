"""Makes sharded checkpoints of the size that people press, shard by shard, with little memory.

python benchmarks/big_checkpoint.py FOLDER dense|experts [--layers N] [--holes]

`dense` has the shape of Mistral 7B, `experts` that of Mixtral 8x7B. Values come from a pool of normally distributed
ones, read from a place of their own for each tensor: no two rows that a quantizer sees side by side are equal. With
`--holes` the data is never written, a sparse file that reads as zeros: enough to open and inspect.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from random_model import write_tokenizer

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB, EXPERTS = 4096, 32, 8, 14336, 32000, 8
SHARD = 2_000_000_000  # bytes of a shard at most
POOL = (64 << 20) + 4099  # values; no multiple of a row, so rows do not repeat


def config(kind: str, layers: int) -> dict[str, object]:
    """Gives config.json."""
    moe = kind == "experts"
    return {
        "architectures": ["MixtralForCausalLM" if moe else "MistralForCausalLM"],
        "model_type": "mixtral" if moe else "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **({"num_local_experts": EXPERTS, "num_experts_per_tok": 2} if moe else {}),
    }


def shapes(kind: str, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Gives names and shapes, in the order of the layers."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            yield f"{block}self_attn.{part}_proj.weight", (rows, HIDDEN)
        if kind == "experts":
            yield f"{block}block_sparse_moe.gate.weight", (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                for part, shape in _mlp("w1", "w3", "w2"):
                    yield f"{block}block_sparse_moe.experts.{expert}.{part}.weight", shape
        else:
            for part, shape in _mlp("gate_proj", "up_proj", "down_proj"):
                yield f"{block}mlp.{part}.weight", shape
        yield f"{block}input_layernorm.weight", (HIDDEN,)
        yield f"{block}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _mlp(gate: str, up: str, down: str) -> tuple[tuple[str, tuple[int, int]], ...]:
    return (gate, (INTERMEDIATE, HIDDEN)), (up, (INTERMEDIATE, HIDDEN)), (down, (HIDDEN, INTERMEDIATE))


def shards(kind: str, layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Cuts the tensors into shards."""
    found, size = [dict[str, tuple[int, ...]]()], 0
    for name, shape in shapes(kind, layers):
        nbytes = 2 * math.prod(shape)
        if found[-1] and size + nbytes > SHARD:
            found.append({})
            size = 0
        found[-1][name] = shape
        size += nbytes
    return found


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray | None) -> None:
    """Writes one safetensors file."""
    header, start = dict[str, object](), 0
    for name, shape in tensors.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if pool is None:
            file.truncate(8 + len(text) + start)
            return
        for name, shape in tensors.items():
            count, first = math.prod(shape), zlib.crc32(name.encode()) % POOL
            while count:
                part = pool[first : first + count]
                file.write((part + np.float32("norm" in name)).astype(pool.dtype) if "norm" in name else part)
                count, first = count - len(part), 0


def make_big_checkpoint(folder: Path, kind: str, layers: int = 32, *, holes: bool = False) -> int:
    """Writes the folder and gives its number of parameters."""
    folder.mkdir(parents=True)
    pool = None
    if not holes:
        values = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
        pool = values.astype(ml_dtypes.bfloat16)
        del values
    parts, places = shards(kind, layers), dict[str, str]()
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, tensors, pool)
        places |= dict.fromkeys(tensors, name)
    parameters = sum(math.prod(shape) for _, shape in shapes(kind, layers))
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(kind, layers), indent=2))
    write_tokenizer(folder)
    return parameters


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["dense", "experts"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--holes", action="store_true")
    options = parser.parse_args()
    make_big_checkpoint(options.folder, options.kind, options.layers, holes=options.holes)
