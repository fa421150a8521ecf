"""Codes that are found once give, in every format, the bytes of the command that finds them for that format alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.codes_stage import Awq, CalibratedStage, CodesStage, Gptq, Hqq, Rtn, SmoothQuant
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import Prepared, RunContext
from quantpress.pipelines.upstream import Upstream, run_stages
from tests.pipelines.prepared_codes import CONTEXT, WINDOWS, files, kept, prepared, pressed, reopened
from tests.tiny import tiny_case, tiny_checkpoint

GPTQ = Gptq(group_size=32, **WINDOWS)
FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("codes") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def gptq(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Upstream]:
    """Its codes by GPTQ in groups of 32."""
    return prepared(open_checkpoint(model), GPTQ, tmp_path_factory.mktemp("entry"))


@pytest.mark.parametrize("form", FORMATS)
def test_gptq_and_a_format_are_quantize_into_that_format(
    model: Path, gptq: tuple[Prepared, Upstream], tmp_path: Path, form: str
) -> None:
    found, upstream = gptq
    pressed(found.checkpoint, Safetensors(output=tmp_path / "one", format=form), upstream)
    qp.quantize(model, tmp_path / "two", method="gptq", group_size=32, format=form, scale_type="F16", **WINDOWS)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("compute_type", ["fp16", "fp32"])
def test_gptq_and_onnx_are_convert_to_onnx(
    model: Path, gptq: tuple[Prepared, Upstream], tmp_path: Path, compute_type: str
) -> None:
    pytest.importorskip("onnx_ir")
    found, upstream = gptq
    if compute_type == "fp32":  # whose codes are found with scales of that type
        found, upstream = prepared(
            open_checkpoint(model), Gptq(group_size=32, scale_type="F32", **WINDOWS), tmp_path / "entry"
        )
    pressed(found.checkpoint, Onnx(output=tmp_path / "one", compute_type=compute_type), upstream)
    stage = Onnx(output=tmp_path / "two", precision="int4", method="gptq", compute_type=compute_type, **WINDOWS)
    pressed(model, stage)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_hqq_and_onnx_are_convert_to_onnx(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    pressed(model, Onnx(output=tmp_path / "one"), lazy=[Hqq(group_size=32, scale_type="F32")])
    pressed(model, Onnx(output=tmp_path / "two", precision="int4", method="hqq"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_gptq_and_gguf_are_quantize_and_then_convert(
    model: Path, gptq: tuple[Prepared, Upstream], tmp_path: Path
) -> None:
    found, upstream = gptq
    pressed(found.checkpoint, Gguf(output=tmp_path / "one.gguf", outtype="q4_0", model_name="tiny"), upstream)
    qp.quantize(model, tmp_path / "folder", method="gptq", group_size=32, **WINDOWS)
    pressed(tmp_path / "folder", Gguf(output=tmp_path / "two.gguf", outtype="q4_0", model_name="tiny"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_gguf_and_gptq_files_hold_the_same_numbers(gptq: tuple[Prepared, Upstream], tmp_path: Path) -> None:
    """As the gguf package reads the one, and as the layout of GPTQ is described for the other."""
    import gguf

    found, upstream = gptq
    pressed(found.checkpoint, Safetensors(output=tmp_path / "folder", format="gptq"), upstream)
    pressed(found.checkpoint, Gguf(output=tmp_path / "file.gguf", outtype="q4_0"), upstream)
    parts = load_file(tmp_path / "folder" / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "file.gguf").tensors}
    for layer in range(3):
        names = {"blk.{}.attn_v": "self_attn.v_proj", "blk.{}.ffn_down": "mlp.down_proj"}
        for short, long in names.items():
            module = f"model.layers.{layer}.{long}"
            blocks = stored[f"{short.format(layer)}.weight"]
            read = gguf.dequantize(blocks.data, blocks.tensor_type)
            words = parts[f"{module}.qweight"].view(np.uint32)
            codes = np.stack([words >> np.uint32(4 * place) & np.uint32(15) for place in range(8)], 1)
            codes = codes.reshape(-1, words.shape[1]).T.astype(np.float32) - 8
            scale = np.repeat(parts[f"{module}.scales"].T.astype(np.float32), 32, axis=1)[:, : codes.shape[1]]
            np.testing.assert_array_equal(read, codes * scale)  # a product of 4 and 11 bits is exact in float32


@pytest.mark.parametrize(
    ("stage", "form"),
    [
        (Awq(group_size=32, **WINDOWS), "awq"),
        (Awq(group_size=32, symmetric=True, **WINDOWS), "compressed-tensors"),
        (SmoothQuant(**WINDOWS), "compressed-tensors"),
        (Gptq(bits=8, group_size=-1, scale_type="F32", **WINDOWS), "bitsandbytes"),
        (Gptq(bits=3, override=("down_proj=bits:8,group_size:32",), skip=("k_proj",), **WINDOWS), "gptq"),
        (Gptq(symmetric=False, act_order=False, damping=0.02, drift=0.0, **WINDOWS), "gptq_v2"),
    ],
    ids=["awq", "awq-symmetric", "smoothquant", "int8-rows", "mixed", "asymmetric"],
)  # fmt: skip
def test_every_method_is_quantize_by_it(model: Path, tmp_path: Path, stage: CalibratedStage, form: str) -> None:
    found, upstream = prepared(open_checkpoint(model), stage, tmp_path / "entry")
    pressed(found.checkpoint, Safetensors(output=tmp_path / "one", format=form), upstream)
    options = {name: value for name, value in stage.describe()["options"].items() if value is not None}
    qp.quantize(model, tmp_path / "two", method=stage.name, format=form, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    ("stage", "form"),
    [
        (Rtn(group_size=32), "gptq"),
        (Rtn(group_size=32, clip_search=True, symmetric=False), "gptq_v2"),
        (Rtn(activation_bits=8), "compressed-tensors"),
        (Hqq(group_size=32), "awq"),
    ],
    ids=["rtn", "rtn-clipped", "rtn-inputs", "hqq"],
)
def test_codes_that_are_found_when_they_are_read_are_those_of_quantize(
    model: Path, tmp_path: Path, stage: CodesStage, form: str
) -> None:
    pressed(model, Safetensors(output=tmp_path / "one", format=form), lazy=[stage])
    options = {name: value for name, value in stage.describe()["options"].items() if value is not None}
    qp.quantize(model, tmp_path / "two", method=stage.name, format=form, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("case", ["gpt2", "phi3", "gemma2", "llama-tied"])
def test_other_families(tmp_path: Path, case: str) -> None:
    tiny = tiny_case(case)
    model = tiny_checkpoint(tmp_path / "model", tiny.family, **tiny.options)
    options = {"group_size": 32, "samples": 2, "sequence_length": 32}
    found, upstream = prepared(open_checkpoint(model), Gptq(**options), tmp_path / "entry")  # type: ignore[arg-type]
    pressed(found.checkpoint, Safetensors(output=tmp_path / "one", format="gptq_v2"), upstream)
    qp.quantize(model, tmp_path / "two", method="gptq", format="gptq_v2", **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    pressed(found.checkpoint, Gguf(output=tmp_path / "one.gguf", outtype="q4_0", model_name="x"), upstream)
    pressed(tmp_path / "two", Gguf(output=tmp_path / "two.gguf", outtype="q4_0", model_name="x"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_the_codes_do_not_depend_on_the_number_of_threads(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    for threads in (1, 3):
        prepared(source, GPTQ, tmp_path / str(threads), RunContext(threads=threads))
    assert kept(tmp_path / "1") == kept(tmp_path / "3")


def test_what_is_kept_is_codes_and_a_journal(model: Path, tmp_path: Path) -> None:
    found, _ = prepared(open_checkpoint(model), GPTQ, tmp_path)
    names = sorted(path.name for path in (tmp_path / "codes").iterdir())
    assert names == [*(f"{number:05d}.safetensors" for number in range(4)), "journal.jsonl"]
    memory, work, nbytes = GPTQ.resolved(open_checkpoint(model)).needs(open_checkpoint(model))
    stored = sum(path.stat().st_size for path in (tmp_path / "codes").glob("*.safetensors"))
    assert nbytes <= stored < nbytes + 4 * 4096  # four headers
    assert memory > nbytes
    assert work > 0
    assert set(found.checkpoint.quantized) == set(found.reports)


def test_opening_changes_nothing_and_needs_no_text(model: Path, tmp_path: Path) -> None:
    source, text = open_checkpoint(model), tmp_path / "text.txt"
    text.write_text("a bc d ef " * 200)
    stage = Gptq(group_size=32, calibration=text, **WINDOWS)
    first, _ = prepared(source, stage, tmp_path / "entry")
    text.unlink()
    before = states(tmp_path / "entry")
    again, _ = reopened(source, stage, tmp_path / "entry")
    assert states(tmp_path / "entry") == before
    assert again.calibration == first.calibration
    assert again.checkpoint.codes_origin == first.checkpoint.codes_origin
    assert again.calibration["tokens"] == 128


def states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What tells whether anything was written."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (state.st_ino, state.st_size, state.st_mtime_ns) for path, state in found.items()}


def test_a_plan_knows_every_size_beforehand(model: Path, gptq: tuple[Prepared, Upstream], tmp_path: Path) -> None:
    source, (found, _) = open_checkpoint(model), gptq
    planned = GPTQ.resolved(source).planned(source)
    outputs = (
        Safetensors(output=tmp_path / "a", format="gptq"),
        Safetensors(output=tmp_path / "b", format="awq"),
        Gguf(output=tmp_path / "c.gguf", outtype="q4_0"),
        Onnx(output=tmp_path / "d"),
    )
    for stage in outputs:
        if stage.name == "onnx":
            pytest.importorskip("onnx_ir")
        plans = [stage.resolved(each.checkpoint).plan(each.checkpoint) for each in (planned, found)]
        assert plans[0] == plans[1]
    assert planned.notes == found.notes
    assert planned.judged_as == found.judged_as == "INT4"
    with pytest.raises(AssertionError, match="planned only"):
        next(iter(planned.checkpoint.quantized.values())).read()


def test_every_default_is_filled_in(model: Path) -> None:
    source = open_checkpoint(model)
    filled = Gptq().resolved(source)
    options = filled.describe()["options"]
    assert {name for name, value in options.items() if value is None} == {"activation_bits", "calibration"}
    asked = Quantize(output=Path("x"), method="gptq", scale_type="F16").resolved(source).describe()["options"]
    assert options == {name: value for name, value in asked.items() if name not in ("output", "method", "format")}
    assert SmoothQuant().resolved(source).activation_bits == 8
    assert Hqq().resolved(source).symmetric is False
    assert filled.resolved(source) == filled


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (Gptq(bits=5), "bits 5"),
        (Rtn(scale_type="F64"), "scale type F64"),
        (Gptq(sequence_length=1 << 20), "was made for"),
        (Rtn(skip=("nowhere",)), "found in the name of no weight"),
        (Hqq(override=("q_proj=tits:4",)), "is not one of"),
        (Gptq(drift=2.0), "2.0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(model: Path, stage: CodesStage, says: str) -> None:
    source = open_checkpoint(model)
    with pytest.raises(qp.UsageError, match=says):
        stage.planned(source) if isinstance(stage, CalibratedStage) else stage.run(source, CONTEXT)


def test_codes_are_not_quantized_once_more(gptq: tuple[Prepared, Upstream], model: Path, tmp_path: Path) -> None:
    view = gptq[0].checkpoint
    for stage in (Rtn(), Gptq(), SmoothQuant()):
        with pytest.raises(qp.UsageError, match="is quantized already \\(by gptq\\)"):
            stage.resolved(view)
    with pytest.raises(qp.UsageError, match="is quantized already"):
        pressed(view, Quantize(output=tmp_path / "out", method="rtn"), gptq[1])
    qp.quantize(model, tmp_path / "folder", method="rtn", group_size=32)
    with pytest.raises(qp.UsageError, match="is quantized already \\(gptq\\)"):
        Gptq().planned(open_checkpoint(tmp_path / "folder"))


def test_a_folder_where_work_is_not_finished_is_refused(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    with pytest.raises(qp.InputError, match="journal"):
        GPTQ.opened(source, tmp_path)
    prepared(source, GPTQ, tmp_path)
    journal = tmp_path / "codes" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(qp.InputError, match="not finished"):
        GPTQ.opened(source, tmp_path)
    journal.write_bytes(b"".join(lines))
    (tmp_path / "codes" / "00001.safetensors").unlink()
    with pytest.raises(qp.InputError, match="00001"):
        GPTQ.opened(source, tmp_path)


def test_preparing_stages_do_not_run_as_lazy_ones(model: Path) -> None:
    with pytest.raises(TypeError, match="call prepare and opened"):
        run_stages(open_checkpoint(model), [GPTQ], CONTEXT)
    with pytest.raises(TypeError, match="call prepare and opened"):
        GPTQ.run(open_checkpoint(model), CONTEXT)


def test_a_config_says_how_codes_were_made(gptq: tuple[Prepared, Upstream], tmp_path: Path) -> None:
    found, upstream = gptq
    pressed(found.checkpoint, Safetensors(output=tmp_path / "out", format="gptq"), upstream)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["meta"]["damp_percent"] == 0.01
