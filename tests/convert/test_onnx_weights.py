"""Weights of checkpoints as nodes: every family's layout, every type, shared or stored twice, refused where damaged.

What a linear layer gives is compared with the formulas of transformers' modules in float64, on the tensors as the
safetensors package reads them: Conv1D multiplies with (K, N), GPT-NeoX's rows are (heads, 3, head_dim).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantpress.convert.arch.spec import Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.preflight import Preflight, preflight
from quantpress.quant.errors import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from quantpress.convert.onnx import weight_rows
from quantpress.convert.onnx.decoder import build_graph
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.weights import ModelWeights
from tests.onnx_weights import Cases, by_part, linear, run

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

CASES = ("llama-bias", "llama-tied", "gemma", "phi3", "gpt2", "gptneox")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Gives a function that makes a tiny checkpoint once."""
    return Cases(tmp_path_factory.mktemp("tiny"))


def bound_rows(checked: Preflight, role: Role, layer: int) -> list[tuple[TensorSpec, LazyTensor]]:
    return [(row, tensor) for row, number, tensor in checked.bindings if row.role is role and number == layer]


def product(values: Array, row: TensorSpec, weight: Array, bias: Array | None, heads: int) -> Array:
    """A linear layer in float64."""
    wide = weight.astype(np.float64)
    found = values.astype(np.float64) @ (wide if row.layout is Layout.TRANSPOSED else wide.T)
    found = found if bias is None else found + bias.astype(np.float64)
    return by_part(found, heads) if row.layout is Layout.HEADS_QKV else found


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_linear_layers_of_every_layout_are_multiplied_with_and_their_bias_added(
    case: str, standard: bool, opened: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_rows, "_CHUNK_VALUES", 1 << 9)  # several pieces of a weight
    source, checked, tensors = opened(case)
    options = OnnxOptions(standard_ops=standard)
    linears = bound_rows(checked, Role.LINEAR, 1)
    assert len(linears) >= 4
    for row, tensor in linears:
        columns = tensor.shape[0 if row.layout is Layout.TRANSPOSED else 1]
        values = np.random.default_rng(0).standard_normal((2, 3, columns)).astype(np.float32)
        (found,), graph = run(tmp_path, source, checked, options, values, linear(row.slot, 1))
        bias = tensors.get(tensor.name.replace(".weight", ".bias"))
        wanted = product(values, row, tensors[tensor.name], bias, checked.hyper.heads)
        # sums of up to 160 products of float32 numbers: 162 * 2^-24 * sum |a w|, and |a| < 5, |w| < 1 here
        np.testing.assert_allclose(found, wanted, rtol=0, atol=162 * 2.0**-24 * columns * 5)
        assert graph.labels == ["F32"] + ([] if bias is None else ["F32"])


@pytest.mark.parametrize("case", ["llama-bias", "gemma", "gptneox", "gpt2"])
def test_norms_and_biases_are_as_the_decoder_wants_them(case: str, opened: Cases, tmp_path: Path) -> None:
    source, checked, tensors = opened(case)
    vectors = bound_rows(checked, Role.NORM, 0) + bound_rows(checked, Role.BIAS, 0)
    slots = [row.slot for row, _ in vectors]

    def add(weights: ModelWeights, given: ir.Value) -> list[ir.Value]:
        assert weights.vector("attn_sinks.weight", 0) is None
        values = [weights.vector(slot, 0) for slot in slots]
        assert [weights.vector(slot, 0) for slot in slots] == values  # stored once
        return [value for value in values if value is not None]

    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    add(ModelWeights(builder, source, checked, OnnxOptions()), builder.input("values", "FLOAT", [1]))
    found = [np.concatenate([task()[0] for task in group.tasks()]) for group, _ in builder.groups]
    for (row, tensor), each in zip(vectors, found, strict=True):
        wanted = tensors[tensor.name].astype(np.float32) + (1 if case == "gemma" else 0)
        if row.layout is Layout.HEADS_QKV:
            wanted = by_part(wanted, checked.hyper.heads)
        np.testing.assert_array_equal(each, wanted)


