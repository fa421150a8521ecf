"""What a line of a family's cases says, and how its tiny random checkpoint is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny import VOCABULARY, randomize, write_tokenizer

__all__ = ["SIZES", "Case", "Logits", "transformers_logits", "write_checkpoint"]

Logits = Callable[[Path, NDArray[np.int64]], NDArray[np.float32]]
"""Folder of a checkpoint, and (T,) token ids -> (T, vocab) logits, by somebody else's code."""

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def transformers_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives what transformers' own class computes in float32, without fused attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(tokens[None])).logits[0].float().numpy()
    return found


@dataclass(frozen=True)
class Case:
    """A family with one set of options.

    Attributes:
        id: name of the test's parameter, `family` or `family-option`.
        family: as `ArchSpec.family`.
        options: keys of config.json, over `SIZES` (or instead of them where `bare`).
        model_type: of transformers' configuration class; the family's name by default.
        bare: the options are the whole configuration; for families that call sizes otherwise.
        gguf: why llama.cpp cannot compute it, in words that the error has; empty: it can.
        reopened: why a GGUF file of it cannot be opened as a checkpoint again.
        onnx: the same of ONNX.
        calibrated: the same of methods that look at activations (GPTQ).
        lora: the same of adapters.
        make: writes config.json, weights and tokenizer where transformers has no class, or another layout than what is
            published. Given the folder, which exists.
        logits: the oracle.
        finish: changes the folder that transformers wrote.
        long: only in `make proofs`.
    """

    id: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    bare: bool = False
    gguf: str = ""
    reopened: str = ""
    onnx: str = ""
    calibrated: str = ""
    lora: str = ""
    make: Callable[[Path], None] | None = None
    logits: Logits = transformers_logits
    finish: Callable[[Path], None] | None = None
    long: bool = False

    def __str__(self) -> str:
        return self.id


def write_checkpoint(case: Case, folder: Path) -> Path:
    """Writes the case's checkpoint into a new folder and gives it."""
    folder.mkdir(parents=True)
    if case.make is not None:
        case.make(folder)
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**({} if case.bare else SIZES), **json.loads(json.dumps(case.options))}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type or case.family, **settings))
    randomize(model, 0, zero_centred=False)
    model.float().save_pretrained(folder)
    write_tokenizer(folder)
    if case.finish is not None:
        case.finish(folder)
    return folder
