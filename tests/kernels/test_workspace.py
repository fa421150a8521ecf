"""Counters of launches that are captured in CUDA graphs: each launch has its own, and the graph need not zero them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels import workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_set_aside", {CPU: torch.zeros(workspace._SET_ASIDE, dtype=torch.int32)})
    monkeypatch.setattr(workspace, "_taken", {})


def test_launches_of_graphs_share_no_counter_and_no_line_of_the_cache() -> None:
    found = [workspace._own(CPU, count) for count in (1, 33, 32, 4096, 7)]
    assert [len(each) for each in found] == [1, 33, 32, 4096, 7]
    for number, each in enumerate(found):
        each += number + 1
    for number, each in enumerate(found):
        assert each.unique().tolist() == [number + 1]
    assert all(each.data_ptr() % 128 == found[0].data_ptr() % 128 for each in found)
    base = workspace._set_aside[CPU].untyped_storage().data_ptr()
    assert all(each.untyped_storage().data_ptr() == base for each in found)


def test_when_none_are_left_or_none_were_set_aside_a_launch_gets_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    base = workspace._set_aside[CPU].untyped_storage().data_ptr()
    whole = workspace._own(CPU, workspace._SET_ASIDE - 5)
    assert whole.untyped_storage().data_ptr() == base
    whole += 1
    more = workspace._own(CPU, 6)
    assert more.untyped_storage().data_ptr() != base
    assert more.tolist() == [0] * 6
    monkeypatch.setattr(workspace, "_set_aside", {})
    assert workspace._own(CPU, 3).tolist() == [0, 0, 0]


def test_without_a_gpu_counters_are_new_and_zero() -> None:
    first = workspace.counters(CPU, 5)
    first += 1
    assert workspace.counters(CPU, 5).tolist() == [0] * 5
