"""A package with stages of its own, installed by pip and used by the program, as docs/write-a-stage.md has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "tests" / "stage_package"
GUIDE = ROOT / "docs" / "write-a-stage.md"


def blocks(language: str) -> list[str]:
    """The guide's blocks of code."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_guide_shows_the_files_that_are_tested() -> None:
    assert blocks("python") == [(PACKAGE / "weight_stages.py").read_text(encoding="utf-8")]
    assert blocks("toml") == [(PACKAGE / "pyproject.toml").read_text(encoding="utf-8")]


def test_a_stage_takes_thirty_lines_of_code() -> None:
    text = (PACKAGE / "weight_stages.py").read_text(encoding="utf-8")
    for body in text.split("@dataclasses.dataclass(frozen=True, kw_only=True)\n")[1:]:
        code = re.sub(r'"""(.|\n)*?"""', "", body)
        assert len([line for line in code.splitlines() if line.strip()]) <= 30


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed into a folder, without network."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the package")
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", folder / "site", source], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("there is no pip")
    assert done.returncode == 0, done.stderr
    return folder / "site"


def program(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the program where the package is installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quantpress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_installed_stages_are_listed_with_their_options(site: Path) -> None:
    stages = {stage["name"]: stage for stage in json.loads(program(site, "stages", "--json").stdout)}
    scale, weights = stages["scale"], stages["weight_list"]
    assert (scale["kind"], scale["package"]) == ("lazy", "weight-stages 1.0")
    assert weights["kind"] == "building"
    assert [(each["name"], each["type"], each["required"], each["default"]) for each in scale["options"]] == [
        ("pattern", "text", True, None),
        ("factor", "number", False, 1.0),
    ]
    assert "gguf" in stages


@pytest.fixture(scope="module")
def pressed(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's pipeline has been run, by workers in processes of their own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").mkdir()
    tiny_checkpoint(folder / "model", "llama")
    (pipeline,) = blocks("yaml")
    (folder / "p.yaml").write_text(pipeline, encoding="utf-8")
    done = program(site, "run", folder / "p.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "result.json").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_the_guides_pipeline_scales_lists_and_is_proved(pressed: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    tensors = load_file(pressed / "model" / "model.safetensors")
    lines = [line.split("\t") for line in (pressed / "out/weights.txt").read_text().splitlines()]
    assert lines[0] == ["name", "type", "shape"]
    assert {line[0]: json.loads(line[2]) for line in lines[1:]} == {k: list(v.shape) for k, v in tensors.items()}
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(pressed / "out/scaled.gguf").tensors}
    np.testing.assert_array_equal(written["output.weight"], tensors["lm_head.weight"] * np.float32(0.5))
    np.testing.assert_array_equal(written["token_embd.weight"], tensors["model.embed_tokens.weight"])
    (job,) = json.loads((pressed / "result.json").read_text())["jobs"]
    listed, scaled = job["outputs"]
    assert (listed["kind"], listed["parity"]) == ("list", None)
    assert scaled["parity"]["passed"]  # the yardstick is scaled too
    sidecar = json.loads((pressed / "out/scaled.gguf.quantpress.json").read_text())
    text = json.dumps(sidecar)
    assert '"factor": 0.5' in text


@pytest.mark.slow
def test_what_a_third_party_stage_made_is_found_again_until_its_options_change(pressed: Path, site: Path) -> None:
    again = json.loads(program(site, "run", pressed / "p.yaml", "--json").stdout)
    assert [job["cached"] for job in again["jobs"]] == [True]
    text = (pressed / "p.yaml").read_text()
    (pressed / "q.yaml").write_text(text.replace("factor: 0.5", "factor: 0.25"))
    done = program(site, "run", pressed / "q.yaml", "--json", "--dry-run", "--force")
    assert done.returncode == 0, done.stderr
    assert "cached" not in {row["state"] for row in json.loads(done.stdout)["steps"]}


def test_errors_of_a_third_party_stage_are_one_line_with_its_place(site: Path, tmp_path: Path) -> None:
    (pipeline,) = blocks("yaml")
    path = tmp_path / "p.yaml"
    path.write_text(pipeline.replace("factor: 0.5", "fctor: 0.5").replace("./model", "org/name"))
    done = program(site, "run", path, "--dry-run")
    assert done.returncode == 2
    place = f"error: {path}:6:35: unknown key 'fctor' of scale; did you mean \"factor\"?"
    assert done.stderr.splitlines()[-1] == place
