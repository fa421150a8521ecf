"""Graphs of one linear layer, and how onnxruntime and the ONNX project's own evaluator run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from quantpress.convert.onnx.data_file import write_data
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight
from quantpress.convert.quantized import LazyQuantized
from quantpress.quant.qtensor import QuantizedTensor

Array = NDArray[Any]
Adds = Callable[[GraphBuilder, ir.Value], ir.Value]


def weight_of(
    values: Array | QuantizedTensor, *, step: int = 7, slot: str = "attn_q.weight", layer: int = 0
) -> LinearWeight:
    """Gives a weight as the builders take it, read `step` rows at a time."""
    lazy = None
    if isinstance(values, QuantizedTensor):
        tensor, values = values, values.dequantize()
        lazy = LazyQuantized("some.weight", tensor.form, "some.safetensors", lambda: tensor)
    array = values
    ranges = [(start, min(start + step, len(array))) for start in range(0, len(array), step)]
    return LinearWeight(
        slot, layer, f"some.{layer}.{slot}", (array.shape[0], array.shape[1]), "F32", "some.safetensors",
        lambda start, stop: array[start:stop], lambda: ranges, codes=lazy,
    )  # fmt: skip


def with_codes(weight: LinearWeight, tensor: QuantizedTensor) -> LinearWeight:
    """Gives a weight with other codes."""
    assert weight.codes is not None
    return replace(weight, codes=LazyQuantized("some.weight", tensor.form, "some.safetensors", lambda: tensor))


class _Plain:
    """A file as `write_data` wants it."""

    def __init__(self, path: Path) -> None:
        self._path, self.nbytes = path, 0
        path.write_bytes(b"")

    def write(self, data: bytes | memoryview, /) -> None:
        with self._path.open("ab") as file:
            self.nbytes += file.write(data)


class Graph:
    """A model with one input and the outputs that a function adds, saved in a folder; the checker has accepted it."""

    def __init__(
        self, folder: Path, add: Callable[[GraphBuilder, ir.Value], Sequence[ir.Value]], *, columns: int | None,
        compute: str = "FLOAT", opset: int = 23, threads: int = 1, standard: bool = True,
    ) -> None:  # fmt: skip
        """Builds it; `columns` None for an input of ids."""
        builder = GraphBuilder(compute=compute, standard=standard, opset=opset)
        dims: list[int | str] = ["batch_size", "sequence_length"]
        if columns is None:
            values = builder.input("values", "INT64", dims)
        else:
            values = builder.input("values", compute, [*dims, columns])
        for number, value in enumerate(add(builder, values)):
            shape = [each if isinstance(each, int) else str(each.value) for each in value.shape or ()]
            builder.output(value, f"result{number}", compute, shape)
        self.labels = [group.label for group, _ in builder.groups]
        self.path = folder / "model.onnx"
        onnx.save(ir.serde.serialize_model(builder.model(name="one", producer_version="0")), self.path)
        write_data(_Plain(folder / DATA_FILE), builder.groups, threads=threads)
        onnx.checker.check_model(str(self.path), full_check=True)

    @property
    def operators(self) -> list[str]:
        """The nodes as they were built."""
        return [node.op_type for node in onnx.load(self.path, load_external_data=False).graph.node]

    def stored(self, ending: str) -> Array:
        """Gives an initializer by the end of its name."""
        found = [each for each in onnx.load(self.path).graph.initializer if each.name.endswith(ending)]
        assert len(found) == 1, [each.name for each in found]
        return onnx.numpy_helper.to_array(found[0])

    def run(self, values: Array, *, optimize: bool = True) -> list[Array]:
        """Runs it in onnxruntime on the CPU."""
        return list(self._session(optimize).run(None, {"values": values}))

    def optimized(self) -> list[str]:
        """The nodes that onnxruntime runs."""
        path = self.path.with_name("optimized.onnx")
        self._session(True, path)
        return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]

    def reference(self, values: Array) -> list[Array]:
        """Runs it in the ONNX project's own evaluator."""
        return list(ReferenceEvaluator(onnx.load(self.path)).run(None, {"values": values}))

    def _session(self, optimize: bool, save: Path | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        options.log_severity_level = 3
        if save is not None:
            options.optimized_model_filepath = str(save)
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
