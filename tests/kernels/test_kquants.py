"""The search for K-quants: reference and interpreted kernels against libggml, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.kquants import quantize as kquants
from quantpress.kernels.kquants.reference import reference_quantize
from quantpress.kernels.kquants.types import KQUANTS
from quantpress.quant.ggml.codec import dequantize
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type
from tests.kernels.kquants_cases import COLUMNS, NAMES, everything, importance, weights
from tests.quant.conftest import LibGGML, libggml  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def interpreted(values, name, important=None, block=4096, **options):
    """What the kernels give; on all sub-blocks at once, because an interpreted step costs the same for any number."""
    out = torch.full((len(values), values.shape[1] // 256 * KQUANTS[name].block_bytes), 0xAA, dtype=torch.uint8)
    given = None if important is None else torch.from_numpy(important)
    with np.errstate(all="ignore"):  # as a GPU, which does not warn
        found = kquants.quantize(torch.as_tensor(values), name, given, out=out, block=block, **options)
    assert found is out
    return found.numpy()


def assert_same_blocks(name, found, wanted):
    width = KQUANTS[name].block_bytes
    bad = np.flatnonzero((found.reshape(-1, width) != wanted.reshape(-1, width)).any(axis=1))
    assert not bad.size, f"{name}: {bad.size} of {wanted.size // width} blocks differ, first {bad[:5]}"


@pytest.mark.parametrize("important", [None, "smooth", "gaps"])
@pytest.mark.parametrize("name", NAMES)
def test_the_references_blocks_are_libggmls(name, important, libggml: LibGGML):  # noqa: F811
    values, weight = everything(32), importance(important)
    wanted = libggml.quantize(ggml_type(name), values, weight)
    assert_same_blocks(name, reference_quantize(values, name, weight), wanted)


@pytest.mark.parametrize("important", [None, "gaps"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_blocks_are_libggmls(name, important, libggml: LibGGML):  # noqa: F811
    # small weights, whose steps are 0 in float16, show every code that the search ends with, also after near ties
    values = np.concatenate([everything(4), weights("small", 60)])
    wanted = libggml.quantize(ggml_type(name), values, importance(important))
    assert_same_blocks(name, interpreted(values, name, importance(important)), wanted)


def test_trained_weights_get_libggmls_blocks(shared, libggml: LibGGML):  # noqa: F811
    from safetensors.numpy import load_file

    tensors = load_file(next((shared / "models" / "mix6m-hf").glob("*.safetensors")))
    matrix = next(value for key, value in sorted(tensors.items()) if key.endswith("down_proj.weight"))
    values = np.ascontiguousarray(matrix[:64], np.float32)
    weight = importance("smooth", values.shape[1])
    for name in NAMES:
        for given in (None, weight):
            wanted = libggml.quantize(ggml_type(name), values, given)
            assert_same_blocks(name, reference_quantize(values, name, given), wanted)
    wanted = libggml.quantize(ggml_type("Q4_K"), values[:8], None)
    assert_same_blocks("Q4_K", interpreted(values[:8], "Q4_K"), wanted)


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K"])
def test_any_number_of_blocks_and_any_tile_give_the_same_bytes(name, monkeypatch):
    # 9 super-blocks: 144 sub-blocks and 288 places, more than a multiple of a tile
    values = weights("mixed", 3, 768)
    wanted = reference_quantize(values, name)
    for block in (64, 256):
        assert_same_blocks(name, interpreted(values, name, block=block), wanted)
    monkeypatch.setattr(kquants, "_SUB_BLOCKS", 2 * 768 // KQUANTS[name].size)  # two rows, then one
    assert_same_blocks(name, interpreted(values, name), wanted)
    np.testing.assert_array_equal(interpreted(values[:1, :256].copy(), name), wanted[:1, : KQUANTS[name].block_bytes])


def test_weights_of_16_bits_are_those_of_32():
    values = weights("normal", 4).astype(np.float16)
    wanted = reference_quantize(values.astype(np.float32), "Q6_K", importance("smooth"))
    assert_same_blocks("Q6_K", interpreted(values, "Q6_K", importance("smooth")), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_that_it_weighs(name):
    values, weight = weights("normal", 64), importance("smooth")
    errors = []
    for given in (None, weight):
        read = dequantize(name, reference_quantize(values, name, given), COLUMNS)
        errors.append((weight * (read.astype(np.float64) - values) ** 2).sum())
    assert errors[1] < errors[0]


def test_no_rows_give_no_bytes():
    assert interpreted(np.zeros((0, 256), np.float32), "Q4_K").shape == (0, 144)
    assert kquants.quantize(torch.zeros(3, 0), "Q4_K").shape == (3, 0)


def test_types_and_block_sizes_are_those_of_the_table():
    for name, kind in KQUANTS.items():
        assert (kind.block_bytes, 256) == (GGML_TYPES[name].block_bytes, GGML_TYPES[name].block_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Q8_K"}, "Q8_K is not searched here: wanted one of Q2_K"),
        ({"values": torch.zeros(2, 128)}, r"values are \(2, 128\) torch.float32: wanted \(N, multiple of 256\)"),
        ({"values": torch.zeros(2, 256, dtype=torch.float64)}, "torch.float64"),
        ({"values": torch.zeros(256, 2).t()}, "values must be contiguous"),
        ({"importance": torch.zeros(128)}, r"importance is \(128,\) torch.float32: wanted \(256,\) float32"),
        ({"importance": torch.zeros(256, dtype=torch.float16)}, "torch.float16"),
        ({"out": torch.zeros(2, 144, dtype=torch.int8)}, r"out is \(2, 144\) torch.int8: wanted \(2, 144\) uint8"),
        ({"out": torch.zeros(2, 110, dtype=torch.uint8)}, r"wanted \(2, 144\) uint8"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"values": torch.zeros(2, 256), "name": "Q4_K", **change}
    with pytest.raises(ValueError, match=message):
        kquants.quantize(given.pop("values"), given.pop("name"), given.pop("importance", None), **given)


def test_compiled_kernels_stay_in_registers_and_load_four_weights_at_a_time():
    script, cases = (Path(__file__).with_name(name) for name in ("compiling.py", "compile_kquants.py"))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(script), str(cases)], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    for row in json.loads(ran.stdout):
        assert row["stack"] == 0, row
        # multiply-adds are fused in quotients and roots only, whose sequences have up to five
        found = row["instructions"]
        roots = sum(number for name, number in found.items() if name.startswith("MUFU"))
        assert found["FFMA"] <= 5 * roots + 8, row
        assert row["registers"] <= 168, row  # three programs of 128 threads for each multiprocessor
        if row["name"].startswith("search"):
            assert row["shared"] == 0, row
            assert row["registers"] <= 128, row  # four
            assert row["instructions"]["LDG.E.128"] >= 4, row
