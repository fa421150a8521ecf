"""Builds of the K-quant kernels: the search with most numbers in registers, and what follows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled

from quantpress.kernels.kquants.blocks import search_minimum
from quantpress.kernels.kquants.codes import FROM_TWO, pack_codes
from quantpress.kernels.kquants.super_blocks import scales_with_minimum

TYPES = {
    "values": "*fp32", "importance": "*fp32", "squares": "*fp32", "work": "*fp32", "blocks": "*u8", "total": "i32",
    "supers": "i32", "columns": "i32",
}  # fmt: skip
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # as kquants.quantize launches them


def case(name: str, kernel: Any, **constants: Any) -> Compiled:
    types = {key: value for key, value in TYPES.items() if key in kernel.arg_names}
    return Compiled(name, kernel, types, constants, OPTIONS, tuple(key for key in types if key != "supers"))


STEPS = {"first": -0.9, "delta": 0.05, "last": 36, "absolute": False}
CASES = [
    case("search Q4_K with importance", search_minimum, size=32, top=15, weighted=True, block=128, **STEPS),
    case(
        "super-blocks Q4_K with importance", scales_with_minimum, count=8, top=63, bounded=False, weighted=True,
        block_bytes=144, block=128,
    ),
    case("codes Q4_K", pack_codes, bits=4, size=32, kept=FROM_TWO.value, block_bytes=144, block=512),
]  # fmt: skip
