"""What is told of an ONNX file is what the onnx package reads from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from quantpress.convert.onnx.precision import precision_of
from quantpress.convert.onnx.read import open_onnx
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.onnx.read_tensor import DATA_TYPES
from quantpress.convert.onnx.wire import MessageFile, signed
from quantpress.quant.errors import InputError
from tests.onnx_models import DATA, save, summing_model


def test_nodes_values_and_tensors_are_those_of_the_onnx_package(tmp_path: Path) -> None:
    folder = save(tmp_path / "sums", summing_model())
    model, theirs = open_onnx(folder), onnx.load(folder / "model.onnx", load_external_data=False)
    assert (model.name, model.path, model.ir_version) == ("sums", folder / "model.onnx", theirs.ir_version)
    assert model.opsets == {"": 21}
    assert model.producer == "test"
    assert [(n.op, n.domain, n.name, n.inputs, n.outputs) for n in model.graph.nodes] == [
        (n.op_type, n.domain, n.name, tuple(n.input), tuple(n.output)) for n in theirs.graph.node
    ]
    assert [dict(n.attributes) for n in model.graph.nodes] == [
        {a.name: helper.get_attribute_value(a) for a in n.attribute} for n in theirs.graph.node
    ]
    for ours, values in ((model.inputs, theirs.graph.input), (model.outputs, theirs.graph.output)):
        assert [(v.name, v.dtype, v.shape) for v in ours] == [
            (
                v.name,
                TensorProto.DataType.Name(v.type.tensor_type.elem_type),
                tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
            )
            for v in values
        ]
    assert list(model.tensors) == [tensor.name for tensor in theirs.graph.initializer]
    assert {file.path.name: file.nbytes for file in model.files} == {
        name: (folder / name).stat().st_size for name in ("model.onnx", DATA)
    }


@pytest.mark.parametrize("external", [True, False])
def test_values_lie_where_they_are_said_to_be(tmp_path: Path, external: bool) -> None:
    folder = save(tmp_path / "sums", summing_model(), external=external)
    loaded = onnx.load(folder / "model.onnx")
    model = open_onnx(folder)
    for theirs in loaded.graph.initializer:
        ours = model.tensors[theirs.name]
        data = (folder / (ours.file or "model.onnx")).read_bytes()[ours.offset : ours.offset + ours.nbytes]
        assert data == numpy_helper.to_array(theirs).tobytes()
        assert ours.file == (DATA if external and len(ours.shape) == 2 else "")


def test_data_types_are_those_of_the_format() -> None:
    names = dict(TensorProto.DataType.items())
    assert {name: number for number, (name, _) in DATA_TYPES.items()} == {
        name: number for name, number in names.items() if number
    }
    for number, (name, bits) in DATA_TYPES.items():
        if name != "STRING":
            values = np.ones(8, helper.tensor_dtype_to_np_dtype(number))
            assert len(numpy_helper.from_array(values).raw_data) == bits


# every field of TensorProto that values may be in, filled by the onnx package
@pytest.mark.parametrize("name", [name for name, bits in DATA_TYPES.values() if bits])
def test_tensors_whose_values_are_numbers_of_the_message_are_read(tmp_path: Path, name: str) -> None:
    number = TensorProto.DataType.Value(name)
    values = np.ones((3, 5), helper.tensor_dtype_to_np_dtype(number))
    stored = [
        helper.make_tensor("typed", number, (3, 5), values.reshape(-1)),
        helper.make_tensor("raw", number, (3, 5), _packed(values, number), raw=True),
        helper.make_tensor("empty", number, (0, 5), []),
    ]
    folder = save(tmp_path / "t", _with_tensors(stored), external=False)
    tensors = open_onnx(folder).tensors
    assert {t: (tensors[t].dtype, tensors[t].shape) for t in ("typed", "raw")} == {
        "typed": (name, (3, 5)),
        "raw": (name, (3, 5)),
    }
    assert tensors["raw"].nbytes == len(_packed(values, number)) == tensors["typed"].nbytes
    assert tensors["typed"].offset == -1
    assert tensors["empty"].nbytes == 0


def _packed(values: np.ndarray, number: int) -> bytes:  # type: ignore[type-arg]
    return bytes(numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(number))).raw_data)


def _with_tensors(stored: list[TensorProto]) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_strings_and_tensors_in_attributes_graphs_and_functions_are_seen(tmp_path: Path) -> None:
    words = helper.make_tensor("words", TensorProto.STRING, (2,), [b"a", b"\xff"])
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((2, 3), np.float32), "c"))
    inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2, 3])])
    branch = helper.make_node("If", ["cond"], ["z"], then_branch=inner, else_branch=inner)
    model = _with_tensors([words])
    model.graph.node.append(branch)
    model.functions.append(
        helper.make_function("mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                             [helper.make_opsetid("", 21)])
    )  # fmt: skip
    model.graph.node.append(helper.make_node("Twice", ["y"], ["w"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    opened = open_onnx(save(tmp_path / "t", model, external=False))
    assert opened.ops == {("", "Add"): 1, ("", "Constant"): 2, ("", "Identity"): 1, ("", "If"): 1, ("mine", "Twice"): 1}
    assert opened.functions == {"mine"}
    assert opened.tensors["words"].dtype == "STRING"


def test_several_tensors_may_share_bytes(tmp_path: Path) -> None:
    def share(model: onnx.ModelProto) -> None:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        twin = model.graph.initializer.add()
        twin.CopyFrom(tensors["head"])
        twin.name = "twin"

    opened = open_onnx(save(tmp_path / "t", summing_model(), change=share))
    assert opened.tensors["twin"].offset == opened.tensors["head"].offset
    assert precision_of(opened).parameters["F32"] == 32 * 8 + 8 * 8 + 8 * 32  # counted once


def test_length_and_offset_may_be_left_out(tmp_path: Path) -> None:
    def strip(model: onnx.ModelProto) -> None:
        first = next(tensor for tensor in model.graph.initializer if tensor.name == "embed")
        del first.external_data[1:]

    opened = open_onnx(save(tmp_path / "t", summing_model(), change=strip))
    assert (opened.tensors["embed"].offset, opened.tensors["embed"].nbytes) == (0, 32 * 8 * 4)


def test_the_model_of_a_folder_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", summing_model())
    assert is_onnx(folder)
    assert is_onnx(folder / "model.onnx")
    assert not is_onnx(tmp_path)
    assert open_onnx(folder / "model.onnx").path == folder / "model.onnx"
    (folder / "model.onnx").rename(folder / "other.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: no such file"):
        open_onnx(folder)  # genai_config.json names it
    (folder / "genai_config.json").unlink()
    assert open_onnx(folder).path == folder / "other.onnx"  # the only one
    (folder / "another.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 ONNX files, first 'another\.onnx'; give the file"):
        open_onnx(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert not is_onnx(folder)  # a checkpoint, whatever else lies there
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no ONNX file in it"):
        open_onnx(empty)


def test_configuration_is_found_beside_the_folder_onnx(tmp_path: Path) -> None:
    """The Hub's habit: config.json and tokenizer above, graphs in onnx/."""
    outer = tmp_path / "org-model"
    outer.mkdir()
    save(outer / "onnx", summing_model())
    (outer / "onnx" / "genai_config.json").unlink()
    (outer / "config.json").write_text(json.dumps({"architectures": ["Unheard"], "max_position_embeddings": 77}))
    for place in (outer, outer / "onnx", outer / "onnx" / "model.onnx"):
        opened = open_onnx(place)
        assert (opened.name, opened.folder.context) == ("org-model", 77)


