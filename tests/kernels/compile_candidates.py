"""Candidates to compile, so that their shared memory is known: `python compiling.py compile_candidates.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from recorded import recorded

from quantpress.kernels import gemv, tiled
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight

PRODUCTS = [
    (Problem(8, 4096, 4096, 4, 128, "float16"), Launch("tiled", 8, 64, 128, 8, 4, 4)),
    (Problem(1024, 4096, 4096, 8, 64, "float16", False), Launch("tiled", 128, 128, 64, 1, 8, 3)),
    (Problem(1, 4096, 4096, 4, 128, "bfloat16"), Launch("gemv", 1, 128, 128, 2, 4, 3)),
]


def weight(problem: Problem) -> PackedWeight:
    """A weight without memory."""
    words = torch.empty((-(-problem.columns * problem.bits // 32), problem.rows), dtype=torch.int32, device="meta")
    shape = (-(-problem.columns // problem.group_size), problem.rows)
    scale = torch.empty(shape, dtype=torch.float16, device="meta")
    zero = None if problem.symmetric else torch.empty(shape, dtype=torch.uint8, device="meta")
    return PackedWeight(words, scale, zero, None, problem.columns, problem.bits, problem.group_size)


def _case(problem: Problem, launch: Launch) -> object:
    x = torch.empty((problem.rows_in, problem.columns), dtype=getattr(torch, problem.dtype), device="meta")
    name = json.dumps([asdict(problem), asdict(launch)])
    if launch.kernel == "gemv":
        return recorded(name, gemv, lambda: gemv.gemv(x, weight(problem), launch=launch))
    return recorded(name, tiled, lambda: tiled.tiled(x, weight(problem), launch=launch))


CASES = [_case(problem, launch) for problem, launch in PRODUCTS]
