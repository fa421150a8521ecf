"""What the layers of T5's two stacks have in common: attention whose scores distances add to, and the MLP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantpress.convert.arch.hyper import Hyperparameters, Seq2Seq
from quantpress.convert.distances import bucket_of
from quantpress.convert.onnx.graph import Dims
from quantpress.convert.onnx.mlp import activate
from quantpress.convert.onnx.norms import Norm
from quantpress.convert.onnx.shared_graph import SharedGraph
from quantpress.convert.onnx.weights import ModelWeights

__all__ = ["Stack"]


@dataclass(frozen=True, slots=True)
class Stack:
    """One of the two stacks of layers while its graph grows.

    Attributes:
        builder: the graph.
        weights: bound to it.
        hyper: sizes.
        stacks: what the model has besides its encoder.
        name: "enc" or "dec".
        length: name of the number of tokens it reads.
    """

    builder: SharedGraph
    weights: ModelWeights
    hyper: Hyperparameters
    stacks: Seq2Seq
    name: str
    length: str

    @property
    def shape(self) -> Dims:
        """Shape of hidden states."""
        return ("batch_size", self.length, self.hyper.hidden)

    def slot(self, part: str) -> str:
        """Gives the slot of a part: "attn" of the decoder is "dec.attn"."""
        return f"{self.name}.{part}"

    def norm(self, part: str, layer: int) -> Norm:
        """Gives a norm; layer -1 for the last."""
        slot = self.slot(part)
        weight = self.weights.vector(f"{slot}.weight", layer)
        assert weight is not None, "preflight has found it"
        place = f"/{slot}" if layer < 0 else f"/layers.{layer}/{slot}"
        return Norm("rms", self.hyper.norm_eps, weight, None, place)

    def heads(self, values: ir.Value, length: str, name: str) -> ir.Value:
        """Gives (B, heads, T, head_dim) of (B, T, heads * head_dim)."""
        builder, heads, size = self.builder, self.hyper.heads, self.hyper.head_dim
        split = builder.constant((0, 0, heads, size))
        apart = builder.add("Reshape", [values, split], name=f"{name}/Split", shape=("batch_size", length, heads, size))
        shape = ("batch_size", heads, length, size)
        return builder.add("Transpose", [apart], name=f"{name}/Transpose", shape=shape, perm=[0, 2, 1, 3])

    def attended(
        self, values: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value, part: str, layer: int, seen: str
    ) -> ir.Value:
        """Gives what attention finds, projected, (B, T, hidden); `bias` is added to the scores, `seen` names S."""
        builder, hyper, slot = self.builder, self.hyper, self.slot(part)
        name, scores = f"/layers.{layer}/{slot}", ("batch_size", hyper.heads, self.length, seen)
        query = self.heads(self.weights.linear(values, f"{slot}_q.weight", layer), self.length, f"{name}/q")
        turned = builder.add(
            "Transpose", [key], name=f"{name}/Keys", shape=("batch_size", hyper.heads, hyper.head_dim, seen),
            perm=[0, 1, 3, 2],
        )  # fmt: skip
        found = builder.add("MatMul", [query, turned], name=f"{name}/Scores", shape=scores)
        found = builder.add("Add", [found, bias], name=f"{name}/Add", shape=scores)
        found = builder.add("Softmax", [found], name=f"{name}/Softmax", shape=scores, axis=-1)
        shape = ("batch_size", hyper.heads, self.length, hyper.head_dim)
        found = builder.add("MatMul", [found, value], name=f"{name}/Values", shape=shape)
        apart = ("batch_size", self.length, hyper.heads, hyper.head_dim)
        found = builder.add("Transpose", [found], name=f"{name}/Back", shape=apart, perm=[0, 2, 1, 3])
        joined = builder.constant((0, 0, hyper.heads * hyper.head_dim))
        together = ("batch_size", self.length, hyper.heads * hyper.head_dim)
        found = builder.add("Reshape", [found, joined], name=f"{name}/Join", shape=together)
        return self.weights.linear(found, f"{slot}_o.weight", layer)

    def passed(self, values: ir.Value, layer: int) -> ir.Value:
        """Gives the MLP's output."""
        slot, name = self.slot("ffn"), f"/layers.{layer}/{self.slot('ffn')}"
        inner = self.weights.linear(values, f"{slot}_up.weight", layer)
        if "gated_mlp" in self.hyper.flags:
            gate = self.weights.linear(values, f"{slot}_gate.weight", layer)
            gate = activate(self.builder, gate, self.hyper.activation, name)
            inner = self.builder.add("Mul", [gate, inner], name=f"{name}/Mul", shape=self.builder.shape_of(inner))
        else:
            inner = activate(self.builder, inner, self.hyper.activation, name)
        return self.weights.linear(inner, f"{slot}_down.weight", layer)

    def key_value(self, values: ir.Value, part: str, layer: int, length: str) -> tuple[ir.Value, ir.Value]:
        """Gives keys and values (B, heads, S, head_dim) of (B, S, hidden); `length` names S."""
        slot = self.slot(part)
        key, value = (
            self.heads(
                self.weights.linear(values, f"{slot}_{each}.weight", layer), length, f"/layers.{layer}/{slot}/{each}"
            )
            for each in ("k", "v")
        )
        return key, value

    def by_distance(self, layer: int, apart: ir.Value, seen: str) -> ir.Value:
        """Gives what distances add to scores, (1, heads, T, S); `apart` is (T, S), key minus query."""
        builder, both, far = self.builder, self.name == "enc", self.stacks.distance
        own = "own_distances" in self.hyper.flags
        table = self.weights.vector(self.slot("attn_rel_b.weight"), layer if own else -1)
        assert table is not None, "preflight has found it"
        name = f"/layers.{layer}/{self.slot('distances')}"
        distances = np.arange(-far, far + 1 if both else 1, dtype=np.int64)
        buckets = bucket_of(distances, both_ways=both, buckets=self.stacks.buckets, furthest=far)
        shape = (self.length, seen)
        low, high = builder.constant(-far), builder.constant(far if both else 0)
        near = builder.add("Clip", [apart, low, high], name=f"{name}/Clip", dtype="INT64", shape=shape)
        index = builder.add("Add", [near, builder.constant(far)], name=f"{name}/Add", dtype="INT64", shape=shape)
        index = builder.add(
            "Gather", [builder.constant(buckets), index], name=f"{name}/Buckets", dtype="INT64", shape=shape
        )
        heads = self.hyper.heads
        found = builder.add("Gather", [table, index], name=f"{name}/Gather", shape=(*shape, heads))
        found = builder.add("Transpose", [found], name=f"{name}/Transpose", shape=(heads, *shape), perm=[2, 0, 1])
        return builder.add(
            "Unsqueeze", [found, builder.constant([0])], name=f"{name}/Unsqueeze", shape=(1, heads, *shape)
        )
