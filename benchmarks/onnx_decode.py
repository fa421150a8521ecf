"""Measures how fast ONNX files of several writers run on the CPU: prefill and decode, tokens a second.

    python benchmarks/onnx_decode.py --builder PYTHON [--model FOLDER] [--keep FOLDER] [--profile]

quantpress and onnxruntime-genai's builder export the same model to int4 (symmetric, blocks of 32), with accuracy levels
0 and 4; the files run under one driver in one process, in turn, 128 tokens of prompt and 64 more. Two drivers: plain
onnxruntime with the cache handed on as it came, and onnxruntime-genai's own generator with its shared cache. `--keep`
keeps the exports, so that a second call only measures; `--profile` says where a token spends its time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from machine import ROOT, git_commit, machine
from measure import measure
from onnx_export import builder, quantpress, versions
from run import HALF_BILLION, RESULTS, make_checkpoint

PROMPT, DECODED = 128, 64
LEVELS = (0, 4)
_PAUSE_S = 0.1  # idle threads of the session before spin for a while: they must not take this one's cores
_WARM_STEPS = 4


class Driver(Protocol):
    """Runs one file: a prompt, then token by token."""

    def run(self, ids: list[int]) -> tuple[float, float, list[int]]:
        """Gives seconds of the prompt, seconds of the tokens after it, and these tokens."""
        ...


class OrtDriver:
    """Plain onnxruntime: greedy, what comes out as cache goes in again without a copy."""

    def __init__(self, folder: Path, threads: int, *, profile: Path | None = None) -> None:
        """Opens the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)

    def run(self, ids: list[int]) -> tuple[float, float, list[int]]:
        """As `Driver.run`."""
        empty = onnxruntime.OrtValue.ortvalue_from_numpy(self.empty)
        cache = {name: empty for name in self.inputs if name.startswith("past_key_values.")}
        start = time.perf_counter()
        token, cache = self._step(ids, len(ids), cache)
        middle, added = time.perf_counter(), [token]
        for number in range(DECODED):
            token, cache = self._step([token], len(ids) + number + 1, cache)
            added.append(token)
        return middle - start, time.perf_counter() - middle, added

    def _step(self, ids: list[int], total: int, cache: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        given = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        if "position_ids" in self.inputs:
            given["position_ids"] = np.arange(total - len(ids), total, dtype=np.int64)[None]
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()}
        results = self.session.run_with_ort_values(self.outputs, {**feeds, **cache})
        named = dict(zip(self.outputs, results, strict=True))
        token = int(named.pop("logits").numpy()[0, -1].argmax())
        return token, {name.replace("present", "past_key_values"): value for name, value in named.items()}


class GenaiDriver:
    """onnxruntime-genai's generator: greedy, one cache buffer for all steps."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Opens the folder."""
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(folder))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._genai, self.model = onnxruntime_genai, onnxruntime_genai.Model(config)

    def run(self, ids: list[int]) -> tuple[float, float, list[int]]:
        """As `Driver.run`."""
        parameters = self._genai.GeneratorParams(self.model)
        length = len(ids) + DECODED + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self.model, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array([ids], np.int32))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(DECODED):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle, generator.get_sequence(0)[len(ids) :].tolist()


def exports(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Exports what is not there yet; gives the folders by writer and level."""
    model = folder / "half-billion" if options.model is None else options.model.resolve()
    if options.model is None and not model.exists():
        make_checkpoint(model, HALF_BILLION)
    found: dict[str, Path] = {}
    for level in LEVELS:
        commands = {"quantpress": quantpress("int4", level)}
        if options.builder:
            commands["genai-builder"] = builder(options.builder, level)
        for name, command in commands.items():
            found[f"{name} {level}"] = out = folder / f"{name}-level-{level}"
            if not (out / "genai_config.json").exists():
                print(f"exporting {out.name}: {measure(command(model, out)).wall:.1f} s", flush=True)
    return found


def in_turn(drivers: Mapping[str, Driver], ids: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs every file once to warm up and then in turn; gives tokens a second and, of ours, ratios pair by pair."""
    taken: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in drivers}
    for number in range(rounds + 1):
        for name, driver in drivers.items():
            time.sleep(_PAUSE_S)
            done = driver.run(ids)
            if number:
                taken[name].append(done)
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in taken.items():
        prefill, decode = [PROMPT / run[0] for run in runs], [DECODED / run[1] for run in runs]
        rows[name] = {
            "prefill_tokens_s": round(statistics.median(prefill), 1),
            "decode_tokens_s": round(statistics.median(decode), 2),
            "decode_all": [round(speed, 2) for speed in decode],
            "first_tokens": runs[0][2][:8],
        }
        theirs = taken.get(name.replace("quantpress", "genai-builder"))
        if name.startswith("quantpress") and theirs:
            pairs = list(zip(runs, theirs, strict=True))
            rows[name]["prefill_ratio"] = round(statistics.median(peer[0] / mine[0] for mine, peer in pairs), 3)
            rows[name]["decode_ratio"] = round(statistics.median(peer[1] / mine[1] for mine, peer in pairs), 3)
        print(name, json.dumps(rows[name]), flush=True)
    return rows


def profile(folder: Path, ids: list[int], threads: int) -> dict[str, float]:
    """Milliseconds that a decoded token spends in each operator, the costliest first; the prompt is left out."""
    with tempfile.TemporaryDirectory() as name:
        driver = OrtDriver(folder, threads, profile=Path(name) / "run")
        driver.run(ids)
        events = json.loads(Path(driver.session.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    begin = sorted(runs, key=lambda event: int(event["ts"]))[_WARM_STEPS]["ts"]
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event["ts"] < begin:
            continue
        if event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
        elif event["name"] == "model_run":
            spent["whole run"] += event["dur"]
    steps = len(runs) - _WARM_STEPS
    return {op: round(spent[op] / steps / 1000, 4) for op in sorted(spent, key=lambda op: -spent[op])}


def benchmark(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Exports, runs and profiles."""
    folders = exports(options, folder)
    vocabulary = json.loads((folders["quantpress 0"] / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocabulary, PROMPT).tolist()
    result: dict[str, Any] = {"threads": options.threads, "prompt": PROMPT, "decoded": DECODED}
    for kind, driver in (("onnxruntime", OrtDriver), ("onnxruntime-genai", GenaiDriver)):
        result[kind] = {}
        for level in LEVELS:
            print(f"{kind}, accuracy level {level}", flush=True)
            chosen = {name: place for name, place in folders.items() if name.endswith(f" {level}")}
            drivers = {name: driver(place, options.threads) for name, place in chosen.items()}
            result[kind].update(in_turn(drivers, ids, options.rounds))
    if options.profile:
        result["profile_ms"] = {name: profile(place, ids, options.threads) for name, place in folders.items()}
        print(json.dumps(result["profile_ms"], indent=1))
    return result


def main() -> None:
    """Runs everything and writes benchmarks/results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", metavar="PYTHON", help="Python of an environment with onnxruntime-genai's builder")
    parser.add_argument("--model", type=Path, help="checkpoint folder instead of a new random one")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where exports are kept and found again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also say where a decoded token's time goes")
    parser.add_argument("--name", default="onnx_decode", help="name of the results file")
    options = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
        done = benchmark(options, options.keep or Path(name))
    result = {"commit": git_commit(), "machine": machine(), "load_before": load, "versions": versions(sys.executable)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result | done, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
