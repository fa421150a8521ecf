"""Rounding to nearest in Triton's interpreter, against the compiled loops of the processor, bit for bit."""

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

from quantpress.kernels.packed import reference_codes
from quantpress.kernels.rtn import reference_rtn, rtn, rtn_codes
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.packed import packed_weight
from tests.kernels.rtn_cases import SCALE_TYPES, bits_of, matrix

ROOT = Path(__file__).resolve().parents[2]


# one weight; groups that share words; below and above a tile of 16 rows and of 128 columns; a group of a whole row
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (17, 33, 7, torch.float16),
        (5, 129, 128, torch.bfloat16),
        (16, 127, 48, torch.float32),
        (4, 300, 300, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_scales_and_zeros_are_those_of_the_processor(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    weight = matrix(rows, columns, dtype)
    scale_type = list(SCALE_TYPES)[(bits + rows) % 3]
    quantized = round_to_nearest(weight.float().numpy(), Grid(bits, group_size, symmetric, scale_type))
    wanted = packed_weight(quantized)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_type": SCALE_TYPES[scale_type]}
    with np.errstate(over="ignore"):  # as a GPU, which does not warn: quotients by subnormal scales
        found, codes = rtn(weight, **options), rtn_codes(weight, **options)
    assert torch.equal(found.words, wanted.words)
    assert torch.equal(bits_of(found.scale), bits_of(wanted.scale))
    assert np.array_equal(codes[0].numpy(), quantized.codes)
    assert torch.equal(bits_of(codes[1].to(found.scale.dtype)), bits_of(wanted.scale))
    for zero in (found.zero, codes[2]):
        assert (zero is None) == symmetric
        assert zero is None or torch.equal(zero, wanted.zero)
    for part, same in zip(reference_rtn(weight, **options), codes, strict=True):
        assert part is same is None or torch.equal(part, same)


def test_every_code_is_the_nearest_that_the_grid_has() -> None:
    weight = matrix(6, 64, torch.float32)[4:].contiguous()
    found = rtn(weight, bits=3, group_size=16, symmetric=False)
    codes = reference_codes(found).T.double()
    scale = found.scale.T.double().repeat_interleave(16, 1)
    zero = found.zero.T.double().repeat_interleave(16, 1)  # type: ignore[union-attr]
    candidates = scale[:, :, None] * (torch.arange(8).double() - zero[:, :, None])
    errors = (candidates - weight.double()[:, :, None]).abs()
    chosen = errors.gather(2, codes.long()[:, :, None])[:, :, 0]
    # a quotient rounded to float32 may take the farther of two codes that are equally near within 2^-24 of 8 codes
    assert (chosen <= errors.amin(2) + scale * 8 * 2.0**-24).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 8, dtype=torch.float64)}, "weight is .*float64"),
        ({"weight": torch.zeros(8, 2).T}, "contiguous"),
        ({"weight": torch.zeros(0, 8)}, "weight is"),
        ({"group_size": 9}, "groups of 9 of 8"),
        ({"bits": 5}, "5 bits"),
        ({"scale_type": torch.float64}, "scales in"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = {"weight": torch.zeros(2, 8), "bits": 4, "group_size": 8, "symmetric": True}
    for function in (rtn, rtn_codes):
        with pytest.raises(ValueError, match=message):
            function(**(given | change))  # type: ignore[arg-type]


def test_compiled_for_gpus_nothing_spills_and_quotients_are_rounded_as_ieee_says() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "tests/kernels/compiling.py", "tests/kernels/compile_rtn.py"]
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    rows = json.loads(ran.stdout)
    assert len(rows) == 2 * 3
    for row in rows:
        found, name = row["instructions"], f"{row['name']} {row['arch']}"
        assert row["stack"] == 0, name
        assert row["shared"] <= 48 << 10, name
        assert any(key.startswith("LDG.E.128") for key in found), name
        # the correctly rounded quotient corrects itself by fused steps and has a slow path; the approximate has none
        assert found.get("FFMA", 0) >= 16 or row["name"].startswith("fit"), name
