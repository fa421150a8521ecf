"""The verdict: its arithmetic against float64 brute force, and every way in which it must not be "passed"."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from quantpress.pipelines.llama_cpp import LlamaCpp, LlamaCppRuntime
from quantpress.pipelines.parity import Parity, compare, unjudged
from quantpress.pipelines.parity_limits import Limits, limits_for
from quantpress.pipelines.perplexity import cut_windows, perplexity
from quantpress.pipelines.token_figures import token_figures
from quantpress.quant.errors import ParityError, UsageError

GENEROUS = Limits(max_kld=100.0, max_ppl_change=1e6, min_top1=0.0)
VOCABULARY, CONTEXT = 37, 10
KEYS = [
    "text_sha256", "tokens", "context", "baseline", "candidate", "ppl_ratio", "mean_kld", "kld_p99", "max_kld",
    "top1_agreement", "limits", "passed", "reason", "failures",
]  # fmt: skip


class Model:
    """A runtime with random logits that depend on the window; ``change`` gets them before they are returned."""

    def __init__(self, name: str = "torch", *, noise: float = 0.0, rows: int = VOCABULARY, change: Any = None) -> None:
        self.name = name
        self.vocab_size = rows
        self._noise, self._change = noise, change
        self.given: list[weakref.ref[np.ndarray]] = []
        self.most_alive = 0

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        rng = np.random.default_rng(tokens.tolist())
        values = (rng.normal(size=(len(tokens), self.vocab_size)) * 3).astype(np.float32)
        values += (np.random.default_rng(5).normal(size=values.shape) * self._noise).astype(np.float32)
        values = values[first:].copy()
        if self._change is not None:
            values = self._change(values)
        self.given.append(weakref.ref(values))
        self.most_alive = max(self.most_alive, sum(array() is not None for array in self.given))
        return values

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@pytest.fixture
def windows() -> list[np.ndarray]:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 8 * CONTEXT).astype(np.int32)
    return cut_windows(tokens, context=CONTEXT)


def judge(baseline: Any, candidate: Any, windows: Any, limits: Limits = GENEROUS, **options: Any) -> Parity:
    return compare(baseline, candidate, windows, limits, text_sha256="ab" * 32, **options)


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a || b) of two rows of logits, term by term, in exactly rounded sums."""
    largest = [float(max(row)) for row in (a, b)]
    shifted = [[float(value) - top for value in row] for row, top in zip((a, b), largest, strict=True)]
    totals = [math.fsum(map(math.exp, row)) for row in shifted]
    logs = [[value - math.log(total) for value in row] for row, total in zip(shifted, totals, strict=True)]
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(*logs, strict=True))


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("columns", [2, 40_000, 70_001])
def test_divergence_equals_brute_force(columns: int, noise: float) -> None:
    rng = np.random.default_rng(columns)
    a = (rng.normal(size=(2, columns)) * 3 + 20).astype(np.float32)
    b = a + (rng.normal(size=a.shape) * noise).astype(np.float32)
    found = token_figures(a, b, np.zeros(2, np.int32)).divergence
    # float64 with logits of some tens: absolute errors of a few 1e-15, whatever the divergence.
    np.testing.assert_allclose(found, [brute_force(*rows) for rows in zip(a, b, strict=True)], rtol=1e-11, atol=2e-14)
    assert (found > -2e-14).all()


def test_divergence_and_losses_equal_those_of_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(50, 5000)).astype(np.float32) * 4 for _ in range(2))
    targets = rng.integers(0, 5000, 50)
    logs = [torch.log_softmax(torch.from_numpy(side).double(), dim=-1) for side in (a, b)]
    divergence = torch.nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    found = token_figures(a, b, targets.astype(np.int32))
    np.testing.assert_allclose(found.divergence, divergence.numpy(), rtol=1e-12)
    for losses, side in ((found.baseline, logs[0]), (found.candidate, logs[1])):
        np.testing.assert_allclose(losses, -side[range(50), targets].numpy(), rtol=1e-12)


def test_divergence_is_not_symmetric_and_starts_from_the_baseline() -> None:
    sure, unsure = np.array([[5.0, 0.0]], np.float32), np.zeros((1, 2), np.float32)
    target = np.zeros(1, np.int32)
    p = 1 / (1 + math.exp(-5))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert token_figures(sure, unsure, target).divergence[0] == pytest.approx(expected, rel=1e-12)
    expected = -(math.log(2 * p) + math.log(2 * (1 - p))) / 2
    assert token_figures(unsure, sure, target).divergence[0] == pytest.approx(expected, rel=1e-12)


