"""The stage that writes GGUF: what its options become, what it refuses, importance matrices, several files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.importance_file import write_importance
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.parity_limits import KLD_BY_TYPE
from quantpress.quant.ggml.types import ggml_type
from tests.gguf_exports import WIDE, export, tensors_of, wide_model
from tests.quant.conftest import LibGGML
from tests.quant.conftest import libggml as libggml_fixture
from tests.tiny import tiny_checkpoint

libggml = libggml_fixture
GPTQ: dict[str, Any] = {"method": "gptq", "outtype": "q4_k_m"}
UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers whose rows are multiples of 256; never write into it."""
    return wide_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def source(model: Path) -> Checkpoint:
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def matrix(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix with an entry for every linear weight but the head's."""
    random, entries = np.random.default_rng(0), dict[str, Importance]()
    for tensor in Gguf(output=Path("out"), outtype="q4_k_m").plan(open_checkpoint(model)).tensors:
        if tensor.name.startswith("blk") and len(tensor.shape) == 2:
            sums = random.gamma(0.3, size=(1, tensor.shape[1])).astype(np.float32)
            entries[tensor.name] = Importance(sums, np.array([5], np.float32))
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    write_importance(path, ImportanceMatrix(entries, ("calib.txt",), 3, 512))
    return path


def stage(**options: Any) -> Gguf:
    return Gguf(output=Path("out.gguf"), **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"method": "rtn", "sequence_length": None, "drift": None, "calibration_dtype": None}),
        ({"method": "RTN"}, {"method": "rtn"}),
        (GPTQ, {"method": "gptq", "sequence_length": 64, "drift": 1.0}),
        ({**GPTQ, "drift": 0.0, "calibration_dtype": "F32"}, {"drift": 0.0, "calibration_dtype": "f32"}),
        ({**GPTQ, "sequence_length": 16}, {"sequence_length": 16}),
    ],
)
def test_what_is_left_open_is_filled_in_once(
    options: dict[str, Any], wanted: dict[str, Any], source: Checkpoint
) -> None:
    filled = stage(**options).resolved(source)
    assert {name: getattr(filled, name) for name in wanted} == wanted
    assert filled.resolved(source) == filled


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "awq"}, "--method awq: GGUF takes one of rtn, gptq"),
        ({"calibration": Path("c.txt")}, "--calibration c.txt: only --method gptq reads a text"),
        ({**GPTQ, "vocab_only": True}, "--vocab-only writes no weight"),
        ({**GPTQ, "outtype": "f16"}, "become F16 with --outtype f16; codes are found for .*Q4_K"),
        ({**GPTQ, "outtype": "tq2_0"}, "become TQ2_0 with --outtype tq2_0"),
        ({**GPTQ, "sequence_length": 65}, "--sequence-length 65: .* made for 64 tokens"),
        ({**GPTQ, "calibration_dtype": "f64"}, "--calibration-dtype f64"),
        ({**GPTQ, "drift": 2.0}, "drift"),
        ({"outtype": "q2_k_s"}, "blk.* garbage without an importance matrix"),
        ({"split_max_size": "2X"}, "--split-max-size '2X'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str, source: Checkpoint) -> None:
    with pytest.raises(qp.UsageError, match=said):
        stage(**options).plan(source)


def test_types_that_need_an_importance_matrix_are_planned_where_one_is_measured(source: Checkpoint) -> None:
    plan = stage(**{**GPTQ, "outtype": "q2_k_s"}).plan(source)
    assert {tensor.type for tensor in plan.tensors} > {"Q2_K"}


def test_a_model_that_has_codes_keeps_them_unless_an_adapter_was_merged(model: Path, tmp_path: Path) -> None:
    qp.quantize(model, tmp_path / "packed", method="rtn", bits=4, group_size=32)
    packed = open_checkpoint(tmp_path / "packed")
    with pytest.raises(qp.UsageError, match=r"--method gptq: .* is quantized already"):
        stage(**GPTQ).resolved(packed)
    merged = dataclasses.replace(packed, adapted=object())  # type: ignore[arg-type]
    job = stage(**GPTQ).job(merged)
    assert not job.source.quantized


def test_the_limits_know_every_file_type(source: Checkpoint) -> None:
    from quantpress.convert.gguf.file_types import FILE_TYPES

    assert set(FILE_TYPES) <= set(KLD_BY_TYPE)


def test_a_plan_says_what_is_kept_meanwhile(source: Checkpoint) -> None:
    plain, found = stage(outtype="q4_k_m").plan(source), stage(**GPTQ).plan(source)
    assert plain.work_bytes == 0
    blocks = sum(tensor.nbytes for tensor in plain.tensors if tensor.name.startswith("blk") and len(tensor.shape) == 2)
    assert found.work_bytes > blocks
    assert found.output_bytes == plain.output_bytes
    assert found.peak_memory > plain.peak_memory
    assert any("built-in text" in note for note in found.notes)


def test_a_file_without_a_method_needs_no_torch(model: Path, matrix: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import quantpress as qp\n"
        "qp.export_gguf(sys.argv[1], sys.argv[2], outtype='q4_k_m', imatrix=sys.argv[3], split_max_tensors=20)\n"
        "qp.export_gguf(sys.argv[1], sys.argv[2], outtype='q8_0')\n"
    )
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "out.gguf", matrix], check=True)
    assert len(list(tmp_path.glob("*.gguf"))) == 3


