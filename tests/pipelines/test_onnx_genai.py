"""onnxruntime-genai generates from exported folders what transformers generates from their sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.stage import RunContext
from tests.tiny import Tiny, tiny_case, tiny_checkpoint

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")

PROMPTS = ([5, 9, 200, 31, 77, 12, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [7, 8, 9])
ADDED = 20
END = 0  # the tiny models' end of text, which must not come before all tokens are there
# one of every way that attention goes, with everything that it may have
NAMES = ("llama", "mistral-window", "mistral-head_dim", "gemma2-caps", "gptneox", "gpt2", "qwen3", "phi3-mini4")
CASES = (*map(tiny_case, NAMES), Tiny("llama-odd", "llama", {"head_dim": 12}))


def export(source: Path, folder: Path, **options: Any) -> Path:
    return Onnx(output=folder, **options).run(open_checkpoint(source), RunContext(threads=1)).path


def generated(folder: Path, rows: list[list[int]]) -> list[list[int]]:
    """What genai adds to prompts; shorter ones are filled up as its tokenizer does it: with pad tokens on the right."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), END, np.int32)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = width + ADDED
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(rows))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[width:].tolist() for row in range(len(rows))]


def wanted(source: Path, rows: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    options = {"max_new_tokens": ADDED, "min_new_tokens": ADDED, "do_sample": False, "eos_token_id": END}
    with torch.no_grad():
        texts = [model.generate(torch.tensor([row]), pad_token_id=END, **options)[0] for row in rows]
    return [text[len(row) :].tolist() for text, row in zip(texts, rows, strict=True)]


@pytest.mark.parametrize("standard", [False, True], ids=["fused", "standard"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_genai_generates_what_transformers_generates(case: Tiny, standard: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", case.family, **case.options)
    folder = export(source, tmp_path / "onnx", standard_ops=standard)
    texts = wanted(source, list(PROMPTS))
    assert len(set(map(tuple, texts))) == len(PROMPTS)
    assert [generated(folder, [prompt])[0] for prompt in PROMPTS] == texts
    assert generated(folder, list(PROMPTS)) == texts  # together, and the shorter one padded


@pytest.mark.parametrize(
    "options",
    [{"precision": "int4"}, {"precision": "int4", "symmetric": False, "block_size": 16}, {"precision": "bf16"}]
    + [{"precision": "int8", "int8": style} for style in ("weight-only", "dynamic")],
    ids=["int4", "int4-asymmetric", "bf16", "int8", "int8-dynamic"],
)
def test_genai_runs_every_precision(options: dict[str, Any], tmp_path: Path) -> None:
    from tests.onnx_runs import OnnxRun

    source = tiny_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    folder = export(source, tmp_path / "onnx", **options)
    alone = [OnnxRun(folder).greedy(prompt, ADDED, never=END) for prompt in PROMPTS]
    assert [generated(folder, [prompt])[0] for prompt in PROMPTS] == alone


def test_a_prompt_may_come_in_pieces_and_generation_be_taken_back(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    folder = export(source, tmp_path / "onnx")
    (text,) = wanted(source, [PROMPTS[0]])
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(PROMPTS[0]) + ADDED
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    for piece in (PROMPTS[0][:5], PROMPTS[0][5:12], [1, 2, 3]):
        generator.append_tokens(np.array([piece], np.int32))
    generator.rewind_to(12)
    generator.append_tokens(np.array([PROMPTS[0][12:]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(PROMPTS[0]) :].tolist() == text


def test_genai_reads_the_tokenizer_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny_checkpoint(tmp_path / "source", "llama")
    folder = export(source, tmp_path / "onnx")
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    for text in ("The press takes 12 files.", " up\n\nand  down", "größer"):
        ids = AutoTokenizer.from_pretrained(source)(text).input_ids
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(np.array(ids, np.int32)) == text


def test_the_settings_name_what_the_model_takes_and_gives(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "mistral", head_dim=24, sliding_window=5)
    fused, standard = (
        json.loads((export(source, tmp_path / name, standard_ops=name == "standard") / "genai_config.json").read_text())
        for name in ("fused", "standard")
    )
    settings = fused
    # only GroupQueryAttention writes into the buffer that it reads; genai copies the cache at every token otherwise
    assert fused["search"]["past_present_share_buffer"]
    assert not standard["search"]["past_present_share_buffer"]
    decoder = settings["model"]["decoder"]
    assert (decoder["head_size"], decoder["hidden_size"], decoder["num_hidden_layers"]) == (24, 64, 3)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert (settings["model"]["context_length"], settings["model"]["vocab_size"]) == (64, 320)
    assert settings["model"]["eos_token_id"] in (END, [END])
