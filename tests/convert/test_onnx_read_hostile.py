"""Damaged and hostile ONNX files: each is refused with words that say what is wrong, soon, and within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from quantpress.convert.onnx.read import open_onnx
from quantpress.quant.errors import InputError
from tests.onnx_models import DATA, save, summing_model
from tests.onnx_wire import OPSET, field

Change = Callable[[ModelProto], object]


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


def place(key: str, value: str | None, *, name: str = "mix") -> Change:
    """Changes one fact about where a tensor's values are; None takes it away."""

    def change(model: ModelProto) -> None:
        entries = tensor(model, name).external_data
        kept = [(entry.key, entry.value) for entry in entries if entry.key != key]
        del entries[:]
        for one, text in [*kept, *([(key, value)] if value is not None else [])]:
            entries.add(key=one, value=text)

    return change


def dims(*sizes: int, name: str = "mix") -> Change:
    def change(model: ModelProto) -> None:
        tensor(model, name).ClearField("dims")
        tensor(model, name).dims.extend(sizes)

    return change


def put(name: str, key: str, value: object) -> Change:
    return lambda model: setattr(tensor(model, name), key, value)


def add(stored: TensorProto) -> Change:
    return lambda model: model.graph.initializer.append(stored)


def nested(depth: int) -> Change:
    def change(model: ModelProto) -> None:
        graph = helper.make_graph([], "leaf", [], [])
        for _ in range(depth):
            graph = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=graph)], "g", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], [], then_branch=graph))

    return change


def twice(model: ModelProto) -> None:
    model.graph.initializer.append(tensor(model, "mix"))


def made_twice(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["x"], ["mixed"]))


def outside(location: str) -> TensorProto:
    """A constant whose values lie in another file."""
    stored = TensorProto(name="far", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    stored.external_data.add(key="location", value=location)
    return stored


def in_attribute(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["far"], value=outside("../far.bin")))


def in_graph(model: ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [outside("/etc/hostname")])
    model.graph.node.append(helper.make_node("If", ["c"], [], then_branch=inner))


def in_function(model: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["far"], value=outside("..\\far.bin"))
    model.functions.append(helper.make_function("mine", "F", [], ["far"], [node], [helper.make_opsetid("", 21)]))


def in_sparse(model: ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("a/../../far.bin"))


