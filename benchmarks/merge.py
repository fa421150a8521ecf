"""Measures `quantpress merge` beside PEFT and mergekit, whole process, and its memory against layers.

    python benchmarks/merge.py                       quantpress only
    python benchmarks/merge.py --peer PYTHON         also PEFT and, where installed, mergekit of that environment

A LoRA of rank 16 on all linear layers is merged into a random checkpoint of half a billion parameters in bfloat16 and
written to disk. Commands run in turn (A B A B), so a machine that slows down slows all of them. quantpress also hashes
its inputs and its output and accounts for every tensor of the adapter; the peers do neither. Nobody verifies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from machine import ROOT, git_commit, machine
from measure import Sample, measure
from run import HALF_BILLION, MIB, RESULTS, make_checkpoint, summary
from shape import Shape

RANK = 16
ALLOWED = 300_000_000  # bytes that a merge may take beside three times its largest tensor and the adapter
IMPORTS = "from quantpress.pipelines import runner, safetensors_stage; from quantpress.pipelines.commands import merge"


def make_adapter(folder: Path, shape: Shape) -> Path:
    """Makes an adapter in a process of its own; see `run.make_checkpoint`."""
    script = Path(__file__).with_name("random_adapter.py")
    subprocess.run([sys.executable, script, folder, str(RANK), json.dumps(dataclasses.asdict(shape))], check=True)
    return folder


def quantpress(base: Path, adapter: Path, out: Path) -> list[str]:
    """Command line of one merge without the parity run, which no peer has."""
    command = [sys.executable, "-m", "quantpress", "-q", "merge", str(base), str(adapter), str(out)]
    return [*command, "--no-verify", "--force"]


def peft(python: str, base: Path, adapter: Path, out: Path) -> list[str]:
    """Command line of the merge with PEFT."""
    return [python, str(Path(__file__).with_name("peft_merge.py")), str(base), str(adapter), str(out)]


def mergekit(python: str, base: Path, adapter: Path, out: Path) -> list[str]:
    """Command line of mergekit, whose model references take an adapter behind a plus; its cache is emptied first."""
    config, cache = out.with_suffix(".yaml"), out.with_suffix(".cache")
    shutil.rmtree(cache, ignore_errors=True)
    config.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: {base}+{adapter}\n")
    program = Path(python).parent / "mergekit-yaml"
    return [str(program), str(config), str(out), "--lora-merge-cache", str(cache), "--no-copy-tokenizer"]


def peers(python: str | None) -> dict[str, Callable[[Path, Path, Path], list[str]]]:
    """Gives the peers that an environment has, by name."""
    if python is None:
        return {}
    found: dict[str, Callable[[Path, Path, Path], list[str]]] = {"peft": lambda *paths: peft(python, *paths)}
    if (Path(python).parent / "mergekit-yaml").exists():
        found["mergekit"] = lambda *paths: mergekit(python, *paths)
    return found


def run_in_turn(
    commands: Mapping[str, Callable[[Path, Path, Path], list[str]]], folder: Path, shape: Shape, runs: int
) -> dict[str, list[Sample]]:
    """Runs every command `runs` times, in turn, each into an output of its own that is removed first."""
    base, adapter = make_checkpoint(folder / "base", shape), make_adapter(folder / "adapter", shape)
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    measure(quantpress(base, adapter, folder / "warm"))  # brings the inputs into the page cache for everybody
    for _ in range(runs):
        for name, command in commands.items():
            out = folder / f"out-{name}"
            shutil.rmtree(out, ignore_errors=True)
            samples[name].append(measure(command(base, adapter, out)))
    return samples


def speed(folder: Path, python: str | None, shape: Shape, runs: int) -> list[dict[str, object]]:
    """Merges side by side: medians, and the ratios of wall times pair by pair."""
    samples = run_in_turn({"quantpress": quantpress, **peers(python)}, folder, shape, runs)
    row: dict[str, object] = {"benchmark": f"merge, LoRA of rank {RANK} on all linear layers"}
    for name, taken in samples.items():
        row[name] = summary(taken)
        if name != "quantpress":
            pairs = [theirs.wall / ours.wall for ours, theirs in zip(samples["quantpress"], taken, strict=True)]
            row[f"{name}_speed_ratio"] = round(statistics.median(pairs), 2)
            row[f"{name}_speed_ratios"] = [round(ratio, 2) for ratio in pairs]
    print(json.dumps(row))
    return [row]


def memory_against_layers(folder: Path) -> list[dict[str, object]]:
    """Peak memory of merges that differ only in the number of layers, above a process that only imports."""
    baseline = measure([sys.executable, "-c", IMPORTS]).peak_bytes
    rows: list[dict[str, object]] = []
    for layers in (8, 32):
        shape = Shape(layers=layers, hidden=1024, heads=16, kv_heads=8, intermediate=2816, vocab=32000)
        base = make_checkpoint(folder / f"layers-{layers}", shape)
        adapter = make_adapter(folder / f"adapter-{layers}", shape)
        peak = max(measure(quantpress(base, adapter, folder / f"memory-{layers}")).peak_bytes for _ in range(2))
        largest = 32000 * 1024 * 2
        adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
        row: dict[str, object] = {
            "benchmark": f"memory {layers} layers",
            "above_import_mib": round((peak - baseline) / MIB, 1),
            "largest_tensor_mib": round(largest / MIB, 1),
            "adapter_mib": round(adapter_bytes / MIB, 1),
            "limit_mib": round((3 * largest + ALLOWED + adapter_bytes) / MIB, 1),
        }
        rows.append(row)
        print(json.dumps(row))
    return rows


def main() -> None:
    """Runs everything and writes benchmarks/results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with peft, and mergekit if wanted")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--name", default="merge", help="name of the results file")
    parser.add_argument("--layers", type=int, default=HALF_BILLION.layers, help="fewer, to try the commands")
    options = parser.parse_args()
    shape = dataclasses.replace(HALF_BILLION, layers=options.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = speed(folder, options.peer, shape, options.runs) + memory_against_layers(folder)
    RESULTS.mkdir(exist_ok=True)
    result = {"commit": git_commit(), "machine": machine(), "shape": dataclasses.asdict(shape), "rows": rows}
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
