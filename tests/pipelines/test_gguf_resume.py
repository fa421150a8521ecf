"""A GGUF file whose blocks GPTQ finds, stopped at any place: the same command goes on and writes the same bytes."""

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
from tests.gguf_exports import GPTQ, export, wide_model
from tests.stopped_runs import LOOSE, stop_at, work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return wide_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run writes that nobody stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "out.gguf"
    export(model, out, **GPTQ)
    return out.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse_to_quantize(phase: str, done: int, total: int) -> None:
    assert phase not in ("quantizing", "embedding"), "every layer was finished before"


@pytest.mark.parametrize("layers", [0.5, 2.5])
def test_a_run_that_is_interrupted_in_a_layer_goes_on_with_it(
    model: Path, undisturbed: bytes, tmp_path: Path, layers: float, caplog: pytest.LogCaptureFixture
) -> None:
    out, finished = tmp_path / "out.gguf", int(layers)
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("quantizing", layers))
    assert not out.exists()
    caplog.clear()
    export(model, out, **GPTQ, threads=1)
    assert out.read_bytes() == undisturbed
    assert (f"going on with layer {finished}" in caplog.text) == bool(finished)
    assert names(tmp_path) == ["out.gguf", "out.gguf.quantpress.json"]


def test_a_run_that_is_interrupted_while_it_writes_goes_on(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("write", 0))
    assert names(tmp_path) == [work(out).name]
    export(model, out, **GPTQ, progress=refuse_to_quantize)
    assert out.read_bytes() == undisturbed
    assert names(tmp_path) == ["out.gguf", "out.gguf.quantpress.json"]


def test_a_file_that_was_not_proved_yet_is_proved_by_the_same_command_and_no_other(
    model: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, judge=LOOSE, progress=stop_at("prove", 0))
    assert out.read_bytes() == undisturbed
    assert not Path(f"{out}.quantpress.json").exists()
    for other in ({"seed": 1}, {"pure": True}, {"output_tensor_type": "bf16"}, {"method": "rtn"}):
        with pytest.raises(qp.UsageError, match="--force"):
            export(model, out, **{**GPTQ, **other}, judge=LOOSE)
    pressed = export(model, out, **GPTQ, judge=LOOSE, progress=refuse_to_quantize)
    assert pressed.parity is not None
    assert out.read_bytes() == undisturbed
    assert names(tmp_path) == ["out.gguf", "out.gguf.quantpress.json"]
    with pytest.raises(qp.UsageError, match="--force"):
        export(model, out, **GPTQ, judge=LOOSE)


def test_another_option_starts_anew(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, change = tmp_path / "stopped" / "out.gguf", {"damping": 0.1}
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("quantizing", 1.5))
    export(model, out, **GPTQ, **change)
    assert "thrown away" in caplog.text
    export(model, tmp_path / "clean.gguf", **GPTQ, **change)
    assert out.read_bytes() == (tmp_path / "clean.gguf").read_bytes()


def test_several_files_go_on_too(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**GPTQ, "split_max_tensors": 20}
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **options, judge=LOOSE, progress=stop_at("prove", 0))
    parts = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    assert len(parts) == 2
    assert work(out).exists()
    with pytest.raises(qp.UsageError, match="--force"):
        export(model, out, **options, seed=1, judge=LOOSE)
    export(model, out, **options, judge=LOOSE, progress=refuse_to_quantize)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")} == parts
    assert names(tmp_path) == sorted([*parts, f"{min(parts)}.quantpress.json"])


def test_a_damaged_layer_is_done_again(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        export(model, out, **GPTQ, progress=stop_at("write", 0))
    kept = sorted(work(out).glob("*.safetensors"))[1]
    data = bytearray(kept.read_bytes())
    data[-5] ^= 1
    kept.write_bytes(data)
    export(model, out, **GPTQ)
    assert out.read_bytes() == undisturbed


def test_a_second_run_on_the_same_output_is_told(model: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.gguf", list[str]()

    def meanwhile(phase: str, _done: int, _total: int) -> None:
        if phase == "quantizing" and not seen:
            seen.append(phase)
            for other in ({}, {"method": "rtn"}):
                with pytest.raises(qp.BusyError):
                    export(model, out, **{**GPTQ, **other})

    export(model, out, **GPTQ, progress=meanwhile)
    assert seen


def started(model: Path, out: Path) -> subprocess.Popen[str]:
    flags = ("--outtype", "q3_k_m", "--method", "gptq", "--samples", "4", "--sequence-length", "32", "--no-verify")
    command: Sequence[str] = [sys.executable, "-m", "quantpress", "convert", str(model), str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_is_killed_goes_on_to_the_same_bytes(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    process, journal = started(model, out), work(out) / "journal.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and b'"layer 0"' in journal.read_bytes():
            break
        time.sleep(0.001)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert not out.exists()
    again = started(model, out)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "going on with layer" in errors
    assert out.read_bytes() == undisturbed
    assert names(tmp_path) == ["out.gguf", "out.gguf.quantpress.json"]
