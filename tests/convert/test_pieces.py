"""Pieces of stored tensors: experts of stacks, parts of fused projections; the oracle is slicing with numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantpress.convert.arch.hyper import Experts, Hyperparameters
from quantpress.convert.arch.spec import Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.unstack import Placed, joined
from quantpress.convert.pieces import Piece, piece_codes, piece_row, resolve, stacked
from quantpress.convert.quantized import LazyQuantized
from quantpress.convert.recent import Recent
from quantpress.convert.row_order import RowOrder
from quantpress.convert.safetensors_reader import open_shard
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

HYPER = Hyperparameters(
    layers=1, hidden=6, heads=4, kv_heads=2, head_dim=3, intermediate=10, vocab=8, context=8, norm_eps=1e-5,
    activation="silu", attention_scale=1.0, experts=Experts(count=3, used=1, intermediate=5, layers=(True,)),
)  # fmt: skip
Q, KV = 12, 6
RANDOM = np.random.default_rng(0)


def lazy(values: Array, *, wide: bool = False) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Array:
        return values[start:stop].astype(np.float16) if wide else values[start:stop]

    return LazyTensor(
        "stored",
        values.shape,
        "F16" if wide else "F32",
        "file",
        read_rows,
        (lambda a, b: values[a:b]) if wide else None,
    )


def row(shape: tuple[str, ...], layout: Layout = Layout.PLAIN, part: str = "", expert: int = -1) -> TensorSpec:
    return TensorSpec("stored", "blk.{layer}.x.weight", shape, Role.LINEAR, layout, part=part, expert=expert)


def values(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def grouped(part: str) -> Callable[[Array], Array]:
    """(kv_heads, heads / kv_heads + 2, head_dim, ...): two query heads, a key, a value in each of two groups."""
    pick = {"q": slice(0, 2), "k": slice(2, 3), "v": slice(3, 4)}[part]
    return lambda whole: whole.reshape(2, 4, 3, *whole.shape[1:])[:, pick].reshape(-1, *whole.shape[1:])


QKV, FFN2 = ("qkv", "hidden"), ("ffn2", "hidden")
STACK, TURNED = ("experts", "expert_ffn2", "hidden"), ("experts", "hidden", "expert_ffn2")
CASES: dict[str, tuple[TensorSpec, tuple[int, ...], Callable[[Array], Array]]] = {
    "q": (row(QKV, part="q"), (Q + 2 * KV, 6), lambda x: x[:Q]),
    "k": (row(QKV, part="k"), (Q + 2 * KV, 6), lambda x: x[Q : Q + KV]),
    "v": (row(QKV, part="v"), (Q + 2 * KV, 6), lambda x: x[Q + KV :]),
    "bias-k": (row(("qkv",), part="k"), (Q + 2 * KV,), lambda x: x[Q : Q + KV]),
    "grouped-q": (row(QKV, Layout.GROUPED_QKV, "q"), (Q + 2 * KV, 6), grouped("q")),
    "grouped-k": (row(QKV, Layout.GROUPED_QKV, "k"), (Q + 2 * KV, 6), grouped("k")),
    "grouped-v": (row(("qkv",), Layout.GROUPED_QKV, "v"), (Q + 2 * KV,), grouped("v")),
    "gate": (row(FFN2, part="gate"), (20, 6), lambda x: x[:10]),
    "up": (row(FFN2, part="up"), (20, 6), lambda x: x[10:]),
    "even": (row(FFN2, part="gate_even"), (20, 6), lambda x: x[::2]),
    "odd": (row(FFN2, part="up_odd"), (20, 6), lambda x: x[1::2]),
    "turned-up": (row(("hidden", "ffn2"), Layout.TRANSPOSED, "up"), (6, 20), lambda x: x[:, 10:]),
    "expert": (row(("experts", "hidden", "expert_ffn"), Layout.STACKED, expert=1), (3, 6, 5), lambda x: x[1]),
    "expert-up": (row(STACK, Layout.STACKED, "up", 2), (3, 10, 6), lambda x: x[2, 5:]),
    "expert-even": (row(TURNED, Layout.STACKED_TRANSPOSED, "gate_even", 2), (3, 6, 10), lambda x: x[2, :, ::2]),
    "expert-bias": (row(("experts", "expert_ffn2"), Layout.STACKED, "up_odd", 1), (3, 10), lambda x: x[1, 1::2]),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_piece_is_what_numpy_cuts_out(case: str, wide: bool) -> None:
    spec, shape, cut = CASES[case]
    whole = values(*shape)
    plain, tensor, piece = resolve(spec, lazy(whole, wide=wide), HYPER, recent=Recent(1))
    wanted = cut(whole)
    assert tensor.shape == wanted.shape == tuple(HYPER.dims[dim] for dim in plain.shape)
    assert piece is not None
    assert piece.stored == "stored"
    assert piece.expert == spec.expert
    np.testing.assert_array_equal(tensor.exact_rows(0, tensor.rows), wanted)
    np.testing.assert_array_equal(tensor.read(), wanted.astype(np.float16) if wide else wanted)
    for start, stop in ((1, 2), (2, 5), (0, 3)):
        np.testing.assert_array_equal(tensor.exact_rows(start, stop), wanted[start:stop])
    assert plain.layout in (Layout.PLAIN, Layout.TRANSPOSED)
    assert not plain.part


def test_pieces_of_one_tensor_have_names_of_their_own() -> None:
    whole = lazy(values(3, 10, 6))
    rows = [row(STACK, Layout.STACKED, part, expert) for part in ("gate", "up") for expert in range(3)]
    names = {resolve(spec, whole, HYPER, recent=Recent(1))[1].name for spec in rows}
    assert names == {f"stored:{expert}:{part}" for expert in range(3) for part in ("gate", "up")}


def test_what_is_no_piece_stays_as_it_is() -> None:
    spec, tensor = row(("hidden", "ffn")), lazy(values(6, 10))
    assert resolve(spec, tensor, HYPER, recent=Recent(1)) == (spec, tensor, None)


def test_unit_rows_have_the_length_one() -> None:
    whole = values(8, 6)
    whole[3] = 0
    _, tensor, _ = resolve(row(("vocab", "hidden"), Layout.UNIT_ROWS), lazy(whole), HYPER, recent=Recent(1))
    wanted = whole.astype(np.float64) / np.maximum(np.linalg.norm(whole.astype(np.float64), axis=1), 1e-12)[:, None]
    # the length is rounded to float32 once, and the quotient once
    np.testing.assert_allclose(tensor.read(), wanted, rtol=2**-22, atol=0)


def test_a_part_that_the_rows_do_not_have_is_refused() -> None:
    with pytest.raises(LayoutError, match="'gate' is no part of rows of hidden"):
        piece_row(row(("hidden", "ffn"), part="gate"), HYPER)


def test_an_expert_of_a_file_is_read_by_rows(tmp_path: Path) -> None:
    whole = values(3, 10, 6)
    save_file({"stack": whole, "other": values(2, 2)}, tmp_path / "x.safetensors")
    tensor = open_shard(tmp_path / "x.safetensors").tensors["stack"]
    assert tensor.inner is not None
    for expert in range(3):
        inner = tensor.inner(expert)
        np.testing.assert_array_equal(inner.read(), whole[expert])
        np.testing.assert_array_equal(inner.read_rows(4, 7), whole[expert, 4:7])
    with pytest.raises(IndexError):
        tensor.inner(3)


def test_an_expert_of_a_stack_that_cannot_be_read_by_rows_is_read_once() -> None:
    whole, asked = values(3, 10, 6), list[tuple[int, int]]()

    def read_rows(start: int, stop: int) -> Array:
        asked.append((start, stop))
        return whole[start:stop]

    tensor = replace(lazy(whole), read_rows=read_rows)
    _, view, _ = resolve(row(STACK, Layout.STACKED, "up", 1), tensor, HYPER, recent=Recent(1))
    parts = [view.read_rows(start, start + 1) for start in range(5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[1, 5:])
    assert asked == [(1, 2)]


def test_single_tensors_make_a_stack_and_come_out_of_it() -> None:
    each = [values(4, 6) for _ in range(3)]
    tensor = stacked([lazy(one) for one in each])
    assert tensor.shape == (3, 4, 6)
    np.testing.assert_array_equal(tensor.read(), np.stack(each))
    assert tensor.inner is not None
    np.testing.assert_array_equal(tensor.inner(2).read(), each[2])


def test_codes_of_a_part_are_rows_of_the_whole() -> None:
    codes = RANDOM.integers(0, 16, (Q + 2 * KV, 6)).astype(np.uint8)
    scale = values(Q + 2 * KV, 2)
    whole = QuantizedTensor(codes, scale, None, 4, 3, None)
    form = QuantizedForm((Q + 2 * KV, 6), 4, 3, True, "F32")
    lazy_codes = LazyQuantized("stored", form, "file", lambda: whole)
    _, _, piece = resolve(row(QKV, part="k"), lazy(values(Q + 2 * KV, 6)), HYPER, recent=Recent(1))
    assert piece is not None
    found = piece_codes({"stored": lazy_codes}, {"stored:k": piece, "other:q": Piece("other", -1, piece.order)})
    assert set(found) == {"stored", "stored:k"}
    part = found["stored:k"]
    assert part.form.shape == (KV, 6)
    np.testing.assert_array_equal(part.read().codes, codes[Q : Q + KV])
    np.testing.assert_array_equal(part.read().scale, scale[Q : Q + KV])


@pytest.mark.parametrize("shape", [TURNED, ("experts", "expert_ffn2")])
def test_pieces_are_put_together_again(shape: tuple[str, ...]) -> None:
    whole = values(*(HYPER.dims[dim] for dim in shape))
    layout = Layout.STACKED_TRANSPOSED if len(shape) == 3 else Layout.STACKED
    placed = []
    for expert in range(3):
        for part in ("up_odd", "gate_even"):
            spec = row(shape, layout, part, expert)
            plain, tensor, piece = resolve(spec, lazy(whole), HYPER, recent=Recent(1))
            assert piece is not None
            placed.append(Placed(tensor, piece.order, expert, plain.layout is Layout.TRANSPOSED))
    tensor = joined("stored", whole.shape, placed, Recent(1))
    np.testing.assert_array_equal(tensor.read(), whole)
    np.testing.assert_array_equal(tensor.read_rows(1, 2), whole[1:2])


def test_parts_of_a_fused_matrix_are_put_together_again() -> None:
    whole = values(Q + 2 * KV, 6)
    placed = []
    for part in ("v", "q", "k"):
        _, tensor, piece = resolve(row(QKV, Layout.GROUPED_QKV, part), lazy(whole), HYPER, recent=Recent(1))
        assert piece is not None
        placed.append(Placed(tensor, piece.order, -1, columns=False))
    np.testing.assert_array_equal(joined("stored", whole.shape, placed, Recent(1)).read(), whole)


def test_chosen_blocks_are_read_in_runs() -> None:
    whole, asked = np.arange(40).reshape(20, 2), list[tuple[int, int]]()

    def read(start: int, stop: int) -> Array:
        asked.append((start, stop))
        return whole[start:stop]

    found = RowOrder(2, (7, 8, 9, 1)).read(read, 0, 8)
    np.testing.assert_array_equal(found, np.concatenate([whole[14:20], whole[2:4]]))
    assert asked == [(14, 20), (2, 4)]
