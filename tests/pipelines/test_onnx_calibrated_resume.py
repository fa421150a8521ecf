"""A calibrated ONNX export that is stopped, at any place, goes on and gives the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from tests.onnx_exports import GPTQ, export, files
from tests.stopped_runs import LOOSE, stop_at, work
from tests.tiny import tiny_checkpoint

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("calibrated") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that nobody stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    export(model, out, **GPTQ)
    return files(out)


def refuse_to_quantize(phase: str, done: int, total: int) -> None:
    assert phase != "quantizing", "every layer was finished before"


@pytest.mark.parametrize("layers", [0.5, 1.5, 2.5])
def test_a_run_that_is_interrupted_in_a_layer_goes_on_with_it(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, layers: float, caplog: pytest.LogCaptureFixture
) -> None:
    out, finished = tmp_path / "out", int(layers)
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("quantizing", layers))
    assert not out.exists()
    assert work(out).exists() == bool(finished)
    caplog.clear()
    export(model, out, **GPTQ)
    assert files(out) == undisturbed
    assert (f"going on with layer {finished}" in caplog.text) == bool(finished)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_interrupted_while_it_writes_goes_on(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("write", 0))
    assert [path.name for path in tmp_path.iterdir()] == [work(out).name]
    export(model, out, **GPTQ, progress=refuse_to_quantize)
    assert files(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_not_proved_yet_is_proved_by_the_same_command_and_no_other(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, judge=LOOSE, progress=stop_at("prove", 0))
    assert files(out) == undisturbed
    assert not (out / "quantpress.json").exists()
    for other in ({"seed": 1}, {"opset": 24}, {"output_tensor_type": "bf16"}):
        with pytest.raises(qp.UsageError, match="--force"):
            export(model, out, **GPTQ, **other, judge=LOOSE)
    pressed = export(model, out, **GPTQ, judge=LOOSE, progress=refuse_to_quantize)
    assert pressed.parity is not None
    assert pressed.parity.passed
    assert files(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(qp.UsageError, match="--force"):
        export(model, out, **GPTQ, judge=LOOSE)
    export(model, out, **GPTQ, force=True)
    assert files(out) == undisturbed


@pytest.mark.parametrize("change", [{"seed": 1}, {"block_size": 16}, {"drift": 0.0}])
def test_another_option_starts_anew(
    model: Path, tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "stopped" / "out"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("quantizing", 1.5))
    export(model, out, **{**GPTQ, **change})
    assert "thrown away" in caplog.text
    export(model, tmp_path / "clean", **{**GPTQ, **change})
    assert files(out) == files(tmp_path / "clean")


def test_what_awq_folds_into_norms_is_kept_too(model: Path, tmp_path: Path) -> None:
    options = {**GPTQ, "method": "awq"}
    export(model, tmp_path / "clean", **options)
    out = tmp_path / "stopped" / "out"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **options, progress=stop_at("quantizing", 1.5))
    assert work(out).exists()
    export(model, out, **options, threads=1)
    assert files(out) == files(tmp_path / "clean")


def test_hqq_keeps_nothing_beside_the_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, method="hqq", progress=stop_at("write", 1))
    assert list(tmp_path.iterdir()) == []
    assert Onnx(output=out, precision="int4", method="hqq").plan(open_checkpoint(model)).work_bytes == 0


def started(model: Path, out: Path) -> subprocess.Popen[str]:
    flags = ("--to", "onnx", "--precision", "int4", "--method", "gptq", "--block-size", "32", "--samples", "4")
    command: Sequence[str] = [sys.executable, "-m", "quantpress", "convert", str(model), str(out), *flags]
    command = [*command, "--sequence-length", "32", "--no-verify"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_is_killed_goes_on_to_the_same_bytes(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process, journal = started(model, out), work(out) / "journal.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") > 1:
            break
        time.sleep(0.001)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert not out.exists()
    again = started(model, out)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "going on with layer" in errors
    assert files(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