def test_a_model_is_at_parity_with_itself(windows: list[np.ndarray]) -> None:
    found = judge(Model(), Model("llama.cpp"), windows, Limits(1e-9, 1e-9, 1.0))
    assert found.passed
    assert (found.mean_kld, found.ppl_ratio, found.top1_agreement) == (pytest.approx(0, abs=1e-14), 1.0, 1.0)
    assert (found.tokens, found.context) == (8 * 4, CONTEXT)
    assert (found.baseline.runtime, found.candidate.runtime) == ("torch", "llama.cpp")


def test_figures_are_those_of_the_scored_tokens(windows: list[np.ndarray]) -> None:
    baseline, candidate = Model(), Model(noise=0.5)
    found = judge(baseline, candidate, windows)
    pairs = [(model.logits(window, 5)[:-1]) for window in windows for model in (baseline, candidate)]
    a, b = np.concatenate(pairs[::2]), np.concatenate(pairs[1::2])
    divergence = [brute_force(*rows) for rows in zip(a, b, strict=True)]
    assert found.mean_kld == pytest.approx(np.mean(divergence))
    assert found.kld_p99 == pytest.approx(np.quantile(divergence, 0.99))
    assert found.max_kld == pytest.approx(max(divergence))
    assert found.top1_agreement == np.mean(a.argmax(1) == b.argmax(1))
    assert found.mean_kld_stderr == pytest.approx(np.std(divergence, ddof=1) / math.sqrt(32))
    for side, model in ((found.baseline, baseline), (found.candidate, candidate)):
        alone = perplexity(model, windows, model="m")
        assert (side.perplexity, side.stderr) == (pytest.approx(alone.perplexity), pytest.approx(alone.stderr))
    assert found.ppl_ratio == pytest.approx(found.candidate.perplexity / found.baseline.perplexity)
    assert 0 < found.ppl_ratio_stderr < found.ppl_ratio
    assert 0 < found.top1_stderr < 0.1


def test_json_has_the_documented_keys_and_no_nan(windows: list[np.ndarray]) -> None:
    for found in (judge(Model(), Model(noise=0.1), windows), judge(Model(), Model(), []), unjudged("why", GENEROUS)):
        parity = found.to_json()
        assert list(parity) == KEYS
        assert list(parity["baseline"]) == list(parity["candidate"]) == ["runtime", "perplexity", "stderr"]
        assert list(parity["limits"]) == ["max_kld", "max_ppl_change", "min_top1"]
        assert json.loads(json.dumps(parity, allow_nan=False)) == parity


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(1e-6, 1e6, 0.0), "mean KL divergence"),
        (Limits(100.0, 1e-6, 0.0), "perplexity changes by"),
        (Limits(100.0, 1e6, 1.0), "top-1 agreement"),
    ],
)
def test_each_limit_fails_by_itself(windows: list[np.ndarray], limits: Limits, reason: str) -> None:
    found = judge(Model(), Model(noise=1.0), windows, limits)
    assert not found.passed
    assert found.reason.startswith(reason)
    assert ";" not in found.reason


def test_a_perplexity_that_falls_too_far_fails_too() -> None:
    limits = Limits(max_kld=1.0, max_ppl_change=0.05, min_top1=0.0)
    figures = {"mean_kld": 0.0, "top1_agreement": 1.0}
    assert limits.problems(ppl_ratio=0.94, **figures) == {"ppl_change": "perplexity changes by -6.00%, more than 5.00%"}
    assert limits.problems(ppl_ratio=1.06, **figures) == {"ppl_change": "perplexity changes by +6.00%, more than 5.00%"}
    assert limits.problems(ppl_ratio=0.96, **figures) == limits.problems(ppl_ratio=1.04, **figures) == {}


@pytest.mark.parametrize("figure", ["mean_kld", "ppl_ratio", "top1_agreement"])
def test_a_figure_that_is_nan_exceeds_every_limit(figure: str) -> None:
    figures = {"mean_kld": 0.0, "ppl_ratio": 1.0, "top1_agreement": 1.0} | {figure: math.nan}
    assert GENEROUS.problems(**figures)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["baseline", "candidate", "both"])
def test_one_logit_that_is_not_finite_fails(windows: list[np.ndarray], value: float, side: str) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[2, 7] = value
        return values

    models = [Model(change=spoil if side in (name, "both") else None) for name in ("baseline", "candidate")]
    found = judge(*models, windows)
    assert not found.passed
    assert "NaN or infinite" in found.reason
    assert found.to_json()["mean_kld"] is None


def test_a_perplexity_beyond_all_numbers_fails(windows: list[np.ndarray]) -> None:
    found = judge(Model(), Model(change=lambda values: values * 1e4), windows)
    assert not found.passed
    assert found.reason == "a figure is not finite"
    assert found.to_json()["candidate"]["perplexity"] is None


def test_the_last_row_of_a_window_predicts_nothing_and_is_not_judged(windows: list[np.ndarray]) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[-1] = np.nan
        return values

    assert judge(Model(), Model(change=spoil), windows).passed


