"""Builds of the kernels for 4-bit levels: one vector and two, tiles, any columns, dense."""

from __future__ import annotations

from typing import Any

from quantpress.kernels.nf4.any_shape import _any
from quantpress.kernels.nf4.gemv import _gemv
from quantpress.kernels.nf4.tiled import _dense, _tiled
from tests.kernels.compiling import Compiled

_DIVISIBLE = ("x", "words", "absmax", "levels", "bias", "out", "slabs", "arrived", "rows", "slab_size", "quads")


def _types(dtype: str, codes: str = "words") -> dict[str, str]:
    pointers = {codes: "*i32" if codes == "words" else "*u8", "absmax": "*fp32", "levels": "*fp32"}
    return {"x": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}", **pointers}


def _shared() -> dict[str, str]:
    return {"slabs": "*fp32", "arrived": "*i32", "rows_in": "i32", "rows": "i32", "slab_size": "i32"}


def gemv(dtype: str, rows_in: int, columns: int, splits: int, block_n: int, warps: int) -> Compiled:
    """A build of the vector kernel; one input row is a constant 1, as at a launch."""
    types, constants = (
        _types(dtype) | _shared(),
        {"columns": columns, "blocksize": 64, "rounding": None, "splits": splits},
    )
    constants |= {"block_m": rows_in, "block_n": block_n, "block_q": 32 * warps}
    if rows_in == 1:
        del types["rows_in"]
        constants["rows_in"] = 1
    divisible = tuple(name for name in _DIVISIBLE if name in types)
    name = f"gemv {dtype} m{rows_in} k{columns} s{splits} n{block_n} w{warps}"
    return Compiled(name, _gemv, types, constants, {"num_warps": warps}, divisible)


def tiled(
    dtype: str, blocks: tuple[int, int, int], splits: int, warps: int, stages: int, *, even: bool = True
) -> Compiled:
    """A build of the kernel on tensor cores."""
    types = _types(dtype) | _shared() | {"quads": "i32"}
    constants: dict[str, Any] = {"whole_blocks": True, "even": even, "blocksize": 64, "rounding": None}
    constants |= {"splits": splits, "band": 8}
    constants |= dict(zip(("block_m", "block_n", "block_k"), blocks, strict=True))
    divisible = tuple(name for name in _DIVISIBLE if name in types)
    options = {"num_warps": warps, "num_stages": stages}
    return Compiled(f"tiled {dtype} {blocks} s{splits} even={even}", _tiled, types, constants, options, divisible)


CASES = [
    gemv("fp16", 1, 14336, 1, 8, 1),
    gemv("bf16", 2, 4096, 2, 4, 2),
    tiled("bf16", (16, 64, 64), 8, 4, 3),
    tiled("fp16", (64, 64, 64), 1, 4, 3, even=False),
    Compiled(
        "any bf16", _any, _types("bf16", "packed") | dict.fromkeys(("rows_in", "rows", "columns"), "i32"),
        {"blocksize": 64, "rounding": "bfloat16", "block_m": 4, "block_n": 8, "block_k": 64}, {"num_warps": 2},
    ),
    Compiled(
        "dense bf16", _dense, {**_types("bf16", "packed"), "size": "i64"}, {"blocksize": 64, "values": 4096},
        {"num_warps": 8}, ("packed", "absmax", "levels", "out", "size"),
    ),
]  # fmt: skip
