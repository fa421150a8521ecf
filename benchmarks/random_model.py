"""Makes checkpoints of any shape with random weights and a small real tokenizer, to measure speed and memory on.

python benchmarks/random_model.py FOLDER '{"layers": 2, ...}'
"""

from __future__ import annotations

import io
import json
import pydoc_data.topics
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from shape import Shape


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        shapes[block + "self_attn.q_proj.weight"] = (shape.hidden, shape.hidden)
        shapes[block + "self_attn.k_proj.weight"] = (kv, shape.hidden)
        shapes[block + "self_attn.v_proj.weight"] = (kv, shape.hidden)
        shapes[block + "self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        shapes[block + "mlp.gate_proj.weight"] = (shape.intermediate, shape.hidden)
        shapes[block + "mlp.up_proj.weight"] = (shape.intermediate, shape.hidden)
        shapes[block + "mlp.down_proj.weight"] = (shape.hidden, shape.intermediate)
        shapes[block + "input_layernorm.weight"] = (shape.hidden,)
        shapes[block + "post_attention_layernorm.weight"] = (shape.hidden,)
    return shapes | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def write_tokenizer(folder: Path) -> None:
    """Writes a SentencePiece tokenizer of 1,024 pieces."""
    lines = [line for topic in sorted(pydoc_data.topics.topics) for line in pydoc_data.topics.topics[topic].split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=1024, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_checkpoint(folder: Path, shape: Shape) -> Path:
    """Writes a bf16 checkpoint folder of normally distributed weights (standard deviation 0.02)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        values = generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        tensors[name] = (values + np.float32("norm" in name)).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    write_tokenizer(folder)
    return folder


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
