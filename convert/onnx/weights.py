"""A checkpoint's weights as nodes of a graph: norms, biases, linear layers, embeddings and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.onnx.embedding import look_up_blocks, look_up_floats
from quantpress.convert.onnx.expert_stacks import ExpertStacks, Half, half_rows, stack_biases, stack_experts
from quantpress.convert.onnx.float_rows import LABELS, as_stored
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.kinds import Kinds, Ranges, RowKind
from quantpress.convert.onnx.linear import LinearKind, LinearWeight, with_last
from quantpress.convert.onnx.linear_float import FloatLinear
from quantpress.convert.onnx.linear_nbits import MatMulNBits
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.convert.onnx.weight_rows import WeightRows
from quantpress.convert.preflight import Preflight
from quantpress.quant.errors import InputError

__all__ = ["ModelWeights"]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


class ModelWeights:
    """Puts the weights of a checkpoint into a graph; nothing of them is read until the data file is written.

    Slots are the decoder's, `attn_q.weight`; layer is -1 outside layers. What it gives is in the activations' type.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        source: Checkpoint,
        checked: Preflight,
        options: OnnxOptions,
        ranges: Ranges | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Takes where weights come from and where they go.

        Args:
            builder: the graph.
            source: the checkpoint.
            checked: its table bound to its tensors.
            options: how weights are to be stored.
            ranges: least and greatest input of every linear weight, for static int8.
            allow_nonfinite: NaN and infinities are stored where floats are, instead of being refused.
        """
        self._builder, self._checked = builder, checked
        self._rows = WeightRows(source, checked, allow_nonfinite)
        self._kinds = Kinds(options, quantized=bool(source.quantized), ranges=ranges)
        self._vectors: dict[tuple[str, int], ir.Value] = {}

    def refuse_unused(self) -> None:
        """Refuses a graph that has left a tensor out.

        Raises:
            InputError: naming the first tensor that nothing has asked for.
        """
        for row, layer, tensor in self._checked.bindings:
            if (row.slot, layer) not in self._rows.asked:
                raise InputError(
                    f"{tensor.source}: {shown(tensor.name)}: ONNX models of {self._checked.spec.family} are written"
                    " without it, and would be another model"
                )

    def vector(self, slot: str, layer: int = -1) -> ir.Value | None:
        """Gives a norm's weight (its offset added) or a bias, (n,) or (heads, n); None where there is none."""
        if not self._rows.has(slot, layer):
            return None
        if (slot, layer) not in self._vectors:
            tensor, read = self._rows.vector(slot, layer)
            group = _vector_group(tensor, read, self._builder.compute)
            (self._vectors[slot, layer],) = self._builder.store(group)
        return self._vectors[slot, layer]

    def linear(self, values: ir.Value, slot: str, layer: int) -> ir.Value:
        """Multiplies with a weight and adds its bias if it has one.

        Args:
            values: (..., K).
            slot: of the weight.
            layer: of the weight.

        Returns:
            (..., N).

        Raises:
            LayoutError: the weight cannot be stored as it is asked for.
        """
        weight = self._rows.matrix(slot, layer)
        return self._biased(weight, self._kinds.layer(weight)(self._builder, weight, values))

    def embed(self, ids: ir.Value) -> ir.Value:
        """Gives the rows of the token embedding, not scaled.

        Args:
            ids: (B, S) int64.

        Returns:
            (B, S, embedding).

        Raises:
            UsageError: options that exclude each other for this model.
            LayoutError: the embedding cannot be stored as it is asked for.
        """
        weight = self._rows.matrix(_EMBEDDING)
        head = self._kinds.head(weight) if self._tied and self._checked.hyper.causal else None
        kind = self._kinds.embedding(weight, head)
        return self._look_up(self._kinds.stored(kind, weight), weight, ids)

    def rows(self, slot: str, index: ir.Value) -> ir.Value:
        """Gives the rows of learned positions or of token types for (B, S) int64: (B, S, hidden)."""
        weight = self._rows.matrix(slot)
        kind = self._kinds.rows(weight)
        return self._look_up(self._kinds.stored(kind, weight), weight, index)

    def expert_stacks(self, layer: int) -> ExpertStacks | None:
        """Gives the experts of a layer, gate and up by turns; None where one operator cannot take them all."""
        experts = self._checked.hyper.experts
        if experts is None:
            raise TypeError("the model has no experts")
        ups, downs = list[tuple[Half, ...]](), list[tuple[Half, ...]]()
        for number in range(experts.count):
            up = self._rows.matrix(f"ffn_up_exps.{number}.weight", layer)
            gate = f"ffn_gate_exps.{number}.weight"
            separate = self._rows.has(gate, layer)
            ups.append(
                ((self._rows.matrix(gate, layer), 0), (up, 0)) if separate else ((up, 0), (up, up.shape[0] // 2))
            )
            downs.append(((self._rows.matrix(f"ffn_down_exps.{number}.weight", layer), 0),))
        name = f"layers.{layer}.experts"
        found = stack_experts(self._builder, self._kinds.layer, ups, downs, name)
        if found is None or not self._rows.has("ffn_up_exps.0.bias", layer):
            return found
        return replace(
            found,
            up_bias=self._stacked_biases(layer, ups, f"{name}.gate_up_proj.bias"),
            down_bias=self._stacked_biases(layer, downs, f"{name}.down_proj.bias"),
        )

    def _stacked_biases(self, layer: int, experts: Sequence[tuple[Half, ...]], name: str) -> ir.Value:
        rows = half_rows(experts[0])

        def reader(half: Half) -> Callable[[], Array]:
            weight, first = half
            _, read = self._rows.vector(f"{weight.slot.removesuffix('.weight')}.bias", layer)
            return lambda: read()[first : first + rows]

        readers = [[reader(half) for half in expert] for expert in experts]
        return stack_biases(self._builder, readers, rows * len(experts[0]), name)

    def head(self, values: ir.Value) -> ir.Value:
        """Multiplies (B, S, embedding) with the head, tied or not, and adds its bias: (B, S, vocab), not capped.

        Raises:
            InputError: there is no head, and config.json does not say that it is tied.
            LayoutError: the head cannot be stored as it is asked for.
        """
        weight, kind = self._head()
        return self._biased(weight, kind(self._builder, weight, values))

    @property
    def _tied(self) -> bool:
        return not self._rows.has(_HEAD)

    def _head(self) -> tuple[LinearWeight, LinearKind]:
        if not self._tied:
            weight = self._rows.matrix(_HEAD)
            return weight, self._kinds.stored(self._kinds.head(weight), weight)
        weight = self._rows.matrix(_EMBEDDING, role_slot=_HEAD)
        if not self._checked.hyper.tied:
            raise InputError(f"{weight.source}: the head is missing and config.json does not say that it is tied")
        head = self._kinds.head(weight)
        embedding = self._kinds.embedding(weight, head)
        shared = self._kinds.stored(head, weight)
        if self._kinds.stored(embedding, weight) is shared:
            return weight, shared
        name = next(row.hf for row in self._checked.spec.tensors if row.slot == _HEAD)
        note = f"tied to {shown(weight.name)}, which is stored in another type beside it"
        return self._rows.matrix(_EMBEDDING, role_slot=_HEAD, name=name), self._kinds.stored(head, weight, note)

    def _look_up(self, kind: RowKind, weight: LinearWeight, index: ir.Value) -> ir.Value:
        if isinstance(kind, FloatLinear):
            return look_up_floats(self._builder, kind, weight, index)
        if isinstance(kind, MatMulNBits):
            return look_up_blocks(self._builder, kind.store(self._builder, weight), weight, index)
        return kind.look_up(self._builder, weight, index, kind.store(self._builder, weight))

    def _biased(self, weight: LinearWeight, values: ir.Value) -> ir.Value:
        bias = self.vector(f"{weight.slot.removesuffix('.weight')}.bias", weight.layer)
        if bias is None:
            return values
        dims = with_last(values, weight.shape[0])
        return self._builder.add("Add", [values, bias], name=f"{weight.node}/Add", shape=dims)


def _vector_group(tensor: LazyTensor, read: Callable[[], Array], dtype: str) -> StoredGroup:
    def piece() -> Piece:
        return (as_stored(read(), dtype, f"{tensor.source}: tensor {shown(tensor.name)}"),)

    def tasks() -> Iterator[Callable[[], Piece]]:
        yield piece

    return StoredGroup((StoredTensor(tensor.name, dtype, tensor.shape),), tasks, LABELS[dtype], tensor.name)
