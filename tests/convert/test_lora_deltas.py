"""What adapters add, against PEFT's own layers and against matrix products of the whole in float64."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.lora.deltas import (
    Hadamard,
    Kronecker,
    LowRank,
    Part,
    Stacked,
    Vector,
    expert_deltas,
    rows_of,
    svd_low_rank,
)
from quantpress.convert.lora.product import Product, squares, tile_lines

# PEFT's layers compute in float64 here, as do we: 16 terms of size 1 at most in another order, and a few factors.
FLOAT64_SUM = 1e-14


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def whole(delta):
    return rows_of(delta, 0, delta.shape[0])


def adapted(config, module):
    """One module, adapted by PEFT, with random values in all trained tensors, and these as float64."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.ModuleDict({"layer": module}), config)
    layer = model.base_model.model["layer"]
    found = {}
    for name, value in layer.named_parameters():
        if name.endswith((".default", ".default.weight")) and "ranknum" not in name:
            value.data = torch.randn_like(value) * 0.3
            found[name.split(".")[0]] = value.detach().double().numpy()
    return layer.double(), found


@given(st.integers(1, 200), st.integers(1, 90), st.integers(0, 20), st.booleans(), st.sampled_from([0.0, 2.0, -0.3]))
@settings(max_examples=60, deadline=None)
def test_low_rank_is_the_product_for_any_shape(lines, width, rank, transposed, scale):
    a, b = random(rank, width), random(lines, rank, seed=1)
    wanted = scale * (b @ a)
    # Sums of up to 20 terms in another order: 20 * 2^-53 of the magnitudes.
    delta = LowRank(a, b, scale, transposed)
    assert delta.shape == (wanted.T if transposed else wanted).shape
    np.testing.assert_allclose(whole(delta), wanted.T if transposed else wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [1, 3, 64, 896, 4864, 6200, 9001, 30_000])
@pytest.mark.parametrize("rank", [1, 2, 16, 300])
def test_wide_and_narrow_tensors_are_right_to_the_last_tile_and_panel(width, rank):
    lines = tile_lines(width) + 3
    left, right = random(lines, rank), random(rank, width, seed=1)
    out = np.full((lines, width), np.nan)
    Product(left, right).lines(0, lines, out)
    np.testing.assert_allclose(out, left @ right, rtol=0, atol=2e-12)  # 300 terms


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_lines_are_the_same_to_the_last_bit_whatever_they_are_asked_for_with(data):
    lines, width = data.draw(st.integers(1, 150)), data.draw(st.integers(300, 700))
    product = Product(random(lines, 5), random(5, width, seed=1))
    out = np.empty((lines, width))
    product.lines(0, lines, out)
    start = data.draw(st.integers(0, lines))
    stop = data.draw(st.integers(start, lines))
    part = np.full((stop - start, width), np.nan)
    product.lines(start, stop, part)
    np.testing.assert_array_equal(part, out[start:stop])


def test_squared_norms_of_lines_are_right_beyond_what_one_call_of_blas_takes():
    for width in (0, 1, 7, 8192, 8193, 20_001):
        values = random(5, width)
        np.testing.assert_allclose(squares(values), (values**2).sum(axis=1), rtol=1e-13, atol=0)


@given(st.integers(1, 120), st.integers(1, 900), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_squared_norms_of_a_product_are_known_without_it(lines, width, rank):
    left, right = random(lines, rank), random(rank, width, seed=1)
    found = Product(left, right).squares()
    np.testing.assert_allclose(found, ((left @ right) ** 2).sum(axis=1), rtol=1e-11, atol=1e-13)


def test_squared_norms_of_a_product_that_cancels_are_nearly_nothing_and_never_negative():
    right = np.repeat(random(1, 500), 4, axis=0)
    left = np.repeat(random(50, 1, seed=1), 4, axis=1) * [1, -1, 1, -1]
    found = Product(left, right).squares()
    assert (found >= 0).all()
    assert np.sqrt(found).max() < 2**-25 * np.linalg.norm(right) * np.abs(left).max() * 4


def test_squared_norms_of_a_product_are_left_to_the_caller_where_the_rank_is_high():
    assert Product(random(20, 600), random(600, 30, seed=1)).squares() is None
    delta = LowRank(random(600, 30, seed=1), random(20, 600), 0.5)
    assert delta.lines(0, 20, np.empty((20, 30))) is None


@pytest.mark.parametrize("conv", [False, True])
def test_low_rank_is_what_peft_adds_to_linear_and_conv1d(conv):
    module = Conv1D(40, 24) if conv else torch.nn.Linear(24, 40)
    layer, found = adapted(LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], fan_in_fan_out=conv), module)
    delta = LowRank(found["lora_A"], found["lora_B"], 4 / 8, transposed=conv)
    assert delta.shape == tuple(module.weight.shape)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)


def test_low_rank_transposed_is_what_peft_adds_to_an_embedding():
    layer, found = adapted(LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]), torch.nn.Embedding(50, 12))
    delta = LowRank(found["lora_embedding_A"], found["lora_embedding_B"], 2.0, transposed=True)
    assert delta.shape == (50, 12)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)


def test_svd_form_is_what_peft_adds_for_adalora():
    config = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=3, target_modules=["layer"], total_step=10)
    layer, found = adapted(config, torch.nn.Linear(24, 40))
    delta = svd_low_rank(found["lora_A"], found["lora_B"], found["lora_E"], 3.0, 6)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)
    turned = svd_low_rank(found["lora_A"], found["lora_B"], found["lora_E"], 3.0, 6, transposed=True)
    np.testing.assert_allclose(whole(turned).T, whole(delta), rtol=0, atol=1e-14)


