"""Numbers of a graph's operators beside those of the source: epsilons, heads, scales, caps, windows and angles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantpress.convert.arch.rotary import attention_factor
from quantpress.convert.arch.spec import Hyperparameters, Rope
from quantpress.convert.onnx.read import OnnxModel, OnnxNode
from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.onnx_proof_read import tensor_values
from quantpress.pipelines.onnx_proof_rows import Array

__all__ = ["SettingsFound", "compare_settings"]

_NORMS = frozenset(
    {
        "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization",
        "LayerNormalization", "RMSNormalization",
    }
)  # fmt: skip
_ATTENTION = {
    "GroupQueryAttention": ("num_heads", "kv_num_heads"),
    "MultiHeadAttention": ("num_heads", ""),
    "Attention": ("q_num_heads", "kv_num_heads"),
}
_LAYER = re.compile(r"/layers\.(\d{1,6})/")
_CLOSE = 2.0**-10  # of a number that may be stored in float16
_CHUNK = 1 << 18  # angles that are computed at once


@dataclass
class SettingsFound:
    """How many settings were compared, what could not be, and what is wrong."""

    count: int = 0
    skipped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def same(self, name: str, found: Any, wanted: Any, close: float = 1e-6) -> None:
        """Compares two numbers, or anything else for equality."""
        self.count += 1
        if isinstance(wanted, float) and isinstance(found, (int, float)):
            if abs(found - wanted) <= close * abs(wanted):
                return
        elif found == wanted:
            return
        self.findings.append(Finding("settings", name, str(found), str(wanted)))


def compare_settings(found: SettingsFound, model: OnnxModel, hyper: Hyperparameters) -> None:
    """Compares what the graph's operators say.

    Args:
        found: takes what is wrong.
        model: made by this program, whose names of nodes are known.
        hyper: of the source.
    """
    _Graph(found, model, hyper).compare()


class _Graph:
    def __init__(self, found: SettingsFound, model: OnnxModel, hyper: Hyperparameters) -> None:
        self._found, self._model, self._hyper = found, model, hyper
        self._made = {name: node for node in model.graph.nodes for name in node.outputs if name}
        self._named = {node.name: node for node in model.graph.nodes}
        self._tables: dict[str, tuple[Rope, str]] = {}

    def compare(self) -> None:
        attentions = 0
        for node in self._model.graph.nodes:
            if node.op in _NORMS:
                self._found.same(f"{node.name} epsilon", node.attributes.get("epsilon", 1e-5), self._hyper.norm_eps)
            elif node.op == "Sqrt":
                self._epsilon_added(node)
            elif node.op in _ATTENTION:
                attentions += 1
                self._attention(node)
            elif node.op == "RotaryEmbedding":
                self._rotary(node)
        self._found.same("layers with attention", attentions, self._hyper.layers)
        self._factors()
        for name, (rope, part) in self._tables.items():
            self._table(name, rope, part)

    def _values(self, name: str) -> Array | None:
        tensor = self._model.tensors.get(name)
        return None if tensor is None else tensor_values(tensor, self._model.path.parent, self._model.path)

    def _scalars(self, node: OnnxNode) -> Iterator[float]:
        for name in node.inputs:
            tensor = self._model.tensors.get(name)
            values = self._values(name) if tensor is not None and tensor.size == 1 else None
            if values is not None:
                yield float(np.asarray(values, np.float32).reshape(-1)[0])

    def _epsilon_added(self, node: OnnxNode) -> None:
        before = self._made.get(node.inputs[0])
        if before is not None and before.op == "Add":
            for value in self._scalars(before):
                self._found.same(f"{before.name} epsilon", value, self._hyper.norm_eps)

    def _slides(self, layer: int) -> bool:
        return bool(self._hyper.sliding_layers) and self._hyper.sliding_layers[layer]

    def _rope(self, layer: int) -> Rope | None:
        hyper = self._hyper
        if hyper.rope_layers and not hyper.rope_layers[layer]:
            return None
        return hyper.rope_local if hyper.rope_local is not None and self._slides(layer) else hyper.rope

    def _attention(self, node: OnnxNode) -> None:
        place, hyper, said = _LAYER.match(node.name), self._hyper, node.attributes
        if place is None or int(place[1]) >= hyper.layers:
            return
        layer, name, same = int(place[1]), node.name, self._found.same
        for key, wanted in zip(_ATTENTION[node.op], (hyper.heads, hyper.kv_heads), strict=True):
            if key and key in said:  # heads that lie apart have no such number
                same(f"{name} {key}", said[key], wanted)
        scale = hyper.attention_scale / (layer + 1 if hyper.inverse_layer_scale else 1)
        same(f"{name} scale", said.get("scale", hyper.head_dim**-0.5), float(scale))
        same(f"{name} softcap", said.get("softcap", 0.0), float(hyper.attention_softcap or 0.0))
        if not hyper.causal:
            same(f"{name} causal", max(int(_int(said, key)) for key in ("is_causal", "unidirectional")), 0)
        if node.op != "GroupQueryAttention":
            return
        window = hyper.sliding_window if self._slides(layer) and hyper.sliding_window is not None else -1
        same(f"{name} local_window_size", said.get("local_window_size", -1), window)
        rope, tables = self._rope(layer), [each for each in node.inputs[7:9] if each]
        if rope is None:
            same(f"{name} do_rotary", said.get("do_rotary", 0), 0)
        elif len(tables) == 2 or said.get("do_rotary", 0):
            same(f"{name} do_rotary", said.get("do_rotary", 0), 1)
            same(f"{name} rotary_interleaved", said.get("rotary_interleaved", 0), int(rope.interleaved))
            self._take(tables, rope)
        else:
            turned = any(each.startswith(f"/layers.{layer}/attn/q/RotaryEmbedding") for each in self._named)
            same(f"{name} turned before", turned, True)

    def _rotary(self, node: OnnxNode) -> None:
        place = _LAYER.match(node.name)
        rope = self._rope(int(place[1])) if place is not None and int(place[1]) < self._hyper.layers else None
        if rope is None:
            return
        said, first = node.attributes, 2 if node.domain else 1
        self._found.same(f"{node.name} interleaved", said.get("interleaved", 0), int(rope.interleaved))
        if said.get("rotary_embedding_dim", 0):
            self._found.same(f"{node.name} rotary_embedding_dim", said["rotary_embedding_dim"], rope.dim)
        self._take(node.inputs[first : first + 2], rope)

    def _take(self, tables: Any, rope: Rope) -> None:
        for name, part in zip(tables, ("cosine", "sine"), strict=False):
            self._tables.setdefault(name, (rope, part))

    def _factors(self) -> None:
        """Factors that stand in nodes of their own: on embeddings, on what is added to the residual, on logits."""
        hyper = self._hyper
        wanted = {
            "/embedding/Mul": None if hyper.embedding_scale == 1.0 else hyper.embedding_scale,
            "/head/Scale": None if hyper.logit_scale == 1.0 else hyper.logit_scale,
            "/head/Div": hyper.logit_softcap,
            "/head/Mul": hyper.logit_softcap,
        }
        for layer in range(hyper.layers):
            for part in ("", "/mlp"):
                wanted[f"/layers.{layer}{part}/Scale"] = None if hyper.residual_scale == 1.0 else hyper.residual_scale
        for name, number in wanted.items():
            node = self._named.get(name)
            if node is None and number is None:
                continue
            found = next(self._scalars(node), None) if node is not None else None
            self._found.same(name, found, None if number is None else float(number), _CLOSE)
        if hyper.logit_softcap is not None:
            self._found.same("/head/Tanh", "/head/Tanh" in self._named, True)

    def _table(self, name: str, rope: Rope, part: str) -> None:
        """Compares a table of angles, in float64, row by row; a position's angle has its own rounding in float32."""
        values = self._values(name)
        if values is None:
            self._found.skipped.append(f"settings: {name} cannot be read")
            return
        low, high, switch = _frequencies(rope, self._hyper.context)
        self._found.same(f"{name} shape", values.shape, ((switch or 0) + self._hyper.context, rope.dim // 2))
        if values.ndim != 2 or values.shape[1] != len(low):
            return
        turn, factor = (np.cos if part == "cosine" else np.sin), attention_factor(rope, self._hyper.context)
        rounding, worst, place = (2.0**-10 if values.dtype == np.float16 else 2.0**-21), 0.0, 0
        for start in range(0, len(values), max(1, _CHUNK // len(low))):
            rows = np.arange(start, min(start + max(1, _CHUNK // len(low)), len(values)))
            late = rows >= switch if switch else np.zeros(len(rows), bool)
            position = np.where(late, rows - (switch or 0), rows)[:, None].astype(np.float64)
            angle = position * np.where(late[:, None], high, low)
            off = np.abs(values[rows[0] : rows[-1] + 1].astype(np.float64) - factor * turn(angle))
            over = off / (factor * (rounding + np.abs(angle) * 2.0**-22))
            if over.max(initial=0) > worst:
                worst, place = float(over.max()), int(rows[over.max(axis=1).argmax()])
        found = "right" if worst <= 1 else f"row {place} is off by {worst:.3g} times the rounding"
        self._found.same(f"{name} of base {rope.theta:g}", found, "right")


def _frequencies(rope: Rope, context: int) -> tuple[Array, Array, int | None]:
    """Gives angles per token in float64, those of long texts, and the row from which on they are used."""
    from quantpress.convert.rope import frequencies

    original = int(rope.parameters["original_max_position_embeddings"]) if rope.kind == "longrope" else context
    switch = original if rope.kind == "longrope" and original < context else None
    low, high = (frequencies(rope, context, length).double().numpy() for length in (min(original, context), context))
    return low, high, switch


def _int(said: Any, key: str) -> int:
    value = said.get(key, 0)
    return value if isinstance(value, int) else 0
