"""Which type each weight of a model is stored in: by options, tied or not, and where the source has codes already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.checkpoint import Array, Checkpoint
from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import LayoutError, UsageError
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import rounded, write_packed
from tests.tiny import tiny_case, tiny_checkpoint

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from quantpress.convert.onnx import weight_rows
from quantpress.convert.onnx.decoder import build_graph
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.weights import ModelWeights
from tests.onnx_weights import Cases, by_part, linear, run

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

UNTIED = {
    "precision=fp32": "F32 F32",
    "precision=fp16 compute_type=fp16": "F16 F16",
    "precision=bf16": "BF16 BF16",
    "precision=int4": "BF16 INT4/32",
    "precision=int8": "BF16 INT8/32",
    "precision=int8 int8=dynamic": "BF16 INT8/32",
    "precision=int8 int8=static": "BF16 INT8/32",
    "precision=int4 compute_type=fp16": "F16 INT4/32",
    "precision=int4 token_embedding_type=int8": "INT8/32 INT4/32",
    "precision=int4 output_tensor_type=int8 block_size=16 symmetric=False": "BF16 INT8/16asym",
    "precision=int4 output_tensor_type=fp32 token_embedding_type=fp16": "F16 F32",
    "precision=fp32 output_tensor_type=int4 token_embedding_type=int4": "INT4/32 INT4/32",
    "precision=fp16 compute_type=fp16 output_tensor_type=fp32": "F16 F32",
    "precision=int4 standard_ops=True": "BF16 INT4/32",
    "precision=int8 standard_ops=True token_embedding_type=int8": "INT8/32 INT8/32",
}
TIED = {
    "precision=fp32": "F32",
    "precision=bf16": "BF16",
    "precision=fp16 compute_type=fp16": "F16",
    "precision=int4": "INT4/32",
    "precision=int4 compute_type=fp16": "INT4/32",
    "precision=int8 block_size=64": "INT8/64",
    "precision=int8 int8=dynamic": "INT8/32",
    "precision=int4 output_tensor_type=int8": "INT8/32",
    "precision=int4 output_tensor_type=fp16": "F16",
    "precision=int4 output_tensor_type=bf16 token_embedding_type=bf16": "BF16",
    "precision=int4 token_embedding_type=fp16": "F16 INT4/32",
    "precision=int4 token_embedding_type=int4 output_tensor_type=int8": "INT4/32 INT8/32",
    "precision=fp16 compute_type=fp16 token_embedding_type=int8 symmetric=False": "INT8/32asym F16",
    "precision=int4 standard_ops=True": "BF16 INT4/32",
    "precision=int8 standard_ops=True": "INT8/32",
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Gives a function that makes a tiny checkpoint once."""
    return Cases(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("case", "wanted", "labels"),
    [("llama-bias", *each) for each in UNTIED.items()] + [("llama-tied", *each) for each in TIED.items()],
)
def test_types_of_embedding_and_head(case: str, wanted: str, labels: str, opened: Cases, tmp_path: Path) -> None:
    source, checked, tensors = opened(case, "bfloat16")
    options = OnnxOptions(**dict(map(option, wanted.split())))
    ids = np.arange(checked.hyper.vocab).reshape(1, -1)
    (rows,), _ = run(tmp_path, source, checked, options, ids, lambda w, given: [w.embed(given)])
    (logits,), graph = run(tmp_path, source, checked, options, ids, lambda w, given: [w.head(w.embed(given))])
    assert [each.replace(" asym", "asym").replace(" g", "/") for each in graph.labels] == labels.split()
    names = {row.slot: tensor.name for row, _, tensor in checked.bindings}
    table = tensors[names["token_embd.weight"]].astype(np.float64)[ids]
    head = tensors[names.get("output.weight", names["token_embd.weight"])].astype(np.float64)
    kinds = labels.split()
    assert_near(rows, table, kinds[0])
    if len(kinds) == 1:
        head = rows[0].astype(np.float64)  # the head multiplies with just what was looked up
    wide = rows.astype(np.float64)
    unit = 2.0**-24 if options.compute == "FLOAT" and "F16" not in kinds[-1][:3] else 2.0**-10
    slack = 66 * unit * (np.abs(wide) @ np.abs(head).T)
    if len(kinds) == 2 and not kinds[-1].startswith(("F32", "BF16")):
        slack += np.abs(wide).sum(-1, keepdims=True) * step(head, kinds[-1])
    assert (np.abs(logits - wide @ head.T) <= slack).all()


def option(text: str) -> tuple[str, Any]:
    """Reads `block_size=16`."""
    name, _, value = text.partition("=")
    known: dict[str, Any] = {"True": True, "False": False}
    return name, int(value) if value.isdigit() else known.get(value, value)


def step(values: Array, label: str) -> float:
    """The most that storing a number in a type moves it: a step of a grid over the greatest number, or half an ulp."""
    greatest = float(np.abs(values).max())
    if label.startswith("INT"):
        return 2 * greatest / (15 if label.startswith("INT4") else 255) * 1.01
    return greatest * {"F32": 0.0, "BF16": 0.0, "F16": 2.0**-11}[label]


