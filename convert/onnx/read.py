"""Opens an ONNX model that a stranger may have made: its graph and where its weights are, never the weights.

Everything is checked that a runtime would believe: counts, sizes and names in the file, and for every tensor outside it
that the data file lies in the model's folder and holds as many bytes as type and shape say. The numbers of fields and
types are those of onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.convert.checkpoint import SourceFile
from quantpress.convert.files import open_regular, shown
from quantpress.convert.onnx.read_folder import OnnxFolder, find_onnx
from quantpress.convert.onnx.read_graph import GraphReader, OnnxGraph, OnnxNode, OnnxValue
from quantpress.convert.onnx.read_tensor import DataFiles, OnnxTensor, read_entry
from quantpress.convert.onnx.wire import BYTES, Field, MessageFile
from quantpress.quant.errors import InputError

__all__ = ["OnnxModel", "OnnxNode", "OnnxTensor", "OnnxValue", "open_onnx"]

MAX_MODEL = (2 << 30) + (1 << 20)  # bytes of model.onnx: no protobuf library reads more than 2 GiB
_MAX_NAME = 4096  # bytes
_MAX_ENTRIES = 10_000  # versions of operators, facts about the model, functions


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model that is open but not read.

    Attributes:
        name: what to call it: its folder, or the file where it does not lie in a model folder.
        path: the .onnx file.
        ir_version: version of the file format.
        opsets: domain -> version of its operators.
        producer: what wrote it, with its version.
        graph: nodes, inputs, outputs and stored tensors.
        ops: (domain, operator) -> nodes, those of nested graphs and functions included.
        functions: domains of operators that the model defines itself.
        facts: the model's own key-value pairs.
        folder: config.json, genai_config.json and the tokenizer's files beside it.
        files: the model file and its data files.
    """

    name: str
    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    graph: OnnxGraph = field(repr=False)
    ops: Mapping[tuple[str, str], int] = field(repr=False)
    functions: frozenset[str]
    facts: Mapping[str, str] = field(repr=False)
    folder: OnnxFolder = field(repr=False)
    files: tuple[SourceFile, ...]

    @property
    def inputs(self) -> tuple[OnnxValue, ...]:
        """What has to be fed: the graph's inputs without those that have a stored value."""
        return tuple(value for value in self.graph.inputs if value.name not in self.graph.tensors)

    @property
    def outputs(self) -> tuple[OnnxValue, ...]:
        """What it computes."""
        return tuple(self.graph.outputs)

    @property
    def tensors(self) -> Mapping[str, OnnxTensor]:
        """Its stored tensors by name."""
        return self.graph.tensors


def open_onnx(model: Path | str) -> OnnxModel:
    """Opens an ONNX model without reading a weight.

    Args:
        model: a folder as onnxruntime-genai, optimum or this program writes it, or a .onnx file.

    Raises:
        InputError: no ONNX model there, or it is damaged, hostile or incomplete.
    """
    folder = OnnxFolder.of(find_onnx(Path(model)))
    path, data = folder.model, DataFiles(folder.model.parent)
    with open_regular(path) as file:
        source = MessageFile(file, str(path))
        if not 0 < source.nbytes <= MAX_MODEL:
            raise InputError(f"{path}: not an ONNX model: {source.nbytes} bytes, wanted 1 to {MAX_MODEL}")
        if source.take(0, min(8, source.nbytes), "its beginning") == b"version ":
            raise InputError(f"{path}: a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
        parts = _Model(source, data)
        parts.read()
    _check_domains(parts, str(path))
    assert parts.graph is not None
    return OnnxModel(
        name=folder.name,
        path=path,
        ir_version=parts.ir_version,
        opsets=parts.opsets,
        producer=" ".join(filter(None, parts.producer)),
        graph=parts.graph,
        ops=dict(sorted(parts.reader.ops.items())),
        functions=frozenset(parts.functions),
        facts=parts.facts,
        folder=folder,
        files=(SourceFile(path, source.nbytes), *data.files.values()),
    )


class _Model:
    """The fields of one ModelProto as they come."""

    def __init__(self, source: MessageFile, data: DataFiles) -> None:
        self._source = source
        self.reader = GraphReader(source, data)
        self.graph: OnnxGraph | None = None
        self.ir_version = 0
        self.producer = ["", ""]
        self.opsets: dict[str, int] = {}
        self.functions: set[str] = set()
        self.facts: dict[str, str] = {}
        self._counts: dict[int, int] = {}

    def read(self) -> None:
        """Reads the whole file.

        Raises:
            InputError: it is no ONNX model, or damaged.
        """
        source = self._source
        for part in source.fields(0, source.nbytes, "the model"):
            number = part[0]
            self._counts[number] = self._counts.get(number, 0) + 1
            if self._counts[number] > _MAX_ENTRIES:
                raise InputError(f"{source.label}: field {number} of the model stands more than {_MAX_ENTRIES} times")
            if number == 7 and self._counts[number] > 1:
                raise InputError(f"{source.label}: the model has two graphs")
            self._take(part)
        if self.graph is None or not self.opsets:
            missing = "no graph" if self.graph is None else "no versions of operators"
            raise InputError(f"{source.label}: not an ONNX model or cut off: it has {missing}")

    def _take(self, part: Field) -> None:
        source, number = self._source, part[0]
        if number == 1:
            self.ir_version = source.integer(part, "the version of the format")
        elif number in (2, 3):
            self.producer[number - 2] = source.text(part, "the name of the producer", _MAX_NAME)
        elif number == 7:
            self.graph = self.reader.graph(part)
        elif number == 8:
            domain, version = self._opset(part)
            if domain in self.opsets and self.opsets[domain] != version:
                raise InputError(f"{source.label}: two versions of the operators of {shown(domain or 'ai.onnx')}")
            self.opsets[domain] = version
        elif number == 14:
            key, value = read_entry(source, part, "a fact about the model")
            self.facts[key] = value
        elif number == 20:
            raise InputError(f"{source.label}: holds a training graph; export the model for inference")
        elif number == 25:
            self._function(part)

    def _opset(self, place: Field) -> tuple[str, int]:
        source, what = self._source, "a version of operators"
        domain, version = "", 0
        source.need(place, BYTES, what)
        for part in source.fields(place[2], place[3], what):
            if part[0] == 1:
                domain = source.text(part, what, _MAX_NAME)
            elif part[0] == 2:
                version = source.integer(part, what)
        return "" if domain == "ai.onnx" else domain, version

    def _function(self, place: Field) -> None:
        """Reads a FunctionProto: its nodes are counted and their tensors checked."""
        source, what = self._source, "a function"
        domain = ""
        source.need(place, BYTES, what)
        for part in source.fields(place[2], place[3], what):
            if part[0] == 7:
                self.reader.node(part, 0)
            elif part[0] == 10:
                domain = source.text(part, what, _MAX_NAME)
            elif part[0] == 9:  # its operators' versions count where the model has none of its own
                self.opsets.setdefault(*self._opset(part))
        self.functions.add(domain)


def _check_domains(parts: _Model, label: str) -> None:
    for domain, op in parts.reader.ops:
        if domain not in parts.opsets:
            raise InputError(
                f"{label}: operator {shown(op)} is of {shown(domain or 'ai.onnx')}, but the model does not say which"
                " version of its operators"
            )


def model_facts(model: OnnxModel) -> dict[str, Any]:
    """Gives what `inspect` shows of the file itself."""
    return {
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in sorted(model.opsets.items())},
        "producer": model.producer,
        "operators": {f"{domain}.{op}" if domain else op: count for (domain, op), count in model.ops.items()},
    }
