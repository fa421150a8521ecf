"""Makes tiny random T5s through transformers' own classes, and asks transformers what they say."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["KINDS", "ROWS", "answer", "tiny_t5"]

ROWS = 128
_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_WORDS = ("the", "and", "of", "to", "ing", "er", "▁the", "▁of", "▁and", "▁a", "▁to")
_CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}

# options of `tiny_t5`, by the name of the case
KINDS: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "own_head": True},
    "t5-v1.1-tied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-buckets": {"relative_attention_num_buckets": 16, "num_decoder_layers": 3},
    "mt5": {"family": "mt5", "own_head": True},
    "umt5": {"family": "umt5"},
}


def tiny_t5(folder: Path, family: str = "t5", *, own_head: bool = False, seed: int = 0, **options: Any) -> Path:
    """Writes a checkpoint whose two stacks differ in depth.

    Args:
        folder: where to; made.
        family: "t5", "mt5" or "umt5".
        own_head: the head is not the embedding.
        seed: of the weights.
        options: keys of config.json.
    """
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{_CLASSES[family]}Config")(
        vocab_size=ROWS, **{"decoder_start_token_id": 0, **_SIZES, **options}
    )
    model = getattr(transformers, f"{_CLASSES[family]}ForConditionalGeneration")(config).float()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms and distances are not all alike
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(ROWS, config.d_model))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}), encoding="utf-8")
    return folder


def _tokenizer() -> str:
    """A Unigram tokenizer.json that knows ASCII letters and signs and some words."""
    signs = string.ascii_letters + string.digits + ".,;:!?'-"
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.5]]
    vocab += [[sign, -5.0 - 0.01 * number] for number, sign in enumerate(signs)]
    vocab += [[word, -4.0 - 0.1 * number] for number, word in enumerate(_WORDS)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": one, "content": vocab[one][0], **flags, "special": True} for one in range(3)]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    process = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, end, pair, end],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    steps = {"normalizer": None, "pre_tokenizer": space, "post_processor": process, "decoder": space}
    model = {"type": "Unigram", "unk_id": 2, "byte_fallback": False, "vocab": vocab}
    return json.dumps({"version": "1.0", "added_tokens": special, **steps, "model": model})


def answer(folder: Path, asked: NDArray[np.int64], given: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives transformers' logits (T, rows) of `given` (T,) for a text `asked` (S,)."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(asked[None]), decoder_input_ids=torch.from_numpy(given[None]))
    logits: NDArray[np.float32] = found.logits[0].numpy()
    return logits
