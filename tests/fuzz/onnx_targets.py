"""Made-up ONNX models, the places of their data outside the file, and the configuration beside them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from quantpress.convert.onnx.precision import precision_of
from quantpress.convert.onnx.read import open_onnx
from quantpress.pipelines.onnx_feeds import feeds_of
from quantpress.pipelines.onnx_inspection import inspect_onnx
from tests.fuzz.target import Target
from tests.onnx_models import DATA, save, summing_model
from tests.onnx_wire import OPSET, field, varint

__all__ = ["TARGETS"]

_WORDS = (
    b"location", b"offset", b"length", b"checksum", b"../x", b"/etc/passwd", b"model.onnx.data", b"model.onnx",
    b"*/_ORT_MEM_ADDR_/*", b"18446744073709551615", b"-1", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x08\x01",
    b"\x42\x00", b"\x3a\x80\x80\x80\x80\x08", b"MatMulNBits", b"com.microsoft", b"\x0a\x00", b"\x70\x01", b"If",
)  # fmt: skip


def _parse(folder: Path) -> object:
    """Opens the model, says how its weights are stored and describes it and how it is fed."""
    model = open_onnx(folder)
    precision_of(model)
    report = inspect_onnx(folder)
    feeds_of(model)
    return report


def _prepare(folder: Path) -> None:
    save(folder, summing_model())


def _external(change: Callable[[ModelProto], None] | None = None) -> bytes:
    """Gives the bytes of a model whose matrices lie in a data file."""
    with tempfile.TemporaryDirectory() as made:
        return (save(Path(made), summing_model(), change=change) / "model.onnx").read_bytes()


def _model_seeds() -> Mapping[str, bytes]:
    whole = summing_model()
    nested = summing_model()
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "b", [], [])
    nested.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch))
    deep = field(1, b"")
    for _ in range(40):  # an attribute that holds a graph with a node that has an attribute, and so on
        deep = field(1, field(5, field(6, deep)))
    return {
        "good": whole.SerializeToString(), "external": _external(), "nested": nested.SerializeToString(),
        "deep": OPSET + field(7, deep), "empty": OPSET + field(7, b""), "no-graph": OPSET,
        "two": OPSET + 2 * field(7, b""),
        "rank": OPSET + field(7, field(5, b"\x08\x01" * 40 + b"\x10\x01")),
        "wide": OPSET + field(7, field(5, b"\x08" + varint((1 << 64) - 1) + b"\x10\x01" + field(8, b"a"))),
        "product": OPSET + field(7, field(5, (b"\x08" + varint(1 << 40)) * 8 + b"\x10\x01" + field(9, b"a"))),
        "group": OPSET + b"\x0b\x0c", "name": OPSET + field(7, field(5, b"\x10\x01" + field(8, b"a\n\xff"))),
        "nodes": OPSET + field(7, field(1, field(4, b"Add")) * 5000), "training": OPSET + field(20, b""),
        "facts": OPSET + field(7, b"") + field(14, field(1, b"a") + field(2, b"b" * 4000)) * 3,
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "function": OPSET + field(7, b"") + field(25, b"\x52\x00"),
    }  # fmt: skip


def _place(**entries: str) -> Callable[[ModelProto], None]:
    """Gives what replaces the place of the first tensor's data."""

    def change(model: ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        del tensor.external_data[:]
        tensor.external_data.extend(StringStringEntryProto(key=key, value=value) for key, value in entries.items())

    return change


def _swollen(model: ModelProto) -> None:
    """Says of a tensor outside that it has 2**63 values and more."""
    tensor = next(each for each in model.graph.initializer if each.external_data)
    tensor.dims[:] = [1 << 32, 1 << 32]


def _both(model: ModelProto) -> None:
    """Gives a tensor values inside and outside."""
    tensor = next(each for each in model.graph.initializer if each.external_data)
    tensor.raw_data = b"\0" * 64


def _inside_again(model: ModelProto) -> None:
    """Says where data is of a tensor that has it inside."""
    tensor = next(each for each in model.graph.initializer if each.external_data)
    tensor.data_location = TensorProto.DEFAULT


def _external_seeds() -> Mapping[str, bytes]:
    places: dict[str, dict[str, str]] = {
        "no-length": {"location": DATA, "offset": "0"}, "no-offset": {"location": DATA}, "none": {},
        "minus": {"location": DATA, "offset": "-1"}, "large": {"location": DATA, "offset": "9223372036854775807"},
        "wraps": {"location": DATA, "offset": "18446744073709551615", "length": "1024"},
        "hex": {"location": DATA, "offset": "0x0"},
        "up": {"location": "../model.onnx.data"}, "root": {"location": "/etc/passwd"}, "here": {"location": "."},
        "model": {"location": "model.onnx", "offset": "0"}, "pipe": {"location": "pipe"}, "link": {"location": "link"},
        "digits": {"location": DATA, "offset": "٣"}, "long": {"location": "a" * 4000}, "zero": {"location": "a\0b"},
        "address": {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "1024"},
        "short": {"location": DATA, "length": "8"},
        "checksum": {"location": DATA, "offset": "0", "checksum": "x" * 40},
        "unknown": {"location": DATA, "basepath": "/etc"},
    }  # fmt: skip
    changed = {name: _external(_place(**place)) for name, place in places.items()}
    odd = {"swollen": _swollen, "both": _both, "inside": _inside_again}
    return {"good": _external(), **changed, **{name: _external(change) for name, change in odd.items()}}


def _with_traps(folder: Path) -> None:
    """Puts beside the model what a location may lead to."""
    _prepare(folder)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/etc/passwd")


def _genai_seeds() -> Mapping[str, bytes]:
    decoder = {
        "filename": "model.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1,
        "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"}, "num_key_value_heads": 1,
    }  # fmt: skip
    model: dict[str, Any] = {"type": "llama", "context_length": 64, "vocab_size": 32, "decoder": decoder}
    values: dict[str, Any] = {
        "good": {"model": model, "search": {"max_length": 64}}, "list": {"model": [decoder]}, "none": {}, "array": [1],
        "up": {"model": {**model, "decoder": {"filename": "../model.onnx"}}}, "text": {"model": {"decoder": "x"}},
        "root": {"model": {"decoder": {"filename": "/etc/passwd"}}}, "number": {"model": {"decoder": {"filename": 5}}},
        "gone": {"model": {"decoder": {"filename": "other.onnx"}}}, "folder": {"model": {"decoder": {"filename": "."}}},
        "context": {"model": {**model, "context_length": -5}}, "wide": {"model": {**model, "context_length": 1 << 63}},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _config_seeds() -> Mapping[str, bytes]:
    from tests.fuzz.table_folder import llama_config

    values: dict[str, Any] = {
        "good": llama_config(), "none": {}, "unknown": {"architectures": ["XForCausalLM"], "n_positions": 7},
        "number": llama_config(architectures=5), "object": llama_config(architectures={"a": 1}),
        "context": llama_config(max_position_embeddings=True), "list": [], "odd": {"max_position_embeddings": [[]]},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


TARGETS: tuple[Target, ...] = (
    Target("onnx-model", "model.onnx", _prepare, _parse, _model_seeds, _WORDS),
    Target("onnx-external-data", "model.onnx", _with_traps, _parse, _external_seeds, _WORDS),
    Target(
        "onnx-genai-config", "genai_config.json", _prepare, _parse, _genai_seeds, (b'"decoder"', b'"../x"', b"null")
    ),
    Target("onnx-config", "config.json", _prepare, _parse, _config_seeds, (b'"architectures": [[1]]', b"null")),
)
