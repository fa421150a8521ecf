"""DoRA, trained tokens and trained biases against PEFT's merge, in float32 and against the formula in float64."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.lora.changes import Add, Dora, SetRows
from quantpress.convert.lora.deltas import LowRank, Vector
from quantpress.convert.lora.merged_tensor import MergedTensor

# PEFT merges float32 in float32: a weight of size 2 at most, a delta of 8 terms of size 1 at most, a norm of 24 terms
# and three roundings after it: (8 + 24 / 2 + 5) * 2^-24 * 2 < 4e-6.
FLOAT32_MERGE = 4e-6
NAMES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def stored(values, dtype="F32"):
    values = np.asarray(values).astype(NAMES[dtype])
    return LazyTensor("w", values.shape, dtype, "base", lambda start, stop: values[start:stop].copy())


def merged(base, *changes, dtype="F32"):
    tensor = MergedTensor("w", stored(base, dtype), changes).lazy()
    return tensor.read().astype(np.float64)


def trained(module, **options):
    """PEFT's layer around a module, every trained tensor random and magnitudes near the norms."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], **options)
    # Without the cast PEFT keeps adapters of 16-bit bases in 16 bits, as trainers do that save memory.
    model = get_peft_model(torch.nn.ModuleDict({"layer": module}), config, autocast_adapter_dtype=False)
    layer = model.base_model.model["layer"]
    found = {}
    for name, value in layer.named_parameters():
        if value.requires_grad:
            noise = torch.randn_like(value)
            value.data = value.data * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise
            part = name.split(".")[0] + (".bias" if name.endswith("bias") else "")
            found[part] = value.detach().double().numpy()
    return model, layer, found


def norm(values, axis):
    return np.sqrt((values**2).sum(axis=axis, keepdims=True))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_dora_is_what_peft_merges(kind):
    modules = {
        "linear": lambda: torch.nn.Linear(24, 40),
        "conv1d": lambda: Conv1D(40, 24),
        "embedding": lambda: torch.nn.Embedding(50, 24),
    }
    module = modules[kind]()
    base = module.weight.detach().double().numpy()
    model, _, found = trained(module, use_dora=True, fan_in_fan_out=kind == "conv1d")
    a, b = (found.get(f"lora_{name}", found.get(f"lora_embedding_{name}")) for name in "AB")
    columns = kind != "linear"
    delta = LowRank(a, b, 0.5, transposed=columns)
    ours = merged(base, Dora(delta, found["lora_magnitude_vector"], columns))
    theirs = model.merge_and_unload()["layer"].weight.detach().numpy()
    assert np.abs(theirs - base).max() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_MERGE)
    changed = base + 0.5 * ((b @ a).T if columns else b @ a)
    magnitude = found["lora_magnitude_vector"].reshape((1, -1) if columns else (-1, 1))
    formula = magnitude / norm(changed, 0 if columns else 1) * changed
    np.testing.assert_array_equal(ours, formula.astype(np.float32))


@pytest.mark.parametrize("columns", [False, True])
def test_the_second_dora_takes_its_norm_on_the_weight_before_any_adapter_as_peft_does(columns):
    module = Conv1D(40, 24) if columns else torch.nn.Linear(24, 40)
    base = module.weight.detach().double().numpy()
    options = {"r": 8, "lora_alpha": 4, "target_modules": ["layer"], "use_dora": True, "fan_in_fan_out": columns}
    model = get_peft_model(torch.nn.ModuleDict({"layer": module}), LoraConfig(**options))
    model.add_adapter("other", LoraConfig(**options))
    layer = model.base_model.model["layer"]
    changes = []
    for name in ("default", "other"):
        for factors in (layer.lora_A, layer.lora_B):
            factors[name].weight.data = torch.randn_like(factors[name].weight) * 0.3
        magnitude = layer.lora_magnitude_vector[name].weight.data
        magnitude *= 1 + 0.1 * torch.randn_like(magnitude)
        a, b = (factors[name].weight.detach().numpy() for factors in (layer.lora_A, layer.lora_B))
        changes.append(Dora(LowRank(a, b, 0.5, columns), magnitude.numpy().copy(), columns))
    model.base_model.set_adapter(["default", "other"])
    theirs = model.merge_and_unload(adapter_names=["default", "other"])["layer"].weight.detach().numpy()
    np.testing.assert_allclose(merged(base, *changes), theirs, rtol=0, atol=2 * FLOAT32_MERGE)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_dora_in_sixteen_bits_is_nearer_to_the_formula_than_peft_or_the_same(dtype):
    module = torch.nn.Linear(24, 40).to(torch.bfloat16 if dtype == "BF16" else torch.float16)
    base = module.weight.detach().double().numpy()
    model, _, found = trained(module, use_dora=True)
    delta = LowRank(found["lora_A"], found["lora_B"], 0.5)
    ours = merged(base, Dora(delta, found["lora_magnitude_vector"]), dtype=dtype)
    changed = base + 0.5 * found["lora_B"] @ found["lora_A"]
    formula = found["lora_magnitude_vector"].reshape(-1, 1) / norm(changed, 1) * changed
    theirs = model.merge_and_unload()["layer"].weight.detach().double().numpy()
    assert (np.abs(ours - formula) <= np.abs(theirs - formula)).all()
    assert (ours != theirs).any()


