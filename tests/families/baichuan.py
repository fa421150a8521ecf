"""Baichuan 7B, 13B and Baichuan 2 in their own layout, against Llama, with what BLOOM adds to scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.families.cases import Case
from tests.families.published import Settings, Tensors, computed, llama_settings, stored_in, write_published
from tests.tiny import VOCABULARY

__all__ = ["CASES"]

_BAICHUAN: Settings = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
_BAICHUAN_ROTARY = {"max_position_embeddings": 64, "model_max_length": 64}
_BAICHUAN_ALIBI = {"model_max_length": 64, "num_hidden_layers": 40}


def _write_baichuan(folder: Path, options: Settings) -> None:
    config = {**_BAICHUAN, **options}
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (hidden,),
        "lm_head.weight": vocabulary,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.W_pack.weight": (3 * hidden, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    write_published(folder, config, shapes)


def _baichuan_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    config, tensors = stored_in(folder)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        for part, values in zip("qkv", np.split(tensors.pop(f"{prefix}W_pack.weight"), 3), strict=True):
            tensors[f"{prefix}{part}_proj.weight"] = values
    if "z_loss_weight" in config:  # Baichuan 2
        head = tensors["lm_head.weight"].astype(np.float64)
        tensors["lm_head.weight"] = (head / np.linalg.norm(head, axis=1, keepdims=True)).astype(np.float32)
    settings = llama_settings(config, num_key_value_heads=None, rms_norm_eps=config["rms_norm_eps"])
    if "max_position_embeddings" in config:
        return computed("llama", settings, tensors, tokens)
    return _alibi_llama(settings, tensors, tokens)


def _alibi_llama(settings: Settings, tensors: Tensors, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Llama without rotary positions, with what BLOOM adds to the scores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    count = len(tokens)
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).float().eval()
    model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, strict=True)
    model.model.rotary_emb.inv_freq.zero_()  # every position turns by no angle
    heads = settings["num_attention_heads"]
    slopes = build_alibi_tensor(torch.ones(1, count), heads, torch.float32).view(1, heads, 1, count)
    future = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        found: NDArray[np.float32] = (
            model(torch.from_numpy(tokens[None]), attention_mask=slopes + future).logits[0].numpy()
        )
    return found


def _baichuan(name: str, *, gguf: str = "", long: bool = True, **options: Any) -> Case:
    make: Callable[[Path], None] = partial(_write_baichuan, options=options)
    return Case(name, "baichuan", gguf=gguf, make=make, logits=_baichuan_logits, long=long)


CASES: tuple[Case, ...] = (
    _baichuan("baichuan-7b", long=False, **_BAICHUAN_ROTARY),
    _baichuan("baichuan-13b", **_BAICHUAN_ALIBI),
    _baichuan("baichuan-13b-heads", hidden_size=96, num_attention_heads=6, **_BAICHUAN_ALIBI),
    _baichuan("baichuan2-7b", z_loss_weight=0, **_BAICHUAN_ROTARY),
    _baichuan("baichuan2-13b", z_loss_weight=0, **_BAICHUAN_ALIBI),
    _baichuan("baichuan-layers", num_hidden_layers=3, gguf="num_hidden_layers", **_BAICHUAN_ROTARY),
)
