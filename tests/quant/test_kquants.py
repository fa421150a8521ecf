"""K-quants on the processor against libggml, byte for byte; lanes, chunks and threads must not show."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml import kquants
from quantpress.quant.ggml.codec import dequantize, quantize_rows
from quantpress.quant.ggml.types import ggml_type
from tests.kernels.kquants_cases import KINDS, NAMES, importance, weights

ROOT = Path(__file__).resolve().parents[2]
SEARCH = {
    "Q2_K": kquants.search_q2_k,
    "Q3_K": kquants.search_q3_k,
    "Q4_K": kquants.search_q4_k,
    "Q5_K": kquants.search_q5_k,
    "Q6_K": kquants.search_q6_k,
}


def blocks_of(name, rows, weight=None):
    """Bytes of the blocks and how many could not be stored."""
    blocks = np.ascontiguousarray(rows).reshape(-1, 256)
    out = np.full((len(blocks), ggml_type(name).block_bytes), 0xAA, np.uint8)
    given = None if weight is None else weight.reshape(-1, 256)
    return out, SEARCH[name](blocks, given, 0, out)


def assert_same_blocks(name, found, wanted):
    width = ggml_type(name).block_bytes
    bad = np.flatnonzero((found.reshape(-1, width) != wanted.reshape(-1, width)).any(axis=1))
    assert not bad.size, f"{name}: {bad.size} of {wanted.size // width} blocks differ, first {bad[:5]}"


def stored_steps(name, blocks):
    """The float16 numbers of blocks: (B, 1 or 2)."""
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    return np.stack([np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0] for at in places], axis=1)


@pytest.mark.parametrize("important", [None, "smooth", "gaps", "one", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_libggmls(name, important, libggml):
    columns = 768
    weight = importance(important if important in ("smooth", "gaps") else None, columns)
    if important in ("one", "zero"):
        weight = np.zeros(columns, np.float32)
        weight[300] = 1 if important == "one" else 0
    for kind in KINDS:
        rows = weights(kind, 27, columns)  # 81 blocks: five times sixteen, and one
        wanted = libggml.quantize(ggml_type(name), rows, weight).reshape(81, -1)
        found, wild = blocks_of(name, rows, weight)
        if kind == "overflowing":
            assert wild == 81, "1e30 is beyond every type, also where libggml stores zeros"
            continue
        held = np.isfinite(stored_steps(name, wanted)).all(axis=1)
        assert wild == (~held).sum(), kind
        assert_same_blocks(f"{name} {kind}".split()[0], found[held], wanted[held])


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_get_libggmls_blocks(name, shared, libggml):
    from safetensors.numpy import load_file

    tensors = load_file(next((shared / "models" / "mix6m-hf").glob("*.safetensors")))
    rng = np.random.default_rng(0)
    for key in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        rows = np.ascontiguousarray(tensors[key][:96], np.float32)
        for weight in (None, rng.random(rows.shape[1], np.float32)):
            wanted = libggml.quantize(ggml_type(name), rows, weight)
            assert_same_blocks(name, quantize_rows(name, rows, weight), wanted)


FLOATS = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-120), 2.0**-120, width=32),
    st.floats(-60000, 60000, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1.1754944e-38, 1e-15, 9.9e-16, 2.0**-14]),
)
FEW = st.lists(FLOATS, min_size=1, max_size=4)
BLOCKS = st.one_of(
    st.lists(FLOATS, min_size=32, max_size=32),
    FEW.flatmap(lambda few: st.lists(st.sampled_from([*few, *(-number for number in few)]), min_size=32, max_size=32)),
)
COSTS = st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 1.0, 7.0, 1e6]), min_size=32, max_size=32)


@pytest.mark.parametrize("name", NAMES)
def test_any_block_is_libggmls(name, libggml):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(BLOCKS, st.one_of(st.none(), COSTS), st.integers(0, 2**16))
    def check(numbers, costs, seed):
        # 32 numbers in any order eight times make a block; each sub-block differs
        rng = np.random.default_rng(seed)
        row = np.concatenate([rng.permutation(np.array(numbers, np.float32)) for _ in range(8)])[None]
        weight = None if costs is None else np.tile(np.array(costs, np.float32), 8)
        wanted = libggml.quantize(ggml_type(name), row, weight)
        found, wild = blocks_of(name, row, weight)
        if wild or not np.isfinite(stored_steps(name, wanted)).all():
            assert wild == 1
            return
        assert_same_blocks(name, found, wanted)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_neither_company_nor_place_nor_thread_changes_a_block(name):
    rows, weight = weights("heavy-tailed", 40, 1280), importance("smooth", 1280)
    for cost in (None, weight):
        together = quantize_rows(name, rows, cost)
        for start, end in ((0, 1), (3, 4), (5, 22), (7, 40)):
            np.testing.assert_array_equal(quantize_rows(name, rows[start:end], cost), together[start:end])
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(partial(quantize_rows, name, importance=cost), rows))
        np.testing.assert_array_equal(np.stack(parts), together)


def test_importance_follows_the_blocks_of_a_row_from_any_first_block():
    rows, weight = weights("normal", 3, 768), importance("smooth", 768)
    wanted = quantize_rows("Q4_K", rows, weight).reshape(9, -1)
    out = np.zeros((7, 144), np.uint8)
    assert kquants.search_q4_k(rows.reshape(9, 256)[2:].copy(), weight.reshape(3, 256), 2, out) == 0
    np.testing.assert_array_equal(out, wanted[2:])


def test_rows_longer_than_a_chunk_are_one_row(libggml):
    rows, weight = weights("normal", 2, 256 * 300), importance("smooth", 256 * 300)  # chunks have 256 blocks
    wanted = libggml.quantize(ggml_type("Q6_K"), rows, weight)
    assert_same_blocks("Q6_K", quantize_rows("Q6_K", rows, weight), wanted)


def test_read_only_and_unaligned_weights_are_taken_and_kept():
    rows, weight = weights("normal", 4, 256), importance("smooth", 256)
    unaligned = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(rows.shape)
    given = np.frombuffer(b"\0" + weight.tobytes(), np.uint8)[1:].view(np.float32)
    wanted, before = quantize_rows("Q5_K", rows, weight), unaligned.tobytes()
    np.testing.assert_array_equal(quantize_rows("Q5_K", unaligned, given), wanted)
    assert unaligned.tobytes() == before


@pytest.mark.parametrize("important", [None, "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_what_no_block_can_hold_is_counted_and_refused(name, important):
    rows, weight = weights("normal", 5, 512), importance(important, 512)
    rows[1, 300], rows[4, 0] = 1e30, -1e30
    with pytest.raises(LayoutError, match=f"{name} keeps scales as float16, and 2 of 10 blocks"):
        quantize_rows(name, rows, weight)
    for wild in (np.nan, np.inf, -np.inf):
        rows[1, 300] = wild
        with pytest.raises(LayoutError, match="2 of 10 blocks"):
            quantize_rows(name, rows, weight)


@pytest.mark.parametrize(
    ("name", "greatest"), [("Q2_K", 15 * 3), ("Q3_K", 32 * 4), ("Q4_K", 63 * 15), ("Q5_K", 63 * 31), ("Q6_K", 128 * 32)]
)
def test_the_largest_step_of_float16_is_the_limit(name, greatest):
    # one weight: its sub-block's scale is the greatest, and the weight has the greatest code
    rows = np.zeros((1, 256), np.float32)
    rows[0, 40] = np.float32(65520 * greatest) * np.float32(1.001)
    assert blocks_of(name, rows)[1] == 1
    rows[0, 40] = np.float32(60000 * greatest)  # libggml's first code may be one below the greatest: 15/14 more
    blocks, wild = blocks_of(name, rows)
    assert wild == 0
    read = dequantize(name, blocks, 256)[0]
    # the step is rounded to 11 bits, by half a place at most
    assert read[40] == pytest.approx(rows[0, 40], rel=2.0**-11)
    assert np.count_nonzero(read) == 1


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_that_it_weighs(name):
    rows, weight = weights("normal", 64), importance("smooth")
    errors = []
    for cost in (None, weight):
        read = dequantize(name, quantize_rows(name, rows, cost), rows.shape[1])
        errors.append((weight * (read.astype(np.float64) - rows) ** 2).sum())
    assert errors[1] < errors[0]


def test_no_blocks_give_no_bytes():
    assert quantize_rows("Q4_K", np.zeros((0, 256), np.float32)).shape == (0, 144)


ELSEWHERE = """
import hashlib
from quantpress.quant.ggml.codec import quantize_rows
from tests.kernels.kquants_cases import importance, weights
rows = weights("mixed", 20)
for weight in (None, importance("gaps")):
    print(hashlib.sha256(quantize_rows("Q4_K", rows, weight)).hexdigest())
"""


@pytest.mark.slow
def test_a_processor_without_wide_vectors_gives_the_same_bytes(tmp_path):
    answers = []
    for processor in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / str(len(processor))), **processor}
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        answers.append(done.stdout)
    assert answers[0] == answers[1]
