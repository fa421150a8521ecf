"""The share of an adapter's effect, against its definition written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.pipelines.adapter_share import AdapterShare, ShareTally

Logits = NDArray[np.float32]
TOKENS, ROWS = 300, 40


class Given:
    """A runtime that says the same to every window."""

    name = "given"

    def __init__(self, logits: Logits) -> None:
        self._logits, self.vocab_size = logits, logits.shape[1]

    def logits(self, tokens: NDArray[np.int32], first: int) -> Logits:
        return self._logits[: len(tokens) - first]

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def some(seed: int, scale: float = 1.0) -> Logits:
    return (scale * np.random.default_rng(seed).standard_normal((TOKENS, ROWS))).astype(np.float32)


def share_of(base: Logits, adapted: Logits, candidate: Logits) -> AdapterShare:
    tally = ShareTally(Given(base))
    for part in np.array_split(np.arange(len(base)), 3):
        tally.add(base[part], adapted[part], candidate[part])
    found = tally.result()
    assert found is not None
    return found


def by_definition(base: Logits, adapted: Logits, candidate: Logits) -> tuple[float, float]:
    """The share and KL(adapted || base), in float64, one token after another."""
    both = alone = divergence = 0.0
    for plain, full, other in zip(*(x.astype(np.float64) for x in (base, adapted, candidate)), strict=True):
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (full, plain))
        effect, found = full - plain, other - plain
        both += float((p * effect * found).sum() - (p * effect).sum() * (p * found).sum())
        alone += float((p * effect * effect).sum() - (p * effect).sum() ** 2)
        divergence += float((p * np.log(p / q)).sum()) / len(base)
    return both / alone, divergence


def test_the_share_is_what_its_definition_says() -> None:
    base, adapted = some(0, 3.0), some(0, 3.0) + some(1)
    candidate = base + np.float32(0.7) * some(1) + some(2)
    found, (share, divergence) = share_of(base, adapted, candidate), by_definition(base, adapted, candidate)
    assert found.share == pytest.approx(share, rel=1e-10)
    assert found.effect == pytest.approx(divergence, rel=1e-10)


@pytest.mark.parametrize("part", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_a_part_of_the_effect_is_that_part(part: float) -> None:
    base, change = some(0, 3.0).astype(np.float64), some(1).astype(np.float64)
    found = share_of(*(x.astype(np.float32) for x in (base, base + change, base + part * change)))
    assert found.share == pytest.approx(part, abs=1e-6)  # float32 logits
    assert found.noise < 1e-6
    assert found.stderr < 1e-6
    assert bool(found.problem) == (part != 1.0)


def test_what_is_added_to_all_logits_of_a_token_changes_nothing() -> None:
    base, adapted, candidate = some(0), some(0) + some(1), some(0) + some(2)
    shifted = share_of(base + 100, adapted - 50, candidate + 30)
    assert shifted.share == pytest.approx(share_of(base, adapted, candidate).share, abs=1e-4)  # float32 at 100


def test_the_standard_error_is_the_scatter_of_the_share() -> None:
    base, adapted = some(0, 2.0), some(0, 2.0) + some(1)
    found = [share_of(base, adapted, adapted + 2 * some(seed)) for seed in range(10, 60)]
    scatter = float(np.std([one.share for one in found], ddof=1))
    # 50 samples know a deviation within 10 %, and their errors are means of figures that hardly differ
    assert np.mean([one.stderr for one in found]) == pytest.approx(scatter, rel=0.35)
    assert all(not one.problem for one in found), "three standard errors, and more for what is aligned"
    assert found[0].noise == pytest.approx(2.0, rel=0.1)  # twice the effect in every direction but one


def test_an_effect_lost_in_noise_is_not_judged_and_said() -> None:
    base = some(0)
    lost = share_of(base, base + 0.01 * some(1), base + some(2))
    assert not lost.problem
    assert "too weak" in lost.doubt
    none = share_of(base, base, base + some(2))
    assert math.isnan(none.share)
    assert not none.problem
    assert none.doubt == "the adapters change nothing on this text"
    assert none.to_json() == {"share": None, "tolerance": None, "effect_kld": 0.0}


def test_logits_too_large_for_an_exponential_are_no_matter() -> None:
    base, adapted = some(0, 1000.0), some(1, 1000.0)
    found = share_of(base, adapted, adapted)
    assert found.share == pytest.approx(1.0)
    assert math.isfinite(found.effect)


def test_rows_that_only_the_adapters_know_are_left_out() -> None:
    base, adapted = some(0), some(0) + some(1)
    more = np.concatenate([adapted, some(5)[:, :3]], axis=1)
    tally = ShareTally(Given(np.concatenate([base, base[:1]])))
    tally.watch(np.zeros(2 * len(base) + 2, np.int32), more, more)
    found = tally.result()
    assert found is not None
    assert found.share == pytest.approx(1.0)


def test_nothing_seen_gives_nothing() -> None:
    assert ShareTally(Given(some(0))).result() is None
