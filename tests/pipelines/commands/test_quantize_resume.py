"""A run of `quantize` that is stopped, at any place and in any way, goes on and gives the same bytes."""

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
from tests.pipelines.commands.quantized_folders import files
from tests.stopped_runs import LAYERS, LOOSE, stop_at, work
from tests.tiny import tiny_checkpoint

GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 32, "samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that nobody stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    qp.quantize(model, out, **GPTQ)
    return files(out)


def interrupted(model: Path, out: Path, phase: str, layers: float, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        qp.quantize(model, out, **{**GPTQ, **options}, progress=stop_at(phase, layers))


@pytest.mark.parametrize("layers", [0.5, 1, 1.25, 1.75, 2, 2.5, 3])
def test_a_run_that_is_interrupted_in_a_layer_goes_on_with_it(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, layers: float, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    interrupted(model, out, "quantizing", layers)
    finished = max(0, -int(-layers // 1) - 1)  # progress is told before a layer is handed over
    assert not out.exists()
    assert work(out).exists() == bool(finished)
    assert ("keeps what is finished" in caplog.text) == bool(finished)
    caplog.clear()
    qp.quantize(model, out, **GPTQ)
    assert files(out) == undisturbed
    assert (f"going on with layer {finished}" in caplog.text) == bool(finished)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_goes_on_again_and_again(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(LAYERS):
        interrupted(model, out, "quantizing", 1.5)  # of the layers that are left
    qp.quantize(model, out, **GPTQ)
    assert files(out) == undisturbed


def test_a_run_that_is_interrupted_while_it_writes_goes_on(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    interrupted(model, out, "writing", 0)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [work(out).name]
    caplog.clear()
    qp.quantize(model, out, **GPTQ, progress=refuse_to_quantize)
    assert files(out) == undisturbed


def refuse_to_quantize(phase: str, done: int, total: int) -> None:
    assert phase != "quantizing", "every layer was finished before"


def test_a_folder_that_was_not_proved_yet_is_proved_by_the_same_command_and_no_other(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, judge = tmp_path / "out", {"verify": True, "judge": LOOSE}
    interrupted(model, out, "prove", 0, **judge)
    assert files(out) == undisturbed
    assert not (out / "quantpress.json").exists()
    with pytest.raises(qp.UsageError, match="--force"):
        qp.quantize(model, out, **{**GPTQ, "seed": 1}, **judge)
    pressed = qp.quantize(model, out, **GPTQ, **judge, progress=refuse_to_quantize)
    assert pressed.parity is not None
    assert pressed.parity.passed
    assert files(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(qp.UsageError, match="--force"):
        qp.quantize(model, out, **GPTQ, **judge)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"samples": 5}, {"bits": 3}, {"damping": 0.02}, {"act_order": False}, {"skip": ("k_proj",)},
     {"override": ("down_proj=bits:8",)}, {"group_size": -1}, {"symmetric": False}],
)  # fmt: skip
def test_another_option_starts_anew(
    model: Path, tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "stopped" / "out"
    interrupted(model, out, "quantizing", 1.5)
    qp.quantize(model, out, **{**GPTQ, **change})
    assert "thrown away" in caplog.text
    qp.quantize(model, tmp_path / "clean" / "out", **{**GPTQ, **change})
    assert files(out) == files(tmp_path / "clean" / "out")


def test_another_text_or_another_model_starts_anew(
    model: Path, tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    own = tmp_path / "model"
    tiny_checkpoint(own, "llama", dtype="bfloat16")
    interrupted(own, out, "quantizing", 1.5, calibration=text)
    text.write_text(text_file.read_text().replace("small", "large"))
    interrupted(own, out, "quantizing", 1.5, calibration=text)
    assert caplog.text.count("thrown away") == 1
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same bytes at another time: nobody has looked whether they are
    interrupted(own, out, "quantizing", 1.5, calibration=text)
    assert caplog.text.count("thrown away") == 2


@pytest.mark.parametrize("name", ["00000.safetensors", "00001.safetensors", "inputs-of-layer-2.f32", "journal.jsonl"])
def test_damage_is_noticed_and_done_again(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    interrupted(model, out, "quantizing", 2.5)
    path = next(work(out).rglob(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    qp.quantize(model, out, **GPTQ)
    assert files(out) == undisturbed


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_methods_that_change_other_tensors_go_on_too(model: Path, tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "samples": 4, "sequence_length": 32}
    options |= {"group_size": 32} if method == "awq" else {}
    qp.quantize(model, tmp_path / "clean" / "out", **options)
    out = tmp_path / "stopped" / "out"
    with pytest.raises(KeyboardInterrupt):
        qp.quantize(model, out, **options, progress=stop_at("quantizing", 1.5))
    qp.quantize(model, out, **options, threads=1)
    assert files(out) == files(tmp_path / "clean" / "out")


def test_data_free_methods_go_on_too(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "rtn", "group_size": 32}
    qp.quantize(model, tmp_path / "clean" / "out", **options)
    out = tmp_path / "stopped" / "out"
    with pytest.raises(KeyboardInterrupt):
        qp.quantize(model, out, **options, progress=stop_at("quantizing", 1.5))
    assert (work(out) / "journal.jsonl").read_bytes().count(b"\n") == 2
    qp.quantize(model, out, **options)
    assert files(out) == files(tmp_path / "clean" / "out")


def started(model: Path, out: Path) -> subprocess.Popen[str]:
    options = ("--group-size", "32", "--samples", "4", "--sequence-length", "32", "--no-verify")
    command: Sequence[str] = [sys.executable, "-m", "quantpress", "quantize", str(model), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(process: subprocess.Popen[str], out: Path, steps: int, how: signal.Signals) -> tuple[int, str, float]:
    """Sends a signal once so many steps are in the journal; gives exit code, messages and seconds it took to end."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        journal = work(out) / "journal.jsonl"
        if journal.exists() and journal.read_bytes().count(b"\n") > steps:
            break
        time.sleep(0.001)
    process.send_signal(how)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, time.monotonic() - sent


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["kill", "int", "term"]
)
def test_a_program_that_is_stopped_goes_on_to_the_same_bytes(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, how: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    found, errors, seconds = stopped(started(model, out), out, 1, how)
    assert found == code, errors
    assert seconds < 5
    assert "Traceback" not in errors
    assert ("keeps what is finished" in errors) == (how != signal.SIGKILL)
    assert not out.exists()
    again = started(model, out)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "going on with layer" in errors
    assert files(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_second_of_two_programs_on_one_output_ends_with_6(model: Path, tmp_path: Path) -> None:
    first = started(model, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not work(tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = started(model, tmp_path / "out")
    _, errors = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    _, own = first.communicate(timeout=60)
    assert second.returncode == 6, errors
    assert first.returncode == 0, own
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
