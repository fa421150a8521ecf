"""Running ONNX models: what is fed, what comes out, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from quantpress.convert.onnx.read import open_onnx
from quantpress.pipelines import onnx_runtime
from quantpress.pipelines.cache_proof import cache_problem, with_cache_proof
from quantpress.pipelines.onnx_runtime import OnnxRuntime
from quantpress.pipelines.parity import unjudged
from quantpress.pipelines.parity_limits import limits_for
from quantpress.pipelines.runtime import Runtime
from quantpress.quant.errors import InputError, OutputError, ParityError, QuantpressError, UsageError
from tests.onnx_models import VOCABULARY, reference_logits, save, summing_model

# float32 against float64: 16 embeddings of size 3 summed, 8 columns twice; each rounds by 6e-8 of at most 50
CLOSE = 1e-4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "sums", summing_model())


@pytest.fixture
def ids() -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(3).integers(0, VOCABULARY, 16).astype(np.int32)


def test_a_window_is_scored_from_an_empty_state(folder: Path, ids: Any) -> None:
    runtime: Runtime = OnnxRuntime(folder, threads=1)
    with runtime as opened:
        assert opened is runtime
        assert (opened.name, opened.vocab_size) == ("onnxruntime", VOCABULARY)
        for first in (0, 9, 15):
            rows = opened.logits(ids, first)
            assert (rows.shape, rows.dtype) == ((16 - first, VOCABULARY), np.float32)
            np.testing.assert_allclose(rows, reference_logits(ids)[first:], atol=CLOSE)
        assert np.array_equal(opened.logits(ids, 0), opened.logits(ids, 0))
        for first in (-1, 16):
            with pytest.raises(ValueError):
                opened.logits(ids, first)
    runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.logits(ids, 0)


def test_the_context_comes_from_the_files(folder: Path) -> None:
    assert OnnxRuntime(folder, threads=1).context == 64
    (folder / "genai_config.json").write_text("{}")
    assert OnnxRuntime(folder / "model.onnx", threads=1).context is None


def test_decoding_with_the_cache_gives_what_the_whole_text_gives(folder: Path, ids: Any) -> None:
    runtime = OnnxRuntime(folder, threads=1)
    wanted = reference_logits(ids)
    found, cache = runtime.prefill(ids[None, :5].astype(np.int64))
    np.testing.assert_allclose(found[0], wanted[:5], atol=CLOSE)
    found, cache = runtime.prefill(ids[None, 5:9].astype(np.int64), cache=cache)
    np.testing.assert_allclose(found[0], wanted[5:9], atol=CLOSE)
    for position in range(9, 16):
        row, cache = runtime.decode(ids[position : position + 1], cache)
        assert row.dtype == np.float32
        np.testing.assert_allclose(row[0], wanted[position], atol=CLOSE)
    assert {name: value.shape for name, value in cache.items()} == dict.fromkeys(cache, (1, 1, 16, 8))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_texts_of_different_lengths_run_together(folder: Path, ids: Any, padding: str) -> None:
    runtime = OnnxRuntime(folder, threads=1)
    rows = [ids[:3], ids, ids[4:9]]
    for row, found in zip(rows, runtime.logits_batch(rows, padding=padding), strict=True):
        np.testing.assert_allclose(found, reference_logits(row), atol=CLOSE)
    with pytest.raises(ValueError, match="wanted left or right"):
        runtime.logits_batch(rows, padding="middle")


def test_a_padded_batch_is_decoded_row_by_row(folder: Path, ids: Any) -> None:
    runtime = OnnxRuntime(folder, threads=1)
    padded = np.stack([np.concatenate([np.zeros(2, np.int64), ids[:4]]), ids[4:10]]).astype(np.int64)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    _, cache = runtime.prefill(padded, mask)
    mask = np.concatenate([mask, [[1], [1]]], axis=1)
    found, _ = runtime.decode(np.array([7, 8]), cache, mask)
    np.testing.assert_allclose(found[0], reference_logits(np.array([*ids[:4], 7]))[-1], atol=CLOSE)
    np.testing.assert_allclose(found[1], reference_logits(np.array([*ids[4:10], 8]))[-1], atol=CLOSE)
    with pytest.raises(ValueError, match="mask of shape"):
        runtime.decode(np.array([7, 8]), cache, mask[:, 1:])


def test_a_long_window_is_fed_in_pieces(folder: Path, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "_LOGITS_BYTES", 4 * VOCABULARY * 5)  # 5 tokens at a time
    runtime = OnnxRuntime(folder, threads=1)
    for first in (0, 4, 5, 12):
        np.testing.assert_allclose(runtime.logits(ids, first), reference_logits(ids)[first:], atol=CLOSE)


def retype(model: ModelProto) -> None:
    """The same model with int32 tokens, position ids that it adds up, a cache in float16 and no number of logits."""
    graph = model.graph
    for value in graph.input:
        if value.name in ("input_ids", "attention_mask"):
            value.type.tensor_type.elem_type = TensorProto.INT32
        else:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            value.type.tensor_type.shape.dim[1].dim_param = "heads"
            value.type.tensor_type.shape.dim[3].dim_param = "width"
        value.name = value.name.replace("past_key_values.", "past_key_values.")
    positions = helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"])
    graph.input.append(positions)
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
        value.type.tensor_type.shape.dim[1].dim_param = "d1"
        value.type.tensor_type.shape.dim[len(value.type.tensor_type.shape.dim) - 1].dim_param = "last"
    renamed = {"past_key_values.0.key": "key32", "past_key_values.0.value": "value32"}
    for node in graph.node:
        for number, name in enumerate(node.input):
            node.input[number] = renamed.get(name, name)
        for number, name in enumerate(node.output):
            node.output[number] = {"present.0.key": "k32", "present.0.value": "v32", "logits": "l32"}.get(name, name)
    casts = [helper.make_node("Cast", [old], [new], to=TensorProto.FLOAT) for old, new in renamed.items()]
    for node in reversed(casts):
        graph.node.insert(0, node)
    graph.node.append(helper.make_node("Cast", ["position_ids"], ["p32"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Unsqueeze", ["p32", "two"], ["p3"]))
    graph.node.append(helper.make_node("Add", ["l32", "p3"], ["sum32"]))
    for old, new in (("k32", "present.0.key"), ("v32", "present.0.value"), ("sum32", "logits")):
        graph.node.append(helper.make_node("Cast", [old], [new], to=TensorProto.FLOAT16))


def test_what_is_fed_follows_the_types_and_names_of_the_inputs(tmp_path: Path, ids: Any) -> None:
    folder = save(tmp_path / "m", summing_model(), change=retype)
    with pytest.raises(InputError, match=r"input 'past_key_values\.0\.key' has an unknown number of heads"):
        OnnxRuntime(folder, threads=1)
    sizes = {"num_key_value_heads": 1, "head_size": 8}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx", **sizes}}}))
    runtime = OnnxRuntime(folder, threads=1)
    assert runtime.vocab_size == VOCABULARY  # one token told it
    wanted = reference_logits(ids) + np.arange(16)[:, None]
    # float16: 2^-11 of each embedding in the cache (3, 16 of them, weights up to 3) and of the logits (up to 30)
    whole = runtime.logits(ids, 0)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, wanted, atol=0.1)
    _, cache = runtime.prefill(ids[None, :15].astype(np.int64))
    assert {value.dtype for value in cache.values()} == {np.dtype(np.float16)}
    row, _ = runtime.decode(ids[15:], cache)
    np.testing.assert_allclose(row[0], wanted[15], atol=0.1)
    (folder / "genai_config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({"num_key_value_heads": 1, "hidden_size": 16, "num_attention_heads": 2})
    )
    np.testing.assert_array_equal(OnnxRuntime(folder, threads=1).logits(ids, 0), whole)


def test_positions_of_a_left_padded_row_begin_at_its_first_token(tmp_path: Path, ids: Any) -> None:
    folder = save(tmp_path / "m", summing_model(), change=retype)
    (folder / "config.json").write_text(json.dumps({"num_key_value_heads": 1, "head_dim": 8}))
    found = OnnxRuntime(folder, threads=1).logits_batch([ids[:5], ids])
    np.testing.assert_allclose(found[0], reference_logits(ids[:5]) + np.arange(5)[:, None], atol=0.1)


def without_cache(model: ModelProto) -> None:
    graph = model.graph
    del graph.input[2:], graph.output[1:]
    nodes = [node for node in graph.node if node.output[0] not in ("present.0.key", "present.0.value", "old4", "past")]
    for node in nodes:
        if node.output[0] == "all4":
            node.op_type, node.input[:] = "Identity", ["x4"]
            del node.attribute[:]
    at = next(number for number, node in enumerate(nodes) if node.output[0] == "now")
    nodes[at] = helper.make_node("Identity", ["sums"], ["now"])
    graph.ClearField("node")
    graph.node.extend(nodes)


def test_a_model_without_a_cache_runs_but_does_not_decode(tmp_path: Path, ids: Any) -> None:
    runtime = OnnxRuntime(save(tmp_path / "m", summing_model(), change=without_cache), threads=1)
    np.testing.assert_allclose(runtime.logits(ids, 3), reference_logits(ids)[3:], atol=CLOSE)
    _, cache = runtime.prefill(ids[None].astype(np.int64))
    assert not runtime.has_cache
    assert not cache
    assert cache_problem(runtime, ids, max_kld=0) == ""
    with pytest.raises(UsageError, match="no inputs for keys and values"):
        runtime.decode(ids[:1], {"past_key_values.0.key": np.zeros((1, 1, 3, 8), np.float32)})


def renamed(old: str, new: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name == old:
                value.name = new

    return change


def another_input(name: str, kind: int = TensorProto.BOOL) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info(name, kind, [1]))


def another_node(op: str, domain: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node(op, ["x"], ["other"], domain=domain))
        model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def flat_cache(model: ModelProto) -> None:
    del model.graph.input[2].type.tensor_type.shape.dim[3]


def unmade(model: ModelProto) -> None:
    model.graph.node[-1].input[0] = "nothing"


REFUSED = {
    "older optimum": (
        another_input("use_cache_branch"),
        "'use_cache_branch': merged from a graph with and one without",
    ),
    "embeddings": (another_input("inputs_embeds"), "'inputs_embeds': starts from embeddings"),
    "encoder": (another_input("encoder_hidden_states"), "encoder-decoder"),
    "unknown input": (another_input("pixel_values"), "what to feed as 'pixel_values' is not known here"),
    "no tokens": (renamed("input_ids", "tokens"), "not a language model: no input 'input_ids'; it has .*'tokens'"),
    "no logits": (renamed("logits", "scores"), "not a language model: no output 'logits'; it has .*'scores'"),
    "no new cache": (renamed("present.0.key", "gone"), r"no output 'present\.0\.key' for the keys"),
    "flat cache": (flat_cache, r"input 'past_key_values\.0\.key' has shape .*, wanted 4 dimensions"),
    "boolean tokens": (
        lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", TensorProto.BOOL),
        "input 'input_ids' is of type BOOL",
    ),
    "unknown domain": (another_node("Magic", "com.example"), r"unknown domain 'com\.example' \('Magic'\)"),
    "compiled": (another_node("EPContext", "com.microsoft"), "compiled for one accelerator"),
    "unknown operator": (another_node("Magic", "com.microsoft"), "onnxruntime refuses it: .*Magic"),
    "value that is never made": (unmade, "onnxruntime refuses it: .*nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    folder = save(tmp_path / "m", summing_model(), change=lambda model: (change(model), None)[1])
    with pytest.raises(InputError, match=words) as caught:
        OnnxRuntime(folder, threads=1)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(folder / "model.onnx"))
    assert "[ONNXRuntimeError]" not in text


def test_a_model_that_fails_while_it_runs_is_a_parity_error(tmp_path: Path, ids: Any) -> None:
    def mix(model: ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4

    runtime = OnnxRuntime(save(tmp_path / "m", summing_model(), change=mix), threads=1)
    with pytest.raises(ParityError, match="onnxruntime failed while it ran") as caught:
        runtime.logits(ids, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ParityError, match=r"token ids 0 to 99, vocabulary of 32"):
        runtime.logits(np.array([0, 99], np.int32), 0)


def test_without_onnxruntime_it_is_told_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(OutputError, match=r"pip install 'quantpress\[onnx\]'"):
        OnnxRuntime(folder)


def test_cuda_needs_an_onnxruntime_that_has_it(folder: Path) -> None:
    import onnxruntime  # type: ignore[import-untyped]

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert OnnxRuntime(folder, device="cuda").provider == "CUDAExecutionProvider"
        return
    with pytest.raises(OutputError, match="pip install onnxruntime-gpu"):
        OnnxRuntime(folder, device="cuda")


def test_the_number_of_threads_reaches_onnxruntime(folder: Path) -> None:
    runtime = OnnxRuntime(open_onnx(folder), threads=3)
    assert runtime._session is not None
    assert runtime._session.get_session_options().intra_op_num_threads == 3
    assert runtime.provider == "CPUExecutionProvider"


def test_a_wrong_cache_is_found(tmp_path: Path, folder: Path, ids: Any) -> None:
    """Perplexity would not see it: whole windows are right."""
    good = OnnxRuntime(folder, threads=1)
    assert cache_problem(good, ids, max_kld=0) == ""
    assert cache_problem(good, ids[:1], max_kld=0) == ""  # nothing to decode after
    wrong = OnnxRuntime(save(tmp_path / "wrong", summing_model(decay_by_cache=True)), threads=1)
    np.testing.assert_allclose(wrong.logits(ids, 0), reference_logits(ids), atol=CLOSE)
    assert "the last 8 tokens of the first chunk, decoded one by one with the cache, differ" in cache_problem(
        wrong, ids, max_kld=1e9
    )
    parity = unjudged("earlier", limits_for("F32"))
    judged = with_cache_proof(parity, wrong, ids)
    assert not judged.passed
    assert judged.reason.startswith("earlier; the last 8 tokens")
    assert with_cache_proof(parity, good, ids) is parity


def test_a_cache_that_gives_nan_is_found(tmp_path: Path, ids: Any) -> None:
    def poison(model: ModelProto) -> None:
        half = next(tensor for tensor in model.graph.initializer if tensor.name == "half")
        half.raw_data = np.float32(np.nan).tobytes()

    folder = save(tmp_path / "m", summing_model(decay_by_cache=True), change=poison)
    assert "NaN or infinite" in cache_problem(OnnxRuntime(folder, threads=1), ids, max_kld=1)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_file_runs_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = save(tmp_path / "m", summing_model())
    path = folder / "model.onnx"
    changed = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        with OnnxRuntime(folder, threads=1) as runtime:
            runtime.logits(np.arange(6, dtype=np.int32), 2)
    except QuantpressError as error:
        said = str(error)
    else:
        return
    assert "\n" not in said
