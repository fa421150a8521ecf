"""Row orders against the formulas of llama.cpp's converter, on whole tensors, part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quantpress.convert.arch.fused_rows import FUSED
from quantpress.convert.arch.registry import ARCHITECTURES
from quantpress.convert.arch.spec import Hyperparameters, Layout, Role, Rope, TensorSpec
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.gguf.rows import RowOrder, Transposed, row_order
from quantpress.convert.weights import canonical
from quantpress.quant.errors import LayoutError

LLAMA = next(arch for arch in ARCHITECTURES if arch.family == "llama")
NEOX = next(arch for arch in ARCHITECTURES if arch.family == "gptneox")


def hyperparameters(*, heads: int, kv_heads: int, head_dim: int, turned: int | None = None) -> Hyperparameters:
    return Hyperparameters(
        layers=1,
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=8,
        vocab=8,
        context=8,
        norm_eps=1e-5,
        activation="silu",
        attention_scale=1.0,
        rope=Rope(10000.0, turned or head_dim),
    )


def spec(rotary: str = "", layout: Layout = Layout.PLAIN) -> TensorSpec:
    return TensorSpec("hf", "gguf", ("q", "hidden"), Role.LINEAR, layout=layout, rotary=rotary)


def reader(array: np.ndarray) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(array)
        return array[start:stop]

    return read


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The formula of LlamaModel.permute in llama.cpp's conversion/llama.py."""
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def pieces(order: RowOrder, array: np.ndarray, step: int) -> np.ndarray:
    starts = range(0, len(array), step)
    return np.concatenate([order.read(reader(array), start, min(start + step, len(array))) for start in starts])


@pytest.mark.parametrize("step", [1, 7, 8, 16, 100])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (1, 6), (3, 2)])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_rotary_rows_are_interleaved_as_llama_cpp_does(
    heads: int, head_dim: int, shape: tuple[int, ...], step: int
) -> None:
    array = np.arange(heads * head_dim * int(np.prod(shape))).reshape(heads * head_dim, *shape)
    order = row_order(LLAMA, spec("heads"), hyperparameters(heads=heads, kv_heads=1, head_dim=head_dim))
    there = pieces(order, array, step)
    np.testing.assert_array_equal(there, permute(array, heads))
    np.testing.assert_array_equal(pieces(order.inverse(), there, step), array)


def test_only_the_values_that_turn_are_interleaved() -> None:
    order = row_order(LLAMA, spec("heads"), hyperparameters(heads=2, kv_heads=2, head_dim=6, turned=4))
    array = np.arange(12)
    assert order.read(reader(array), 0, 12).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_neighbours_that_turn_together_stay_for_norm_and_part_for_neox() -> None:
    sizes = hyperparameters(heads=2, kv_heads=2, head_dim=8, turned=6)
    assert sizes.rope is not None
    turning = dataclasses.replace(sizes, rope=dataclasses.replace(sizes.rope, interleaved=True))
    assert not row_order(LLAMA, spec("heads"), turning).moves
    order = row_order(NEOX, spec("heads"), turning)
    # pairs (0, 1), (2, 3), (4, 5) become (0, 3), (1, 4), (2, 5), as NEOX turns them
    assert order.read(reader(np.arange(16)), 0, 16).tolist() == [0, 2, 4, 1, 3, 5, 6, 7, 8, 10, 12, 9, 11, 13, 14, 15]


@pytest.mark.parametrize("step", [1, 4, 10, 100])
def test_heads_of_neox_become_q_then_k_then_v(step: int) -> None:
    heads, head_dim, width = 3, 4, 5
    array = np.arange(heads * 3 * head_dim * width).reshape(-1, width)
    order = row_order(
        NEOX, spec("heads", Layout.HEADS_QKV), hyperparameters(heads=heads, kv_heads=heads, head_dim=head_dim)
    )
    # conversion/gptneox.py: reshape to (heads, 3, head_dim, hidden), then all q, all k, all v
    wanted = array.reshape(heads, 3, head_dim, width).swapaxes(0, 1).reshape(-1, width)
    there = pieces(order, array, step)
    np.testing.assert_array_equal(there, wanted)
    np.testing.assert_array_equal(pieces(order.inverse(), there, step), array)


