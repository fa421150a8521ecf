"""Merged tensors against PEFT's merge_and_unload and the formula in float64, read in any pieces by any threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from quantpress.convert.checkpoint import DTYPES, LazyTensor
from quantpress.convert.lora.changes import Add, Dora, SetRows
from quantpress.convert.lora.deltas import LowRank, Stacked, Vector, rows_of
from quantpress.convert.lora.merged_tensor import MergedTensor
from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FACTORS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# As in test_lora_changes.py, without norms: (8 + 2) * 2^-24 * 2 for weights of size 2 at most.
FLOAT32_MERGE = 1e-6


class Stored:
    """A tensor that notes which rows were read."""

    def __init__(self, values, dtype):
        self.values = np.asarray(values).astype(DTYPES[dtype])
        self.dtype = dtype
        self.reads = []

    def lazy(self):
        return LazyTensor("w", self.values.shape, self.dtype, "base", self._rows)

    def _rows(self, start, stop):
        self.reads.append((start, stop))
        return self.values[start:stop].copy() if self.values.ndim else self.values.copy()


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank(shape, rank=4, scale=0.5, seed=1, dtype="F64"):
    a, b = random(rank, shape[1], seed=seed), random(shape[0], rank, seed=seed + 1)
    return LowRank(a.astype(DTYPES[dtype]) * 0.3, b.astype(DTYPES[dtype]) * 0.3, scale)


def half_a_step(exact, dtype):
    """The most that one rounding to a type may change, |exact| * 2^-bits, and below its normal numbers a constant."""
    bits = {"BF16": 8, "F16": 11, "F8_E4M3": 4, "F8_E5M2": 3, "F32": 24, "F64": 52}[dtype]
    smallest = {"F16": 2**-25, "F8_E4M3": 2**-10, "F8_E5M2": 2**-17, "F64": 2**-52}.get(dtype, 0)
    return np.maximum(np.abs(exact) * 2.0**-bits, smallest)


def read_in(tensor, cuts):
    parts = [tensor.read_rows(start, stop) for start, stop in pairwise(cuts)]
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("adapter", ["F32", "F16", "BF16"])
def test_the_merge_is_pefts_in_float32_and_pefts_or_nearer_to_the_formula_in_sixteen_bits(kind, dtype, adapter):
    torch.manual_seed(0)
    module = {
        "linear": lambda: torch.nn.Linear(24, 40),
        "conv1d": lambda: Conv1D(40, 24),
        "embedding": lambda: torch.nn.Embedding(50, 24),
    }[kind]().to(TORCH[dtype])
    base = module.weight.detach().double().numpy()
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], fan_in_fan_out=kind == "conv1d")
    model = get_peft_model(torch.nn.ModuleDict({"layer": module}), config)
    factors = []
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.data = (0.3 * torch.randn(value.shape)).to(TORCH[adapter])
            factors.append((name, value.detach().double().numpy().astype(FACTORS[adapter])))
    a, b = (next(value for name, value in factors if mark in name) for mark in ("_A", "_B"))
    product = 0.5 * (b.astype(np.float64) @ a.astype(np.float64))
    formula = base + (product if kind == "linear" else product.T)
    change = Add(LowRank(a, b, 0.5, transposed=kind != "linear"))
    ours = MergedTensor("w", Stored(base, dtype).lazy(), (change,)).lazy().read().astype(np.float64)
    theirs = model.merge_and_unload()["layer"].weight.detach().double().numpy()
    assert np.abs(theirs - base).max() > 0.05
    if dtype == "F32" and adapter == "F32":
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_MERGE)
    assert (np.abs(ours - formula) <= np.abs(theirs - formula)).all()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bytes_do_not_depend_on_the_pieces_that_are_read(data):
    shape = data.draw(st.sampled_from([(700, 300), (40, 5000), (3, 70, 40), (5, 600, 300), (900,)]))
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32", "F8_E4M3", "F64"]))
    rows = shape[0]
    base = Stored(random(*shape), dtype)
    if len(shape) == 1:
        delta = Vector(random(rows, seed=1), 0.5)
    elif len(shape) == 3:
        delta = Stacked([low_rank(shape[1:], seed=10 * number) for number in range(rows)])
    else:
        delta = low_rank(shape)
    tensor = MergedTensor("w", base.lazy(), (Add(delta),)).lazy()
    whole = tensor.read()
    wanted = base.values.astype(np.float64) + rows_of(delta, 0, rows)
    assert (np.abs(whole.astype(np.float64) - wanted) <= half_a_step(wanted, dtype)).all()
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    pieces = read_in(tensor, cuts)
    assert pieces.dtype == whole.dtype
    np.testing.assert_array_equal(pieces.view(np.uint8), whole.view(np.uint8))


def test_bytes_do_not_depend_on_the_number_of_readers():
    shape = (3000, 300)
    base = Stored(random(*shape), "BF16")
    tensor = MergedTensor("w", base.lazy(), (Add(low_rank(shape)), Dora(low_rank(shape, seed=5), random(3000)))).lazy()
    whole = tensor.read()
    starts = list(range(0, 3000, 37))
    found = {}

    def work(number):
        for start in starts[number::4]:
            found[start] = tensor.read_rows(start, min(start + 37, 3000))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(
        np.concatenate([found[start] for start in starts]).view(np.uint8), whole.view(np.uint8)
    )


def test_bits_before_rounding_do_not_depend_on_the_threads_that_blas_may_start():
    program = (
        "import hashlib, numpy as np\n"
        "from quantpress.convert.lora.product import Product, squares\n"
        "rng = np.random.default_rng(0)\n"
        "out = np.empty((700, 5000))\n"
        "Product(rng.standard_normal((700, 16)), rng.standard_normal((16, 5000))).lines(0, 700, out)\n"
        "print(hashlib.sha256(out.tobytes() + squares(out).tobytes()).hexdigest())\n"
    )
    digests = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 2 * hashlib.sha256().digest_size


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_wide_rows_are_float32_of_what_is_rounded_once_to_the_type(dtype):
    shape = (70, 50)
    base = Stored(random(*shape), dtype)
    delta = low_rank(shape)
    tensor = MergedTensor("w", base.lazy(), (Add(delta),)).lazy()
    exact = base.values.astype(np.float64) + rows_of(delta, 0, 70)
    assert tensor.wide_rows is not None
    np.testing.assert_array_equal(tensor.exact_rows(3, 60), exact[3:60].astype(np.float32))
    assert tensor.read().dtype == DTYPES[dtype]
    error = np.abs(tensor.read().astype(np.float64) - exact)
    assert (error <= half_a_step(exact, dtype)).all()


def test_types_of_float32_and_more_have_no_wider_rows_and_the_type_can_be_chosen():
    base = Stored(random(5, 4), "F32")
    for dtype in ("F32", "F64"):
        tensor = MergedTensor("w", base.lazy(), (), dtype).lazy()
        assert tensor.wide_rows is None
        assert (tensor.dtype, tensor.read().dtype) == (dtype, DTYPES[dtype])
        np.testing.assert_array_equal(tensor.read(), base.values)
    narrow = MergedTensor("w", base.lazy(), (), "BF16").lazy()
    np.testing.assert_array_equal(narrow.read(), base.values.astype(ml_dtypes.bfloat16))


def test_biases_and_scalars_can_be_changed():
    base = Stored(random(300), "BF16")
    values = random(300, seed=1)
    found = MergedTensor("w", base.lazy(), (Add(Vector(values, 2.0)),))
    wanted = (base.values.astype(np.float64) + 2 * values).astype(np.float32)
    np.testing.assert_array_equal(found.lazy().exact_rows(0, 300), wanted)
    scalar = MergedTensor("w", Stored(np.float32(3.0), "F32").lazy(), (Add(Vector(np.array(1.5), 2.0)),))
    assert scalar.lazy().read().shape == ()
    assert scalar.lazy().read() == 6.0
    assert scalar.delta_norms() == (1.0,)
    empty = MergedTensor("w", Stored(np.zeros((0, 4)), "F16").lazy(), (SetRows([], np.zeros((0, 4))),))
    assert empty.lazy().read().shape == (0, 4)
    assert empty.delta_norms() == (0.0,)


def test_norms_are_those_of_each_change_on_what_was_there_before_it():
    shape = (700, 300)
    base = Stored(random(*shape), "BF16")
    one, other = low_rank(shape), low_rank(shape, seed=7)
    rows = random(2, 300, seed=9)
    tensor = MergedTensor("w", base.lazy(), (Add(one), SetRows([5, 2], rows), Dora(other, np.ones(700))))
    first = base.values.astype(np.float64)
    second = first + rows_of(one, 0, 700)
    third = second.copy()
    third[[5, 2]] = rows
    scaled = first + rows_of(other, 0, 700)
    last = (third + rows_of(other, 0, 700)) / np.sqrt((scaled**2).sum(axis=1, keepdims=True))
    steps = (first, second, third, last)
    wanted = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairwise(steps)]
    np.testing.assert_allclose(tensor.delta_norms(), wanted, rtol=1e-12)


def test_norms_are_recorded_while_rows_are_read_and_only_the_rest_is_read_for_them():
    shape = (3000, 300)
    base = Stored(random(*shape), "BF16")
    tensor = MergedTensor("w", base.lazy(), (Add(low_rank(shape)),))
    wanted = MergedTensor("w", base.lazy(), (Add(low_rank(shape)),)).delta_norms()
    base.reads.clear()
    lazy = tensor.lazy()
    for start, stop in ((0, 1000), (500, 1200), (2000, 3000), (0, 100)):
        lazy.read_rows(start, stop)
    base.reads.clear()
    assert tensor.delta_norms() == wanted
    assert sum(stop - start for start, stop in base.reads) == 800
    base.reads.clear()
    assert tensor.delta_norms() == wanted
    lazy.read()
    assert tensor.delta_norms() == wanted
    assert sum(stop - start for start, stop in base.reads) == 3000


def test_a_change_of_nothing_is_0_and_of_zeros_to_something_is_infinite():
    zeros = Stored(np.zeros((4, 6)), "F32").lazy()
    still = LowRank(np.ones((1, 6)), np.zeros((4, 1)), 1.0)
    assert MergedTensor("w", zeros, (Add(still), Add(low_rank((4, 6))))).delta_norms() == (0.0, float("inf"))


def test_the_base_is_read_a_few_megabytes_at_a_time_and_factors_are_dropped_after_the_last_row():
    shape = (20_000, 300)
    base = Stored(np.zeros(shape), "BF16")
    a, b = Stored(random(2, 300), "F32"), Stored(random(20_000, 2), "F32")
    tensor = MergedTensor("w", base.lazy(), (Add(LowRank(a.lazy(), b.lazy(), 1.0)),)).lazy()
    assert not a.reads
    tensor.read()
    assert max(stop - start for start, stop in base.reads) * 300 <= 1 << 21
    assert sum(stop - start for start, stop in base.reads) == 20_000
    assert len(a.reads) == len(b.reads) == 1
    tensor.read_rows(0, 5)
    assert len(a.reads) == 2


def test_rows_of_a_stack_of_matrices_are_read_one_matrix_at_a_time():
    base = Stored(random(4, 1100, 1000), "BF16")
    delta = Stacked([low_rank((1100, 1000), seed=number) for number in range(4)])
    tensor = MergedTensor("w", base.lazy(), (Add(delta),)).lazy()
    found = tensor.read_rows(1, 3)
    assert base.reads == [(1, 2), (2, 3)]
    exact = base.values[1:3].astype(np.float64) + rows_of(delta, 1, 3)
    np.testing.assert_array_equal(tensor.exact_rows(1, 3), exact.astype(np.float32))
    assert found.shape == (2, 1100, 1000)


def test_nan_in_the_adapter_and_overflow_of_the_type_reach_the_writer():
    base = Stored(np.ones((4, 6)), "F16").lazy()
    broken = np.ones((4, 1))
    broken[2] = np.nan
    for factor, count in ((broken, 6), (np.full((4, 1), 1e6), 24), (np.full((4, 1), 1e308), 24)):
        tensor = MergedTensor("w", base, (Add(LowRank(np.full((1, 6), 1e2), factor, 1.0)),)).lazy()
        assert count_nonfinite(tensor.read()) == count


def test_what_cannot_be_merged_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match="int32"):
        MergedTensor("w", Stored(np.ones((4, 6)), "I32").lazy(), ())
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        MergedTensor("w", Stored(np.ones((4, 6)), "F32").lazy(), (Add(low_rank((6, 4))),))
    tensor = MergedTensor("w", Stored(np.ones((4, 6)), "F32").lazy(), ()).lazy()
    with pytest.raises(IndexError):
        tensor.read_rows(2, 5)


@pytest.mark.parametrize("shape", [(300, 700), (5, 3), (1, 4096), (700, 1)])
def test_compiled_merges_give_the_same_bytes_and_norms_in_any_pieces(shape) -> None:
    stored = Stored(random(*shape), "BF16")
    plain = MergedTensor("w", stored.lazy(), (Add(low_rank(shape)),))
    compiled = MergedTensor("w", stored.lazy(), (Add(low_rank(shape)),), compiled=True)
    exact = stored.values.astype(np.float64) + rows_of(low_rank(shape), 0, shape[0])
    whole = compiled.lazy().read()
    assert whole.tobytes() == plain.lazy().read().tobytes()
    assert (np.abs(whole.astype(np.float64) - exact) <= half_a_step(exact, "BF16")).all()
    assert (compiled.lazy().exact_rows(0, shape[0]) == exact.astype(np.float32)).all()
    cuts = sorted({0, shape[0], *(int(cut) for cut in np.random.default_rng(2).integers(0, shape[0] + 1, 4))})
    pieces = [compiled.lazy().read_rows(start, stop) for start, stop in pairwise(cuts)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    # sums of n float64 in another order
    assert np.allclose(compiled.delta_norms(), plain.delta_norms(), rtol=np.prod(shape) * 2.0**-53)


def test_what_numba_has_no_kernel_for_is_merged_as_before() -> None:
    shape = (40, 30)
    for dtype, changes in (("F16", (Add(low_rank(shape)),)), ("BF16", (Add(low_rank(shape)), Add(low_rank(shape, 2))))):
        stored = Stored(random(*shape), dtype)
        both = [MergedTensor("w", stored.lazy(), changes, compiled=flag).lazy().read() for flag in (True, False)]
        assert both[0].tobytes() == both[1].tobytes()
