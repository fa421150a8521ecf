"""Measures `quantpress quantize` beside GPTQModel and llm-compressor, whole process, on the same token windows.

    python benchmarks/quantize.py MODEL --text TEXT [--gptqmodel PYTHON] [--llmcompressor PYTHON] [--judge TEXT]

GPTQ, symmetric int4. The windows are cut once by quantpress, stored as token ids and given to the peers as they are;
the sidecar's hash of them is checked. Commands run in turn (A B C A B C), after one small run of each that compiles
what a tool compiles once and brings the model into the page cache. Settings other than bits, group and symmetry are
each tool's own and recorded. quantpress also hashes its inputs and its output; nobody verifies. `--judge` compares the
last output of each with the model: mean KL divergence and perplexity, by one judge, from the files as written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, git_commit, machine
from measure import Sample, measure
from run import MIB, RESULTS, summary

PACKAGES = ("quantpress", "torch", "numpy", "numba")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Job:
    """What everybody is to do.

    Attributes:
        model: checkpoint folder.
        text: where the windows come from.
        windows: the windows' token ids, (samples, length) int32.
        samples, length, seed: how they are cut.
        bits, group_size: of the symmetric grid.
    """

    model: Path
    text: Path
    windows: Path
    samples: int
    length: int
    seed: int
    bits: int
    group_size: int


Command = Callable[[Job, Path], list[str]]


def quantpress(job: Job, out: Path) -> list[str]:
    """Command line of ours; it cuts the same windows from the text."""
    command = [sys.executable, "-m", "quantpress", "-q", "quantize", str(job.model), str(out), "--method", "gptq"]
    command += ["--bits", str(job.bits), "--group-size", str(job.group_size), "--symmetric", "--format", "gptq"]
    command += ["--calibration", str(job.text), "--samples", str(job.samples)]
    return [*command, "--sequence-length", str(job.length), "--seed", str(job.seed), "--no-verify", "--force"]


def peer(
    python: str, script: str, model: Path, windows: Path, out: Path, *, bits: int, group_size: int, dtype: str = "auto"
) -> list[str]:
    """Command line of a peer; GPTQModel needs to be told that there are two workers."""
    places = [str(HERE / script), str(model), str(windows), str(out)]
    return [
        "env", "GPTQMODEL_CPU_WORKERS=2", "HF_HUB_OFFLINE=1", python, *places, str(bits), str(group_size), dtype,
    ]  # fmt: skip


def tools(options: argparse.Namespace) -> dict[str, Command]:
    """Gives the tools that were named."""
    found: dict[str, Command] = {} if options.without_quantpress else {"quantpress": quantpress}
    named = {"gptqmodel": options.gptqmodel, "llmcompressor": options.llmcompressor}
    for name, python in named.items():
        if python:
            found[name] = partial(_peer_of_job, python, f"peer_{name}.py", options.dtype)
    return found


def _peer_of_job(python: str, script: str, dtype: str, job: Job, out: Path) -> list[str]:
    return peer(python, script, job.model, job.windows, out, bits=job.bits, group_size=job.group_size, dtype=dtype)


def cut(job: Job) -> str:
    """Writes the windows and gives their hash, as the sidecar will say it."""
    from quantpress.convert.calibration.windows import calibration_windows, windows_sha256
    from quantpress.convert.open import open_checkpoint
    from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles

    source = open_checkpoint(job.model)
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    ids = tokenizer.encode(job.text.read_text(encoding="utf-8"), special=False)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    windows = calibration_windows(ids, samples=job.samples, length=job.length, seed=job.seed, bos=bos)
    np.save(job.windows, np.stack(windows))
    return windows_sha256(windows)


def run_in_turn(
    commands: Mapping[str, Command], job: Job, small: Job, folder: Path, runs: int
) -> dict[str, list[Sample]]:
    """Runs every command once on the small job, then `runs` times in turn, each into an output of its own."""
    for name, command in commands.items():
        print(f"warm {name}: {measure(command(small, folder / f'warm-{name}')).wall:.1f} s", flush=True)
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for number in range(runs):
        for name, command in commands.items():
            samples[name].append(measure(command(job, folder / f"out-{name}-{number}")))
            last = samples[name][-1]
            print(f"{name}: {last.wall:.1f} s, CPU {last.cpu:.1f} s, {last.peak_bytes / MIB:.0f} MiB", flush=True)
    return samples


def settings_of(name: str, out: Path) -> dict[str, Any]:
    """What a tool says about its own run: the peers' settings file, our sidecar."""
    if name != "quantpress":
        return dict(json.loads(Path(f"{out}.settings.json").read_text()))
    sidecar = json.loads((out / "quantpress.json").read_text())
    said = {key: sidecar[key] for key in ("stages", "calibration", "timings") if key in sidecar}
    return {"versions": {package: version(package) for package in PACKAGES}, **said}


