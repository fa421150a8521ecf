"""Tied embeddings and grown vocabularies: the merged model speaks like base and adapter that PEFT runs unmerged.

PEFT's merge_and_unload is no oracle here: it adds to the parameter that embedding and head share, so what was trained
at one end acts on both afterwards (logits of these models move by up to 500), and twice with `ensure_weight_tying`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from tests.peft_oracle import attach, load_base, logits, quiet, train, write
from tests.tiny import tiny_case, tiny_checkpoint

# Logits are up to 100 here, in float32, after three layers; the unmerged model adds the same numbers in another order.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """An adapter for the embeddings of a tiny model, and whether the merged model is tied."""

    id: str
    tied: bool
    options: Mapping[str, Any]
    base: str = "llama-tied"
    kind: str = "LoraConfig"

    def __str__(self) -> str:
        return self.id


def lora(name: str, *, tied: bool, base: str = "llama-tied", **options: Any) -> Case:
    return Case(name, tied, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}, base)


BOTH = ["embed_tokens", "lm_head"]
CASES = (
    lora("embedding", tied=False, target_modules=["embed_tokens", "v_proj"]),
    lora("embedding-dora", tied=False, target_modules=["embed_tokens", "v_proj"], use_dora=True),
    lora("head", tied=False, target_modules=["lm_head"]),
    lora("head-dora", tied=False, target_modules=["lm_head"], use_dora=True),
    lora("both", tied=False, target_modules=BOTH),
    lora("gpt2", tied=False, base="gpt2", target_modules=["wte", "lm_head", "c_attn"]),
    lora("gptneox", tied=False, base="gptneox-tied", target_modules=["lm_head", "dense"]),
    lora("gemma3-vision", tied=False, base="gemma3-vision", target_modules=["lm_head", "down_proj"]),
    lora("ensured", tied=True, target_modules=BOTH, ensure_weight_tying=True),
    lora("embedding-ensured", tied=True, target_modules=["embed_tokens"], ensure_weight_tying=True),
    lora("dora-ensured", tied=False, target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True),
    lora(
        "ensured-with-other-scales",
        tied=False,
        target_modules=BOTH,
        ensure_weight_tying=True,
        alpha_pattern={"lm_head": 3},
    ),
    lora("saved-embedding", tied=False, modules_to_save=["embed_tokens"]),
    lora("saved-head", tied=False, modules_to_save=["lm_head"]),
    lora("saved-both", tied=False, modules_to_save=BOTH),
    lora("saved-ensured", tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    lora("saved-both-ensured", tied=True, modules_to_save=BOTH, ensure_weight_tying=True),
    lora("saved-bare", tied=False, base="llama-bare", modules_to_save=["lm_head"]),
    lora("tokens", tied=True, trainable_token_indices=[1, 5, 300]),
    lora("tokens-of-embedding", tied=True, trainable_token_indices={"embed_tokens": [1, 5]}),
    lora("tokens-of-head", tied=False, trainable_token_indices={"lm_head": [1, 5]}),
    lora("tokens-of-both", tied=True, trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [1, 5]}),
    lora("tokens-apart", tied=False, trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [5, 2, 3]}),
    lora("tokens-gemma", tied=True, base="gemma3", trainable_token_indices=[1, 5, 300]),
    lora("tokens-gpt2", tied=True, base="gpt2", target_modules=["c_attn"], trainable_token_indices=[1, 300]),
    lora("tokens-vision", tied=True, base="gemma3-vision", target_modules=["q_proj"], trainable_token_indices=[7]),
    Case("only-tokens", True, {"token_indices": [1, 5]}, kind="TrainableTokensConfig"),
)


def make(tmp_path: Path, case: Case, resize: int | None = None, **save: Any) -> tuple[Path, Path]:
    """Makes base and adapter."""
    tiny = tiny_case(case.base)
    base = tiny_checkpoint(tmp_path / "base", tiny.family, **tiny.options)
    with quiet():
        # PEFT changes the lists that it is given
        config = getattr(peft, case.kind)(task_type="CAUSAL_LM", **copy.deepcopy(dict(case.options)))
    return base, train(tmp_path / "adapter", base, config, resize=resize, **save)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_end_of_tied_embeddings_gets_what_it_was_trained_with(case: Case, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, case)
    merged = merge_lora(open_checkpoint(base), adapter)
    assert merged.adapted is not None
    merged.adapted.check()
    wanted = logits(attach(base, adapter))
    with quiet():
        model = load_base(write(tmp_path / "merged", merged))
    assert model.config.tie_word_embeddings is case.tied
    assert json.loads(merged.tokenizer_files["config.json"])["tie_word_embeddings"] is case.tied
    assert np.abs(logits(model) - wanted).max() <= TOLERANCE
    assert np.abs(logits(load_base(base)) - wanted).max() > 0.1
    notes = [note for note in merged.adapted.notes if "head of its own" in note]
    assert len(notes) == (not case.tied)
    assert [entry.name for entry in merged.adapted.ledger()] == [
        t.name for t in merged.adapted.applied[0].adapter.tensors
    ]


GROWN = 330
GROWING = (
    lora("grown", tied=True),
    lora("grown-saved", tied=False, modules_to_save=BOTH),
    lora("grown-saved-embedding", tied=False, modules_to_save=["embed_tokens"]),
    lora("grown-saved-head", tied=False, modules_to_save=["lm_head"]),
    lora("grown-ensured", tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    lora("grown-embedding", tied=False, target_modules=["embed_tokens"]),
    lora("grown-both", tied=False, target_modules=BOTH),
    lora("grown-both-ensured", tied=True, target_modules=BOTH, ensure_weight_tying=True),
    lora("grown-tokens", tied=True, trainable_token_indices=[1, 325]),
    lora("grown-tokens-of-embedding", tied=True, trainable_token_indices={"embed_tokens": [1, 325]}),
    Case("grown-only-tokens", True, {"token_indices": [1, 325]}, kind="TrainableTokensConfig"),
    lora("untied-grown", tied=False, base="llama"),
    lora("untied-grown-saved", tied=False, base="llama", modules_to_save=BOTH),
    lora("untied-grown-saved-embedding", tied=False, base="llama", modules_to_save=["embed_tokens"]),
    lora("untied-grown-both", tied=False, base="llama", target_modules=BOTH),
    lora("untied-grown-both-dora", tied=False, base="llama", target_modules=BOTH, use_dora=True),
    lora("untied-grown-tokens", tied=False, base="llama", trainable_token_indices=[1, 325]),
    lora("grown-gpt2", tied=False, base="gpt2", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]),
)


@pytest.mark.parametrize("rows", [GROWN, 300])
@pytest.mark.parametrize("case", GROWING, ids=str)
def test_a_grown_or_shrunk_vocabulary_comes_with_the_adapter(case: Case, rows: int, tmp_path: Path) -> None:
    if rows < 325 and ("tokens" in case.id or case.base == "gpt2"):
        pytest.skip("the token is not there")
    base, adapter = make(tmp_path, case, resize=rows)
    merged = merge_lora(open_checkpoint(base), adapter)
    assert merged.adapted is not None
    merged.adapted.check()
    wanted = logits(attach(base, adapter, resize=rows), vocabulary=min(rows, 320))
    model = load_base(write(tmp_path / "merged", merged))
    assert model.config.vocab_size == rows
    assert model.config.tie_word_embeddings is case.tied
    assert wanted.shape[1] == rows
    assert np.abs(logits(model, vocabulary=min(rows, 320)) - wanted).max() <= TOLERANCE
    assert any(f"{rows} rows, 320 in the base" in note for note in merged.adapted.notes)
    assert len(merged.adapted.ledger()) == len(merged.adapted.applied[0].adapter.tensors)