def in_sparse_attribute(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["far"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.indices.CopyFrom(outside("/etc/hostname"))


def made_and_stored(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["x"], ["mix"]))


def training(model: ModelProto) -> None:
    model.training_info.add()


def no_opset(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Fused", ["x"], ["f"], domain="com.example"))


def attribute_twice(model: ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["k"])
    node.attribute.extend([helper.make_attribute("value_int", 1)] * 2)


BAD: Mapping[str, tuple[Change, str]] = {
    "absolute": (place("location", "/etc/passwd"), "tensor 'mix': its values cannot be opened: .*is absolute"),
    "drive": (place("location", "C:/x"), "is absolute"),
    "climbing": (place("location", "../model.onnx.data"), "leaves the model folder"),
    "climbing within": (place("location", "a/../../x"), "leaves the model folder"),
    "backslash": (place("location", "..\\x"), "backslash"),
    "address": (place("location", "*/_ORT_MEM_ADDR_/*"), "address in memory"),
    "no location": (place("location", None), "its place has no location"),
    "empty location": (place("location", ""), "its place has no location"),
    "missing file": (place("location", "weights.bin"), r"weights\.bin: no such file"),
    "folder": (place("location", "sub"), "this is a folder"),
    "link out": (place("location", "link"), "a link that leaves the model folder"),
    "negative offset": (place("offset", "-4"), "offset of its place is '-4', wanted a number of bytes"),
    "offset in words": (place("offset", "ten"), "offset of its place is 'ten'"),
    "offset with blanks": (place("offset", " 4"), "offset of its place is ' 4'"),
    "offset in other digits": (place("offset", "٤"), "wanted a number of bytes"),
    "offset behind the end": (
        place("offset", "99999"),
        r"takes bytes 99999 to 100255 of 'model\.onnx\.data', which has",
    ),
    "offset of 30 digits": (place("offset", "1" * 30), "wanted a number of bytes"),
    "offset that overflows": (
        place("offset", "9223372036854775807"),
        "takes bytes 9223372036854775807 to 9223372036854776063",
    ),
    "length too small": (place("length", "255"), "takes 256 bytes, but its length is 255"),
    "length too large": (place("length", "257"), "takes 256 bytes, but its length is 257"),
    "length of nothing": (place("length", ""), "length of its place is ''"),
    "negative dimension": (dims(-8, -8), "tensor 'mix' has a dimension of -8"),
    "huge dimension": (dims(1 << 62, 4), "has a dimension of 4611686018427387904"),
    "product that overflows": (dims(1 << 40, 1 << 40), "takes 4835703278458516698824704 bytes, but its length is 256"),
    "17 dimensions": (dims(*[1] * 17), "more than 16 dimensions"),
    "larger than its bytes": (dims(9, 8), "takes 288 bytes, but its length is 256"),
    "unknown type": (put("mix", "data_type", 99), "tensor 'mix' has the unknown type 99"),
    "type 0": (put("mix", "data_type", 0), "tensor 'mix' has the unknown type 0"),
    "strings outside": (put("mix", "data_type", 8), "of type STRING cannot be stored in a data file"),
    "values in two places": (put("mix", "raw_data", bytes(256)), "has values in the model file and in a data file"),
    "marked as inside": (put("mix", "data_location", 0), "names a data file but is not marked as stored there"),
    "raw too short": (
        put("half", "raw_data", b"abc"),
        "tensor 'half' of type FLOAT and shape .* has 3 bytes of values, wanted 4",
    ),
    "raw too long": (put("one", "raw_data", bytes(16)), "has 16 bytes of values, wanted 8"),
    "inside without values": (
        lambda model: tensor(model, "one").ClearField("raw_data"),
        "tensor 'one' of shape .* has no values",
    ),
    "raw and numbers": (lambda model: tensor(model, "one").int64_data.append(1), "has two sets of values"),
    "too many numbers": (
        add(TensorProto(name="n", data_type=7, dims=[2], int64_data=[1, 2, 3])),
        "has 3 values in field 7, wanted 2",
    ),
    "numbers in the wrong field": (
        add(TensorProto(name="n", data_type=1, dims=[2], int64_data=[1, 2])),
        "of type FLOAT .* field 7",
    ),
    "4 bits": (
        add(TensorProto(name="n", data_type=22, dims=[3], int32_data=[1, 2, 3])),
        "has 3 values in field 5, wanted 2",
    ),
    "segments": (
        lambda model: tensor(model, "half").segment.CopyFrom(TensorProto.Segment(begin=1)),
        "stored in segments",
    ),
    "fact twice": (
        lambda model: tensor(model, "mix").external_data.add(key="offset", value="0"),
        "'offset' is given twice",
    ),
    "17 facts": (
        lambda model: [tensor(model, "mix").external_data.add(key=str(n), value="") for n in range(17)],
        "given twice or too much is said",
    ),
    "tensor without a name": (put("one", "name", ""), "of the graph has no name"),
    "long name": (put("one", "name", "n" * 5000), "has 5000 bytes, at most 4096 are read"),
    "tensor twice": (twice, "two tensors are called 'mix'"),
    "value twice": (made_twice, "the value 'mixed' is made twice"),
    "attribute twice": (attribute_twice, "attribute 'value_int' stands twice"),
    "input twice": (lambda model: model.graph.input.append(model.graph.input[0]), "two inputs are called 'input_ids'"),
    "output twice": (lambda model: model.graph.output.append(model.graph.output[0]), "two outputs are called 'logits'"),
    "deep": (nested(9), "nested deeper than 8 levels"),
    "data of an attribute": (in_attribute, "tensor 'far': its values cannot be opened: .*leaves the model folder"),
    "data of an inner graph": (in_graph, "tensor 'far': its values cannot be opened: .*is absolute"),
    "data of a function": (in_function, "tensor 'far': its values cannot be opened: .*backslash"),
    "data of a sparse tensor": (in_sparse, "tensor 'far': its values cannot be opened: .*leaves"),
    "data of a sparse attribute": (in_sparse_attribute, "tensor 'far': its values cannot be opened: .*is absolute"),
    "value made and stored": (made_and_stored, "the value 'mix' is made twice"),
    "training": (training, "holds a training graph"),
    "no version": (no_opset, "operator 'Fused' is of 'com.example', but the model does not say which version"),
    "two versions": (
        lambda model: model.opset_import.append(helper.make_opsetid("", 9)),
        "two versions of the operators",
    ),
    "versions gone": (lambda model: model.ClearField("opset_import"), "it has no versions of operators"),
    "no graph": (lambda model: model.ClearField("graph"), "it has no graph"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_and_named(tmp_path: Path, name: str) -> None:
    change, words = BAD[name]
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "far.bin").write_bytes(bytes(4096))
    (tmp_path / "m" / "link").symlink_to(tmp_path / "far.bin")
    folder = save(tmp_path / "m", summing_model(), change=lambda model: (change(model), None)[1])
    with pytest.raises(InputError, match=words) as caught:
        open_onnx(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert "model.onnx" in text


RAW: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "not an ONNX model: 0 bytes"),
    "text": (b"Once upon a time " * 9, "not an ONNX model"),
    "zeros": (bytes(99), "field 0"),
    "ones": (b"\xff" * 99, "a number in the model ends nowhere"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "not an ONNX model"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "two graphs": (OPSET + field(7, b"") * 2, "the model has two graphs"),
    "longer than the file": (b"\x3a\xff\xff\xff\xff\x0f", "takes 4294967295 bytes from byte 6, 0 are left"),
    "group": (OPSET + b"\x3b", "field of kind 3"),
    "cut in a key": (OPSET + field(7, b"\x80"), "ends nowhere"),
    "cut after a key": (OPSET + field(7, b"\x08"), "is cut off"),
    "name not UTF-8": (OPSET + field(7, field(1, field(3, b"\xff"))), "the name of a node is not UTF-8: b'.xff'"),
    "name as a number": (OPSET + field(7, field(1, b"\x18\x01")), "stored as kind 0 of protobuf's, wanted 2"),
    "graph as a number": (OPSET + b"\x38\x01", "stored as kind 0"),
    "half a float": (OPSET + field(7, field(1, field(5, b"\x15\x00\x00"))), "takes 4 bytes from byte"),
    "odd floats": (OPSET + field(7, field(5, b"\x10\x01" + field(4, bytes(6)))), "6 bytes of values, no multiple of 4"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_such_message_is_refused(tmp_path: Path, name: str) -> None:
    data, words = RAW[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        open_onnx(path)
    assert "\n" not in str(caught.value)


def test_pipes_folders_and_broken_links_are_refused_and_nothing_hangs(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", summing_model())
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)
    with pytest.raises(InputError, match="a named pipe"):
        open_onnx(folder)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(InputError, match="a named pipe"):
        open_onnx(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    with pytest.raises(InputError, match="this is a folder"):
        open_onnx(folder)
    (folder / "model.onnx").rmdir()
    (folder / "model.onnx").symlink_to(tmp_path / "nowhere.onnx")
    with pytest.raises(InputError, match="leaves the model folder"):
        open_onnx(folder)


def test_a_folder_s_file_may_not_be_a_link_to_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "other", summing_model())
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.onnx").symlink_to(tmp_path / "other" / "model.onnx")
    with pytest.raises(InputError, match="a link that leaves the model folder"):
        open_onnx(folder)
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "../other/model.onnx"}}}')
    with pytest.raises(InputError, match="leaves the model folder"):
        open_onnx(folder)


def test_a_data_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", summing_model())
    os.truncate(folder / DATA, (folder / DATA).stat().st_size - 1)
    with pytest.raises(InputError, match="is cut short or belongs to another model"):
        open_onnx(folder)


# How large files are refused: (bytes of one part, how often); each as a file of 64 MB, in a process of its own
_BOMBS: Mapping[str, Callable[[int], bytes]] = {
    "empty nodes": lambda size: OPSET + field(7, field(1, b"") * (size // 2)),
    "nodes": lambda size: OPSET + field(7, b"".join(field(1, field(2, b"%d" % n)) for n in range(size // 300))),
    "tensors": lambda size: OPSET + field(
        7, b"".join(field(5, field(8, b"%d" % n) + b"\x10\x06\x08\x00") for n in range(size // 300))
    ),
    "numbers in an attribute": lambda size: OPSET + field(7, field(1, field(5, field(8, b"\x01" * (1 << 20)) * 63))),
    "a text": lambda size: OPSET + field(7, field(1, field(5, field(4, b"x" * (size - 100))))),
    "packed values": lambda size: OPSET + field(
        7, field(5, field(8, b"a") + b"\x10\x06" + field(5, b"\x01" * (size - 99)))
    ),
    "functions": lambda size: OPSET + field(25, b"") * (size // 3),
}  # fmt: skip
_RUN = """
import json, sys, time
import quantpress.convert.onnx.precision as precision
from quantpress.convert.onnx.read import open_onnx
from quantpress.quant.errors import InputError
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, begin = peak(), time.process_time()
try:
    precision.precision_of(open_onnx(sys.argv[1]))
    said = ""
except InputError as error:
    said = str(error)
print(json.dumps([time.process_time() - begin, (peak() - before) / 1024, said]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", _BOMBS)
def test_a_bad_file_of_64_mb_is_refused_within_2_seconds_and_200_mb(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_BOMBS[name](64 << 20))
    ended = subprocess.run([sys.executable, "-c", _RUN, str(path)], capture_output=True, text=True, check=True)
    seconds, megabytes, said = json.loads(ended.stdout)
    assert said
    assert seconds < 2
    assert megabytes < 200
