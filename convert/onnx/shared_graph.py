"""Several graphs that keep their weights in one data file, and graphs that choose between two ways when they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from quantpress.convert.onnx.graph import Dims, GraphBuilder
from quantpress.convert.onnx.stored import StoredGroup

__all__ = ["SharedGraph"]

Outputs = Sequence[tuple[str, str, Dims]]
"""Name, type and shape of each."""


class SharedGraph(GraphBuilder):
    """A graph that adds to the data file that another has begun; what both have lies there once."""

    def __init__(self, *, compute: str, standard: bool, opset: int, before: GraphBuilder | None = None) -> None:
        """Begins an empty graph.

        Args:
            compute: see `GraphBuilder`.
            standard: see `GraphBuilder`.
            opset: see `GraphBuilder`.
            before: the graph whose data file this one goes on with; nothing may be stored in it any more.
        """
        super().__init__(compute=compute, standard=standard, opset=opset)
        if before is not None:
            self.groups, self.data_bytes = before.groups, before.data_bytes

    def store(self, group: StoredGroup) -> tuple[ir.Value, ...]:
        """Gives the tensors of a group as values; see `GraphBuilder.store`."""
        for known, placed in self.groups:
            if known.tensors == group.tensors:
                return tuple(self.stored_as(each, each.tensor) for each in placed)
        return super().store(group)

    def choose(
        self,
        condition: ir.Value,
        first: Callable[[], Sequence[ir.Value]],
        second: Callable[[], Sequence[ir.Value]],
        outputs: Outputs,
        *,
        name: str,
    ) -> tuple[ir.Value, ...]:
        """Adds a node that runs one of two graphs; both see all values from before it.

        Args:
            condition: (1,) bool.
            first: adds the nodes that run where it is true and gives their results, which they must have made.
            second: the same where it is false.
            outputs: what both give.
            name: of the node.
        """
        branches = {
            part: self._branch(make, f"{name}/{part}")
            for part, make in (("then_branch", first), ("else_branch", second))
        }
        values = [
            ir.Value(name=each, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
            for each, dtype, shape in outputs
        ]
        self._nodes.append(ir.node("If", [condition], branches, outputs=values, name=name))
        self._domains.add("")
        return tuple(values)

    def _branch(self, make: Callable[[], Sequence[ir.Value]], name: str) -> ir.Graph:
        outer, self._nodes = self._nodes, []
        try:
            found = make()
            self._inner += self._nodes
            return ir.Graph([], list(found), nodes=self._nodes, name=name)
        finally:
            self._nodes = outer
