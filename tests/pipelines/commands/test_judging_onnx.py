"""`verify`, `perplexity` and `inspect` of ONNX models."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from quantpress.pipelines.candidate import ftype_of

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    """Writes the tiny model as ONNX, once per set of flags; never change what it gives."""
    from quantpress.pipelines.cli import run

    found: dict[tuple[str, ...], Path] = {}

    def write(*flags: str, model: Path = tiny_model) -> Path:
        key = (str(model), *flags)
        if key not in found:
            found[key] = tmp_path_factory.mktemp("onnx") / "model-onnx"
            assert run(["-q", "convert", str(model), str(found[key]), "--to", "onnx", "--no-verify", *flags]) == 0
        return found[key]

    return write


@pytest.fixture
def judge(quantpress: Run, tiny_model: Path, text_file: Path) -> Callable[..., Any]:
    def verify(artifact: Path, *flags: object) -> Any:
        return quantpress(
            "verify", artifact, "--against", tiny_model, "--text", text_file, "--context", 64, "--json", *flags
        )

    return verify


def changed(folder: Path, target: Path, change: Callable[[ModelProto], object]) -> Path:
    """Copies a folder and changes the graph in the copy."""
    shutil.copytree(folder, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    change(model)
    (target / "model.onnx").write_bytes(model.SerializeToString())
    return target


def exchange(model: ModelProto, names: Sequence[str], *, outputs: bool) -> None:
    """Exchanges two values wherever nodes take them, or where nodes make them."""
    swap = {names[0]: names[1], names[1]: names[0]}
    for node in model.graph.node:
        values = node.output if outputs else node.input
        for number, name in enumerate(values):
            values[number] = swap.get(name, name)


def test_a_good_model_passes_as_a_folder_and_as_a_file(written: Callable[..., Path], judge: Callable[..., Any]) -> None:
    folder = written("--precision", "fp32")
    for artifact, flags in ((folder, ()), (folder / "model.onnx", ("--runtime", "onnxruntime", "--threads", 1))):
        ended = judge(artifact, *flags)
        assert ended.code == 0, ended.err
        parity = json.loads(ended.out)
        assert parity["candidate"]["runtime"] == "onnxruntime"
        assert parity["baseline"]["runtime"] == "torch"
        assert parity["limits"]["max_kld"] == 1e-5
        assert parity["mean_kld"] < 1e-9  # float32 on both sides: logits differ by 1e-5, half the square of that


@pytest.mark.parametrize("kind", ["gate and up", "one weight"])
def test_a_model_of_other_weights_fails_with_4(
    written: Callable[..., Path], judge: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    def change(model: ModelProto) -> None:
        def name(part: str) -> str:
            found = [one.name for one in model.graph.initializer if part in one.name and "weight" in one.name]
            assert len(found) == 1
            return found[0]

        if kind == "gate and up":
            exchange(model, (name("layers.1.mlp.gate_proj"), name("layers.1.mlp.up_proj")), outputs=False)
        else:
            exchange(model, (name("layers.0.self_attn.q_proj"), name("layers.1.self_attn.q_proj")), outputs=False)

    ended = judge(changed(written("--precision", "fp32"), tmp_path / "m", change))
    assert ended.code == 4
    assert json.loads(ended.out)["passed"] is False
    assert "mean KL divergence" in ended.err


def test_a_model_whose_cache_is_wrong_fails_with_4_though_its_figures_are_right(
    written: Callable[..., Path], judge: Callable[..., Any], tmp_path: Path
) -> None:
    """Keys come out where values belong, and the other way round: only what decodes step by step sees it."""
    swapped = lambda model: exchange(model, ("present.0.key", "present.0.value"), outputs=True)  # noqa: E731
    ended = judge(changed(written("--precision", "fp32"), tmp_path / "m", swapped))
    assert ended.code == 4
    parity = json.loads(ended.out)
    assert parity["mean_kld"] < 1e-9
    assert parity["reason"].startswith(
        "the last 8 tokens of the first chunk, decoded one by one with the cache, differ"
    )


def test_a_damaged_model_ends_with_3_and_one_line(
    quantpress: Run, written: Callable[..., Path], judge: Callable[..., Any], text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(written("--precision", "fp32"), folder)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(100)
    ends = (
        judge(folder),
        quantpress("perplexity", folder, "--text", text_file, "--context", 64),
        quantpress("inspect", folder),
    )
    for ended in ends:
        assert ended.code == 3
        assert "is cut short or belongs to another model" in ended.err
        assert "Traceback" not in ended.err


def score(quantpress: Run, model: Path, text_file: Path, *flags: object) -> Any:
    ended = quantpress("perplexity", model, "--text", text_file, "--context", 64, "--chunks", 4, "--json", *flags)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize(("flags", "error"), [((), 1e-6), (("--standard-ops",), 1e-6)])
def test_perplexity_is_that_of_the_torch_runtime(
    quantpress: Run,
    written: Callable[..., Path],
    tiny_model: Path,
    text_file: Path,
    flags: tuple[str, ...],
    error: float,
) -> None:
    """Both compute in float32: losses differ by about 1e-6, and what is averaged by less."""
    source = score(quantpress, tiny_model, text_file)
    found = score(quantpress, written("--precision", "fp32", *flags), text_file, "--runtime", "onnxruntime")
    assert (found["runtime"], found["model"], found["tokens"]) == ("onnxruntime", "model-onnx", source["tokens"])
    assert math.isclose(found["perplexity"], source["perplexity"], rel_tol=error)


@pytest.mark.parametrize("bits", [4, 8])
def test_perplexity_of_the_same_codes_is_that_of_the_torch_runtime(
    quantpress: Run, written: Callable[..., Path], tiny_model: Path, text_file: Path, tmp_path: Path, bits: int
) -> None:
    """The requirement is 0.05 %; codes and scales are the same numbers, so only float32 sums differ."""
    flags = ("--method", "rtn", "--bits", bits, "--group-size", 32, "--no-verify")
    assert quantpress("quantize", tiny_model, tmp_path / "q", *flags).code == 0
    source = score(quantpress, tmp_path / "q", text_file)
    onnx_folder = written(model=tmp_path / "q")
    assert ftype_of(onnx_folder) == f"INT{bits}"
    found = score(quantpress, onnx_folder, text_file)
    assert found["runtime"] == "onnxruntime"
    assert math.isclose(found["perplexity"], source["perplexity"], rel_tol=1e-5)
    unquantized = score(quantpress, tiny_model, text_file)["perplexity"]
    assert abs(unquantized / source["perplexity"] - 1) > 1e-4  # the codes are not the source's weights


@pytest.mark.parametrize(
    ("flags", "ftype"),
    [
        (("--precision", "fp32"), "F32"),
        (("--precision", "fp32", "--standard-ops"), "F32"),
        (("--precision", "fp16"), "F16"),
        (("--precision", "bf16"), "BF16"),
        (("--precision", "int4"), "INT4"),
        (("--precision", "int4", "--standard-ops"), "INT4"),
        (("--precision", "int8"), "INT8"),
        (("--precision", "int8", "--standard-ops"), "INT8"),
        (("--precision", "int8", "--accuracy-level", "4"), "W8A8"),
        (("--precision", "int8", "--int8", "dynamic"), "W8A8"),
        (("--precision", "int8", "--int8", "static"), "W8A8"),
    ],
)
def test_the_limits_are_those_of_the_type_and_every_type_passes(
    written: Callable[..., Path], judge: Callable[..., Any], flags: tuple[str, ...], ftype: str
) -> None:
    calibration = ("--samples", "4", "--sequence-length", "64") if "static" in flags else ()
    folder = written(*flags, *calibration)
    assert ftype_of(folder) == ftype
    ended = judge(folder)
    assert ended.code == 0, ended.out


def test_a_runtime_that_does_not_run_such_files_is_a_usage_error(
    quantpress: Run, written: Callable[..., Path], judge: Callable[..., Any], tiny_model: Path, text_file: Path
) -> None:
    folder = written("--precision", "fp32")
    for runtime in ("torch", "llama.cpp"):
        for ended in (
            judge(folder, "--runtime", runtime),
            quantpress("perplexity", folder, "--text", text_file, "--runtime", runtime),
        ):
            assert ended.code == 2
            assert "is an ONNX model; use --runtime onnxruntime" in ended.err
    for ended in (
        judge(tiny_model, "--runtime", "onnxruntime"),
        quantpress("perplexity", tiny_model, "--text", text_file, "--runtime", "onnxruntime"),
    ):
        assert ended.code == 2
        assert "--runtime onnxruntime: runs ONNX models only" in ended.err


def test_without_onnxruntime_nothing_is_proved_and_it_is_told_how_to_get_it(
    quantpress: Run, written: Callable[..., Path], judge: Callable[..., Any], text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = written("--precision", "fp32")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    ended = quantpress("perplexity", folder, "--text", text_file, "--context", 64)
    assert ended.code == 5
    assert "pip install 'quantpress[onnx]'" in ended.err
    ended = judge(folder)
    assert ended.code == 4
    assert "pip install 'quantpress[onnx]'" in json.loads(ended.out)["reason"]
    report = json.loads(quantpress("doctor", "--json").out)
    row = next(runtime for runtime in report["runtimes"] if runtime["name"] == "onnxruntime")
    assert row == {"name": "onnxruntime", "usable": False, "hint": "pip install 'quantpress[onnx]'"}
    assert quantpress("inspect", folder).code == 0  # needs no runtime


def test_doctor_tells_what_onnxruntime_computes_on(quantpress: Run) -> None:
    report = json.loads(quantpress("doctor", "--json").out)
    row = next(runtime for runtime in report["runtimes"] if runtime["name"] == "onnxruntime")
    assert row["usable"]
    assert "CPU" in row["providers"]
    assert " on " in quantpress("doctor").out


def test_inspect_tells_types_operators_and_inputs(
    quantpress: Run, written: Callable[..., Path], tiny_model: Path
) -> None:
    folder = written("--precision", "int4")
    for path in (folder, folder / "model.onnx"):
        report = json.loads(quantpress("inspect", path, "--json").out)
        assert (report["model"], report["format"], report["family"]) == ("model-onnx", "onnx", "llama")
        assert report["context"] == 128
        assert report["quantization"] == {
            "format": "onnx", "bits": 4, "group_size": 32, "activations": "not rounded", "compute_type": "FLOAT",
        }  # fmt: skip
        source = json.loads(quantpress("inspect", tiny_model, "--json").out)
        assert report["parameters"] == source["parameters"]
        assert report["tokenizer"] == source["tokenizer"]
        matrices = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3) + 320 * 64  # of two layers, and the head
        assert report["tensor_types"]["INT4 g32"]["parameters"] == matrices
        assert report["operators"]["com.microsoft.MatMulNBits"] == 2 * 7 + 1
        assert report["inputs"]["input_ids"] == "INT64 (batch_size, sequence_length)"
        assert report["problem"] is None
        assert report["bytes"] == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    shown = quantpress("inspect", folder).out
    assert "INT4 g32" in shown
    assert "com.microsoft.GroupQueryAttention 2" in shown


def test_an_onnx_model_is_no_source(quantpress: Run, written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written("--precision", "fp32")
    for source in (folder, folder / "model.onnx"):
        ended = quantpress("convert", source, tmp_path / "out.gguf")
        assert ended.code == 3
        assert "an ONNX model is a target, not a source; give the model it was made from" in ended.err
    assert not (tmp_path / "out.gguf").exists()
