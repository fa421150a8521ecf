"""Measures ONNX export beside onnxruntime-genai's model builder (int4) and optimum-onnx (fp32), whole process.

    python benchmarks/onnx_export.py [--builder PYTHON] [--optimum PYTHON] [--model FOLDER]

The model is the half-billion-parameter checkpoint of run.py, made anew unless one is named. int4 is symmetric in blocks
of 32 with the head at 4 bits too, the builder's own default. Commands run in turn (A B A B), each into a folder that is
not there yet, after one run that brings the model into the page cache. Nobody verifies the result: optimum-onnx is
called by its function, because its command always does. quantpress also hashes what it reads and writes, and syncs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from machine import ROOT, git_commit, machine
from measure import Sample, measure
from run import HALF_BILLION, MIB, RESULTS, make_checkpoint, summary

BLOCK_SIZE = 32
LEVEL = 4  # of accuracy, the builder's default for processors; it changes one attribute and not the work of an export
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "optimum-onnx", "torch", "transformers", "numpy")

Command = Callable[[Path, Path], list[str]]


def quantpress(precision: str, level: int = LEVEL) -> Command:
    """Command line of ours, without the parity run, which no peer has."""

    def command(model: Path, out: Path) -> list[str]:
        start = [sys.executable, "-m", "quantpress", "-q", "convert", str(model), str(out), "--to", "onnx"]
        blocks = ["--block-size", str(BLOCK_SIZE), "--accuracy-level", str(level)] if precision == "int4" else []
        return [*start, "--precision", precision, *blocks, "--no-verify"]

    return command


def builder(python: str, level: int = LEVEL) -> Command:
    """Command line of onnxruntime-genai's model builder: int4, symmetric, for processors."""

    def command(model: Path, out: Path) -> list[str]:
        start = ["env", "HF_HUB_OFFLINE=1", python, "-m", "onnxruntime_genai.models.builder"]
        places = ["-i", str(model), "-m", str(model), "-o", str(out), "-c", str(out.parent / "cache")]
        options = [f"accuracy_level={level}", f"block_size={BLOCK_SIZE}", "is_symmetric=true"]
        return [*start, *places, "-p", "int4", "-e", "cpu", "--extra_options", *options]

    return command


def optimum(python: str) -> Command:
    """Command line of optimum-onnx: fp32, with a cache of keys and values."""
    script = (
        "import sys; from optimum.exporters.onnx import main_export; main_export(sys.argv[1], sys.argv[2], "
        "task='text-generation-with-past', dtype='fp32', do_validation=False, library_name='transformers')"
    )

    def command(model: Path, out: Path) -> list[str]:
        return ["env", "HF_HUB_OFFLINE=1", python, "-c", script, str(model), str(out)]

    return command


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_turn(commands: Mapping[str, Command], model: Path, folder: Path, runs: int) -> dict[str, dict[str, Any]]:
    """Runs every command once to warm up and then `runs` times in turn; gives samples and sizes."""
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    sizes: dict[str, int] = {}
    for number in range(-1, runs):
        for name, command in commands.items():
            out = folder / f"{name}-{number}"
            sample = measure(command(model, out))
            print(f"{name}: {sample.wall:.1f} s, CPU {sample.cpu:.1f} s, {sample.peak_bytes / MIB:.0f} MiB", flush=True)
            sizes[name] = folder_size(out)
            shutil.rmtree(out)
            if number >= 0:
                samples[name].append(sample)
    ours = samples["quantpress"]
    return {name: _row(samples[name], sizes[name], None if name == "quantpress" else ours) for name in commands}


def _row(samples: list[Sample], size: int, ours: list[Sample] | None) -> dict[str, Any]:
    row: dict[str, Any] = {**summary(samples), "walls_s": [round(sample.wall, 2) for sample in samples]}
    row["output_mib"] = round(size / MIB, 1)
    if ours:
        pairs = list(zip(ours, samples, strict=True))
        row["speed_ratio"] = round(statistics.median(theirs.wall / mine.wall for mine, theirs in pairs), 2)
        row["peak_ratio"] = round(statistics.median(theirs.peak_bytes / mine.peak_bytes for mine, theirs in pairs), 2)
    return row


def versions(python: str) -> dict[str, str]:
    """Versions of the packages that matter in an environment."""
    script = (
        "import json; from importlib.metadata import distributions; "
        f"print(json.dumps({{d.name: d.version for d in distributions() if d.name in {PACKAGES!r}}}))"
    )
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Runs everything and writes benchmarks/results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", metavar="PYTHON", help="Python of an environment with onnxruntime-genai's builder")
    parser.add_argument("--optimum", metavar="PYTHON", help="Python of an environment with optimum-onnx")
    parser.add_argument("--model", type=Path, help="checkpoint folder instead of a new random one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--name", default="onnx_export", help="name of the results file")
    options = parser.parse_args()
    jobs: dict[str, dict[str, Command]] = {name: {"quantpress": quantpress(name)} for name in ("int4", "fp32")}
    environments = {"quantpress": sys.executable}
    if options.builder:
        jobs["int4"]["genai-builder"] = builder(options.builder)
        environments["genai-builder"] = options.builder
    if options.optimum:
        jobs["fp32"]["optimum-onnx"] = optimum(options.optimum)
        environments["optimum-onnx"] = options.optimum
    result: dict[str, Any] = {"commit": git_commit(), "machine": machine(), "load_before": os.getloadavg()}
    result["versions"] = {name: versions(python) for name, python in environments.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model.resolve() if options.model else make_checkpoint(folder / "half-billion", HALF_BILLION)
        result["jobs"] = {job: in_turn(commands, model, folder, options.runs) for job, commands in jobs.items()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