def assert_near(found: Array, wanted: Array, label: str) -> None:
    assert np.abs(found - wanted).max() <= step(wanted, label) + 1e-12
    if label.startswith("INT"):
        assert np.abs(found - wanted).max() > 0


def test_rows_of_4_bits_are_not_in_the_standard(opened: Cases, tmp_path: Path) -> None:
    source, checked, _ = opened("llama-tied")
    options = OnnxOptions(precision="int4", standard_ops=True, token_embedding_type="int4")
    with pytest.raises(UsageError, match="--token-embedding-type int4"):
        run(tmp_path, source, checked, options, np.zeros((1, 1), np.int64), lambda w, given: [w.embed(given)])


def test_a_head_that_is_stored_beside_its_embedding_says_so(opened: Cases) -> None:
    source, checked, _ = opened("llama-tied")
    options = OnnxOptions(precision="int4", token_embedding_type="fp16")
    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    weights = ModelWeights(builder, source, checked, options)
    build_graph(builder, weights, checked.spec, checked.hyper)
    notes = {group.tensors[0].name: group.note for group, _ in builder.groups}
    assert notes.pop("lm_head.qweight").startswith("tied to 'model.embed_tokens.weight'")
    assert set(notes.values()) == {""}


def packed(folder: Path, case: str, group: int, left: str = "") -> tuple[Checkpoint, dict[str, QuantizedTensor]]:
    """Gives a checkpoint whose linear weights but one are quantized, and their codes."""
    make = rounded(4, group, symmetric=False)
    tiny_checkpoint(folder / "source", tiny_case(case).family, dtype="bfloat16", **tiny_case(case).options)
    made = write_packed(
        folder / "source", folder / "packed", FORMAT,
        lambda name, weight: None if left and left in name else make(name, weight),
    )  # fmt: skip
    return open_checkpoint(folder / "packed"), made


@pytest.mark.parametrize(
    ("case", "slot", "part"),
    [("gptneox", "attn_qkv.weight", "1.attention.query_key_value"), ("gpt2", "ffn_down.weight", "1.mlp.c_proj")],
)
@pytest.mark.parametrize("options", [{"precision": "int4"}, {"precision": "fp32"}, {"precision": "int8"}])
def test_codes_follow_the_order_of_rows(
    case: str, slot: str, part: str, options: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_rows, "_CHUNK_VALUES", 1 << 11)
    source, made = packed(tmp_path, case, 32)
    checked = preflight(source)
    tensor = next(each for name, each in made.items() if part in name)
    values = np.random.default_rng(0).standard_normal((1, 4, tensor.columns)).astype(np.float32)
    (found,), graph = run(tmp_path, source, checked, OnnxOptions(**options), values, linear(slot, 1))
    bias = next(each for name, each in source.tensors.items() if name.endswith(f"{part}.bias")).read()
    wanted = values.astype(np.float64) @ meaning(tensor).T + bias.astype(np.float64)
    wanted = by_part(wanted, checked.hyper.heads) if case == "gptneox" else wanted
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert graph.labels[0] == ("F32" if options["precision"] == "fp32" else "INT4 g32 asym")


def meaning(tensor: QuantizedTensor) -> Array:
    group = np.arange(tensor.columns) // tensor.group_size
    steps: Array = tensor.codes.astype(np.float64) - tensor.zeros()[:, group]
    return steps * tensor.scale.astype(np.float64)[:, group]


def test_what_a_quantized_source_leaves_alone_stays_as_it_is(tmp_path: Path) -> None:
    source, _ = packed(tmp_path, "llama-bias", 32, left="1.self_attn.o_proj")
    checked = preflight(source)
    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    weights = ModelWeights(builder, source, checked, OnnxOptions(precision="int4", block_size=16))
    build_graph(builder, weights, checked.spec, checked.hyper)
    labels = {group.source: group.label for group, _ in builder.groups}
    assert labels["model.layers.1.self_attn.o_proj.weight"] == "BF16"
    assert labels["lm_head.weight"] == labels["model.embed_tokens.weight"] == "BF16"
    assert {labels[name] for name in source.quantized} == {"INT4 g32 asym"}
    assert len(source.quantized) == 3 * 7 - 1
    notes = {group.source: group.note for group, _ in builder.groups if group.note}
    assert notes == {"model.layers.1.self_attn.o_proj.weight": "the source has not quantized it"}


def test_codes_of_other_bits_than_were_asked_for_say_so(tmp_path: Path) -> None:
    source, _ = packed(tmp_path, "llama", 32)
    checked = preflight(source)
    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    weights = ModelWeights(builder, source, checked, OnnxOptions(precision="int8"))
    build_graph(builder, weights, checked.spec, checked.hyper)
    notes = {group.note for group, _ in builder.groups if group.source in source.quantized}
    assert notes == {"the source's codes of 4 bits, as they are"}


def test_codes_in_groups_have_no_dynamic_int8(tmp_path: Path) -> None:
    source, _ = packed(tmp_path, "llama", 32)
    options = OnnxOptions(precision="int8", int8="dynamic")
    values = np.zeros((1, 1, 64), np.float32)
    with pytest.raises(LayoutError, match=r"attn.q_proj.weight.*--int8 weight-only"):
        run(tmp_path, source, preflight(source), options, values, linear("attn_q.weight", 0))
