"""Measures six outputs of one GPTQ calibration: one pipeline file beside six separate commands.

    python benchmarks/batch.py MODEL [--calibration TEXT] [--text TEXT] [--samples N] [--repeats N]

Both prove every output. Commands run in turn, whole process, as the operating system accounts them; the peak is that of
the largest process. The pipeline runs once more at the end: nothing is left to do then. Figures go to
benchmarks/results/batch.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import ROOT, git_commit, machine
from measure import Sample, measure

from quantpress.pipelines.hashing import hash_file

FORMATS = ("gptq", "gptq_v2", "compressed-tensors", "awq")
GROUP = 32  # columns that share a scale: what GGUF's Q4_0 has, and all others can have
PROGRAM = str(ROOT / ".venv" / "bin" / "quantpress")
RESULTS = Path(__file__).resolve().parent / "results" / "batch.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is pressed and how.

    Attributes:
        model: the source.
        calibration, text: None for the built-in ones.
        samples: windows of the calibration.
        chunks: windows of the judge.
    """

    model: Path
    calibration: Path | None
    text: Path | None
    samples: int
    chunks: int

    @property
    def gptq(self) -> dict[str, Any]:
        """The stage's options."""
        options = {"bits": 4, "group_size": GROUP, "symmetric": True, "samples": self.samples}
        return options | ({"calibration": str(self.calibration)} if self.calibration else {})

    @property
    def judging(self) -> list[str]:
        """The commands' flags."""
        return [*(["--text", str(self.text)] if self.text else []), "--chunks", str(self.chunks)]

    @property
    def calibrating(self) -> list[str]:
        """The commands' flags."""
        named = ["--calibration", str(self.calibration)] if self.calibration else []
        return ["--method", "gptq", "--samples", str(self.samples), *named]


def pipeline(case: Case, folder: Path) -> list[list[str]]:
    """Writes the pipeline file; gives the one command."""
    outputs: list[dict[str, Any]] = [{"safetensors": {"format": form, "output": form}} for form in FORMATS]
    outputs += [{"onnx": {"output": "onnx"}}, {"gguf": {"outtype": "Q4_0", "output": "Q4_0.gguf", "model_name": "six"}}]
    file = {
        "version": 1,
        "cache": "cache",
        "defaults": {"chunks": case.chunks, **({"text": str(case.text)} if case.text else {})},
        "jobs": [{"name": "six", "model": str(case.model), "stages": [{"gptq": case.gptq}, *outputs]}],
    }
    path = folder / "six.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False), encoding="utf-8")
    return [[PROGRAM, "-q", "run", str(path)]]


def commands(case: Case, folder: Path) -> dict[str, list[list[str]]]:
    """Gives what makes each output by itself; a GGUF file takes three: codes, file, proof against the model."""
    codes = ["--bits", "4", "--group-size", str(GROUP), "--symmetric", "--scale-type", "f16"]
    quantize = [PROGRAM, "-q", "quantize", str(case.model)]
    made = {
        form: [[*quantize, str(folder / form), "--format", form, *codes, *case.calibrating, *case.judging]]
        for form in FORMATS
    }
    convert, onnx = [PROGRAM, "-q", "convert"], [str(case.model), str(folder / "onnx"), "--to", "onnx"]
    int4 = ["--precision", "int4", "--block-size", str(GROUP), "--symmetric"]
    made["onnx"] = [[*convert, *onnx, *int4, *case.calibrating, *case.judging]]
    between, file = str(folder / "between"), str(folder / "Q4_0.gguf")
    made["gguf"] = [
        [*quantize, between, "--format", "gptq", *codes, *case.calibrating, "--no-verify"],
        [*convert, between, file, "--outtype", "q4_0", "--model-name", "six", "--no-verify"],
        [PROGRAM, "-q", "verify", file, "--against", str(case.model), *case.judging],
    ]
    return made


def together(steps: Sequence[Sample]) -> Sample:
    """Gives commands that run one after the other as one."""
    return Sample(
        sum(step.wall for step in steps), sum(step.cpu for step in steps), max(step.peak_bytes for step in steps)
    )


def differing(one: Path, other: Path) -> list[str]:
    """Names the outputs whose weights are not the same bytes."""
    names = [*(f"{form}/model.safetensors" for form in FORMATS), "onnx/model.onnx.data", "Q4_0.gguf"]
    return [name for name in names if hash_file(one / name)[0] != hash_file(other / name)[0]]


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Runs both ways once, in an empty folder."""
    batch, apart = folder / "batch", folder / "apart"
    batch.mkdir()
    apart.mkdir()
    run = pipeline(case, batch)
    first = together([measure(command) for command in run])
    again = together([measure(command) for command in run])
    print(
        f"pipeline: {first.wall:.1f} s ({first.cpu:.1f} of CPU), then {again.wall:.1f} s ({again.cpu:.1f})", flush=True
    )
    alone = {}
    for name, steps in commands(case, apart).items():
        alone[name] = together([measure(step) for step in steps])
        print(f"{name}: {alone[name].wall:.1f} s ({alone[name].cpu:.1f} of CPU)", flush=True)
    found = {"pipeline": first, "again": again, **alone, "apart": together(list(alone.values()))}
    record: dict[str, Any] = {name: dataclasses.asdict(sample) for name, sample in found.items()}
    ratios = {"ratio": first.wall / found["apart"].wall, "cpu_ratio": first.cpu / found["apart"].cpu}
    return record | ratios | {"differing": differing(batch, apart)}


def main() -> None:
    """Measures, and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: Path(text).resolve())
    parser.add_argument("--calibration", type=lambda text: Path(text).resolve())
    parser.add_argument("--text", type=lambda text: Path(text).resolve())
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    case, runs = Case(**options), []
    for _ in range(repeats):
        folder = Path(tempfile.mkdtemp(prefix="quantpress-batch-"))
        try:
            runs.append(compare(case, folder))
        finally:
            shutil.rmtree(folder)
        now = runs[-1]
        print(f"ratio {now['ratio']:.3f} ({now['cpu_ratio']:.3f} of CPU), other bytes: {now['differing'] or 'none'}")
    ratio = statistics.median(run["ratio"] for run in runs)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    settings["model"] = case.model.name
    record = {"commit": git_commit(), "machine": machine(), "settings": settings, "ratio": ratio, "runs": runs}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(f"one pipeline takes {ratio:.2f} of the time of six commands; wrote {RESULTS}")


if __name__ == "__main__":
    main()
