"""The source's weights run beside the quantized ones: what drift is measured, and that it costs no determinism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.calibration.precision import native_precision, products
from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.open import open_checkpoint
from quantpress.quant.grid import Grid, round_to_nearest
from tests.tiny import tiny_checkpoint

WINDOWS = list(np.random.default_rng(1).integers(0, 320, (40, 33)).astype(np.int32))
CASES = ("llama", "gptneox", "gemma3", "phi3", "gpt2")
PRECISIONS = [
    "f32",
    pytest.param("bf16", marks=pytest.mark.skipif(native_precision("cpu") != "bf16", reason="no units for bfloat16")),
]


@dataclass
class Watch:
    """Rounds to `bits`, or leaves the weights as they are, and keeps what it was given."""

    bits: int | None = 3
    wants: frozenset[str] = frozenset({"hessian", "drift"})
    sequential: bool = True
    drifts: list[NDArray[np.float32]] = field(default_factory=list)
    hessians: list[NDArray[np.float32]] = field(default_factory=list)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Any]) -> SiteResult:
        del plain
        codes = {}
        for site in sites:
            assert site.hessian is not None
            if site.drift is not None:
                self.drifts.append(site.drift.copy())
            self.hessians.append(site.hessian.copy())
            if self.bits is not None:
                codes |= {slot: round_to_nearest(weight, Grid(self.bits, 16)) for slot, weight in site.weights.items()}
        return SiteResult(codes)


def walk(source: Path, folder: Path, method: Watch, **options: Any) -> Watch:
    folder.mkdir(exist_ok=True)
    options = {"threads": 2, "targets": lambda _name: True, **options}
    for _ in calibrate(open_checkpoint(source), WINDOWS, method, folder=folder, **options):
        pass
    return method


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_stay_as_they_are_make_no_drift(family: str, precision: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family)
    method = walk(source, tmp_path / "work", Watch(None), precision=precision)
    assert len(method.drifts) == 12
    assert all(not drift.any() for drift in method.drifts)


@pytest.mark.parametrize("family", CASES)
def test_drift_is_the_difference_to_a_run_of_the_source(family: str, tmp_path: Path) -> None:
    """(X' - X)^T X has X'^T X' - X^T X = D + D^T + (X' - X)^T (X' - X): the last term is small and never negative."""
    source = tiny_checkpoint(tmp_path / "model", family)
    ours = walk(source, tmp_path / "ours", Watch(8))
    plain = walk(source, tmp_path / "plain", Watch(None))
    assert not ours.drifts[0].any()
    first = 3 if family == "gptneox" else 1  # whose MLP reads the layer's input: up has no drift yet
    for drift, hessian, before in zip(ours.drifts[first:], ours.hessians[first:], plain.hessians[first:], strict=True):
        wide = before.astype(np.float64) - hessian
        rest = wide - drift - drift.T  # the mean of squares of X' - X
        assert np.abs(drift).max() > 0
        # eight bits in groups of 16 move inputs by a few per mille: their squares are far below the drift itself
        assert np.trace(rest) >= -1e-6 * np.trace(hessian)
        assert np.abs(rest).max() < 0.1 * np.abs(wide).max() + 1e-6 * np.trace(hessian)


@pytest.mark.parametrize("family", CASES)
def test_steps_in_bfloat16_see_what_the_steps_before_have_quantized(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family)
    wide, narrow = (walk(source, tmp_path / "work", Watch(3), precision=one) for one in ("f32", "bf16"))
    first = 3 if family == "gptneox" else 1  # whose MLP reads the layer's input: up has no drift yet
    assert len(narrow.drifts) == 12
    for wanted, found in zip(wide.drifts[first:], narrow.drifts[first:], strict=True):
        # a weight rounded to 3 bits is off by a tenth and more, one rounded to bfloat16 by 2^-9: half leaves room
        assert np.linalg.norm(found - wanted) < 0.5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_and_budget_change_no_bit(precision: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "gptneox")
    wanted = walk(source, tmp_path / "one", Watch(), threads=1, precision=precision)
    for threads, budget in ((2, None), (3, 0), (2, 100_000)):
        found = walk(source, tmp_path / "other", Watch(), threads=threads, max_memory=budget, precision=precision)
        for name in ("drifts", "hessians"):
            pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
            assert all(one.tobytes() == other.tobytes() for one, other in pairs), (threads, budget, name)
        assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_sees_the_drift_of_an_undisturbed_one(precision: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "llama")
    wanted = walk(source, tmp_path / "whole", Watch(), precision=precision)
    (folder := tmp_path / "stopped").mkdir()
    first, second = Watch(), Watch()
    options: dict[str, Any] = {"threads": 2, "targets": lambda _name: True, "folder": folder, "precision": precision}
    for result in calibrate(open_checkpoint(source), WINDOWS, first, **options):
        if result.layer == 0:
            break
    list(calibrate(open_checkpoint(source), WINDOWS, second, first_layer=1, **options))
    found = [*first.drifts[:4], *second.drifts]
    assert [one.tobytes() for one in found] == [other.tobytes() for other in wanted.drifts]


@pytest.mark.skipif(native_precision("cpu") != "bf16", reason="no units for bfloat16")
def test_bfloat16_is_off_by_what_its_eight_bits_are_worth(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "llama")
    exact, rounded = (walk(source, tmp_path / "work", Watch(None), precision=one) for one in ("f32", "bf16"))
    for wide, narrow in zip(exact.hessians, rounded.hessians, strict=True):
        change = np.linalg.norm(wide - narrow) / np.linalg.norm(wide)
        # inputs of layer n have passed 7 n roundings of 2^-9; the first ones are rounded in the product alone
        assert 0 < change < 3 * 7 * 2.0**-8


def test_products_are_as_they_were_afterwards() -> None:
    import torch

    left = torch.randn(300, 300)
    before = left @ left
    with products("bf16"):
        within = left @ left
    assert torch.equal(left @ left, before)
    if native_precision("cpu") == "bf16":
        assert not torch.equal(within, before)
