"""Makes small ONNX models of checkpoints without the exporter: weights of the torch decoder, inlined in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.onnx.decoder import build_graph
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.weights import CheckpointWeights
from tests.tiny import tiny_checkpoint

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
        The folder.
    """
    builder = GraphBuilder(compute=compute, standard=standard, opset=opset)
    build_graph(builder, InlineWeights(builder, weights), weights.spec, weights.hyper)
    return write_graph(folder, builder)


def write_graph(folder: Path, builder: GraphBuilder) -> Path:
    """Writes what a builder holds; gives the folder."""
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
    model = builder.model(name="decoder", producer_version="0")
    (folder / "model.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
    return folder


def checked(folder: Path) -> onnx.ModelProto:
    """Gives the model after onnx's own checker and its shape inference have passed it."""
    path = folder / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path, load_external_data=False)


def operators(model: onnx.ModelProto, *, under: str = "/") -> list[str]:
    """Gives the operators of nodes whose names begin like this, in order; those of onnxruntime with a star."""
    nodes = [node for node in model.graph.node if node.name.startswith(under)]
    return [f"{node.op_type}*" if node.domain else node.op_type for node in nodes]


@dataclass(frozen=True)
class Source:
    """A tiny checkpoint: its weights, sizes and what transformers makes of it."""

    folder: Path
    weights: CheckpointWeights
    model: Any

    @property
    def hyper(self) -> Hyperparameters:
        """Its sizes."""
        return self.weights.hyper

    def logits(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Gives transformers' logits of one text, (S, vocab)."""
        with torch.no_grad():
            found: NDArray[np.float32] = self.model(torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
        return found


def tiny_source(folder: Path, family: str, **options: Any) -> Source:
    """Makes a checkpoint of `tests.tiny` and loads it."""
    from transformers import AutoModelForCausalLM, logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny_checkpoint(folder, family, **options)
    checkpoint = open_checkpoint(folder)
    spec = find_arch(checkpoint.config)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return Source(folder, CheckpointWeights(checkpoint, spec, spec.read_config(checkpoint.config)), model)
