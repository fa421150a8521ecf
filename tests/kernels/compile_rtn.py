"""Builds of the kernels that round to nearest: both kinds of grids, words of 3 and 4 bits, codes."""

from __future__ import annotations

from quantpress.kernels.rtn import _choose, _fit
from tests.kernels.compiling import Compiled

_SIZES = dict.fromkeys(("rows", "columns", "group_size"), "i32")
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_DIVISIBLE = ("weight", "scale", "zero", "result", "rows", "columns", "group_size")


def fit(dtype: str, *, symmetric: bool) -> Compiled:
    """A build of the first launch."""
    types = {"weight": f"*{dtype}", "scale": "*fp32", **_SIZES} | ({} if symmetric else {"zero": "*u8"})
    constants = {"bits": 4, "symmetric": symmetric, "precision": 11, "least": -24, "block_n": 16, "block_k": 128}
    constants |= {"zero": None} if symmetric else {}
    divisible = tuple(name for name in _DIVISIBLE if name in types)
    return Compiled(f"fit {dtype} symmetric={symmetric}", _fit, types, constants, _OPTIONS, divisible)


def choose(dtype: str, bits: int, *, packed: bool, symmetric: bool) -> Compiled:
    """A build of the second launch."""
    unit = 32 if bits == 3 else 32 // bits
    types = {"weight": f"*{dtype}", "scale": "*fp32", "result": "*i32" if packed else "*u8", **_SIZES}
    types |= {} if symmetric else {"zero": "*u8"}
    constants = {"bits": bits, "packed": packed, "block_n": 16, "units": 128 // unit, "unit": unit}
    constants |= {"zero": None} if symmetric else {}
    divisible = tuple(name for name in _DIVISIBLE if name in types)
    return Compiled(f"choose {dtype} {bits} packed={packed}", _choose, types, constants, _OPTIONS, divisible)


CASES = [
    fit("i16", symmetric=True),
    fit("fp16", symmetric=False),
    choose("fp32", 3, packed=True, symmetric=False),
]
