"""ONNX files that are cut, changed or made of random bytes: each opens or is refused, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from quantpress.convert.onnx.precision import precision_of
from quantpress.convert.onnx.read import open_onnx
from quantpress.quant.errors import InputError
from tests.onnx_models import save, summing_model
from tests.onnx_wire import OPSET, field


def test_every_file_that_is_cut_anywhere_is_refused_or_still_whole(tmp_path: Path) -> None:
    """A prefix of a message is often a message: what it lacks is noticed, or it lacks nothing that is asked for."""
    folder = save(tmp_path / "m", summing_model())
    path = folder / "model.onnx"
    data = path.read_bytes()
    graph_ends = data.rindex(b"\x42")  # the versions of operators come after the graph
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        if length < graph_ends:
            with pytest.raises(InputError):
                open_onnx(folder)
        else:
            _open_or_refuse(folder)


def _open_or_refuse(folder: Path) -> bool:
    try:
        model = open_onnx(folder)
        precision_of(model)
    except InputError as error:
        said = str(error)
    else:
        for stored in model.tensors.values():
            size = (folder / (stored.file or "model.onnx")).stat().st_size
            assert stored.offset < 0 or stored.offset + stored.nbytes <= size
        return True
    assert "\n" not in said
    assert "model.onnx" in said or str(folder) in said
    return False


@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_file_opens_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = save(tmp_path / "m", summing_model())
    path = folder / "model.onnx"
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        what = data.draw(st.sampled_from(["set", "insert", "delete", "repeat"]))
        if what == "set":
            good[at] = data.draw(st.integers(0, 255))
        elif what == "insert":
            good[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        elif what == "delete":
            del good[at : at + data.draw(st.integers(1, 40))]
        else:
            good[at:at] = good[at : at + data.draw(st.integers(1, 80))]
        if not good:
            break
    path.write_bytes(good)
    opened = _open_or_refuse(folder)
    if opened:  # what we can read, the protobuf library can: nothing is read where it sees something else
        onnx.ModelProto.FromString(bytes(good))


@given(st.binary(max_size=200))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_after_a_good_beginning_open_or_are_refused(tmp_path: Path, data: bytes) -> None:
    folder = save(tmp_path / "m", summing_model())
    with (folder / "model.onnx").open("ab") as file:
        file.write(data)
    _open_or_refuse(folder)
    (folder / "model.onnx").write_bytes(OPSET + field(7, data))
    _open_or_refuse(folder)


def test_the_onnx_package_reads_what_this_file_writes() -> None:
    stored = numpy_helper.from_array(np.ones(3), "a").SerializeToString()
    made = onnx.ModelProto.FromString(OPSET + field(7, field(5, stored)))
    assert made.opset_import[0].version == 23
    assert made.graph.initializer[0].name == "a"
