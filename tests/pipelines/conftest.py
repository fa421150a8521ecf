"""Tiny GGUF files made with the official `gguf` package, and the llama.cpp libraries to run them with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.pipelines.llama_cpp import LlamaCpp, find_llama_cpp
from quantpress.pipelines.llama_cpp_find import ENVIRONMENT_VARIABLE

TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 96, "rope": 16}
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6  # tokenizer.ggml.token_type


@pytest.fixture(scope="session", params=["installed", "named"])
def library(request: pytest.FixtureRequest) -> LlamaCpp:
    """The installed llama.cpp, and the one that QUANTPRESS_LLAMA_CPP names if it names one."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if request.param == "named" and not named:
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no second library")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "installed":
            patch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        found = find_llama_cpp()
    if found is None:
        pytest.skip("no llama.cpp is installed")
    return found


def llama_gguf(path: Path, weights: dict[str, np.ndarray], vocabulary: dict[str, list[Any]], **fields: Any) -> Path:
    """A llama GGUF with the given tensors (GGUF names, numpy order), tokens and hyperparameters."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["layers"])
    writer.add_context_length(fields.get("context", 512))
    writer.add_embedding_length(fields["hidden"])
    writer.add_feed_forward_length(fields["inner"])
    writer.add_head_count(fields["heads"])
    writer.add_head_count_kv(fields["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(fields["rope"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_scores(vocabulary["scores"])
    writer.add_token_types(vocabulary["types"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(fields.get("add_bos", True))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rotary rows in the order llama.cpp wants: its converter's `permute` (conversion/llama.py), by an index list."""
    rows = values.shape[0] // heads
    order = [
        head * rows + half * rows // 2 + pair for head in range(heads) for pair in range(rows // 2) for half in (0, 1)
    ]
    return values[order]


def gguf_weights(state: dict[str, np.ndarray], *, layers: int, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """A Hugging Face Llama state dict (float32) under GGUF names."""
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if "lm_head.weight" in state:
        tensors["output.weight"] = state["lm_head.weight"]
    parts = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(layers):
        source = f"model.layers.{layer}."
        for name, part in parts.items():
            tensors[f"blk.{layer}.{name}.weight"] = state[f"{source}{part}.weight"]
        for name, part, count in (("attn_q", "q_proj", heads), ("attn_k", "k_proj", kv_heads)):
            tensors[f"blk.{layer}.{name}.weight"] = interleaved(state[f"{source}self_attn.{part}.weight"], count)
    return tensors


def tiny_vocabulary() -> dict[str, list[Any]]:
    """320 SentencePiece-like tokens: three specials, 256 bytes, letters, some words."""
    words = [b"\xe2\x96\x81" + word for word in (b"", b"the", b"a", b"of", b"and")] + [b"th", b"he", b"in", b"er"]
    words += [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]
    words += [b"w%d" % index for index in range(320 - 259 - len(words))]
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), *words]
    types = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(words))]
    return {"tokens": tokens, "scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))], "types": types}


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A random two-layer transformers Llama in float32 whose logits are far from flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=TINY["hidden"],
        num_hidden_layers=TINY["layers"],
        num_attention_heads=TINY["heads"],
        num_key_value_heads=TINY["kv_heads"],
        intermediate_size=TINY["inner"],
        vocab_size=320,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: Any) -> dict[str, np.ndarray]:
    """The tiny model's float32 tensors under GGUF names."""
    state = {name: value.detach().numpy() for name, value in tiny_model.state_dict().items()}
    return gguf_weights(state, layers=TINY["layers"], heads=TINY["heads"], kv_heads=TINY["kv_heads"])


@pytest.fixture(scope="session")
def make_tiny(tiny_weights: dict[str, np.ndarray]) -> Callable[..., Path]:
    """Writes the tiny model, with changes to its tensors and fields."""

    def make(path: Path, weights: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
        return llama_gguf(path, tiny_weights | (weights or {}), tiny_vocabulary(), **(TINY | fields))

    return make


@pytest.fixture(scope="session")
def tiny_gguf(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an F32 GGUF file."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny-F32.gguf")


@pytest.fixture(scope="session")
def stories(shared: Path) -> tuple[Any, Any]:
    """stories260K as a transformers model in float32, and its SentencePiece tokenizer."""
    import sentencepiece
    import torch
    from transformers import LlamaForCausalLM

    folder = shared / "models" / "stories260k-hf"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def stories_gguf(stories: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as an F32 GGUF file."""
    model, pieces = stories
    count = pieces.get_piece_size()
    kinds = [
        UNKNOWN if pieces.is_unknown(i) else CONTROL if pieces.is_control(i) else BYTE if pieces.is_byte(i) else NORMAL
        for i in range(count)
    ]
    vocabulary = {
        "tokens": [pieces.id_to_piece(i).encode() for i in range(count)],
        "scores": [pieces.get_score(i) for i in range(count)],
        "types": kinds,
    }
    config = model.config
    size = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    size["kv_heads"] = config.num_key_value_heads
    state = {name: value.detach().numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    path = tmp_path_factory.mktemp("stories") / "stories-F32.gguf"
    fields = {"hidden": config.hidden_size, "inner": config.intermediate_size, "rope": 8}
    return llama_gguf(path, gguf_weights(state, **size), vocabulary, **size, **fields)
