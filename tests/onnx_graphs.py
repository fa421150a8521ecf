"""Makes small ONNX models of checkpoints without the exporter: weights of the torch decoder, inlined in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.onnx.decoder import build_graph
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder
from quantpress.convert.weights import CheckpointWeights

_SHAPE = ("batch_size", "sequence_length")


class InlineWeights:
    """Weights as `build_graph` asks for them, from the torch decoder's reader, plain MatMul throughout."""

    def __init__(self, builder: GraphBuilder, weights: CheckpointWeights) -> None:
        """Takes the graph and where weights come from."""
        self.builder, self.weights = builder, weights

    def vector(self, slot: str, layer: int = -1) -> ir.Value | None:
        """Gives a norm or bias."""
        found = self.weights(slot, layer)
        return None if found is None else self._constant(found.float().numpy())

    def linear(self, values: ir.Value, slot: str, layer: int) -> ir.Value:
        """Multiplies and adds the bias."""
        return self._multiply(values, slot, layer, f"/layers.{layer}/{slot.removesuffix('.weight')}")

    def embed(self, ids: ir.Value) -> ir.Value:
        """Takes rows."""
        return self._rows("token_embd.weight", ids)

    def positions(self, index: ir.Value) -> ir.Value:
        """Takes rows."""
        return self._rows("position_embd.weight", index)

    def head(self, values: ir.Value) -> ir.Value:
        """Multiplies."""
        return self._multiply(values, "output.weight", -1, "/head")

    def _multiply(self, values: ir.Value, slot: str, layer: int, name: str) -> ir.Value:
        weight = self.weights(slot, layer)
        assert weight is not None
        shape = (*_SHAPE, weight.shape[0])
        stored = self._constant(weight.float().numpy().T)
        result = self.builder.add("MatMul", [values, stored], name=f"{name}/MatMul", shape=shape)
        bias = self.vector(f"{slot.removesuffix('.weight')}.bias", layer)
        return result if bias is None else self.builder.add("Add", [result, bias], name=f"{name}/Add", shape=shape)

    def _rows(self, slot: str, index: ir.Value) -> ir.Value:
        stored = self.weights(slot, -1)
        assert stored is not None
        shape = (*_SHAPE, stored.shape[1])
        return self.builder.add("Gather", [self._constant(stored.float().numpy()), index], shape=shape)

    def _constant(self, values: NDArray[Any]) -> ir.Value:
        return self.builder.constant(np.ascontiguousarray(values.astype(self.builder.numpy_type)))


def write_model(
    folder: Path, weights: CheckpointWeights, *, compute: str = "FLOAT", standard: bool = False, opset: int = 23
) -> Path:
    """Writes model.onnx and its data file.

    Returns:
        Path of model.onnx.
    """
    builder = GraphBuilder(compute=compute, standard=standard, opset=opset)
    build_graph(builder, InlineWeights(builder, weights), weights.spec, weights.hyper)
    return write_graph(folder, builder)


def write_graph(folder: Path, builder: GraphBuilder) -> Path:
    """Writes what a builder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    data = np.zeros(builder.data_bytes, np.uint8)
    for group, places in builder.groups:
        ends = [place.offset for place in places]
        for task in group.tasks():
            for number, piece in enumerate(task()):
                raw = np.frombuffer(np.ascontiguousarray(piece).tobytes(), np.uint8)
                data[ends[number] : ends[number] + len(raw)] = raw
                ends[number] += len(raw)
        assert ends == [place.offset + place.tensor.nbytes for place in places]
    data.tofile(folder / DATA_FILE)
    path = folder / "model.onnx"
    model = builder.model(name="decoder", producer_version="0")
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    return path


class Session:
    """A model in onnxruntime, single-threaded."""

    def __init__(self, path: Path, hyper: Hyperparameters) -> None:
        """Loads it."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.hyper = hyper
        kinds = {each.name: each.type for each in self.session.get_inputs()}
        self.dtype = np.float16 if kinds["past_key_values.0.key"] == "tensor(float16)" else np.float32

    def empty(self, batch: int) -> list[NDArray[Any]]:
        """Gives the cache before the first token."""
        shape = (batch, self.hyper.kv_heads, 0, self.hyper.head_dim)
        return [np.zeros(shape, self.dtype) for _ in range(2 * self.hyper.layers)]

    def run(
        self, ids: NDArray[Any], mask: NDArray[Any] | None = None, cache: Sequence[NDArray[Any]] | None = None
    ) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        """Runs tokens (B, S) that stand at the end of the mask (B, T).

        Returns:
            Logits (B, S, vocab), and the cache with these tokens.
        """
        cache = self.empty(len(ids)) if cache is None else cache
        if mask is None:
            mask = np.ones((len(ids), cache[0].shape[2] + ids.shape[1]))
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        for number, values in enumerate(cache):
            feeds[f"past_key_values.{number // 2}.{('key', 'value')[number % 2]}"] = values
        logits, *present = self.session.run(None, feeds)
        return logits.astype(np.float32), present


def checked(path: Path) -> onnx.ModelProto:
    """Gives the model after onnx's own checker and its shape inference have passed it."""
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path, load_external_data=False)


def operators(path: Path) -> list[str]:
    """Gives the operators of a model in order, those of onnxruntime with their domain."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes]


__all__ = ["ArchSpec", "InlineWeights", "Session", "checked", "operators", "write_graph", "write_model"]