@pytest.mark.parametrize("case", ["llama-tied", "llama-bias", "gpt2", "gptneox"])
def test_embeddings_positions_and_the_head_of_floats(case: str, opened: Cases, tmp_path: Path) -> None:
    source, checked, tensors = opened(case)
    ids = np.array([[0, 5, 63], [1, 1, 2]])
    learned = checked.spec.learned(checked.hyper)

    def add(weights: ModelWeights, given: ir.Value) -> list[ir.Value]:
        values = weights.embed(given)
        return [values, weights.head(values), *([weights.rows("position_embd.weight", given)] if learned else [])]

    (rows, logits, *positions), graph = run(tmp_path, source, checked, OnnxOptions(), ids, add)
    names = {row.slot: tensor.name for row, layer, tensor in checked.bindings if layer < 0}
    table = tensors[names["token_embd.weight"]]
    head = tensors[names.get("output.weight", names["token_embd.weight"])]
    np.testing.assert_array_equal(rows, table[ids])
    np.testing.assert_allclose(logits, table[ids].astype(np.float64) @ head.T, rtol=0, atol=66 * 2.0**-24 * 64)
    if learned:
        np.testing.assert_array_equal(positions[0], tensors[names["position_embd.weight"]][ids])
    assert len(graph.labels) == 1 + ("output.weight" in names) + learned


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_is_built_without_reading_a_weight(case: str, precision: str, opened: Cases) -> None:
    source, _, _ = opened(case)

    def closed(_start: int, _stop: int) -> Array:
        raise AssertionError("read")

    tensors = {name: replace(tensor, read_rows=closed) for name, tensor in source.tensors.items()}
    source = replace(source, tensors=tensors)
    checked = preflight(source)
    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    weights = ModelWeights(builder, source, checked, OnnxOptions(precision=precision))
    build_graph(builder, weights, checked.spec, checked.hyper)
    stored = {group.source for group, _ in builder.groups}
    assert stored >= {tensor.name for _, _, tensor in checked.bindings}
    for group, _ in builder.groups:
        if group.source:
            with pytest.raises(AssertionError, match="read"):
                next(iter(group.tasks()))()


def changed(source: Checkpoint, name: str, place: tuple[int, ...], value: float) -> tuple[Checkpoint, Preflight]:
    """Gives a checkpoint with one value of one tensor replaced."""
    values = source.tensors[name].read().copy()
    values[place] = value
    tensor = replace(source.tensors[name], read_rows=lambda start, stop: values[start:stop])
    other = replace(source, tensors={**source.tensors, name: tensor})
    return other, preflight(other)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize(
    ("case", "name", "slot", "place"),
    [
        ("llama-bias", "model.layers.1.self_attn.q_proj.weight", "attn_q.weight", (63, 5)),
        ("llama-bias", "model.layers.1.self_attn.q_proj.bias", "attn_q.weight", (3,)),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "attn_qkv.weight", (3, 190)),
        ("gptneox", "gpt_neox.layers.1.attention.query_key_value.weight", "attn_qkv.weight", (191, 0)),
    ],
)
def test_values_that_are_not_finite_are_refused_by_file_and_tensor(
    case: str, name: str, slot: str, place: tuple[int, ...], precision: str, opened: Cases, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(weight_rows, "_CHUNK_VALUES", 1 << 9)
    source, checked = changed(opened(case)[0], name, place, np.nan)
    values = np.zeros((1, 1, 64), np.float32)
    text = f"model.safetensors: tensor '{name}': 1 of {source.tensors[name].size} values are NaN or infinite"
    options = OnnxOptions(precision=precision)
    with pytest.raises(InputError, match=text):
        run(tmp_path, source, checked, options, values, linear(slot, 1))


def test_values_that_are_not_finite_are_written_where_that_is_allowed(opened: Cases, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    source, checked = changed(opened("llama-tied")[0], name, (63, 5), np.inf)
    values = np.ones((1, 1, 64), np.float32)
    add = linear("attn_q.weight", 1)
    (found,), _ = run(tmp_path, source, checked, OnnxOptions(), values, add, allow_nonfinite=True)
    assert np.flatnonzero(np.isinf(found)).tolist() == [63]
    with pytest.raises(InputError, match=f"model.safetensors: tensor '{name}': 1 of .* no code stands for"):
        run(tmp_path, source, checked, OnnxOptions(precision="int8"), values, add, allow_nonfinite=True)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_values_beyond_float16_are_refused_by_file_and_tensor(name: str, opened: Cases, tmp_path: Path) -> None:
    name = f"model.layers.1.self_attn.q_proj.{name}"
    source, checked = changed(opened("llama-bias")[0], name, (0,), 65520.0)
    options = OnnxOptions(precision="fp16", compute_type="fp16")
    with pytest.raises(InputError, match=rf"model.safetensors: tensor '{name}': \d+ of .* beyond F16"):
        run(tmp_path, source, checked, options, np.zeros((1, 1, 64), np.float16), linear("attn_q.weight", 1))


def test_nothing_heavy_is_imported_before_weights_are_read() -> None:
    code = (
        "import sys; import quantpress.convert.onnx.weights; "
        "print(sorted({'torch', 'numba', 'scipy', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
