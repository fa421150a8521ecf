"""The block types beside the K-quants: interpreted kernels against libggml, byte for byte."""

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

from quantpress.kernels.ggml import quantize as blocks
from quantpress.kernels.ggml.quantize import TYPES
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type
from tests.kernels.kquants_cases import KINDS, everything, importance, weights
from tests.quant.conftest import LibGGML, libggml  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
DIRECT = ["TQ1_0", "TQ2_0", "MXFP4"]
LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def interpreted(values, name, important=None, block=1024, **options):
    """What the kernels give; on all blocks at once, because an interpreted step costs the same for any number."""
    kind = TYPES[name]
    out = torch.full((len(values), values.shape[1] // kind.size * kind.block_bytes), 0xAA, dtype=torch.uint8)
    given = None if important is None else torch.from_numpy(important)
    with np.errstate(all="ignore"):  # as a GPU, which does not warn
        found = blocks.quantize(torch.as_tensor(values), name, given, out=out, block=block, **options)
    assert found is out
    return found.numpy()


def assert_same_blocks(name, found, wanted):
    width = TYPES[name].block_bytes
    bad = np.flatnonzero((found.reshape(-1, width) != wanted.reshape(-1, width)).any(axis=1))
    assert not bad.size, f"{name}: {bad.size} of {wanted.size // width} blocks differ, first {bad[:5]}"


@pytest.mark.parametrize(
    ("name", "important"),
    [
        *[(name, "gaps") for name in LEGACY], ("Q4_1", "smooth"), ("IQ4_NL", None), ("IQ4_NL", "gaps"),
        ("IQ4_XS", None), ("IQ4_XS", "gaps"),
    ],
)  # fmt: skip
def test_searched_blocks_are_libggmls(name, important, libggml: LibGGML):  # noqa: F811
    values = np.concatenate([everything(2), weights("small", 8)])
    wanted = libggml.quantize(ggml_type(name), values, importance(important))
    assert_same_blocks(name, interpreted(values, name, importance(important)), wanted)


@pytest.mark.parametrize("name", DIRECT)
def test_blocks_without_a_search_are_libggmls_with_importance_or_without(name, libggml: LibGGML):  # noqa: F811
    values = everything(16)
    wanted = libggml.quantize(ggml_type(name), values)
    for given in (None, importance("smooth")):
        assert_same_blocks(name, interpreted(values, name, given), wanted)


def test_exponents_are_those_of_log2f_beside_every_power_of_two(libggml: LibGGML):  # noqa: F811
    # 60 floats below each power and 3 from it on, subnormal ones among them: a row for each
    powers = np.ldexp(1.0, np.arange(-148, 128)).astype(np.float32)
    steps = np.arange(-60, 4)
    greatest = (powers.view(np.int32)[:, None] + steps).reshape(-1)
    greatest = greatest[(greatest > 0) & (greatest < 0x7F800000)].astype(np.int32).view(np.float32)
    values = np.zeros((len(greatest), 32), np.float32)
    values[:, 3], values[:, 17] = -greatest, greatest / 3
    wanted = libggml.quantize(ggml_type("MXFP4"), values)
    assert_same_blocks("MXFP4", interpreted(values, "MXFP4", block=4096), wanted)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_digits_are_rounded_as_lroundf_does_beside_every_half(name, libggml: LibGGML):  # noqa: F811
    halves = np.nextafter(np.float32(0.5), np.float32([0, 1])).tolist()
    values = np.tile(np.float32([1, 0.5, -0.5, *halves, -halves[0], -halves[1], 0]), (3, 32))
    values *= np.float32([[1], [3e-39], [0.7]])  # the second row's inverse is infinite
    wanted = libggml.quantize(ggml_type(name), values)
    assert_same_blocks(name, interpreted(values, name), wanted)


def test_the_sign_of_a_minimum_that_is_zero_is_libggmls(libggml: LibGGML):  # noqa: F811
    values = np.abs(weights("normal", 4, 64))
    values[0, :2], values[1, :2], values[2, 5:7], values[3, 5:7] = [0.0, -0.0], [-0.0, 0.0], [0.0, -0.0], [-0.0, 0.0]
    weight = np.ones(64, np.float32)
    wanted = libggml.quantize(ggml_type("Q4_1"), values, weight)
    assert_same_blocks("Q4_1", interpreted(values, "Q4_1", weight, block=32), wanted)


@pytest.mark.parametrize(("name", "columns"), [("Q5_0", 96), *((name, 768) for name in DIRECT)])
def test_any_number_of_blocks_and_any_tile_give_the_same_bytes(name, columns, monkeypatch, libggml: LibGGML):  # noqa: F811
    values, weight = weights("normal", 11, columns), importance("smooth", columns)
    wanted = libggml.quantize(ggml_type(name), values, weight)
    assert_same_blocks(name, interpreted(values, name, weight, block=32), wanted)  # 33 blocks: more than one tile
    monkeypatch.setattr(blocks, "_BLOCKS", 8 * columns // 32)  # eight rows at a time, then three
    assert_same_blocks(name, interpreted(values, name, weight), wanted)


@pytest.mark.parametrize("name", ["Q5_0", "TQ2_0", "MXFP4"])
def test_weights_of_16_bits_are_those_of_32(name):
    values = weights("normal", 4).astype(np.float16)
    wanted = interpreted(values.astype(np.float32), name, importance("smooth"))
    assert_same_blocks(name, interpreted(values, name, importance("smooth")), wanted)


def test_no_rows_give_no_bytes():
    assert interpreted(np.zeros((0, 256), np.float32), "IQ4_XS").shape == (0, 136)
    assert blocks.quantize(torch.zeros(3, 0), "MXFP4").shape == (3, 0)


def test_types_and_block_sizes_are_those_of_the_table():
    for name, kind in TYPES.items():
        assert (kind.block_bytes, kind.size) == (GGML_TYPES[name].block_bytes, GGML_TYPES[name].block_size)
    assert len(KINDS) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Q4_K"}, "Q4_K is not found here: wanted one of Q4_0"),
        ({"name": "Q4_0"}, "Q4_0 is searched with an importance only"),
        ({"values": torch.zeros(2, 48)}, r"values are \(2, 48\) torch.float32: wanted \(N, multiple of 32\)"),
        ({"values": torch.zeros(2, 256, dtype=torch.float64)}, "torch.float64"),
        ({"values": torch.zeros(256, 2).t()}, "values must be contiguous"),
        ({"importance": torch.zeros(128)}, r"importance is \(128,\) torch.float32: wanted \(256,\) float32"),
        ({"out": torch.zeros(2, 18, dtype=torch.uint8)}, r"wanted \(2, 144\) uint8"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"values": torch.zeros(2, 256), "name": "IQ4_NL", **change}
    with pytest.raises(ValueError, match=message):
        blocks.quantize(given.pop("values"), given.pop("name"), given.pop("importance", None), **given)


def test_compiled_kernels_stay_in_registers_and_do_not_fuse():
    script, cases = (Path(__file__).with_name(name) for name in ("compiling.py", "compile_ggml.py"))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(script), str(cases)], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    for row in json.loads(ran.stdout):
        assert row["stack"] == 0, row
        # multiply-adds are fused in quotients and roots only, whose sequences have up to five
        found = row["instructions"]
        roots = sum(number for name, number in found.items() if name.startswith("MUFU"))
        assert found.get("FFMA", 0) <= 5 * roots + 8, row
        assert row["registers"] <= 128, row  # four programs of 128 threads for each multiprocessor
        if row["name"].startswith("search"):
            assert row["shared"] == 0, row
