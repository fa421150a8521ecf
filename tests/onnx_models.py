"""Small ONNX language models for tests of reading and running, made with the onnx package's own helpers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

VOCABULARY, WIDTH = 32, 8
DATA = "model.onnx.data"


def weights(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """An embedding, a matrix and a head of a model that sums what it has read."""
    draw = np.random.default_rng(seed)
    return {
        "embed": draw.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "mix": (draw.standard_normal((WIDTH, WIDTH)) / 3).astype(np.float32),
        "head": draw.standard_normal((WIDTH, VOCABULARY)).astype(np.float32),
    }


def summing_model(*, decay_by_cache: bool = False) -> ModelProto:
    """A language model without attention: logits of a token come from the sum of all embeddings so far.

    Its keys are the embeddings, its values are not used; so what is fed in pieces says the same as the whole. With
    `decay_by_cache` it does not: what comes from the cache counts half.
    """
    arrays = weights()
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),  # (B, S, 8)
        helper.make_node("Unsqueeze", ["x", "one"], ["x4"]),  # (B, 1, S, 8)
        helper.make_node("Concat", ["past_key_values.0.key", "x4"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "x4"], ["present.0.value"], axis=2),
        helper.make_node("Mul", ["past_key_values.0.key", "half" if decay_by_cache else "whole"], ["old4"]),
        helper.make_node("Concat", ["old4", "x4"], ["all4"], axis=2),
        helper.make_node("Squeeze", ["all4", "one"], ["all"]),  # (B, T, 8)
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["all", "mask3"], ["seen"]),
        helper.make_node("CumSum", ["seen", "axis"], ["sums"]),
        helper.make_node("Shape", ["past_key_values.0.key"], ["past"], start=2, end=3),
        helper.make_node("Slice", ["sums", "past", "most", "one"], ["now"]),
        helper.make_node("MatMul", ["now", "mix"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["bent"]),
        helper.make_node("MatMul", ["bent", "head"], ["logits"]),
    ]
    constants = {
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "axis": np.array(1, np.int64),
        "most": np.array([1 << 40], np.int64),
        "half": np.array(0.5, np.float32),
        "whole": np.array(1, np.float32),
    }
    cache = ["batch", 1, "past", WIDTH]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        *(helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for part in _PARTS),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
        *(helper.make_tensor_value_info(f"present.0.{part}", TensorProto.FLOAT, cache) for part in _PARTS),
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in (arrays | constants).items()]
    graph = helper.make_graph(nodes, "sums", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="test")


_PARTS = ("key", "value")


def reference_logits(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the model should say of (n,) tokens, in float64: (n, vocabulary)."""
    arrays = {name: array.astype(np.float64) for name, array in weights().items()}
    return np.asarray(np.tanh(arrays["embed"][ids].cumsum(axis=0) @ arrays["mix"]) @ arrays["head"])


def save(
    folder: Path, model: ModelProto, *, external: bool = True, change: Callable[[ModelProto], None] | None = None
) -> Path:
    """Writes a folder with a model, its data file and genai_config.json.

    Args:
        folder: made if it is missing.
        model: written as it is, but for `external` and `change`.
        external: matrices go into the data file.
        change: what to do to the model last of all.
    """
    folder.mkdir(exist_ok=True)
    if external:
        data = b""
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2:
                raw = tensor.raw_data
                set_external_data(tensor, DATA, offset=len(data), length=len(raw))
                tensor.ClearField("raw_data")
                data += raw
        (folder / DATA).write_bytes(data)
    if change is not None:
        change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    genai = {"model": {"type": "llama", "context_length": 64, "decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(genai))
    return folder
