"""Reads the graph of an ONNX file: nodes, inputs, outputs and stored tensors, wherever they are nested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantpress.convert.files import shown
from quantpress.convert.onnx.read_tensor import DATA_TYPES, DataFiles, OnnxTensor, read_tensor
from quantpress.convert.onnx.wire import BYTES, Field, MessageFile
from quantpress.quant.errors import InputError

__all__ = ["GraphReader", "OnnxGraph", "OnnxNode", "OnnxValue"]

_MAX_DEPTH = 8  # graphs inside graphs; merged decoders of optimum have 1
_MAX_NAME = 4096  # bytes
_MAX_TEXT = 16 << 20  # bytes of a string attribute; compiled models for accelerators are kept in such
_KEPT_TEXT = 4096  # bytes of a string attribute that are kept
_KEPT_INTS = 64
_MAX_PACKED = 1 << 20  # bytes of packed numbers in an attribute
_MAX_INPUTS = 4096  # of a model or a node; a model of 126 layers has 255
_MAX_RANK = 16


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output of the model.

    Attributes:
        name: its name.
        dtype: name of the type, "" for what is no tensor.
        shape: a size, or a name where it is known only when the model runs ("" without one); None without a shape.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """A node.

    Attributes:
        op: operator.
        domain: "" for the standard.
        name: its name.
        inputs: names of values, "" where one is left out.
        outputs: names of values.
        attributes: numbers, short texts and short lists of integers; tensors as they are; what is longer or a graph
            is left out.
    """

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | float | str | tuple[int, ...] | OnnxTensor]


@dataclass(slots=True)
class OnnxGraph:
    """What a graph holds.

    Attributes:
        name: of the graph.
        nodes: its own nodes.
        inputs, outputs: its values.
        tensors: its initializers by name, in the order of the file.
    """

    name: str = ""
    nodes: list[OnnxNode] = field(default_factory=list)
    inputs: list[OnnxValue] = field(default_factory=list)
    outputs: list[OnnxValue] = field(default_factory=list)
    tensors: dict[str, OnnxTensor] = field(default_factory=dict)


class GraphReader:
    """Reads graphs of one file.

    Attributes:
        ops: (domain, operator) -> nodes, those of graphs inside graphs and of functions included.
    """

    def __init__(self, source: MessageFile, data: DataFiles) -> None:
        """Takes the model file and the data files beside it."""
        self._source, self._data = source, data
        self.ops: Counter[tuple[str, str]] = Counter()

    def graph(self, place: Field, depth: int = 0) -> OnnxGraph:
        """Reads a GraphProto.

        Raises:
            InputError: damaged, nested too deep, or a name is given twice.
        """
        source = self._source
        source.need(place, BYTES, "the graph")
        if depth > _MAX_DEPTH:
            raise InputError(f"{source.label}: graphs are nested deeper than {_MAX_DEPTH} levels")
        graph = OnnxGraph()
        for part in source.fields(place[2], place[3], "the graph"):
            self._take(graph, part, depth)
        for what, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            names = Counter(value.name for value in values)
            if twice := [name for name, count in names.items() if count > 1]:
                raise InputError(f"{source.label}: two {what} are called {shown(twice[0])}")
        made = Counter(name for node in graph.nodes for name in node.outputs if name)
        made.update(graph.tensors.keys())
        if twice := [name for name, count in made.items() if count > 1]:
            raise InputError(f"{source.label}: the value {shown(twice[0])} is made twice")
        return graph

    def _take(self, graph: OnnxGraph, part: Field, depth: int) -> None:
        source, number = self._source, part[0]
        if number == 1:
            graph.nodes.append(self.node(part, depth))
        elif number == 2:
            graph.name = source.text(part, "the name of the graph", _MAX_NAME)
        elif number == 5:
            self._add_tensor(graph, read_tensor(source, part, f"tensor {len(graph.tensors)}", self._data))
        elif number in (11, 12):
            values = graph.inputs if number == 11 else graph.outputs
            if len(values) >= _MAX_INPUTS:
                raise InputError(f"{source.label}: more than {_MAX_INPUTS} inputs or outputs")
            values.append(self._value(part))
        elif number == 15:
            self._sparse(part)

    def _add_tensor(self, graph: OnnxGraph, tensor: OnnxTensor) -> None:
        if not tensor.name:
            raise InputError(f"{self._source.label}: tensor {len(graph.tensors)} of the graph has no name")
        if tensor.name in graph.tensors:
            raise InputError(f"{self._source.label}: two tensors are called {shown(tensor.name)}")
        graph.tensors[tensor.name] = tensor

    def _sparse(self, place: Field) -> None:
        """Checks the two tensors of a sparse one."""
        what = "a sparse tensor"
        self._source.need(place, BYTES, what)
        for part in self._source.fields(place[2], place[3], what):
            if part[0] in (1, 2):
                read_tensor(self._source, part, what, self._data)

    def node(self, place: Field, depth: int) -> OnnxNode:
        """Reads a NodeProto and counts it."""
        source, texts = self._source, {3: "", 4: "", 7: ""}
        source.need(place, BYTES, "a node")
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, int | float | str | tuple[int, ...] | OnnxTensor] = {}
        seen: set[str] = set()
        for part in source.fields(place[2], place[3], "a node"):
            number = part[0]
            if number in (1, 2):
                names = inputs if number == 1 else outputs
                if len(names) >= _MAX_INPUTS:
                    raise InputError(f"{source.label}: a node has more than {_MAX_INPUTS} inputs or outputs")
                names.append(source.text(part, "an input or output of a node", _MAX_NAME))
            elif number in texts:
                texts[number] = source.text(part, "the name of a node", _MAX_NAME)
            elif number == 5:
                name, value = self._attribute(part, depth)
                if name in seen:
                    raise InputError(f"{source.label}: attribute {shown(name)} stands twice in a node")
                seen.add(name)
                if value is not None:
                    attributes[name] = value
        domain = "" if texts[7] == "ai.onnx" else texts[7]
        self.ops[domain, texts[4]] += 1
        return OnnxNode(texts[4], domain, texts[3], tuple(inputs), tuple(outputs), attributes)

    def _attribute(
        self, place: Field, depth: int
    ) -> tuple[str, int | float | str | tuple[int, ...] | OnnxTensor | None]:
        """Reads an AttributeProto: its name, and its value where that is kept."""
        source = self._source
        name, what = "", "an attribute"
        value: int | float | str | OnnxTensor | None = None
        ints: list[int] = []
        source.need(place, BYTES, what)
        for part in source.fields(place[2], place[3], what):
            number = part[0]
            if number == 1:
                name = source.text(part, "the name of an attribute", _MAX_NAME)
                what = f"attribute {shown(name)}"
            elif number == 2:
                value = source.floating(part, what)
            elif number == 3:
                value = source.integer(part, what)
            elif number in (4, 9):
                text = self._short_text(part, what)
                value = text if number == 4 else value
            elif number == 8:
                ints += source.integers(part, what, _MAX_PACKED)
            elif number in (5, 10):
                tensor = read_tensor(source, part, what, self._data)
                value = tensor if number == 5 else value
            elif number in (6, 11):
                self.graph(part, depth + 1)
            elif number in (22, 23):
                self._sparse(part)
        return name, value if not ints else tuple(ints) if len(ints) <= _KEPT_INTS else None

    def _short_text(self, part: Field, what: str) -> str | None:
        """Gives a text attribute; None where it is long or not UTF-8, which attributes may be."""
        source = self._source
        source.need(part, BYTES, what)
        nbytes = part[3] - part[2]
        if nbytes > _MAX_TEXT:
            raise InputError(f"{source.label}: {what} has {nbytes} bytes, at most {_MAX_TEXT} are read")
        if nbytes > _KEPT_TEXT:
            return None
        try:
            return source.take(part[2], part[3], what).decode("utf-8")
        except UnicodeDecodeError:
            return None

    def _value(self, place: Field) -> OnnxValue:
        """Reads a ValueInfoProto."""
        source, what = self._source, "an input or output"
        source.need(place, BYTES, what)
        name, dtype = "", ""
        shape: tuple[int | str, ...] | None = None
        for part in source.fields(place[2], place[3], what):
            if part[0] == 1:
                name = source.text(part, "the name of an input or output", _MAX_NAME)
            elif part[0] == 2:
                source.need(part, BYTES, what)
                for kind in source.fields(part[2], part[3], what):
                    if kind[0] == 1:
                        dtype, shape = self._tensor_type(kind, f"{what} {shown(name)}")
        return OnnxValue(name, dtype, shape)

    def _tensor_type(self, place: Field, what: str) -> tuple[str, tuple[int | str, ...] | None]:
        source, dtype = self._source, ""
        sizes: list[int | str] | None = None
        source.need(place, BYTES, what)
        for part in source.fields(place[2], place[3], what):
            if part[0] == 1:
                number = source.integer(part, f"the type of {what}")
                if number not in DATA_TYPES:
                    raise InputError(f"{source.label}: {what} has the unknown type {number}")
                dtype = DATA_TYPES[number][0]
            elif part[0] == 2:
                source.need(part, BYTES, what)
                sizes = [] if sizes is None else sizes
                for dim in source.fields(part[2], part[3], f"the shape of {what}"):
                    if dim[0] == 1:
                        sizes.append(self._dimension(dim, what))
                    if len(sizes) > _MAX_RANK:
                        raise InputError(f"{source.label}: {what} has more than {_MAX_RANK} dimensions")
        return dtype, None if sizes is None else tuple(sizes)

    def _dimension(self, place: Field, what: str) -> int | str:
        size: int | str = ""
        self._source.need(place, BYTES, what)
        for part in self._source.fields(place[2], place[3], f"the shape of {what}"):
            if part[0] == 1:
                size = self._source.integer(part, f"the shape of {what}")
                if size < 0:
                    raise InputError(f"{self._source.label}: {what} has a dimension of {size}")
            elif part[0] == 2:
                size = self._source.text(part, f"the shape of {what}", _MAX_NAME)
        return size
