"""What a sidecar says of the stages before an output, and what the output is judged against."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.codes_stage import Gptq, Rtn
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.merge_stage import MergeLora
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.runner import Upstream as OfRunner
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import Artifact, Prepared, TensorResult
from quantpress.pipelines.upstream import Upstream, run_stages
from tests.pipelines.commands.peft_adapters import make_adapter
from tests.pipelines.prepared_codes import CONTEXT, LOOSE, WINDOWS, prepared, pressed, reopened, sidecar
from tests.tiny import tiny_checkpoint

GPTQ = Gptq(group_size=32, **WINDOWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("upstream") / "model", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of it."""
    return make_adapter(model, tmp_path_factory.mktemp("adapters") / "tone")


@pytest.fixture(scope="module")
def entry(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of the model with the adapter merged."""
    folder = tmp_path_factory.mktemp("entry")
    prepared(merged(model, adapter), GPTQ, folder)
    return folder


def merged(model: Path, adapter: Path) -> Checkpoint:
    return run_stages(open_checkpoint(model), [MergeLora(adapter=adapter, weight=0.5)], CONTEXT)[0]


def test_a_sidecar_says_what_quantize_says_and_lists_the_stages(
    model: Path, adapter: Path, entry: Path, tmp_path: Path
) -> None:
    source = merged(model, adapter)
    found, upstream = reopened(source, GPTQ, entry)
    pressed(found.checkpoint, Safetensors(output=tmp_path / "out", format="gptq"), upstream, judge=LOOSE)
    one = sidecar(tmp_path / "out")
    options: dict[str, Any] = {"method": "gptq", "group_size": 32, "format": "gptq", **WINDOWS}
    qp.quantize(source, tmp_path / "two" / "out", verify=True, judge=LOOSE, **options)
    two = sidecar(tmp_path / "two" / "out")
    assert [record["name"] for record in one.pop("stages")] == ["merge_lora", "gptq", "safetensors"]
    assert [record["name"] for record in two.pop("stages")] == ["merge_lora", "quantize"]
    for each in (one, two):  # the in-toto predicate lists the stages again
        each["predicate"]["buildDefinition"]["externalParameters"].pop("stages")
    assert one == two
    assert one["adapters"]
    assert one["calibration"]["tokens"] == 128
    assert {tensor["name"] for tensor in one["tensors"] if "loss" in tensor} == set(found.reports)
    assert any(name["name"] == "tone/adapter_model.safetensors" for name in one["inputs"])


def test_the_sidecar_is_the_same_from_codes_of_before(model: Path, adapter: Path, entry: Path, tmp_path: Path) -> None:
    made, upstream = prepared(merged(model, adapter), GPTQ, tmp_path / "entry")
    for name, (found, before) in {
        "made": (made, upstream),
        "kept": reopened(merged(model, adapter), GPTQ, entry),
    }.items():
        pressed(found.checkpoint, Gguf(output=tmp_path / name / "out.gguf", outtype="q4_0"), before)
    assert sidecar(tmp_path / "made" / "out.gguf") == sidecar(tmp_path / "kept" / "out.gguf")


def test_a_ledger_that_is_kept_is_not_read_again(
    model: Path, adapter: Path, entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantpress.convert.lora.ledger import Adapted

    source = merged(model, adapter)
    assert source.adapted is not None
    wanted = source.adapted.ledger()
    found, upstream = reopened(merged(model, adapter), GPTQ, entry)
    monkeypatch.setattr(Adapted, "ledger", lambda _self: pytest.fail("the merged weights are read once more"))
    run = pressed(found.checkpoint, Safetensors(output=tmp_path / "out", format="gptq_v2"), upstream)
    assert run.ledger == wanted


def test_gguf_tensors_have_the_figures_of_their_weights(model: Path, tmp_path: Path) -> None:
    found, upstream = prepared(open_checkpoint(model), GPTQ, tmp_path / "entry")
    pressed(found.checkpoint, Gguf(output=tmp_path / "a.gguf", outtype="q4_0"), upstream)
    pressed(found.checkpoint, Gguf(output=tmp_path / "b.gguf", outtype="bf16"), upstream)
    exact, rounded = ({t["name"]: t for t in sidecar(tmp_path / name)["tensors"]} for name in ("a.gguf", "b.gguf"))
    report = found.reports["model.layers.1.mlp.down_proj.weight"]
    loss = float(f"{report['loss']:.6g}")
    assert exact["blk.1.ffn_down.weight"]["loss"] == rounded["blk.1.ffn_down.weight"]["loss"] == loss
    assert not exact["blk.1.ffn_down.weight"]["relative_error"]
    assert 0 < rounded["blk.1.ffn_down.weight"]["relative_error"] < 2**-8  # what bfloat16 rounds at most
    assert rounded["blk.1.ffn_down.weight"]["prepared_error"] is None  # GPTQ says its loss instead
    assert "loss" not in exact["blk.1.attn_norm.weight"]


def test_lazy_codes_have_their_error_in_every_output(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    weight = source.tensors["model.layers.0.mlp.down_proj.weight"].read().astype(np.float64)
    groups = weight.reshape(weight.shape[0], -1, 32)
    least, greatest = groups.min(-1), groups.max(-1)
    absmax = np.where(np.abs(least) >= np.abs(greatest), least, greatest)
    scale = (absmax / -8).astype(np.float16).astype(np.float64)[..., None]
    codes = np.clip(np.rint(groups / scale), -8, 7)
    wanted = np.sqrt(np.square(codes * scale - groups).sum() / np.square(groups).sum())
    stages = {
        "a.gguf": Gguf(output=tmp_path / "a.gguf", outtype="q4_0"),
        "b": Safetensors(output=tmp_path / "b", format="gptq"),
    }
    for name, stage in stages.items():
        run = pressed(model, stage, lazy=[Rtn(group_size=32)])
        found = [
            t
            for t in sidecar(tmp_path / name)["tensors"]
            if "layers.0.mlp.down" in t["name"] or "0.ffn_down" in t["name"]
        ]
        assert found[0]["relative_error"] == pytest.approx(wanted, rel=1e-3)  # ties may be rounded to either side
        assert run.judged_as == "INT4"


def test_an_output_is_judged_against_the_base_with_its_adapters_beside(
    model: Path, adapter: Path, entry: Path, tmp_path: Path
) -> None:
    found, upstream = reopened(merged(model, adapter), GPTQ, entry)
    run = pressed(found.checkpoint, Safetensors(output=tmp_path / "out", format="gptq"), upstream, judge=LOOSE)
    apart = qp.verify(tmp_path / "out", model, adapters=[(adapter, 0.5)], options=LOOSE)
    assert run.parity is not None
    assert run.parity.mean_kld == apart.mean_kld
    assert run.parity.adapter_share is not None
    assert run.parity.mean_kld > 0  # from the codes themselves it would be nothing
    lazy = pressed(
        model, Safetensors(output=tmp_path / "lazy", format="gptq"), judge=LOOSE,
        lazy=[MergeLora(adapter=adapter, weight=0.5), Rtn(group_size=32)],
    )  # fmt: skip
    apart = qp.verify(tmp_path / "lazy", model, adapters=[(adapter, 0.5)], options=LOOSE)
    assert lazy.parity is not None
    assert lazy.parity.mean_kld == apart.mean_kld
    assert lazy.ledger


@pytest.mark.parametrize(
    ("before", "own", "wanted"),
    [
        ("INT4", "Q8_0", "INT4"),
        ("INT8", "Q4_0", "Q4_0"),
        ("W8A8", "F32", "W8A8"),
        ("", "F16", "F16"),
        ("INT4", "?", "INT4"),
    ],
)
def test_the_limits_are_those_of_the_coarser_step(before: str, own: str, wanted: str) -> None:
    empty = Checkpoint("empty", {}, {})
    upstream = Upstream(empty, (), Prepared(empty, judged_as=before))
    assert upstream.described(Artifact(Path("x"), "gguf", own, ())).judged_as == wanted
    assert Upstream(empty).described(Artifact(Path("x"), "gguf", own, ())).judged_as == ""


def test_an_error_of_two_steps_is_told_as_two() -> None:
    empty = Checkpoint("empty", {}, {})
    reports = {"w": {"relative_error": 0.1, "loss": 2.0}}
    made = Prepared(empty, reports=reports, notes=("one", "two"), calibration={"tokens": 3})
    tensors = (TensorResult("w", "a", 1), TensorResult("x", "a", 1, 0.5, source="w"), TensorResult("y", "a", 1, 0.5))
    given = Artifact(Path("x"), "gguf", "F16", (), tensors, notes=("two", "three"), calibration={"tokens": 5})
    found = Upstream(empty, (), made).described(given)
    assert [(t.relative_error, dict(t.figures)) for t in found.tensors] == [
        (0.1, {"loss": 2.0}),
        (0.5, {"loss": 2.0, "prepared_error": 0.1}),
        (0.5, {}),
    ]
    assert found.notes == ("one", "two", "three")
    assert found.calibration == {"tokens": 5, "prepared": {"tokens": 3}}
    alone = Upstream(empty, (), made).described(dataclasses.replace(given, calibration={}))
    assert alone.calibration == {"tokens": 3}


def test_an_adapter_after_codes_is_merged_into_what_they_stand_for(model: Path, adapter: Path, tmp_path: Path) -> None:
    found, upstream = prepared(open_checkpoint(model), GPTQ, tmp_path / "entry")
    view, after = run_stages(found.checkpoint, [MergeLora(adapter=adapter)], CONTEXT, upstream)
    assert view.adapted is not None
    assert after.source.adapted is not None
    assert not after.source.quantized
    assert [record["name"] for record in after.records] == ["gptq", "merge_lora"]
    assert after.ledger()
    with pytest.raises(qp.UsageError, match="needs a stage that quantizes before it"):
        pressed(view, Safetensors(output=tmp_path / "out", format="gptq"), after)
    run = pressed(view, Gguf(output=tmp_path / "out.gguf", outtype="bf16"), after, judge=LOOSE)
    assert run.judged_as == "INT4"
    assert [record["name"] for record in sidecar(tmp_path / "out.gguf")["stages"]] == ["gptq", "merge_lora", "gguf"]


def test_the_output_may_not_replace_an_input_of_the_stages_before(
    model: Path, adapter: Path, entry: Path, tmp_path: Path
) -> None:
    found, upstream = reopened(merged(model, adapter), GPTQ, entry)
    for folder in (model, adapter):
        with pytest.raises(qp.UsageError, match="would be replaced"):
            pressed(found.checkpoint, Safetensors(output=folder, format="gptq"), upstream)
    text = tmp_path / "texts" / "calibration.txt"
    text.parent.mkdir()
    text.write_text("a bc d ef " * 200)
    upstream = Upstream.of(merged(model, adapter)).with_prepared(found, dataclasses.replace(GPTQ, calibration=text))
    with pytest.raises(qp.UsageError, match=r"calibration\.txt"):
        pressed(found.checkpoint, Safetensors(output=text.parent, format="gptq"), upstream)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (Safetensors(output=Path("x"), format="gptq"), "needs a stage that quantizes before it: rtn, hqq, gptq"),
        (Safetensors(output=Path("x"), scale_type="F16"), "give format too"),
        (Safetensors(output=Path("x"), format="gptq", dtype="f16"), "leave it out"),
        (Safetensors(output=Path("x"), format="zip"), "needs a stage"),
    ],
)
def test_a_format_without_codes_is_refused(model: Path, stage: Safetensors, says: str) -> None:
    with pytest.raises(qp.UsageError, match=says):
        stage.resolved(open_checkpoint(model))


def test_formats_that_cannot_hold_the_codes_are_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    view = Rtn(bits=8, group_size=32).run(source, CONTEXT)
    for form, says in {"awq": "4 bits", "bitsandbytes": "one scale per row", "zip": "must be one of"}.items():
        with pytest.raises((qp.LayoutError, qp.UsageError), match=says):
            Safetensors(output=tmp_path / "out", format=form).plan(view)
    assert list(tmp_path.iterdir()) == []


def test_codes_written_as_numbers_say_so(model: Path, tmp_path: Path) -> None:
    run = pressed(model, Safetensors(output=tmp_path / "out"), lazy=[Rtn(group_size=32)], judge=LOOSE)
    assert any("packs them" in note for note in run.notes)
    assert run.judged_as == "INT4"
    assert not open_checkpoint(tmp_path / "out").quantized


def test_onnx_keeps_the_codes_and_their_figures(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found, upstream = prepared(open_checkpoint(model), GPTQ, tmp_path / "entry")
    run = pressed(found.checkpoint, Onnx(output=tmp_path / "out"), upstream, judge=LOOSE)
    assert run.parity is not None
    assert run.parity.passed
    losses = [t["name"] for t in sidecar(tmp_path / "out")["tensors"] if "loss" in t]
    assert sorted(losses) == sorted(found.reports)
    assert run.artifact.calibration["tokens"] == 128


def test_infinite_weights_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(start: int, stop: int) -> Any:
        values = source.tensors[name].read_rows(start, stop).copy()
        values[0, 0] = np.inf
        return values

    tensors: dict[str, Any] = {**source.tensors, name: dataclasses.replace(source.tensors[name], read_rows=broken)}
    damaged: Checkpoint = dataclasses.replace(source, tensors=tensors)
    with pytest.raises(qp.InputError, match="up_proj"):
        prepared(damaged, GPTQ, tmp_path / "entry")
    with pytest.raises(qp.InputError, match="up_proj"):
        pressed(damaged, Safetensors(output=tmp_path / "out", format="gptq"), lazy=[Rtn(group_size=32)])


def test_the_runner_has_the_name() -> None:
    assert OfRunner is Upstream
