"""The pipeline files in examples/, run as they stand on small models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.commands.peft_adapters import make_adapter
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
# Random models lose more to rounding than trained ones: here the files are to be made and run, limits are judged below.
LOOSE = {"defaults.max_kld": 9, "defaults.max_ppl_change": 9, "defaults.min_top1": 0, "defaults.chunks": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("examples") / "tiny-llama", "llama", dtype="bfloat16")


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of the folder, so that nothing is written into the repository."""
    return Path(shutil.copytree(ROOT / "examples", tmp_path / "work" / "examples"))


def run(file: Path, values: Mapping[str, Any], *flags: str) -> subprocess.CompletedProcess[str]:
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    command: Sequence[str] = [sys.executable, "-m", "quantpress", "run", str(file), "--workers", "0", *sets, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def result_of(ended: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert ended.returncode == code, ended.stderr + ended.stdout
    record: dict[str, Any] = json.loads(ended.stdout)
    return record


def outputs(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {Path(output["path"]).name: output for job in result["jobs"] for output in job["outputs"]}


def test_there_is_a_line_in_the_readme_for_every_example() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert EXAMPLES
    for path in EXAMPLES:
        assert f"({path.name})" in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_begins_with_the_command_that_runs_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("version:")[0]
    assert f"quantpress run examples/{path.name}" in head


def test_a_release_is_six_files_from_one_calibration(model: Path, examples: Path, tmp_path: Path) -> None:
    file = examples / "release.yaml"
    values = {"model": model, "name": "tiny", "out": tmp_path / "out", **LOOSE}
    result = result_of(run(file, values, "--json"))
    found = outputs(result)
    kinds = {name: (output["kind"], output["ftype"].upper()) for name, output in found.items()}
    assert kinds == {
        "tiny-F16.gguf": ("gguf", "F16"),
        "tiny-Q8_0.gguf": ("gguf", "Q8_0"),
        "tiny-gptq": ("safetensors", "INT4"),
        "tiny-w4a16": ("safetensors", "INT4"),
        "tiny-onnx-int4": ("onnx", "INT4"),
        "tiny-gptq-Q4_0.gguf": ("gguf", "Q4_0"),
    }
    assert all(output["parity"]["passed"] for output in found.values())
    assert {output["parity"]["candidate"]["runtime"] for output in found.values()} >= {"llama.cpp", "onnxruntime"}
    # the same codes: what differs is how each runtime rounds activations
    int4 = [found[name]["parity"]["mean_kld"] for name in ("tiny-gptq", "tiny-w4a16", "tiny-onnx-int4")]
    assert max(int4) - min(int4) < 0.05 * max(int4)
    assert found["tiny-Q8_0.gguf"]["parity"]["mean_kld"] < min(int4)

    again = result_of(run(file, values, "--json"))
    assert all(job["cached"] for job in again["jobs"])
    assert {name: output["parity"] for name, output in outputs(again).items()} == {
        name: output["parity"] for name, output in found.items()
    }


def test_gguf_files_of_all_sizes_share_one_importance_matrix(examples: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny_checkpoint(tmp_path / "wide", "llama", dtype="bfloat16", **sizes)
    values = {"model": model, "name": "tiny", "out": tmp_path / "out", "samples": 32, **LOOSE}
    result = result_of(run(examples / "gguf.yaml", values, "--json"))
    found = outputs(result)
    assert [found[f"tiny-{kind}.gguf"]["ftype"] for kind in ("Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")] == [
        "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K",
    ]  # fmt: skip
    loss = {name: output["parity"]["mean_kld"] for name, output in found.items()}
    assert loss["tiny-Q3_K_M.gguf"] > loss["tiny-Q4_K_M.gguf"] > loss["tiny-Q5_K_M.gguf"] > loss["tiny-Q6_K.gguf"]
    assert loss["tiny-gptq-Q4_K_M.gguf"] < loss["tiny-Q4_K_M.gguf"]
    assert all(output["parity"]["candidate"]["runtime"] == "llama.cpp" for output in found.values())


def test_adapters_by_formats_are_proved_against_base_and_adapter(model: Path, examples: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    make_adapter(model, adapters / "tone")
    make_adapter(model, adapters / "facts", seed=1, target_modules=["v_proj", "up_proj"], use_rslora=True)
    values = {"model": model, "adapters": adapters, "out": tmp_path / "out", **LOOSE}
    found = outputs(result_of(run(examples / "adapters.yaml", values, "--json")))
    assert set(found) == {
        "tone-F16.gguf", "tone-Q8_0.gguf", "tone-Q4_0.gguf", "facts-F16.gguf", "facts-Q8_0.gguf", "blend",
    }  # fmt: skip
    assert all(output["parity"]["passed"] for output in found.values())
    ledger = json.loads((tmp_path / "out" / "blend" / "quantpress.json").read_text())
    text = json.dumps(ledger)
    assert '"weight": 0.7' in text
    assert '"weight": 0.5' in text
    perplexity = {name: output["parity"]["baseline"]["perplexity"] for name, output in found.items()}
    assert perplexity["tone-F16.gguf"] == perplexity["tone-Q4_0.gguf"]  # one reading of the source for each adapter
    assert len({perplexity[name] for name in ("tone-F16.gguf", "facts-F16.gguf", "blend")}) == 3


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The sweep, with its report."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(ROOT / "examples", folder / "examples")
    values = {"model": model, "samples": 8, "out": folder / "out", "defaults.chunks": 4}
    report = folder / "sweep.html"
    ended = run(folder / "examples" / "gptq-sweep.yaml", values, "--json", "--report", str(report))
    return result_of(ended), report


def test_a_sweep_measures_all_and_judges_none(swept: tuple[dict[str, Any], Path]) -> None:
    result, report = swept
    found = outputs(result)
    loss = {name: output["parity"]["mean_kld"] for name, output in found.items()}
    assert set(loss) == {"4-32", "4--1", "3-32", "3--1", "rtn-4", "rtn-3"}
    assert loss["4-32"] < loss["3-32"]
    assert loss["4--1"] < loss["3--1"]
    assert loss["rtn-4"] < loss["rtn-3"]
    assert all(name in report.read_text(encoding="utf-8") for name in ("gptq-int4-g32", "rtn-int3"))


def test_a_sweep_takes_a_text_of_its_own(model: Path, examples: Path, tmp_path: Path) -> None:
    text = tmp_path / "held out.txt"
    text.write_text("What was pressed in the morning is read in the evening. " * 200)
    values = {"model": model, "samples": 4, "out": tmp_path / "out", "text": text}
    result = result_of(run(examples / "gptq-sweep.yaml", values, "--job", "rtn-int4", "--json"))
    hashes = {output["parity"]["text_sha256"] for output in outputs(result).values()}
    assert hashes == {hashlib.sha256(text.read_bytes()).hexdigest()}


@pytest.mark.slow
def test_a_release_of_a_trained_model_passes_the_limits_of_its_types(
    shared: Path, examples: Path, tmp_path: Path
) -> None:
    values = {"model": shared / "models" / "mix6m-hf", "name": "mix6m", "out": tmp_path / "out"}
    values |= {"samples": 16, "defaults.chunks": 2}
    found = outputs(result_of(run(examples / "release.yaml", values, "--json")))
    assert len(found) == 6
    assert all(output["parity"]["passed"] for output in found.values())
