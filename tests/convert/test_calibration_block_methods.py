"""GPTQ for GGUF as a method of calibration: which weights get blocks, what reports say, what layers go on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantpress.convert.calibration.block_methods import KquantGptqMethod
from quantpress.convert.calibration.site import LayerResult, Site
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.codec import quantize_rows
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

WINDOWS = list(np.random.default_rng(1).integers(0, 320, (12, 33)).astype(np.int32))


def _site(kinds: dict[str, str], tokens: int = 4096) -> Site:
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((2048, 256)) * rng.gamma(1, 1, 256)).astype(np.float32)
    weights = {slot: (rng.standard_normal((8, 256)) * 0.1).astype(np.float32) for slot in kinds}
    return Site(0, weights, {slot: f"model.{slot}" for slot in kinds}, tokens, hessian=inputs.T @ inputs / len(inputs))


def _method(kinds: dict[str, str]) -> KquantGptqMethod:
    return KquantGptqMethod(lambda name: kinds[name.removeprefix("model.")])


def test_each_weight_gets_the_type_that_was_asked_for_by_its_name_in_the_checkpoint() -> None:
    kinds = {"q": "Q4_K", "k": "F16", "v": "Q6_K", "o": "Q4_0", "t": "TQ2_0"}
    site = _site(kinds)
    result = _method(kinds).quantize([site], {})
    assert list(result.quantized) == ["q", "v", "o", "t"]  # F16 stays as it is
    for slot, tensor in result.quantized.items():
        assert isinstance(tensor, BlockTensor)
        assert (tensor.kind, tensor.shape) == (kinds[slot], (8, 256))
        assert result.reports[slot]["type"] == kinds[slot]
        assert result.reports[slot]["tokens"] == 4096
    assert result.reports["q"]["loss"] > result.reports["v"]["loss"] > 0
    assert result.reports["t"]["method"] == "plain"  # no codes are found for it
    assert (result.quantized["t"].data == quantize_rows("TQ2_0", site.weights["t"])).all()


def test_a_site_without_tokens_is_rounded_plainly_and_one_with_few_is_reported() -> None:
    kinds = {"q": "Q4_K"}
    result = _method(kinds).quantize([_site(kinds, tokens=0)], {})
    assert result.reports["q"] == {"type": "Q4_K", "method": "plain", "tokens": 0}
    assert (result.quantized["q"].data == quantize_rows("Q4_K", _site(kinds).weights["q"])).all()
    few = _method(kinds).quantize([_site(kinds, tokens=31)], {}).reports["q"]
    assert few["few_tokens"]
    assert "few_tokens" not in _method(kinds).quantize([_site(kinds, tokens=32)], {}).reports["q"]


def test_it_needs_the_hessian_and_the_drift_only_where_that_is_made_up_for() -> None:
    kinds = {"q": "Q4_K"}
    site = _site(kinds)
    assert _method(kinds).wants == {"hessian"}
    assert KquantGptqMethod(lambda _name: "Q4_K", drift=1.0).wants == {"hessian", "drift"}
    with pytest.raises(InputError, match="needs the Hessian"):
        _method(kinds).quantize([Site(0, site.weights, site.names, 5)], {})


def _run(source: Path, folder: Path, threads: int) -> list[LayerResult]:
    folder.mkdir(exist_ok=True)
    method = KquantGptqMethod(lambda _name: "Q4_0", threads=threads, drift=1.0)
    return list(
        calibrate(open_checkpoint(source), WINDOWS, method, targets=lambda _name: True, threads=threads, folder=folder)
    )


@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_blocks_come_in_the_checkpoints_order_of_rows_and_do_not_depend_on_threads(family: str, tmp_path: Path) -> None:
    # rows of gptneox's fused matrix stand head by head in the checkpoint, and in three parts in the decoder
    source = tiny_checkpoint(tmp_path / family, family, dtype="float32")
    tensors = open_checkpoint(source).tensors
    found = _run(source, tmp_path / "one", 1)
    for one, other in zip(found, _run(source, tmp_path / "two", 2), strict=True):
        assert one.reports == other.reports
        for name, tensor in one.quantized.items():
            assert isinstance(tensor, BlockTensor)
            assert (tensor.data == other.quantized[name].data).all()  # type: ignore[union-attr]
            weight = tensors[name].read().astype(np.float32)
            weight = weight if weight.shape == tensor.shape else weight.T
            apart = np.linalg.norm(tensor.dequantize() - weight, axis=1) / np.linalg.norm(weight, axis=1)
            assert apart.max() < 0.5  # 4 bits; another row would be 1.4 apart
