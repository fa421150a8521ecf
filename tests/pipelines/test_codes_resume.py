"""Work on codes that is stopped, at any place and in any way, is ended by the next run with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.codes_stage import Awq, Gptq, Rtn, SmoothQuant
from quantpress.pipelines.runner import press
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.upstream import Upstream
from tests.pipelines.prepared_codes import LOOSE, WINDOWS, files, kept, prepared, pressed, reopened
from tests.stopped_runs import stop_at
from tests.tiny import tiny_checkpoint

GPTQ = Gptq(group_size=32, **WINDOWS)
PROGRAM = """
import sys
from pathlib import Path
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.codes_stage import Gptq
from quantpress.pipelines.stage import RunContext
source = open_checkpoint(sys.argv[1])
stage = Gptq(group_size=32, samples=4, sequence_length=32).resolved(source)
stage.prepare(source, Path(sys.argv[2]), RunContext(threads=2))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prepared(open_checkpoint(model), GPTQ, folder)
    return kept(folder)


def refuse_to_quantize(phase: str, done: int, total: int) -> None:
    assert phase != "quantizing", "every layer was finished before"


@pytest.mark.parametrize("layers", [0.5, 1.5, 2.5, 3])
def test_work_that_is_interrupted_goes_on_where_it_was(
    model: Path, undisturbed: dict[str, Any], tmp_path: Path, layers: float, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_checkpoint(model)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, GPTQ, tmp_path, RunContext(progress=stop_at("quantizing", layers), threads=2))
    finished = max(0, -int(-layers // 1) - 1)  # progress is told before a layer is handed over
    caplog.clear()
    prepared(source, GPTQ, tmp_path, RunContext(threads=1))
    assert kept(tmp_path) == undisturbed
    assert (f"going on with layer {finished}" in caplog.text) == bool(finished)


def test_finished_work_is_not_done_again(model: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    source = open_checkpoint(model)
    prepared(source, GPTQ, tmp_path)
    (tmp_path / "codes" / "live").mkdir()  # killed before it was removed
    journal = tmp_path / "codes" / "journal.jsonl"
    for lines in (5, 4):  # with the last line, and killed before it
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:lines]))
        prepared(source, GPTQ, tmp_path, RunContext(progress=refuse_to_quantize))
        assert kept(tmp_path) == undisturbed


@pytest.mark.parametrize("name", ["00000.safetensors", "inputs-of-layer-2.f32", "journal.jsonl"])
def test_damage_is_noticed_and_done_again(model: Path, undisturbed: dict[str, Any], tmp_path: Path, name: str) -> None:
    source = open_checkpoint(model)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, GPTQ, tmp_path, RunContext(progress=stop_at("quantizing", 2.5), threads=2))
    path = next(tmp_path.rglob(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    prepared(source, GPTQ, tmp_path)
    assert kept(tmp_path) == undisturbed


@pytest.mark.parametrize("stage", [Awq(group_size=32, **WINDOWS), SmoothQuant(**WINDOWS)], ids=["awq", "smoothquant"])
def test_norms_that_scales_were_folded_into_are_kept_too(model: Path, tmp_path: Path, stage: Awq | SmoothQuant) -> None:
    source = open_checkpoint(model)
    clean, _ = prepared(source, stage, tmp_path / "clean")
    with pytest.raises(KeyboardInterrupt):
        prepared(source, stage, tmp_path / "stopped", RunContext(progress=stop_at("quantizing", 1.5), threads=2))
    again, _ = prepared(source, stage, tmp_path / "stopped")
    assert kept(tmp_path / "stopped") == kept(tmp_path / "clean")
    norm = "model.layers.2.input_layernorm.weight"
    values = [each.tensors[norm].read().tobytes() for each in (clean.checkpoint, again.checkpoint, source)]
    assert values[0] == values[1] != values[2]


def started(model: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(model), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_programs_that_are_killed_at_every_step_leave_the_same_in_the_end(
    model: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    journal = tmp_path / "codes" / "journal.jsonl"
    for steps in (1, 2):
        process = started(model, tmp_path)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > steps:
                break
            time.sleep(0.001)
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
    again = started(model, tmp_path)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "going on with layer" in errors
    assert kept(tmp_path) == undisturbed


def test_an_output_that_was_begun_from_other_codes_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    """The spool beside an output must know the codes, for nothing else of the run tells these two apart."""
    source, out = open_checkpoint(model), tmp_path / "out"
    for number, damping in enumerate((0.01, 0.5)):
        prepared(source, Gptq(group_size=32, damping=damping, **WINDOWS), tmp_path / str(number))
    found, upstream = reopened(source, GPTQ, tmp_path / "0")
    with pytest.raises(KeyboardInterrupt):
        stopped(found.checkpoint, out, upstream)
    other = Gptq(group_size=32, damping=0.5, **WINDOWS)
    found, upstream = reopened(source, other, tmp_path / "1")
    pressed(found.checkpoint, Safetensors(output=out, format="gptq"), upstream)
    pressed(found.checkpoint, Safetensors(output=tmp_path / "clean", format="gptq"), upstream)
    assert files(out) == files(tmp_path / "clean")


def test_an_output_that_was_not_proved_yet_is_replaced_by_the_same_codes_only(model: Path, tmp_path: Path) -> None:
    source, out = open_checkpoint(model), tmp_path / "out"
    lazy = [Rtn(group_size=32)]
    stop = RunContext(progress=stop_at("prove", 0), threads=2)
    with pytest.raises(KeyboardInterrupt):
        press(source, Safetensors(output=out, format="gptq"), stop, lazy=lazy, judge=LOOSE)
    first = files(out)
    other = [Rtn(group_size=32, clip_search=True)]
    with pytest.raises(qp.UsageError, match="--force"):
        pressed(model, Safetensors(output=out, format="gptq"), lazy=other, judge=LOOSE)
    pressed(model, Safetensors(output=out, format="gptq"), lazy=lazy, judge=LOOSE)
    assert files(out) == first


def stopped(checkpoint: Any, out: Path, upstream: Upstream) -> None:
    context = RunContext(progress=stop_at("quantizing", 1.5), threads=2)
    press(checkpoint, Safetensors(output=out, format="gptq"), context, upstream=upstream)
