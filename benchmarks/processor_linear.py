"""Measures a product with a packed matrix on a processor, beside torch's own int4 product and a dense one.

    python benchmarks/processor_linear.py [--size 4096] [--runs 9]

Symmetric 4-bit codes in groups of 128, one to 64 input rows; the ways run in turn. torch's product wants scales in the
type of the input, so its bfloat16 form rounds them; `error` is the greatest difference to float64 over the greatest
value.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import git_commit, machine

from quantpress.kernels.linear import linear
from quantpress.kernels.packed import PackedWeight, reference_codes, reference_dequantize

RESULTS = Path(__file__).with_name("results") / "processor_linear.json"
GROUP = 128


def ways(weight: PackedWeight, rows_in: int) -> dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]]:
    """Gives name -> what multiplies, and the same in float64."""
    x = torch.randn(rows_in, weight.columns, generator=torch.Generator().manual_seed(rows_in))
    codes = reference_codes(weight).T.contiguous().to(torch.int32)
    dense = reference_dequantize(weight)
    wanted = x.double() @ dense.double().T
    made: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "quantpress float32": (lambda: linear(x, weight), wanted),
        "dense float32": (lambda: torch.nn.functional.linear(x, dense), wanted),
    }
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)  # noqa: SLF001 - torch has no public name for it
    product = torch._weight_int4pack_mm_for_cpu  # noqa: SLF001
    for dtype in (torch.float32, torch.bfloat16):
        scales = weight.scale.to(dtype)
        pairs = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
        name = f"torch int4 {str(dtype).removeprefix('torch.')}"
        given = x.to(dtype)
        made[name] = (functools.partial(product, given, packed, GROUP, pairs), given.double() @ dense.double().T)
    return made


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (options.size // 8, options.size), generator=random, dtype=torch.int32)
    scale = (torch.rand((options.size // GROUP, options.size), generator=random) * 0.01 + 0.005).half()
    weight = PackedWeight(words, scale, None, None, options.size, 4, GROUP)
    rows = []
    for rows_in in (1, 16, 64):
        made = ways(weight, rows_in)
        taken: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.runs):
            for name, (run, _wanted) in made.items():
                start = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - start)
        for name, (run, wanted) in made.items():
            error = float((run().double() - wanted).abs().max() / wanted.abs().max())
            median = statistics.median(taken[name]) * 1e3
            rows.append({"rows_in": rows_in, "way": name, "ms": round(median, 2), "error": float(f"{error:.2g}")})
            print(json.dumps(rows[-1]))
    about = {"commit": git_commit(), "machine": machine(), "torch": torch.__version__, "size": options.size}
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