def test_weights_are_encoded_with_their_importance(
    model: Path, source: Checkpoint, matrix: Path, tmp_path: Path, libggml: LibGGML
) -> None:
    pressed = export(model, tmp_path / "out.gguf", outtype="q4_k_m", imatrix=matrix)
    tensor = tensors_of(tmp_path / "out.gguf")[UP]
    values = source.tensor("model.layers.1.mlp.up_proj.weight").read().astype(np.float32)
    sums = next(t.data for t in gguf.GGUFReader(matrix).tensors if t.name == f"{UP}.in_sum2")
    importance = np.asarray(sums, np.float32).reshape(-1) / np.float32(5)
    np.testing.assert_array_equal(tensor.data, libggml.quantize(ggml_type("Q4_K"), values, importance))
    assert pressed.notes == ("imatrix.gguf has no entry for 1 weights, first output.weight",)


def test_what_was_used_is_in_the_metadata_and_in_the_sidecar(model: Path, matrix: Path, tmp_path: Path) -> None:
    pressed = export(model, tmp_path / "out.gguf", outtype="q4_k_m", imatrix=matrix)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "imatrix.gguf"
    assert fields["quantize.imatrix.dataset"].contents() == "calib.txt"
    assert fields["quantize.imatrix.entries_count"].contents() == 21
    assert fields["quantize.imatrix.chunks_count"].contents() == 3
    found = json.loads(pressed.sidecar.read_text())
    digest = hashlib.sha256(matrix.read_bytes()).hexdigest()
    used = {"file": "imatrix.gguf", "datasets": ["calib.txt"], "entries": 21, "chunks": 3, "sha256": digest}
    assert found["mixture"] == {"rules": "llama.cpp v0.5.0", "importance": used}
    export(model, tmp_path / "plain.gguf", outtype="q4_k_m")
    assert "quantize.imatrix.file" not in gguf.GGUFReader(tmp_path / "plain.gguf").fields


