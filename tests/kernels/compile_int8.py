"""Builds of the int8 kernels that their tests look at; see compiling.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled

from quantpress.kernels.int8 import llm_int8
from quantpress.kernels.int8 import product as int8_product
from quantpress.kernels.int8 import w8a8 as int8

_WHOLE = (
    "codes", "token_scale", "weight", "scale", "bias", "result", "partial", "arrived", "x", "kept", "rows", "columns",
    "share", "slab",
)  # fmt: skip


def product(
    name: str, block_m: int, block_n: int, warps: int, stages: int, dtype: str, *, split: int = 1, kept: bool = False,
    even: bool = True,
) -> Compiled:  # fmt: skip
    """A product of matrices whose K is a multiple of 16, and of a tile where `even`; one row where tiles have 16."""
    types = {"codes": "*i8", "token_scale": "*fp32", "weight": "*i8", "scale": "*fp32", "bias": f"*{dtype}"}
    types |= {"result": f"*{dtype}", "rows": "i32", "columns": "i32", "share": "i32"}
    constants: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "block_k": 128, "even": even, "split": split}
    constants["band"] = 8
    if split > 1:
        types |= {"partial": "*i32", "arrived": "*i32", "slab": "i32"}
    else:
        constants |= {"partial": None, "arrived": None}
        types["slab"] = "i32"
    if kept:
        types |= {"x": f"*{dtype}", "kept": "*i32"}
    else:
        constants |= {"x": None, "kept": None}
    if block_m == 16:
        constants["rows_in"] = 1  # what a launch makes of a 1
    else:
        types["rows_in"] = "i32"
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return Compiled(
        name, int8_product._multiply, types, constants, options, tuple(key for key in _WHOLE if key in types)
    )


def rounding(name: str, block: int, warps: int, dtype: str, held: bool) -> Compiled:
    """Inputs rounded a row per program."""
    types = {"x": f"*{dtype}", "codes": "*i8", "scale": "*fp32", "columns": "i32", "half_range": "fp32"}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    constants = {"held": held, "block": block}
    whole = ("x", "codes", "scale", "columns")
    return Compiled(name, int8._quantize_row, types | {"epsilon": "fp32"}, constants, options, whole)


def split_rounding(name: str, block: int, warps: int, dtype: str) -> Compiled:
    """Inputs rounded by LLM.int8(), and the list of columns with outliers."""
    types = {"x": f"*{dtype}", "codes": "*i8", "scale": "*fp32", "kept": "*i32", "flags": "*i32", "rows": "i32"}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    whole = ("x", "codes", "scale", "kept", "flags", "columns")
    types |= {"columns": "i32", "limit": "fp32"}
    return Compiled(name, llm_int8._quantize_row, types, {"split": True, "block": block}, options, whole)


def clearing(name: str) -> Compiled:
    """Codes of columns with outliers taken away."""
    types = {"codes": "*i8", "kept": "*i32", "rows": "i32", "columns": "i32"}
    return Compiled(name, llm_int8._clear, types, {"block": 64}, {"num_warps": 4}, ("codes", "kept", "columns"))


# the launcher takes "wide" only for capability 9
CASES = [
    product("product, one row", 16, 64, 4, 4, "bf16", split=4),
    product("product, 64 rows, K no multiple of a tile", 64, 64, 4, 4, "fp16", even=False),
    product("product, many rows, kept columns", 128, 128, 8, 3, "fp16", kept=True),
    product("product, many rows, wide, float32", 128, 256, 8, 3, "fp32", kept=True),
    rounding("rounding, short", 4096, 8, "bf16", True),
    rounding("rounding, long", 16384, 16, "fp16", False),
    split_rounding("rounding, outliers", 4096, 8, "bf16"),
    clearing("clearing"),
]
