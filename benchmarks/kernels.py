"""Measures products with quantized matrices on a GPU beside cuBLAS, tinygemm, GemLite and GPTQModel's Triton path.

    python benchmarks/kernels.py                                    all models' layers, 4 bits, 1 to 1024 input rows
    python benchmarks/kernels.py --tune                             search for launch parameters first, and keep them
    python benchmarks/kernels.py --model llama-3-8b --rows-in 1 16  less
    python benchmarks/kernels.py --plan                             says what would be measured; needs no GPU

Every product runs in a CUDA graph on copies of the weight that take turns, so that none is in the L2 cache; figures are
medians. Ours is compared with a product in float64 before it is timed, peers with one in float32. Peers that are not
installed are left out: `pip install gemlite`, `pip install gptqmodel`. Written are results/kernels.json, kernels.md
and, with matplotlib, kernels.svg, after each matrix, so a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_peers import PEERS, dense_runs, wrong
from kernels_report import picture, table
from machine import git_commit, machine

from quantpress.kernels.launch import Problem
from quantpress.kernels.tuning.ahead import Ahead
from quantpress.kernels.tuning.candidates import H200, Device, candidates, device_facts
from quantpress.kernels.tuning.choice import choose, device_file
from quantpress.kernels.tuning.measuring import Measured, measure
from quantpress.kernels.tuning.products import Products, weight_bytes
from quantpress.kernels.tuning.timing import copies, copy_bandwidth, graph_seconds, timing
from quantpress.pipelines.kernel_bench import SHAPES, keep

ROWS_IN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
RESULTS = Path(__file__).with_name("results")
_SAMPLES = 25


def problems(options: argparse.Namespace) -> list[list[Problem]]:
    """Gives the products, a list for each matrix."""
    shapes = [(name, shape) for name in options.model for shape in SHAPES[name]]
    return [
        [
            Problem(rows_in, rows, columns, bits, min(options.group_size or columns, columns), options.dtype)
            for rows_in in options.rows_in
        ]
        for bits in options.bits
        for _, (columns, rows) in shapes
    ]


def compared(
    problem: Problem, device: Device, ours: Measured, bandwidth: float, peers: Sequence[Any]
) -> dict[str, Any]:
    """Measures the peers on a product and gives its row of the results."""
    row = ours.to_json(bandwidth)
    products = Products(problem, "cuda", copies(weight_bytes(problem), device.cache_bytes))
    row["peers"] = {}
    for peer in peers:
        try:
            runs = peer.runs(problem, products.x, products.weights)
            problem_of_peer = runs and wrong(runs[0](), problem, products.x, products.weights[0])
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, and none of it is known beforehand
            row["peers"][peer.name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        if not runs:
            continue
        if problem_of_peer:
            row["peers"][peer.name] = {"failed": problem_of_peer}
            continue
        row["peers"][peer.name] = _peer_row(runs, ours)
        del runs
    dense = dense_runs(problem, products.x, copies(problem.rows * problem.columns * 2, device.cache_bytes))
    row["peers"]["cublas"] = _peer_row(dense, ours)
    return row


def _peer_row(runs: Sequence[Any], ours: Measured) -> dict[str, float]:
    taken = timing(graph_seconds(runs, _SAMPLES))
    return {
        "microseconds": round(taken.median * 1e6, 3),
        "times_slower": round(taken.median / ours.timing.median, 3),
    }


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Writes results, table and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(result))
    picture(result, folder / f"{name}.svg")


def versions() -> dict[str, str]:
    """Gives versions of what the figures depend on."""
    known = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {**known, **{peer.name: found for peer in PEERS if (found := peer.version())}}


def run(options: argparse.Namespace) -> None:
    """Measures everything that there is time for, and writes it."""
    device, start = device_facts(), time.monotonic()
    peers = [peer for peer in PEERS if peer.version() and peer.name in options.peers]
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "commit": options.commit or git_commit(), "gpu": device.name, "cuda": torch.version.cuda,
        "versions": versions(), "machine": machine(), "tuned": options.tune,
        "copy_gb_per_s": round(bandwidth / 1e9, 1), "rows": [],
    }  # fmt: skip
    print(f"{device.name}, a copy moves {bandwidth / 1e9:.0f} GB/s, peers: {[peer.name for peer in peers]}", flush=True)
    with Ahead(options.jobs) as ahead:
        for matrix in problems(options):
            for problem in matrix:
                if time.monotonic() - start > options.most_seconds:
                    print("out of time: the rest is left out", flush=True)
                    break
                ours = measure(problem, device, graph_seconds, ahead if options.tune else None, dense=False)
                if options.tune:
                    keep(device_file(device.name), device.name, ours)
                row = compared(problem, device, ours, bandwidth, peers)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
            write(options.output, options.name, result)
            torch.cuda.empty_cache()
    if options.tune:
        (options.output / f"{options.name}-launches.json").write_text(device_file(device.name).read_text())
    print(table(result))


def plan(options: argparse.Namespace) -> None:
    """Prints what would be measured."""
    device = device_facts() if torch.cuda.is_available() else H200
    for problem in (each for matrix in problems(options) for each in matrix):
        count = len(candidates(problem, device))
        print(f"{problem}: {choose(problem, device.name)}, {count} candidates")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4])
    parser.add_argument("--rows-in", nargs="+", type=int, default=list(ROWS_IN))
    parser.add_argument("--group-size", type=int, default=128, help="0: one group a row")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--peers", nargs="*", default=[peer.name for peer in PEERS])
    parser.add_argument("--tune", action="store_true", help="search for launch parameters, and keep them")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 16), help="that compile")
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="stop before the next product then")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kernels", help="name of the results files")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--plan", action="store_true", help="only say what would be measured")
    options = parser.parse_args()
    if options.plan:
        plan(options)
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device here (--plan says what would be measured)")
    else:
        run(options)


if __name__ == "__main__":
    main()
