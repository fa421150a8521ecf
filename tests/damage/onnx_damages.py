"""Damages of ONNX folders, planted with the onnx package in copies of good ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

Array = NDArray[Any]


class NotHereError(Exception):
    """The file has nothing that this damage could be done to."""


@dataclass(frozen=True)
class Damage:
    """Something that can be wrong with a file.

    Attributes:
        name: in words.
        plant: changes a folder; raises `NotHereError` where it cannot.
    """

    name: str
    plant: Callable[[Path], None]

    def copy(self, good: Path, target: Path) -> Path:
        """Copies a good folder and damages the copy."""
        shutil.copytree(good, target)
        (target / "quantpress.json").unlink(missing_ok=True)
        self.plant(target)
        return target

    def __str__(self) -> str:
        return self.name


def loaded(folder: Path) -> ModelProto:
    """Gives the model with all its values in it."""
    return onnx.load(folder / "model.onnx")


def stored(model: ModelProto, folder: Path) -> None:
    """Writes it back; the small models of the tests fit one file."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").unlink(missing_ok=True)


def initializer(model: ModelProto, *ends: str) -> TensorProto:
    """Gives the first stored tensor with such an end, codes and scales before floats."""
    for end in ends:
        for each in model.graph.initializer:
            if each.name.endswith(end):
                found: TensorProto = each
                return found
    raise NotHereError(ends)


def put(tensor: TensorProto, values: Array) -> None:
    """Stores other values of the same shape and type."""
    name, dims, kind = tensor.name, list(tensor.dims), tensor.data_type
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        packed = values.reshape(-1).astype(np.uint8) & 15
        packed = np.append(packed, np.zeros(len(packed) % 2, np.uint8))
        raw = (packed[0::2] | packed[1::2] << 4).tobytes()
        new = TensorProto(data_type=kind, dims=dims, raw_data=raw)
    else:
        new = numpy_helper.from_array(np.ascontiguousarray(values).reshape(dims))
    tensor.CopyFrom(new)
    tensor.name = name


def values_of(tensor: TensorProto) -> Array:
    """Gives its values, codes of 4 bits as int8 or uint8."""
    found = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.INT4:
        return found.astype(np.int8)
    return found.astype(np.uint8) if tensor.data_type == TensorProto.UINT4 else np.array(found)


def on_values(change: Callable[[Array], Array], *ends: str) -> Callable[[Path], None]:
    """Damages the first tensor with one of these ends."""

    def plant(folder: Path) -> None:
        model = loaded(folder)
        tensor = initializer(model, *ends)
        put(tensor, change(values_of(tensor)))
        stored(model, folder)

    return plant


def swapped(one: str, other: str) -> Callable[[Path], None]:
    """Exchanges the values of two weights, with their scales and zeros, as far as shapes are equal."""

    def plant(folder: Path) -> None:
        model = loaded(folder)
        found = {each.name: each for each in model.graph.initializer}
        done = 0
        for name in [name for name in found if one in name]:
            first, second = found[name], found.get(name.replace(one, other))
            if second is not None and first.dims == second.dims:
                values = values_of(first), values_of(second)
                put(first, values[1])
                put(second, values[0])
                done += 1
        if not done:
            raise NotHereError(one)
        stored(model, folder)

    return plant


