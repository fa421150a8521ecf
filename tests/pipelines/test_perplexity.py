"""llama.cpp's perplexity: the arithmetic against brute force in float64, the procedure against transformers."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from quantpress.pipelines.llama_cpp import LlamaCpp, LlamaCppRuntime
from quantpress.pipelines.perplexity import Score, cut_windows, perplexity, plain_text, row_blocks, score
from quantpress.quant.errors import InputError, ParityError, UsageError


class Table:
    """A runtime whose logits are a fixed (context, vocabulary) array."""

    name = "table"

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits
        self.vocab_size = logits.shape[1]
        self.seen: list[tuple[list[int], int]] = []

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        self.seen.append((tokens.tolist(), first))
        return self._logits[first : len(tokens)].copy()

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def brute_force_loss(row: np.ndarray, target: int) -> float:
    largest = max(map(float, row))
    return math.log(math.fsum(math.exp(float(value) - largest) for value in row)) + largest - float(row[target])


@pytest.mark.parametrize("columns", [1, 3, 1000, 70_001])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0])
def test_losses_equal_brute_force(columns: int, scale: float) -> None:
    rng = np.random.default_rng(columns)
    logits = (rng.normal(size=(7, columns)) * scale + 5).astype(np.float32)
    targets = rng.integers(0, columns, 7).astype(np.int32)
    expected = [brute_force_loss(row, target) for row, target in zip(logits, targets, strict=True)]
    # float64 throughout: 70,001 terms of relative error 2^-53, plus the last bit of values up to 400.
    np.testing.assert_allclose(score(logits, targets), expected, rtol=1e-12, atol=1e-12)


def test_blocks_cover_every_row_once() -> None:
    for rows, columns in ((1, 1), (255, 49152), (7, 10**7), (1000, 512)):
        covered = np.concatenate([np.arange(rows)[block] for block in row_blocks(rows, columns)])
        np.testing.assert_array_equal(covered, np.arange(rows))


def test_perplexity_and_its_error_follow_the_formula() -> None:
    """The population variance over count - 1, as in llama.cpp; here through the statistics module."""
    rng = np.random.default_rng(0)
    table = Table(rng.normal(size=(16, 11)).astype(np.float32))
    tokens = rng.integers(0, 11, 40).astype(np.int32)
    result = perplexity(table, cut_windows(tokens, context=16), model="m")
    losses = [
        brute_force_loss(table._logits[position], int(tokens[chunk * 16 + position + 1]))
        for chunk in range(2)
        for position in range(8, 15)
    ]
    value = math.exp(statistics.fmean(losses))
    assert result.perplexity == pytest.approx(value, rel=1e-12)
    assert result.stderr == pytest.approx(value * math.sqrt(statistics.pvariance(losses) / 13), rel=1e-9)
    assert (result.tokens, result.context, result.chunks, result.runtime) == (14, 16, 2, "table")


def test_json_has_the_documented_keys() -> None:
    table = Table(np.zeros((8, 5), np.float32))
    found = perplexity(table, cut_windows(np.zeros(16, np.int32), context=8), model="m").to_json()
    assert list(found) == ["model", "runtime", "perplexity", "stderr", "tokens", "context", "chunks", "seconds"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["perplexity"] == pytest.approx(5.0)  # all five tokens are equally likely


def test_windows_are_cut_and_begun_as_llama_cpp_does() -> None:
    tokens = np.arange(100, 123, dtype=np.int32)
    plain = cut_windows(tokens, context=7)
    assert [window.tolist() for window in plain] == [list(range(100 + 7 * i, 107 + 7 * i)) for i in range(3)]
    begun = cut_windows(tokens, context=7, bos=1, chunks=2)
    assert [window.tolist() for window in begun] == [[1, *range(101, 107)], [1, *range(108, 114)]]
    assert tokens.tolist() == list(range(100, 123))
    assert len(cut_windows(tokens, context=7, chunks=99)) == 3


def test_only_the_second_half_is_asked_for_and_progress_is_told() -> None:
    table, done = Table(np.zeros((9, 5), np.float32)), []
    perplexity(
        table,
        cut_windows(np.arange(18, dtype=np.int32) % 5, context=9),
        model="m",
        progress=lambda *at: done.append(at),
    )
    assert [first for _, first in table.seen] == [4, 4]
    assert done == [(1, 2), (2, 2)]


def test_a_short_text_says_how_long_it_is_and_what_fits() -> None:
    with pytest.raises(InputError, match=r"has 1000 tokens, wanted at least 1024 .*--context 500"):
        cut_windows(np.zeros(1000, np.int32), context=512)
    with pytest.raises(InputError, match=r"has 0 tokens.* longer text"):
        cut_windows(np.zeros(0, np.int32), context=512)
    assert len(cut_windows(np.zeros(1000, np.int32), context=500)) == 2
    with pytest.raises(UsageError, match="--context 3"):
        cut_windows(np.zeros(1000, np.int32), context=3)
    with pytest.raises(UsageError, match="--chunks 0"):
        cut_windows(np.zeros(1000, np.int32), context=8, chunks=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = np.zeros((8, 5), np.float32)
    logits[6, 2] = value
    with pytest.raises(ParityError, match=r"m: table .*not finite, chunk 0, position=6"):
        perplexity(Table(logits), cut_windows(np.zeros(16, np.int32), context=8), model="m")


def test_nothing_to_score_is_an_error_and_no_figure() -> None:
    with pytest.raises(InputError, match="no text"):
        perplexity(Table(np.zeros((8, 5), np.float32)), [], model="m")
    assert math.isnan(Score().perplexity()[0])
    assert Score().add(np.full(3, 1e4)).perplexity()[0] == math.inf


def test_one_final_line_break_is_dropped() -> None:
    assert [plain_text(text) for text in ("a\n\n", "a\n", "a", "")] == ["a\n", "a", "a", ""]


def reference_perplexity(model: Any, pieces: Any, text: str, context: int, chunks: int) -> tuple[float, float, int]:
    """The method of perplexity.cpp, written again with transformers, SentencePiece and torch's float64 log-softmax."""
    import torch

    ids = [pieces.bos_id(), *pieces.encode(text)]
    losses: list[float] = []
    for chunk in range(min(chunks, len(ids) // context)):
        window = torch.tensor([[pieces.bos_id(), *ids[chunk * context + 1 : (chunk + 1) * context]]])
        with torch.no_grad():
            logs = torch.log_softmax(model(window).logits[0].double(), dim=-1)
        for position in range(context // 2, context - 1):
            losses.append(-float(logs[position, window[0, position + 1]]))
    mean = sum(losses) / len(losses)
    variance = sum(loss * loss for loss in losses) / len(losses) - mean * mean
    return math.exp(mean), math.exp(mean) * math.sqrt(variance / (len(losses) - 1)), len(losses)


@pytest.mark.parametrize("context", [512, 130])
def test_the_whole_procedure_agrees_with_transformers(
    stories: Any, stories_gguf: Path, shared: Path, library: LlamaCpp, context: int
) -> None:
    # Single spaces: SentencePiece joins runs of them, llama.cpp's tokenizer of this kind does not.
    text = " ".join((shared / "text" / "tinystories.test.txt").read_text("utf-8")[:12_000].split())
    with LlamaCppRuntime(stories_gguf, context=context, threads=1, library=library) as runtime:
        bos = runtime.info.bos if runtime.info.add_bos else None
        windows = cut_windows(runtime.tokenize(text), context=context, chunks=4, bos=bos)
        found = perplexity(runtime, windows, model="stories")
    value, stderr, count = reference_perplexity(*stories, text, context, 4)
    assert found.tokens == count == 4 * (context - 1 - context // 2)
    # Logits agree within 2e-5 (float32 sums in another order), so every loss does within 4e-5.
    assert found.perplexity == pytest.approx(value, rel=4e-5)
    assert found.stderr == pytest.approx(stderr, rel=1e-3)
    assert 2 < found.perplexity < 12  # it is a model of such stories