def test_a_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    save(tmp_path / "blobs", summing_model())
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", DATA, "genai_config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert {file.path.name for file in open_onnx(snapshot).files} == {"model.onnx", DATA}


def test_a_folder_that_may_not_be_listed_is_no_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert not is_onnx(tmp_path)


def test_context_is_what_the_files_say(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", summing_model())
    assert open_onnx(folder).folder.context == 64
    (folder / "genai_config.json").write_text("{}")
    assert open_onnx(folder).folder.context is None
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 31}))
    assert open_onnx(folder).folder.context == 31


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
@settings(max_examples=50, deadline=None)
def test_numbers_are_read_as_protobuf_writes_them(tmp_path_factory: pytest.TempPathFactory, values: list[int]) -> None:
    attribute = helper.make_attribute("axes", values, attr_type=onnx.AttributeProto.INTS)
    packed = b"".join(_varint(value & (2**64 - 1)) for value in values)
    path = tmp_path_factory.mktemp("wire") / "message"
    path.write_bytes(attribute.SerializeToString() + b"\x42" + _varint(len(packed)) + packed)
    with path.open("rb", buffering=0) as file:
        source = MessageFile(file, "message")
        found = []
        for field in source.fields(0, source.nbytes, "it"):
            if field[0] == 8:
                found += source.integers(field, "it", 1000)
    assert found == values * 2
    assert [signed(value & (2**64 - 1)) for value in values] == values


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def test_a_file_longer_than_what_is_read_at_a_time_is_walked_to_its_end(tmp_path: Path) -> None:
    """Fields that begin just before, at and after the end of a chunk of 256 KiB."""
    for shift in range(40):
        model = _with_tensors([numpy_helper.from_array(np.zeros((256 << 10) - 60 + shift, np.uint8), "big")])
        model.graph.initializer.append(numpy_helper.from_array(np.arange(3.0), "last"))
        opened = open_onnx(save(tmp_path / "m", model, external=False))
        assert list(opened.tensors) == ["big", "last"]
        assert [value.name for value in opened.outputs] == ["y"]