def on_nodes(change: Callable[[ModelProto, NodeProto], bool]) -> Callable[[Path], None]:
    """Damages every node that `change` says it has changed."""

    def plant(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        if not sum(change(model, node) for node in model.graph.node):
            raise NotHereError
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return plant


def attribute(name: str, value: Callable[[Any], Any], *ops: str) -> Callable[[Path], None]:
    """Changes an attribute of all nodes of some operators."""

    def change(_model: ModelProto, node: NodeProto) -> bool:
        if node.op_type not in ops:
            return False
        for each in node.attribute:
            if each.name == name:
                each.CopyFrom(onnx.helper.make_attribute(name, value(onnx.helper.get_attribute_value(each))))
                return True
        return False

    return on_nodes(change)


def without_attribute(name: str) -> Callable[[Path], None]:
    """Takes an attribute away wherever it stands."""

    def change(_model: ModelProto, node: NodeProto) -> bool:
        kept = [each for each in node.attribute if each.name != name]
        if len(kept) == len(node.attribute):
            return False
        del node.attribute[:]
        node.attribute.extend(kept)
        return True

    return on_nodes(change)


def bypassed(end: str) -> Callable[[Path], None]:
    """Takes the first node with such a name out of the graph, so that its first input goes on unchanged."""

    def plant(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        node = next((each for each in model.graph.node if each.name.endswith(end)), None)
        if node is None:
            raise NotHereError(end)
        for other in model.graph.node:
            for place, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[place] = node.input[0]
        model.graph.node.remove(node)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return plant


def two_tokens(folder: Path) -> None:
    """Exchanges the ids of two rare tokens in the tokenizer."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise NotHereError
    found = json.loads(path.read_text(encoding="utf-8"))
    vocab = found["model"]["vocab"]
    if isinstance(vocab, dict):
        last = sorted(vocab, key=lambda token: vocab[token])[-3:-1]
        vocab[last[0]], vocab[last[1]] = vocab[last[1]], vocab[last[0]]
    else:
        vocab[-3], vocab[-2] = vocab[-2], vocab[-3]
    path.write_text(json.dumps(found), encoding="utf-8")


def on_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Damages a JSON file."""

    def plant(folder: Path) -> None:
        path = folder / name
        if not path.exists():
            raise NotHereError
        found = json.loads(path.read_text(encoding="utf-8"))
        change(found)
        path.write_text(json.dumps(found), encoding="utf-8")

    return plant


def bit_of_scales(bit: int, blocks: int | None) -> Callable[[Path], None]:
    """Flips a bit of the scale of the first blocks of one matrix; of all with None."""

    def change(values: Array) -> Array:
        images = values.reshape(-1).view(f"u{values.itemsize}").copy()
        if bit >= 8 * values.itemsize:
            raise NotHereError
        images[:blocks] ^= images.dtype.type(1 << bit)
        return images.view(values.dtype).reshape(values.shape)

    return on_values(change, "layers.1.mlp.up_proj.scales")


def bit_flipped(good: Path, target: Path, end: str, bit: int) -> Path:
    """Copies a folder, sidecar and all, and flips a bit of the first number of a tensor where it lies."""
    shutil.copytree(good, target)
    tensor = initializer(onnx.load(target / "model.onnx", load_external_data=False), end)
    place = {each.key: each.value for each in tensor.external_data}
    with (target / place["location"]).open("r+b") as data:
        data.seek(int(place["offset"]) + bit // 8)
        byte = data.read(1)[0]
        data.seek(-1, 1)
        data.write(bytes([byte ^ 1 << bit % 8]))
    return target


def zeros_off(folder: Path) -> None:
    """Adds one to every zero point of a matrix."""

    def change(values: Array) -> Array:
        if values.dtype == np.uint8 and values.ndim == 2:
            low, high = (values & 15) + 1 & 15, ((values >> 4) + 1) & 15
            return (low | high << 4).astype(np.uint8)
        return (values + 1) & 15

    on_values(change, "layers.1.mlp.up_proj.qzeros")(folder)


def _zero_row(values: Array) -> Array:
    values = values.copy()
    values[3] = 0
    return values


def _norm_shift(values: Array) -> Array:
    return (values + 1).astype(values.dtype)


def _one_layer(genai: Any) -> None:
    genai["model"]["decoder"]["num_hidden_layers"] = 1


def _other_end(genai: Any) -> None:
    genai["model"]["eos_token_id"] = 7


def _other_base(config: Any) -> None:
    config |= {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}


def _turned(values: Array) -> Array:
    """Rows of heads, halves of 16 by turns."""
    rows = values.reshape(-1, 2, 8, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


UP, NORM = "layers.1.mlp.up_proj", "layers.1.post_attention_layernorm.weight"
_MATRIX = (f"{UP}.scales", f"{UP}.weight")
_ROWS = (f"{UP}.qweight", f"{UP}.weight")
NORMS = (
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization",
    "SkipLayerNormalization",
)  # fmt: skip
_ATTENTION = ("GroupQueryAttention", "Attention", "MultiHeadAttention")

WEIGHTS = (
    Damage("one matrix zeroed", on_values(np.zeros_like, *_MATRIX)),
    Damage("one matrix times 1.1", on_values(lambda each: (each * 1.1).astype(each.dtype), *_MATRIX)),
    Damage("rows shifted by one", on_values(lambda each: np.roll(each, 1, axis=0), *_ROWS)),
    Damage("one row zeroed", on_values(_zero_row, *_MATRIX)),
    Damage("gate and up exchanged", swapped("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")),
    Damage("k and v exchanged", swapped("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj")),
    Damage(
        "q's rows as llama.cpp has them",
        on_values(_turned, "layers.0.self_attn.q_proj.qweight", "layers.0.self_attn.q_proj.weight"),
    ),
    Damage("layers 0 and 1 exchanged", swapped("layers.0.", "layers.1.")),
    Damage("a norm's weight plus 1", on_values(_norm_shift, NORM)),
    Damage("a norm's weight times 1.1", on_values(lambda each: (each * 1.1).astype(each.dtype), NORM)),
    Damage(
        "embedding's rows shifted",
        on_values(lambda each: np.roll(each, 1, axis=0), "embed_tokens.qweight", "embed_tokens.weight"),
    ),
    Damage("zero points off by one", zeros_off),
    Damage("a sum left out", bypassed("attn_q/Add")),
)
SETTINGS = (
    Damage("epsilon of norms times 10", attribute("epsilon", lambda each: each * 10, *NORMS)),
    Damage("angles of another base", on_values(lambda each: each[:, ::-1], "cos_cache")),
    Damage("angles one place late", on_values(lambda each: np.roll(each, 1, axis=0), "sin_cache")),
    Damage("scale of attention times 1.1", attribute("scale", lambda each: each * 1.1, *_ATTENTION)),
    Damage("cap on scores left out", without_attribute("softcap")),
    Damage("window left out", without_attribute("local_window_size")),
    Damage("angles not applied", attribute("do_rotary", lambda _each: 0, "GroupQueryAttention")),
    Damage("layers in genai_config.json", on_json("genai_config.json", _one_layer)),
    Damage("end token in genai_config.json", on_json("genai_config.json", _other_end)),
    Damage("base of angles in config.json", on_json("config.json", _other_base)),
)
VOCABULARY = (Damage("two tokens exchanged", two_tokens),)
ALL = (*WEIGHTS, *SETTINGS, *VOCABULARY)