@pytest.mark.parametrize("columns", [False, True])
def test_an_output_without_weights_becomes_nan_as_in_peft(columns):
    base = np.ones((6, 5))
    base[(slice(None), 2) if columns else 2] = 0
    delta = LowRank(np.zeros((2, 5)), np.zeros((6, 2)), 1.0)
    found = merged(base, Dora(delta, np.zeros(5 if columns else 6), columns))
    nan = np.isnan(found)
    assert nan.sum() == (6 if columns else 5)
    assert nan[(slice(None), 2) if columns else 2].all()


def test_norms_of_columns_are_taken_in_one_pass_by_whichever_thread_comes_first():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((70_000, 4)).astype(np.float32)
    rows_read = []

    def read_rows(start, stop):
        rows_read.append(stop - start)
        return values[start:stop].copy()

    base = LazyTensor("w", values.shape, "F32", "base", read_rows)
    a, b = rng.standard_normal((2, 70_000)), rng.standard_normal((4, 2))
    magnitude = rng.standard_normal(4)
    tensor = MergedTensor("w", base, (Dora(LowRank(a, b, 1.0, transposed=True), magnitude, columns=True),)).lazy()
    found = {}
    cuts = [0, 20_000, 35_001, 52_000, 70_000]

    def read(number):
        found[number] = tensor.read_rows(cuts[number], cuts[number + 1])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(rows_read) == 2 * 70_000
    changed = values.astype(np.float64) + (b @ a).T
    # Sums of 70,000 squares in another order differ in the last bits of float64, and so may one rounding in 2^29.
    wanted = magnitude / norm(changed, 0) * changed
    np.testing.assert_allclose(np.concatenate([found[number] for number in range(4)]), wanted, rtol=1e-7)


def test_rows_are_overwritten_whatever_the_order_of_their_ids():
    rng = np.random.default_rng(0)
    base, rows = rng.standard_normal((3000, 64)), rng.standard_normal((5, 64)).astype(np.float32)
    ids = [2999, 0, 1500, 7, 2048]
    wanted = base.astype(np.float32)
    wanted[ids] = rows
    np.testing.assert_array_equal(merged(base, SetRows(ids, rows)), wanted)
    np.testing.assert_array_equal(merged(base, SetRows([], rows[:0])), base.astype(np.float32))


def test_trained_tokens_are_what_peft_merges():
    module = torch.nn.Embedding(50, 24)
    base = module.weight.detach().numpy().copy()
    config = TrainableTokensConfig(target_modules=["layer"], token_indices=[9, 3, 41])
    model = get_peft_model(torch.nn.ModuleDict({"layer": module}), config)
    (rows,) = (value for value in model.parameters() if value.requires_grad)
    rows.data += 1.5
    values = rows.detach().numpy().copy()
    theirs = model.merge_and_unload()["layer"].weight.detach().numpy()
    np.testing.assert_array_equal(merged(base, SetRows([9, 3, 41], values)), theirs)
    assert (theirs != base).any(axis=1).nonzero()[0].tolist() == [3, 9, 41]


def test_a_trained_bias_is_what_peft_merges():
    module = torch.nn.Linear(24, 40)
    base = module.bias.detach().numpy().copy()
    model, _, found = trained(module, lora_bias=True)
    theirs = model.merge_and_unload()["layer"].bias.detach().numpy()
    ours = merged(base, Add(Vector(found["lora_B.bias"], 0.5)))
    np.testing.assert_array_equal(ours, (base + 0.5 * found["lora_B.bias"]).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_MERGE)


def test_changes_are_applied_in_their_order_without_rounding_between():
    base = np.full((2, 3), 1.0)
    tiny = LowRank(np.full((1, 3), 1e-12), np.ones((2, 1)), 1.0)
    back = LowRank(np.full((1, 3), -1.0), np.ones((2, 1)), 1.0)
    np.testing.assert_allclose(merged(base, Add(tiny), Add(back), dtype="BF16"), np.full((2, 3), 1e-12), rtol=2**-8)
    rows = np.full((1, 3), 5.0)
    after = merged(base, SetRows([1], rows), Add(back))
    np.testing.assert_array_equal(after, [[0, 0, 0], [4, 4, 4]])
    np.testing.assert_array_equal(merged(base, Add(back), SetRows([1], rows)), [[0, 0, 0], [5, 5, 5]])