def test_a_runtime_that_fails_is_no_pass_and_gives_its_reason(windows: list[np.ndarray]) -> None:
    calls = []

    def fail(values: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise ParityError("x.gguf: llama.cpp died from SIGABRT")
        return values

    found = judge(Model(), Model(change=fail), windows)
    assert not found.passed
    assert found.reason == "chunk 2: could not be judged: x.gguf: llama.cpp died from SIGABRT"
    assert found.tokens == 0


@pytest.mark.parametrize("empty", [[], [np.zeros(0, np.int32)], [np.zeros(1, np.int32)], [np.zeros(2, np.int32)]])
def test_nothing_scored_is_no_pass(empty: list[np.ndarray]) -> None:
    found = judge(Model(), Model(), empty)
    assert not found.passed
    assert "no token was scored" in found.reason


def test_windows_of_different_lengths_and_foreign_tokens_are_no_pass(windows: list[np.ndarray]) -> None:
    assert "different lengths" in judge(Model(), Model(), [windows[0], windows[1][:8]]).reason
    for token in (-1, VOCABULARY):
        found = judge(Model(), Model(), [np.full(CONTEXT, token, np.int32)])
        assert not found.passed
        assert "token ids" in found.reason


def test_padding_rows_are_left_out_and_other_differences_of_size_fail(windows: list[np.ndarray]) -> None:
    def padded(values: np.ndarray) -> np.ndarray:
        values[:, :VOCABULARY] = Model().logits(self_window[0], 5)
        values[:, VOCABULARY:] = 50.0  # would change everything if it were compared
        return values

    self_window = [windows[0]]
    candidate = Model(rows=VOCABULARY + 3, change=padded)
    same = judge(Model(), candidate, self_window, Limits(1e-9, 1e-9, 1.0), vocabulary=VOCABULARY)
    assert same.passed
    assert judge(candidate, Model(), self_window, Limits(1e-9, 1e-9, 1.0), vocabulary=VOCABULARY).passed
    for vocabulary in (None, VOCABULARY + 1):
        found = judge(Model(), candidate, self_window, vocabulary=vocabulary)
        assert not found.passed
        assert "vocabularies of 37 (baseline) and 40 (candidate)" in found.reason


def test_one_window_of_each_side_is_in_memory_at_a_time(windows: list[np.ndarray]) -> None:
    models, done = (Model(), Model(noise=0.1)), []
    judge(*models, windows, progress=lambda *at: done.append(at))
    assert [model.most_alive for model in models] == [1, 1]
    assert done == [(index + 1, 8) for index in range(8)]


@pytest.mark.parametrize("values", [(-1.0, 0.1, 0.5), (math.nan, 0.1, 0.5), (0.1, math.inf, 0.5), (0.1, 0.1, 1.01)])
def test_limits_that_cannot_be_meant_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="limit m"):
        Limits(*values)


def test_every_type_has_limits_and_more_bits_never_allow_more() -> None:
    assert limits_for("q4_k_m") == limits_for("Q4_K_M") != limits_for("Q4_0")
    with pytest.raises(UsageError, match=r"'Q9_9'; known: .*Q8_0"):
        limits_for("Q9_9")
    order = ["F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    for finer, coarser in itertools.pairwise(order):
        a, b = limits_for(finer), limits_for(coarser)
        assert a.max_kld <= b.max_kld
        assert a.max_ppl_change <= b.max_ppl_change
        assert a.min_top1 >= b.min_top1


class Transformers(Model):
    """The baseline of a real comparison: a transformers model in float32."""

    def __init__(self, model: Any) -> None:
        super().__init__("torch", rows=model.config.vocab_size)
        self._model = model

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self._model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, first:].numpy()


def test_a_faithful_file_passes_and_swapped_projections_fail(
    tiny_model: Any,
    tiny_gguf: Path,
    make_tiny: Any,
    tiny_weights: dict[str, np.ndarray],
    tmp_path: Path,
    library: LlamaCpp,
) -> None:
    tokens = np.random.default_rng(4).integers(3, 320, 512).astype(np.int32)
    windows = cut_windows(tokens, context=128)
    with LlamaCppRuntime(tiny_gguf, context=128, threads=1, library=library) as runtime:
        found = judge(Transformers(tiny_model), runtime, windows, limits_for("F32"))
    assert found.passed, found.reason
    assert found.mean_kld < 1e-9
    swapped = {
        f"blk.{layer}.ffn_{name}.weight": tiny_weights[f"blk.{layer}.ffn_{other}.weight"]
        for layer in range(2)
        for name, other in (("gate", "up"), ("up", "gate"))
    }
    with LlamaCppRuntime(make_tiny(tmp_path / "s.gguf", swapped), context=128, threads=1, library=library) as runtime:
        found = judge(Transformers(tiny_model), runtime, windows, limits_for("Q8_0"))
    assert not found.passed
    assert found.mean_kld > 0.1
