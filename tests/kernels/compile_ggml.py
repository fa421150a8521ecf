"""Builds of the kernels for ggml's other block types: searches with most numbers in registers, and the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled

from quantpress.kernels.ggml.direct import fit_greatest, pack_fp4, pack_ternary
from quantpress.kernels.ggml.iq4 import pack_levels, scale_super_blocks, search_levels
from quantpress.kernels.ggml.legacy import mean_squares_of_rows, pack_legacy, search_legacy

TYPES = {
    "values": "*fp32", "importance": "*fp32", "squares": "*fp32", "target": "*fp32", "work": "*fp32", "blocks": "*u8",
    "total": "i32", "supers": "i32", "rows": "i32", "columns": "i32",
}  # fmt: skip
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # as ggml.quantize launches them


def case(name: str, kernel: Any, values: str = "*fp32", **constants: Any) -> Compiled:
    types = {key: value for key, value in (TYPES | {"values": values}).items() if key in kernel.arg_names}
    options = OPTIONS | ({"num_warps": 1} if name.startswith("rows") else {})
    aligned = tuple(key for key in types if key not in ("supers", "rows"))
    return Compiled(name, kernel, types, constants, options, aligned)


CASES = [
    case("search IQ4_NL with importance", search_levels, whole=True, weighted=True, block=128),
    case("super-blocks IQ4_XS", scale_super_blocks, block=128),
    case("codes IQ4_XS", pack_levels, whole=False, block=512),
    case("rows", mean_squares_of_rows, block=32),
    case("search Q4_0 of bfloat16", search_legacy, "*bf16", bits=4, minimum=False, block_bytes=18, block=128),
    case("codes Q5_1", pack_legacy, bits=5, minimum=True, block_bytes=24, block=512),
    case("greatest TQ1_0", fit_greatest, size=256, block_bytes=54, step=52, block=16),
    case("greatest MXFP4", fit_greatest, size=32, block_bytes=17, step=None, block=128),
    case("codes TQ1_0", pack_ternary, five=True, block=512),
    case("codes MXFP4", pack_fp4, block=512),
]  # fmt: skip
