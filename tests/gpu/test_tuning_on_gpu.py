"""Timing and the search for launch parameters on a real GPU: skipped without one. The logic is tested without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.dispatch import matmul
from quantpress.kernels.launch import Problem
from quantpress.kernels.tuning import choice as tuning
from quantpress.kernels.tuning.ahead import Ahead
from quantpress.kernels.tuning.candidates import candidates, device_facts
from quantpress.kernels.tuning.measuring import dense_seconds, measure
from quantpress.kernels.tuning.products import Products
from quantpress.kernels.tuning.search import Refused
from quantpress.kernels.tuning.timing import copy_bandwidth, graph_seconds, timing
from quantpress.pipelines.kernel_bench import keep

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("no_launch_files"),
]

LAYER = Problem(1, 4096, 4096, 4, 128, "bfloat16")


def test_times_grow_with_the_work_and_no_product_is_faster_than_memory() -> None:
    bandwidth, device = copy_bandwidth(), device_facts()
    assert 1e11 < bandwidth < 2e13  # bytes a second of any GPU that Triton runs on
    small = dense_seconds(replace(LAYER, rows=4096), device, graph_seconds)
    large = dense_seconds(replace(LAYER, rows=32768), device, graph_seconds)
    assert 3 < large / small < 16
    # a read may be somewhat faster than a copy; were weights found in the cache, it would be several times as fast
    assert 2 * 4096 * 32768 / large < 1.3 * bandwidth


def test_samples_of_one_launch_agree() -> None:
    products = Products(LAYER, "cuda", 8)
    launch = tuning.choose(LAYER, torch.cuda.get_device_name())
    first, second = (timing(graph_seconds(products.runs(launch))) for _ in range(2))
    assert first.median == pytest.approx(second.median, rel=0.2)


@pytest.mark.parametrize("rows_in", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_candidates_run_and_pass_the_check(rows_in: int, bits: int) -> None:
    problem = replace(LAYER, rows_in=rows_in, bits=bits, rows=1536, columns=2048)
    products, allowed = Products(problem, "cuda"), candidates(problem, device_facts())
    refused = {}
    chosen = allowed[:: max(len(allowed) // 12, 1)]
    for launch in chosen:
        try:
            products.check(launch)
        except Refused as error:
            refused[launch] = str(error)
    # too many registers is what no estimate foresees; a wrong result never is
    assert not [why for why in refused.values() if "wrong" in why], refused
    assert len(refused) <= len(chosen) // 4, refused


def test_a_search_ends_with_a_launch_that_is_no_slower_and_is_used_from_then_on() -> None:
    problem, device = replace(LAYER, rows_in=4, columns=2048), device_facts()
    before = measure(problem, device, graph_seconds, dense=False)
    with Ahead(4) as ahead:
        found = measure(problem, device, graph_seconds, ahead, dense=False)
    assert found.timing.median <= before.timing.median * 1.1
    assert found.tried > 5
    keep(tuning.device_file(device.name), device.name, found)
    assert tuning.choose(problem, device.name) == found.launch
    products = Products(problem, "cuda")
    again = matmul(products.x, products.weights[0])
    torch.testing.assert_close(again, products.runs(found.launch)[0](), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["w8a8", "nf4"])
def test_other_kinds_are_measured(kind: str) -> None:
    problem = replace(LAYER, kind=kind, bits=8 if kind == "w8a8" else 4, group_size=4096 if kind == "w8a8" else 64)
    found = measure(problem, device_facts(), graph_seconds)
    assert found.dense is not None
    assert 0 < found.timing.median < 1e-2
