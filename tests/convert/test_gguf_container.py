"""Bytes of the GGUF container, against bytes worked out by hand and against the gguf package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.gguf.container import encode_header, encode_pair, encode_tensor
from quantpress.convert.gguf.writer import FilePlan, Slot, write_container
from quantpress.quant.errors import LayoutError, UsageError

TINY = bytes.fromhex(
    "47475546"  # GGUF
    "03000000"  # version
    "0200000000000000"  # two tensors
    "0200000000000000"  # two pairs
    "1400000000000000"  # key of 20 bytes
    "67656e6572616c2e617263686974656374757265"  # general.architecture
    "08000000"  # string
    "0500000000000000"
    "6c6c616d61"  # llama
    "0100000000000000"
    "6b"  # k
    "09000000"
    "05000000"
    "0200000000000000"
    "ffffffff"
    "07000000"  # array of int32: -1, 7
    "0100000000000000"
    "61"  # tensor a
    "02000000"
    "0300000000000000"
    "0200000000000000"  # two dimensions, innermost first: 3, 2
    "00000000"
    "0000000000000000"  # F32 at 0
    "0100000000000000"
    "62"  # tensor b
    "01000000"
    "0100000000000000"  # one dimension: 1
    "01000000"
    "2000000000000000"  # F16 at 32, for 24 bytes are aligned to 32
) + bytes(16)  # 176 bytes up to here, 192 is the next multiple of 32
DATA = np.arange(6, dtype="<f4").tobytes() + bytes(8) + np.float16(1).tobytes() + bytes(30)
METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("string", "llama"),
    "k": ("array[int32]", np.array([-1, 7])),
}
SLOTS = [Slot("a", (2, 3), 0, 24), Slot("b", (1,), 1, 2)]


def test_a_tiny_file_has_the_bytes_of_the_specification(tmp_path: Path) -> None:
    chunks = [(0, np.arange(4, dtype="<f4")), (0, np.array([[4.0, 5.0]], "<f4")), (1, np.ones(1, np.float16))]
    written = write_container(tmp_path / "tiny.gguf", FilePlan(METADATA, SLOTS), iter(chunks), force=False)
    found = (tmp_path / "tiny.gguf").read_bytes()
    assert found == TINY + DATA
    assert written.sha256 == hashlib.sha256(found).hexdigest()
    assert written.nbytes == len(found) == FilePlan(METADATA, SLOTS).nbytes()


def test_the_alignment_of_the_metadata_is_the_alignment_of_the_file(tmp_path: Path) -> None:
    plan = FilePlan({**METADATA, "general.alignment": ("uint32", 128)}, SLOTS)
    data = [(0, np.arange(6, dtype="<f4")), (1, np.ones(1, np.float16))]
    write_container(tmp_path / "wide.gguf", plan, data, force=False)
    reader = gguf.GGUFReader(tmp_path / "wide.gguf")
    assert [tensor.data_offset % 128 for tensor in reader.tensors] == [0, 0]
    assert reader.tensors[1].data.tolist() == [1.0]
    assert (tmp_path / "wide.gguf").stat().st_size % 128 == 0


VALUES: dict[str, tuple[str, Any]] = {
    "u8": ("uint8", 255),
    "i8": ("int8", -128),
    "u16": ("uint16", 65535),
    "i16": ("int16", -32768),
    "u32": ("uint32", 2**32 - 1),
    "i32": ("int32", -(2**31)),
    "u64": ("uint64", 2**64 - 1),
    "i64": ("int64", -(2**63)),
    "f32": ("float32", 0.1),
    "f64": ("float64", 0.1),
    "yes": ("bool", True),
    "no": ("bool", False),
    "text": ("string", "grüße 🦙\n"),
    "texts": ("array[string]", ["", "a", "▁b"]),
    "floats": ("array[float32]", np.array([0.5, -1.0], np.float32)),
    "truths": ("array[bool]", [True, False]),
    "longs": ("array[int64]", [2**40, -1]),
}


def test_the_gguf_package_reads_every_value_type(tmp_path: Path) -> None:
    metadata = {"general.architecture": ("string", "llama"), **VALUES}
    write_container(tmp_path / "values.gguf", FilePlan(metadata, [Slot("t", (1,), 0, 4)]), [(0, np.zeros(1, "<f4"))],
                    force=False)  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "values.gguf").fields
    for key, (kind, value) in VALUES.items():
        wanted = value.tolist() if isinstance(value, np.ndarray) else value
        wanted = float(np.float32(wanted)) if kind == "float32" else wanted
        assert fields[key].contents() == wanted
        assert fields[key].types[-1].name.lower() == kind.removeprefix("array[").removesuffix("]")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint32", -1),
        ("uint32", 2**32),
        ("int32", 2**31),
        ("uint64", 2**64),
        ("uint32", 1.5),
        ("uint32", True),
        ("uint32", "1"),
        ("float32", 1e39),
        ("float32", None),
        ("bool", 1),
        ("string", 5),
        ("string", "\ud800"),
        ("array[int32]", [1, 2**31]),
        ("array[int32]", [[1], [2]]),
        ("array[string]", [1]),
        ("complex64", 1),
        ("array[array[int32]]", []),
    ],
)
def test_a_value_that_its_type_cannot_hold_is_refused_by_the_name_of_its_key(kind: str, value: Any) -> None:
    with pytest.raises(LayoutError, match="some\\.key"):
        encode_pair("some.key", (kind, value))


def test_bytes_that_are_not_utf8_survive_reading_and_writing() -> None:
    assert encode_pair("k", ("string", b"\xff\xfe".decode("utf-8", "surrogateescape"))).endswith(b"\xff\xfe")


@pytest.mark.parametrize(("name", "shape"), [("x" * 64, (1,)), ("", (1,)), ("t", (1,) * 5), ("t", (0, 2))])
def test_a_tensor_that_llama_cpp_would_refuse_is_not_written(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="GGUF holds"):
        encode_tensor(name, shape, 0, 0)


def test_a_header_of_no_tensors_ends_aligned() -> None:
    assert len(encode_header(METADATA, [])) % 32 == 0


@pytest.mark.parametrize("nbytes", [20, 28])
def test_data_of_another_size_than_planned_never_become_a_file(tmp_path: Path, nbytes: int) -> None:
    chunks = [(0, np.zeros(nbytes, np.uint8)), (1, np.ones(1, np.float16))]
    with pytest.raises(ValueError, match=f"'a' got {nbytes} bytes where 24"):
        write_container(tmp_path / "wrong.gguf", FilePlan(METADATA, SLOTS), chunks, force=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    plan = FilePlan(METADATA, [])
    with pytest.raises(UsageError, match="--force"):
        write_container(tmp_path / "old.gguf", plan, [], force=False)
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    write_container(tmp_path / "old.gguf", plan, [], force=True)
    assert (tmp_path / "old.gguf").read_bytes().startswith(b"GGUF")
