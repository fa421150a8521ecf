"""The texts that encoders are judged on, and the figures of their vectors, beside brute force."""

from __future__ import annotations

import numpy as np
import pytest

from quantpress.pipelines.encoder_windows import PASSES, gathered, masked, texts_of
from quantpress.pipelines.vector_figures import cosine_limit, pooled, vector_figures

MASK = 99


def test_each_predicted_token_is_masked_once_and_taken_from_that_pass() -> None:
    window, first = np.arange(20, dtype=np.int32), 10
    forms = masked(window, first, MASK)
    times = sum((form == MASK).astype(int) for form in forms)
    assert times.tolist() == [0] * 11 + [1] * 8 + [0]  # the last token ends the text
    assert max(int((form == MASK).sum()) for form in forms) <= 3  # about one in eight
    states = [np.stack([form, np.full_like(form, number)], axis=1) for number, form in enumerate(forms)]
    found = gathered([each.astype(np.float32) for each in states], first)
    assert found.shape == (10, 2)
    assert (found[:8, 0] == MASK).all()
    assert found[:8, 1].tolist() == [float(place % PASSES) for place in range(11, 19)]


def test_texts_for_vectors_have_several_lengths_and_keep_their_ends() -> None:
    windows = [np.arange(start, start + 64, dtype=np.int32) for start in range(0, 80, 10)]
    texts = texts_of(windows)
    assert [len(text) for text in texts] == [8, 16, 32, 64, 8, 16, 32, 64]
    for text, window in zip(texts, windows, strict=True):
        assert (text[0], text[-1]) == (window[0], window[-1])


def test_vectors_are_pooled_as_their_names_say() -> None:
    states = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert pooled(states, "cls").tolist() == [0, 1, 2]
    assert pooled(states, "last").tolist() == [9, 10, 11]
    assert pooled(states, "mean").tolist() == pooled(states, "").tolist() == [4.5, 5.5, 6.5]


def test_cosines_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    ours = list(random.normal(size=(6, 16)).astype(np.float32))
    theirs = [each + 0.1 * random.normal(size=16).astype(np.float32) for each in ours]
    theirs[2] = -ours[2]
    found = vector_figures(ours, theirs, pooling="cls", max_kld=0.2)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True)]
    assert found.min_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert found.mean_cosine == pytest.approx(sum(cosines) / 6, abs=1e-6)
    assert found.nearest == pytest.approx(5 / 6)
    assert "below 0.950000" in found.problem


def test_vectors_that_are_not_finite_do_not_pass() -> None:
    ours, theirs = [np.ones(4, np.float32)], [np.full(4, np.nan, np.float32)]
    found = vector_figures(ours, theirs, pooling="mean", max_kld=1.0)
    assert found.problem
    assert found.to_json()["min_cosine"] is None


@pytest.mark.parametrize(("max_kld", "allowed"), [(0.0, 1 - 1e-5), (0.2, 0.95), (100.0, 0.0)])
def test_the_limit_of_cosines_follows_that_of_divergence(max_kld: float, allowed: float) -> None:
    assert cosine_limit(max_kld) == pytest.approx(allowed)