def test_an_importance_that_a_stage_has_measured_serves_where_no_file_is_given(
    model: Path, source: Checkpoint, matrix: Path, tmp_path: Path
) -> None:
    from quantpress.convert.gguf.importance_file import read_importance

    measured = dataclasses.replace(source, importance=read_importance(matrix))
    export(measured, tmp_path / "stage.gguf", outtype="q4_k_m")
    export(model, tmp_path / "file.gguf", outtype="q4_k_m", imatrix=matrix)
    assert (tmp_path / "stage.gguf").read_bytes() == (tmp_path / "file.gguf").read_bytes()
    other = dataclasses.replace(source, importance=ImportanceMatrix({}))
    export(other, tmp_path / "both.gguf", outtype="q4_k_m", imatrix=matrix)
    assert (tmp_path / "both.gguf").read_bytes() == (tmp_path / "file.gguf").read_bytes()


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [
        (UP, 128, "128 values .* 256 columns"),
        ("blk.9.ffn_up.weight", 256, "none of its 1 entries, such as .*, is a tensor of"),
    ],
)
def test_an_importance_matrix_of_another_model_is_refused(
    name: str, width: int, said: str, model: Path, tmp_path: Path
) -> None:
    entry = Importance(np.ones((1, width), np.float32), np.ones(1, np.float32))
    write_importance(tmp_path / "i.gguf", ImportanceMatrix({name: entry}))
    with pytest.raises(qp.InputError, match=said):
        export(model, tmp_path / "out.gguf", outtype="q4_k_m", imatrix=tmp_path / "i.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_an_importance_matrix_that_changes_nothing_is_told(model: Path, matrix: Path, tmp_path: Path) -> None:
    pressed = export(model, tmp_path / "out.gguf", outtype="q8_0", imatrix=matrix)
    assert "imatrix.gguf changes nothing" in pressed.notes[0]


def test_an_output_may_not_replace_its_importance_matrix(model: Path, matrix: Path) -> None:
    before = matrix.read_bytes()
    with pytest.raises(qp.UsageError, match="an input of this run"):
        export(model, matrix, outtype="q4_k_m", imatrix=matrix, force=True)
    assert matrix.read_bytes() == before


def test_several_files_have_one_sidecar_beside_the_first(model: Path, tmp_path: Path) -> None:
    options = {"outtype": "q4_k_m", "model_name": "tiny"}
    pressed = export(model, tmp_path / "{name}-{ftype}.gguf", split_max_size="200K", **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names) - 1
    assert count > 2
    assert names[:2] == [
        f"tiny-Q4_K_M-00001-of-{count:05d}.gguf",
        f"tiny-Q4_K_M-00001-of-{count:05d}.gguf.quantpress.json",
    ]
    assert pressed.artifact.path == tmp_path / names[0]
    found = json.loads(pressed.sidecar.read_text())
    assert [output["name"] for output in found["outputs"]] == [names[0], *names[2:]]
    for output in found["outputs"]:
        assert output["sha256"] == hashlib.sha256((tmp_path / output["name"]).read_bytes()).hexdigest()
    plan = stage(split_max_size="200K", **options).plan(open_checkpoint(model))
    assert plan.output.name == f"out-00001-of-{count:05d}.gguf"
    assert plan.output_bytes == sum((tmp_path / output["name"]).stat().st_size for output in found["outputs"])
    export(model, tmp_path / "whole.gguf", **options)
    whole = tensors_of(tmp_path / "whole.gguf")
    parts = {name: tensor for path in tmp_path.glob("tiny*.gguf") for name, tensor in tensors_of(path).items()}
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name].data, parts[name].data) for name in whole)


def test_parts_that_stand_are_replaced_with_force_only(model: Path, tmp_path: Path) -> None:
    options = {"outtype": "q8_0", "split_max_tensors": 20}
    export(model, tmp_path / "m.gguf", **options)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    with pytest.raises(qp.UsageError, match="--force"):
        export(model, tmp_path / "m.gguf", **options)
    export(model, tmp_path / "m.gguf", **options, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")} == first
    with pytest.raises(qp.UsageError, match="an input of this run"):
        export(tmp_path / next(iter(sorted(first))), tmp_path / "m.gguf", **options, force=True)


def test_rows_that_fit_no_super_block_are_noted(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", **{**WIDE, "intermediate_size": 288})
    pressed = export(folder, tmp_path / "out.gguf", outtype="q4_k_m")
    assert any("ffn_down" in note for note in pressed.notes)
