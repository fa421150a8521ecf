"""GPTQ of a layer's sites on a device, here the processor by another name: the same as the compiled one."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert.calibration.methods import GptqMethod
from quantpress.convert.calibration.site import Site
from quantpress.quant.errors import UsageError
from quantpress.quant.grid import Grid
from tests.quant.gptq_cuda_cases import layer

ON_DEVICE = "cpu:0"  # torch's full name of the processor: what is not plain "cpu" takes the way of a GPU


def site(*, drift: float) -> Site:
    """Two matrices that read the same 96 columns, one of which never gets an input."""
    weight, hessian = layer(40, 96)
    hessian[7] = hessian[:, 7] = 0
    moved = (hessian * np.random.default_rng(5).normal(0, drift, hessian.shape)).astype(np.float32)
    weights = {"attn_q.weight": weight[:24], "attn_k.weight": weight[24:]}
    names = {slot: slot for slot in weights}
    return Site(0, weights, names, 384, hessian=hessian, drift=moved if drift else None)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_codes_and_reports_are_those_of_the_processor_up_to_near_ties(share: float) -> None:
    grids = {"attn_q.weight": Grid(4, 32), "attn_k.weight": Grid(3, 32, symmetric=False)}
    found, wanted = (
        GptqMethod(grids.__getitem__, drift=share, device=device).quantize([site(drift=0.3 if share else 0.0)], {})
        for device in (ON_DEVICE, "cpu")
    )
    for slot, grid in grids.items():
        one, other = found.quantized[slot], wanted.quantized[slot]
        assert (one.codes == other.codes).mean() > 0.98
        # scales are the ranges of groups over the steps: corrected weights differ by roundings, F16 by one unit then
        np.testing.assert_allclose(one.scale.astype(np.float32), other.scale.astype(np.float32), rtol=2e-3)
        assert one.bits == grid.bits
        report, told = found.reports[slot], wanted.reports[slot]
        assert report.keys() == told.keys()
        assert (report["dead_columns"], report["tokens"], report["damping"]) == (1, 384, told["damping"])
        assert report["loss"] == pytest.approx(told["loss"], rel=2e-2)


def test_the_correction_for_drift_changes_the_codes() -> None:
    plain, made_up = (
        GptqMethod(lambda _: Grid(4, 32), drift=share, device=ON_DEVICE).quantize([site(drift=0.3)], {})
        for share in (0.0, 1.0)
    )
    assert (plain.quantized["attn_q.weight"].codes != made_up.quantized["attn_q.weight"].codes).mean() > 0.05


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="device cuda:63"):
        GptqMethod(lambda _: Grid(4, 32), device="cuda:63").quantize([site(drift=0.0)], {})
