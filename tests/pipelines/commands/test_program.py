"""The program as a whole: help, reports about models and machines, signals, and the promise of a light start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.pipelines.cli import COMMANDS
from tests.pipelines.commands.conftest import model_shapes

Run = Callable[..., Any]


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "quantpress", *(str(argument) for argument in arguments)]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(quantpress: Run, command: str) -> None:
    ended = quantpress(command, "--help")
    assert ended.code == 0
    assert "Usage:" in ended.out


def test_an_unknown_command_ends_with_2(quantpress: Run) -> None:
    ended = quantpress("compress")
    assert ended.code == 2
    assert ended.err.startswith("error:")


def test_the_convert_path_imports_no_torch() -> None:
    code = (
        "import sys, quantpress.pipelines.commands.convert as c; "
        "heavy = {'torch', 'transformers', 'numba', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_tells_what_a_model_holds(quantpress: Run, tiny_model: Path) -> None:
    ended = quantpress("inspect", tiny_model, "--json")
    assert ended.code == 0
    report = json.loads(ended.out)
    count = sum(int(np.prod(shape)) for shape in model_shapes().values())
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["parameters"] == count
    assert report["tensor_types"] == {"F32": {"tensors": len(model_shapes()), "parameters": count}}
    assert report["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 2  # k and v, layers, kv width, bytes
    assert report["estimated_bytes"]["F32"] == 4 * count
    assert report["problem"] is None


def test_inspect_says_why_a_model_cannot_be_converted(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    config = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = json.loads(quantpress("inspect", tmp_path, "--json").out)
    assert "layer 2 is missing" in report["problem"]


def test_doctor_lists_runtimes_and_says_how_to_get_a_missing_one(
    quantpress: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpress.pipelines.commands.doctor.find_llama_cpp", lambda: None)
    report = json.loads(quantpress("doctor", "--json").out)
    runtimes = {runtime["name"]: runtime for runtime in report["runtimes"]}
    assert runtimes["torch"]["usable"] is True
    assert runtimes["llama.cpp"]["usable"] is False
    assert "pip install" in runtimes["llama.cpp"]["hint"]


def test_architectures_lists_every_family(quantpress: Run) -> None:
    found = {row["family"] for row in json.loads(quantpress("architectures", "--json").out)}
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gptneox"} <= found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_seconds_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out.gguf"
    script = (
        "import signal, sys, time, quantpress.convert.gguf.export as export\n"
        "from quantpress.pipelines import cli\n"
        "encode = export._encode\n"
        "export._encode = lambda *a, **k: (time.sleep(0.2), encode(*a, **k))[1]\n"
        "sys.argv = ['quantpress', 'convert', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    arguments = [sys.executable, "-c", script, str(tiny_model), str(out), "--no-verify"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".quantpress-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp") or path == out] == []


def test_the_version_is_the_packages(quantpress: Run) -> None:
    assert "0.1.0" in quantpress("--version").out


@pytest.mark.parametrize("flag", [("--log-format", "json"), ("--log-format=json",)])
def test_every_message_is_a_json_line_when_that_is_asked_for(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flag: tuple[str, ...]
) -> None:
    done = quantpress(*flag, "convert", tiny_model, tmp_path / "out.gguf", "--outtype", "q4_0", "--no-verify")
    failed = quantpress(*flag, "convert", tmp_path / "nowhere", tmp_path / "out.gguf")
    lines = [json.loads(line) for line in (done.err + failed.err).splitlines()]
    assert (done.code, failed.code) == (0, 3)
    assert lines[-1] == {"event": "error", "message": lines[-1]["message"], "exit_code": 3}
    assert {line["event"] for line in lines} <= {"progress", "log", "error"}
