"""Compiles kernels for sm_90 as they are launched for random shapes and types: python build_sweep.py SECONDS [SEED]

The interpreter neither specializes integers of 1 nor checks types, and tests build a few cases only. No GPU is needed;
`PYTHONPATH` may name a folder with another version of triton. Ends with 1 if something does not compile.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled, build
from recorded import all_recorded

from quantpress.kernels import dequantize, dispatch, gemv, rtn, tiled
from quantpress.kernels.int8 import llm_int8, product, w8a8
from quantpress.kernels.nf4 import matmul as nf4
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tuning.choice import choose

GPU = "NVIDIA H200"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("packed", "packed", "packed", "dequantize", "w8a8", "llm_int8", "nf4", "rtn")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Draw:
    """One product, drawn at random."""

    kind: str
    rows_in: int
    rows: int
    columns: int
    bits: int
    group: int
    dtype: torch.dtype
    zeros: bool
    ordered: bool
    biased: bool

    @classmethod
    def of(cls, drawn: random.Random) -> Draw:
        columns = drawn.choice((1, 7, 32, 96, 100, 4096, 14336))
        return cls(
            drawn.choice(KINDS), drawn.choice((1, 1, 2, 3, 4, 5, 16, 33, 64, 65, 200, 2000)),
            drawn.choice((1, 7, 16, 100, 4096, 28672)), columns, drawn.choice((2, 3, 4, 4, 8)),
            min(drawn.choice((1, 7, 16, 32, 64, 100, 128, columns)), columns), drawn.choice(FLOATS),
            drawn.random() < 0.5, drawn.random() < 0.3, drawn.random() < 0.5,
        )  # fmt: skip

    def weight(self) -> PackedWeight:
        groups = -(-self.columns // self.group)
        zero = empty(groups, self.rows, dtype=torch.uint8) if self.zeros else None
        order = empty(self.columns, dtype=torch.int64) if self.ordered else None
        words = empty(-(-self.columns * self.bits // 32), self.rows, dtype=torch.int32)
        scale = empty(groups, self.rows, dtype=torch.float16)
        return PackedWeight(words, scale, zero, order, self.columns, self.bits, self.group)

    def launcher(self) -> tuple[list[ModuleType], Callable[[], object]]:
        """Gives the modules that check devices, and what launches."""
        x = empty(self.rows_in, self.columns, dtype=self.dtype)
        bias = empty(self.rows, dtype=self.dtype) if self.biased else None
        codes, scale = empty(self.rows, self.columns, dtype=torch.int8), empty(self.rows, dtype=torch.float32)
        if self.kind == "packed":
            weight = self.weight()
            launch = choose(dispatch.problem_of(x, weight), GPU)
            return [gemv, tiled, dequantize], lambda: dispatch.run(x, weight, bias, launch=launch)
        if self.kind == "dequantize":
            return [dequantize], lambda: dequantize.dequantize(self.weight(), self.dtype, ordered=self.biased)
        if self.kind == "w8a8":
            return [w8a8, product], lambda: w8a8.w8a8(x, codes, scale, bias)
        if self.kind == "llm_int8":
            return [w8a8, product, llm_int8], lambda: llm_int8.llm_int8(x, codes, scale, bias)
        if self.kind == "nf4":
            size = self.rows * self.columns
            parts = empty(-(-size // 2), dtype=torch.uint8), empty(-(-size // 64), dtype=torch.float32)
            levels = empty(16, dtype=torch.float32)
            return [nf4], lambda: nf4.nf4_matmul(x, *parts, levels, self.rows, self.columns, 64, bias)
        matrix = empty(self.rows, self.columns, dtype=self.dtype)
        return [rtn], lambda: rtn.rtn(matrix, bits=self.bits, group_size=self.group, symmetric=not self.zeros)


def main() -> int:
    drawn = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    end, built, failed = time.monotonic() + float(sys.argv[1]), set[str](), 0
    while time.monotonic() < end:
        draw = Draw.of(drawn)
        modules, call = draw.launcher()
        with_check = [module for module in modules if hasattr(module, "check_device")]
        cases: list[Compiled] = all_recorded(str(draw), with_check, call)
        for case in cases:
            key = repr((case.kernel, case.types, case.constants, case.options, case.divisible))
            if key in built:
                continue
            built.add(key)
            try:
                build(case, 90)
            except Exception as error:  # noqa: BLE001 - whatever the compiler raises is a finding
                failed += 1
                sys.stdout.write(f"{draw}\n{case.constants} {case.options}\n{error!r:.2000}\n")
    sys.stdout.write(f"triton {triton.__version__}: {len(built)} builds, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