def test_hadamard_is_what_peft_adds_for_loha():
    layer, found = adapted(LoHaConfig(r=4, alpha=2, target_modules=["layer"]), torch.nn.Linear(24, 40))
    delta = Hadamard(*(found[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")), 0.5)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 2])
def test_kronecker_is_what_peft_adds_for_lokr(both, factor):
    config = LoKrConfig(r=2, alpha=1, target_modules=["layer"], decompose_both=both, decompose_factor=factor)
    layer, found = adapted(config, torch.nn.Linear(96, 160))
    factors = [
        found.get(f"lokr_{name}", (found.get(f"lokr_{name}_a"), found.get(f"lokr_{name}_b"))) for name in ("w1", "w2")
    ]
    assert isinstance(factors[0], tuple) == (both and factor == -1)
    delta = Kronecker(*factors, 0.5)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)


@given(st.tuples(*[st.integers(1, 9)] * 4), st.booleans(), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_lines_of_a_kronecker_product_are_those_of_the_whole(sizes, first_is_product, second_is_product, data):
    w1, w2 = (random(sizes[0], 2), random(2, sizes[1], seed=1)), (random(sizes[2], 3), random(3, sizes[3], seed=2))
    wanted = 0.7 * np.kron(w1[0] @ w1[1], w2[0] @ w2[1])
    delta = Kronecker(w1 if first_is_product else w1[0] @ w1[1], w2 if second_is_product else w2[0] @ w2[1], 0.7)
    start = data.draw(st.integers(0, delta.shape[0]))
    stop = data.draw(st.integers(start, delta.shape[0]))
    np.testing.assert_allclose(rows_of(delta, start, stop), wanted[start:stop], rtol=0, atol=1e-13)


class Experts(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight_of_all = torch.nn.Parameter(torch.zeros(*shape))

    def forward(self, x):
        return x


@pytest.mark.parametrize("in_out", [False, True])
def test_stacked_experts_are_what_peft_adds_to_a_parameter_of_three_dimensions(in_out):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"experts": Experts(3, 20, 12)})
    if in_out:
        model["experts"].is_transposed = True
    config = LoraConfig(r=4, lora_alpha=2, target_modules=[], target_parameters=["experts.weight_of_all"])
    layer = get_peft_model(model, config).base_model.model["experts"].double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data = torch.randn_like(b)
    # PEFT takes the last dimension for the output unless the module says otherwise; the factors' shapes tell.
    transposed = a.shape[1] == 20
    delta = Stacked(expert_deltas(a.detach().numpy(), b.detach().numpy(), 0.5, 3, transposed))
    assert delta.shape == (3, 20, 12)
    np.testing.assert_allclose(whole(delta), layer.get_delta_weight("default").detach(), atol=FLOAT64_SUM)
    np.testing.assert_array_equal(rows_of(delta, 1, 2), whole(delta)[1:2])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_parts_of_a_delta_are_its_slices_along_any_axis(data):
    stacked = Stacked([LowRank(random(2, 11, seed=e), random(13, 2, seed=9 + e), 1.0) for e in range(4)])
    flat = LowRank(random(2, 11), random(13, 2, seed=1), 1.0)
    for delta in (stacked, flat):
        axis = data.draw(st.integers(0, len(delta.shape) - 1))
        start = data.draw(st.integers(0, delta.shape[axis] - 1))
        stop = data.draw(st.integers(start + 1, delta.shape[axis]))
        wanted = np.take(whole(delta), range(start, stop), axis)
        part = Part(delta, start, stop, axis)
        assert part.shape == wanted.shape
        np.testing.assert_array_equal(whole(part), wanted)
        first = data.draw(st.integers(0, part.shape[0]))
        np.testing.assert_array_equal(rows_of(part, first, part.shape[0]), wanted[first:])


def test_a_vector_is_scaled_and_can_be_cut():
    values = random(30).astype(np.float32)
    np.testing.assert_array_equal(whole(Vector(values, 0.5)), values.astype(np.float64) * 0.5)
    np.testing.assert_array_equal(rows_of(Part(Vector(values, 2.0), 3, 20), 1, 5), values[4:8].astype(np.float64) * 2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_factors_of_any_float_type_are_exact(dtype):
    a, b = random(3, 10).astype(dtype), random(8, 3, seed=1).astype(dtype)
    wanted = b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(whole(LowRank(a, b, 1.0)), wanted, rtol=0, atol=1e-14)


class Counted:
    """A tensor that counts how often it is read."""

    def __init__(self, values):
        self.count = 0
        self.values = values

    def lazy(self):
        return LazyTensor("t", self.values.shape, "F64", "f", self._rows)

    def _rows(self, start, stop):
        self.count += 1
        return self.values[start:stop]


def test_factors_are_read_once_by_all_threads_and_again_after_a_release():
    a, b = Counted(random(3, 50)), Counted(random(400, 3, seed=1))
    delta = LowRank(a.lazy(), b.lazy(), 1.0)
    assert a.count == 0
    found = []
    threads = [threading.Thread(target=lambda: found.append(whole(delta))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (a.count, b.count, len(found)) == (1, 1, 4)
    delta.release()
    np.testing.assert_array_equal(whole(delta), found[0])
    assert (a.count, b.count) == (2, 2)


def test_factors_that_experts_share_are_kept_until_the_last_is_done():
    a, b = Counted(random(6, 5)), Counted(random(7, 6, seed=1))
    deltas = expert_deltas(a.lazy(), b.lazy(), 1.0, 3)
    for delta in deltas:
        whole(delta)
        delta.release()
    assert (a.count, b.count) == (1, 1)
    whole(deltas[0])
    assert (a.count, b.count) == (2, 2)
