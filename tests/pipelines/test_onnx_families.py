"""Every family and option as ONNX, from transformers' own random checkpoint to what plain onnxruntime says."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.stage import RunContext
from tests.onnx_runs import Array, OnnxRun
from tests.tiny import FAMILIES, VOCABULARY, Tiny, tiny_checkpoint

# head sizes that no fused operator takes, with everything that attention may have
ODD_HEADS = (
    Tiny("llama-odd", "llama", {"head_dim": 12, "attention_bias": True}),
    Tiny("qwen3-odd", "qwen3", {"head_dim": 20}),
    Tiny("gemma2-odd", "gemma2", {"head_dim": 10, "attn_logit_softcapping": 2.0}),
    Tiny("gptneox-odd", "gptneox", {"hidden_size": 72, "num_attention_heads": 4}),
)
CASES = (*FAMILIES, *ODD_HEADS)
TOKENS = np.random.default_rng(7).integers(1, VOCABULARY, 64)  # longer than every window, and than longrope's switch
# pieces in which the text runs through the cache: across 8 and 16 tokens one by one, then past a window of 40
CHUNKS = (5, 1, 1, 1, 1, 5, 1, 1, 1, 1, 25, 1, 1)
# logits are below 16 in magnitude, and some forty operators stand one behind the other, each of which rounds to
# 2^-24 of what it gives: 40 * 16 * 2^-24 = 4e-5
LIMIT = 5e-5


@dataclass(frozen=True)
class Exported:
    """A tiny model, and what was written for it."""

    case: Tiny
    standard: bool
    source: Path
    folder: Path
    run: OnnxRun
    tokens: Array

    @property
    def model(self) -> onnx.ModelProto:
        """The graph, without the weights."""
        return onnx.load(self.folder / "model.onnx", load_external_data=False)


def export(source: Path, folder: Path, **options: Any) -> Path:
    return Onnx(output=folder, **options).run(open_checkpoint(source), RunContext(threads=1)).path


def checkpoint(case: Tiny, folder: Path) -> Path:
    source = folder / case.id
    return source if source.exists() else tiny_checkpoint(source, case.family, **case.options)


@functools.lru_cache(maxsize=2)
def transformers_model(source: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = "ForConditionalGeneration" in (source / "config.json").read_text()
    loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return loader.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_logits(source: Path, tokens: Array, chunks: Sequence[int] = ()) -> Array:
    """Logits (S, vocab) float32; with chunks through transformers' own cache, and the rest at once."""
    import torch

    model, cache, found, start = transformers_model(source), None, list[Array](), 0
    with torch.no_grad():
        for size in [*chunks, len(tokens) - sum(chunks)]:
            ids = torch.from_numpy(tokens[None, start : start + size])
            done = model(ids, past_key_values=cache, use_cache=True)
            cache, start = done.past_key_values, start + size
            found.append(done.logits[0].numpy())
    return np.concatenate(found)


@functools.lru_cache(maxsize=4)
def wanted(source: Path, count: int, chunks: tuple[int, ...] = ()) -> Array:
    return transformers_logits(source, TOKENS[:count], chunks)


PAIRS = [pytest.param((case, mode), id=f"{case}-{mode}") for case in CASES for mode in ("fused", "standard")]


@pytest.fixture(scope="module", params=PAIRS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case, mode = request.param
    # a folder each time: with tests that move between workers, one case may come twice in one
    folder = tmp_path_factory.mktemp("families")
    source = checkpoint(case, folder)
    out = export(source, folder / f"{case.id}-{mode}", standard_ops=mode == "standard")
    context = 32 if case.id == "llama-dynamic" else 64
    return Exported(case, mode == "standard", source, out, OnnxRun(out), TOKENS[:context])


def test_onnxruntime_speaks_like_transformers(exported: Exported) -> None:
    count = len(exported.tokens)
    found = exported.run.logits(exported.tokens)
    np.testing.assert_allclose(found, wanted(exported.source, count), rtol=0, atol=LIMIT)
    short = exported.run.logits(exported.tokens[:9])
    np.testing.assert_allclose(short, wanted(exported.source, 9), rtol=0, atol=LIMIT)


def test_a_text_in_pieces_through_the_cache_is_as_in_transformers(exported: Exported) -> None:
    count = len(exported.tokens)
    chunks = CHUNKS if count > sum(CHUNKS) else CHUNKS[:-3]
    rest = [*chunks, count - sum(chunks)]
    found = exported.run.in_chunks(exported.tokens, rest)
    np.testing.assert_allclose(found, wanted(exported.source, count, chunks), rtol=0, atol=LIMIT)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_and_neighbours_change_nothing(exported: Exported, left: bool) -> None:
    tokens = exported.tokens
    texts, prefill = [tokens[:6], tokens[3:24], tokens[::-1][:15]], [2, 17, 11]
    found = exported.run.in_batch(texts, prefill=prefill, left=left)
    for text, count, logits in zip(texts, prefill, found, strict=True):
        np.testing.assert_allclose(logits, exported.run.in_chunks(text, [count]), rtol=0, atol=LIMIT)


def test_the_model_passes_the_checker_and_its_shapes_are_inferred(exported: Exported) -> None:
    onnx.checker.check_model(exported.folder / "model.onnx", full_check=True)
    model = exported.model
    if exported.standard:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        known = {each.name for each in inferred.graph.value_info} | {each.name for each in inferred.graph.output}
        assert {name for node in model.graph.node for name in node.output if name} <= known
    shapes = {
        each.name: tuple(size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim)
        for each in [*model.graph.input, *model.graph.output]
    }
    assert shapes.pop("input_ids") == ("batch_size", "sequence_length")
    assert shapes.pop("attention_mask") == ("batch_size", "total_sequence_length")
    assert shapes.pop("logits") == ("batch_size", "sequence_length", VOCABULARY)
    for name, (batch, _, length, _) in shapes.items():
        past = "past" if name.startswith("past_key_values.") else "total"
        assert (batch, length) == ("batch_size", f"{past}_sequence_length"), name


def test_fused_operators_stand_where_they_can_and_standard_ones_where_they_were_asked_for(exported: Exported) -> None:
    found = Counter((node.domain, node.op_type) for node in exported.model.graph.node)
    domains = {each.domain for each in exported.model.opset_import}
    layers = sum(name.endswith(".key") and name.startswith("past") for name in exported.run.inputs)
    if exported.standard:
        assert domains == {""}
        assert {domain for domain, _ in found} == {""}
        assert found["", "Attention"] == layers
    else:
        fused = "Attention" if exported.case in ODD_HEADS else "GroupQueryAttention"
        assert found["" if fused == "Attention" else "com.microsoft", fused] == layers
        assert (
            found["com.microsoft", "SkipSimplifiedLayerNormalization"]
            + found["com.microsoft", "SkipLayerNormalization"]
            > 0
        )


@pytest.mark.parametrize("standard", [False, True], ids=["fused", "standard"])
@pytest.mark.parametrize("name", ["llama", "gptneox", "gpt2", "phi3-longrope", "llama-odd"])
def test_a_text_that_outgrows_the_tables_is_refused_and_not_answered(name: str, standard: bool, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.id == name)
    run = OnnxRun(export(checkpoint(case, tmp_path), tmp_path / "onnx", standard_ops=standard))
    long = np.resize(TOKENS, 70)  # the tiny models read 64
    for chunks in ([70], [60]):
        with pytest.raises(
            Exception, match=r"cos_cache dimension 0|Updating cos_cache|out of range|out of data bounds"
        ):
            run.in_chunks(long, chunks)
