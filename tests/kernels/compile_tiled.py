"""Builds of the tiled product and of dequantize that their tests look at; see compiling.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled

from quantpress.kernels import dequantize, tiled

_WHOLE = ("x", "words", "scale", "zero", "out", "slabs", "arrived", "rows", "columns", "word_rows", "bias")


def tiles(
    name: str, dtype: str, block_m: int, block_n: int, block_k: int, bits: int, *, group: int = 128, split: int = 1,
    warps: int = 4, stages: int = 3, zero: bool = False, rounded: bool = False,
) -> Compiled:  # fmt: skip
    """A product whose sizes are multiples of a tile's; group 0: one scale for each output."""
    types = dict.fromkeys(("rows_in", "rows", "columns", "word_rows", "masks"), "i32")
    types |= {"x": f"*{dtype}", "words": "*i32", "scale": f"*{dtype}", "out": f"*{dtype}"}
    constants: dict[str, Any] = {
        "group_size": group or 4096, "bits": bits, "mixed": False, "rounded": rounded,
        "whole_rows": True, "whole_columns": True, "split_k": split, "block_m": block_m, "block_n": block_n,
        "block_k": block_k, "band": 8, "bias": None,
    }  # fmt: skip
    for argument, kind, given in (("zero", "*u8", zero), ("slabs", "*fp32", split > 1), ("arrived", "*i32", split > 1)):
        if given:
            types[argument] = kind
        else:
            constants[argument] = None
    divisible = tuple(key for key in _WHOLE if key in types)
    return Compiled(name, tiled._tiles, types, constants, {"num_warps": warps, "num_stages": stages}, divisible)


def dense(name: str, dtype: str, bits: int, block_k: int, *, zero: bool, order: bool) -> Compiled:
    """A dense matrix in float16 or bfloat16."""
    types = dict.fromkeys(("rows", "columns", "word_rows", "masks", "group_size"), "i32")
    types |= {"words": "*i32", "scale": f"*{dtype}", "out": f"*{dtype}"}
    constants: dict[str, Any] = {"one_group": True, "bits": bits, "whole": True, "block_n": 64, "block_k": block_k}
    for argument, kind, given in (("zero", "*u8", zero), ("place_of", "*i32", order)):
        if given:
            types[argument] = kind
        else:
            constants[argument] = None
    return Compiled(
        name, dequantize._dequantize, types, constants, {"num_warps": 4}, tuple(key for key in types if key != "masks")
    )


CASES = [
    tiles("few rows, fp16", "fp16", 16, 64, 128, 4, split=4, stages=4),
    tiles("few rows, bf16 with zeros", "bf16", 16, 128, 128, 4, split=4, stages=4, zero=True),
    tiles("three bits, one group", "fp16", 16, 64, 128, 3, group=0),
    tiles("eight bits, bf16", "bf16", 32, 64, 64, 8),
    tiles("many rows, 4 warps", "bf16", 128, 128, 64, 4, rounded=True),
    tiles("many rows, 8 warps", "fp16", 128, 128, 64, 4, rounded=True, warps=8, zero=True),
    dense("dequantize", "bf16", 4, 128, zero=True, order=False),
    dense("dequantize in order", "fp16", 3, 32, zero=False, order=True),
]