@pytest.mark.parametrize("step", [1, 4, 10, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2), (6, 3)])
def test_groups_of_heads_become_q_then_k_then_v(heads: int, kv_heads: int, step: int) -> None:
    head_dim, width = 4, 5
    array = np.arange((heads + 2 * kv_heads) * head_dim * width).reshape(-1, width)
    row = TensorSpec("hf", "gguf", ("qkv", "hidden"), Role.LINEAR, layout=Layout.GROUPED_QKV)
    sizes = hyperparameters(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    # transformers' FalconAttention._split_heads: of each group all but two heads are q, then k, then v
    groups = array.reshape(kv_heads, heads // kv_heads + 2, head_dim, width)
    wanted = np.concatenate([part.reshape(-1, width) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
    order = row_order(NEOX, row, sizes)
    there = pieces(order, array, step)
    np.testing.assert_array_equal(there, wanted)
    np.testing.assert_array_equal(pieces(order.inverse(), there, step), array)
    np.testing.assert_array_equal(canonical(torch.from_numpy(array), row, sizes).numpy(), wanted)
    np.testing.assert_array_equal(canonical(torch.from_numpy(array[:, 0].copy()), row, sizes).numpy(), wanted[:, 0])


def test_other_rows_stay_where_they_are() -> None:
    sizes = hyperparameters(heads=2, kv_heads=2, head_dim=4)
    assert not row_order(LLAMA, spec(), sizes).moves
    assert not row_order(NEOX, spec("heads"), sizes).moves
    assert not row_order(LLAMA, spec("heads"), dataclasses.replace(sizes, rope=None)).moves


def test_two_reorderings_at_once_are_refused() -> None:
    with pytest.raises(LayoutError, match="hf"):
        row_order(LLAMA, spec("heads", Layout.HEADS_QKV), hyperparameters(heads=2, kv_heads=2, head_dim=4))


def test_only_rows_of_tables_that_say_so_move() -> None:
    moved = {
        (arch.family, row.slot)
        for arch in ARCHITECTURES
        for row in arch.tensors
        if not row.part  # views of one part have no fused rows any more
        and row_order(arch, row, hyperparameters(heads=2, kv_heads=2, head_dim=4)).moves
    }
    names = ("attn_q.weight", "attn_k.weight")
    assert moved >= {(family, name) for family in ("llama", "mistral") for name in names}
    assert moved >= {("gptneox", "attn_qkv.weight"), ("gptneox", "attn_qkv.bias")}
    for arch in ARCHITECTURES:
        said = {row.slot for row in arch.tensors if row.rotary or row.layout in FUSED}
        assert {slot for family, slot in moved if family == arch.family} <= said
    assert not any("attn_v" in name for _, name in moved)


def test_a_transposed_tensor_is_read_once() -> None:
    calls: list[tuple[int, int]] = []
    array = np.arange(12.0).reshape(3, 4)

    def read(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        return array[start:stop]

    turned = Transposed(LazyTensor("w", (3, 4), "F64", "file", read))
    rows = [turned.read_rows(start, min(start + 3, 4)) for start in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), array.T)
    assert all(part.flags.c_contiguous for part in rows)
    assert calls == [(0, 3)]


def test_whole_blocks_are_read_in_one_call() -> None:
    calls: list[tuple[int, int]] = []
    order = row_order(LLAMA, spec("heads"), hyperparameters(heads=8, kv_heads=8, head_dim=4))

    def read(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        return np.zeros((stop - start, 2))

    order.read(read, 8, 24)
    assert calls == [(8, 24)]