def breakdown(sidecar: Mapping[str, Any], sample: Sample, floor: Mapping[str, Any]) -> dict[str, Any]:
    """Where the wall seconds of our last run went; `quantize` is factors and column loops of all layers.

    The last two are the seconds of the layers and of the whole command over those of forward pass and factors alone.
    """
    stage = sidecar["timings"]["quantize"]
    totals: dict[str, float] = {}
    for layer in stage["parts"].values():
        for step, seconds in layer.items():
            totals[step] = totals.get(step, 0.0) + seconds
    layers = sum(totals.values())
    needed = floor["forward_s"] + floor["factor_s"]
    return {
        **{step: round(seconds, 2) for step, seconds in totals.items()},
        "packing_windows_input_output": round(stage["seconds"] - layers, 2),
        "start_and_end": round(sample.wall - stage["seconds"], 2),
        "layers_over_floor": round(layers / needed, 2),
        "command_over_floor": round(sample.wall / needed, 2),
    }


def floor_of(job: Job) -> dict[str, Any]:
    """The forward pass and the factors alone, in a process of their own; see forward_pass.py."""
    command = [sys.executable, str(HERE / "forward_pass.py"), str(job.model), str(job.windows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def judge(outputs: Mapping[str, Path], model: Path, text: Path, chunks: int) -> dict[str, Any]:
    """Mean KL divergence and perplexity of each output, read back by quantpress and run in torch."""
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.verification import Reference

    reference = Reference(open_checkpoint(model), JudgeOptions(text=text, chunks=chunks, runtime="torch"))
    found: dict[str, Any] = {}
    for name, out in outputs.items():
        parity = reference.judge(out, "INT4")
        if not parity.tokens:
            raise SystemExit(f"{name}: {parity.reason}")
        found[name] = {
            "mean_kld": parity.mean_kld,
            "mean_kld_stderr": parity.mean_kld_stderr,
            "perplexity": parity.candidate.perplexity,
            "perplexity_stderr": parity.candidate.stderr,
            "baseline_perplexity": parity.baseline.perplexity,
            "tokens": parity.tokens,
        }
        print(json.dumps({name: found[name]}), flush=True)
    return found


def compared(samples: Mapping[str, list[Sample]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of each tool, every run, and how many times ours is as fast, pair by pair."""
    tools: dict[str, Any] = {}
    for name, taken in samples.items():
        walls, cpus = [round(sample.wall, 2) for sample in taken], [round(sample.cpu, 2) for sample in taken]
        tools[name] = {**summary(taken), "walls_s": walls, "cpus_s": cpus, "settings": settings[name]}
        if name != "quantpress" and "quantpress" in samples:
            pairs = [theirs.wall / ours.wall for ours, theirs in zip(samples["quantpress"], taken, strict=True)]
            tools[name]["speed_ratio"] = round(statistics.median(pairs), 2)
            tools[name]["speed_ratios"] = [round(ratio, 2) for ratio in pairs]
    return tools


def benchmark(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cuts the windows, runs the tools, the floor and the judge."""
    figures = {"length": options.length, "seed": options.seed, "bits": options.bits, "group_size": options.group_size}
    place = {"model": options.model.resolve(), "text": options.text.resolve()}
    job = Job(**place, windows=folder / "windows.npy", samples=options.samples, **figures)
    small = Job(**place, windows=folder / "small.npy", samples=2, **figures)
    cut(small)
    sha256 = cut(job)
    load = os.getloadavg()
    samples = run_in_turn(tools(options), job, small, folder, options.runs)
    last = {name: folder / f"out-{name}-{options.runs - 1}" for name in samples}
    settings = {name: settings_of(name, out) for name, out in last.items()}
    seen = settings.get("quantpress", {}).get("calibration", {}).get("windows_sha256", sha256)
    if seen != sha256:
        raise SystemExit(f"quantpress calibrated on other windows than the peers: {seen}, wanted {sha256}")
    floor = floor_of(job)
    ours = (
        {"breakdown": breakdown(settings["quantpress"], samples["quantpress"][-1], floor)}
        if "quantpress" in samples
        else {}
    )
    return {
        "commit": git_commit(),
        "machine": machine(),
        "load_before": load,
        "job": {"model": options.model.name, "text": options.text.name, "samples": job.samples, **figures},
        "windows_sha256": sha256,
        "tools": compared(samples, settings),
        "floor": floor,
        **ours,
        "judged": judge(last, options.model, options.judge, options.chunks) if options.judge else {},
    }


def main() -> None:
    """Runs everything and writes benchmarks/results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--judge", type=Path, help="text on which the outputs are judged")
    parser.add_argument("--chunks", type=int, default=16, help="windows of 512 tokens that are judged")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="Python of an environment with gptqmodel")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="Python of an environment with llmcompressor")
    parser.add_argument("--dtype", default="auto", help="type that the peers compute in: auto, float32, bfloat16")
    parser.add_argument("--without-quantpress", action="store_true", help="peers only")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--name", default="quantize", help="name of the results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = benchmark(options, Path(name))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
