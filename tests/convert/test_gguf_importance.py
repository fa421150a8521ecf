"""Importance matrices: files against libggml and the gguf package, numbers against llama.cpp's formula."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.importance_file import plan_importance, read_importance, write_importance
from quantpress.quant.errors import InputError, UsageError


def some_matrix(name: str = "") -> ImportanceMatrix:
    draw = np.random.default_rng(3)
    return ImportanceMatrix(
        {
            "output.weight": Importance(draw.random((1, 64), np.float32), np.array([1024], np.float32)),
            "blk.10.attn_q.weight": Importance(draw.random((1, 64), np.float32) * 1e6, np.array([1024], np.float32)),
            "blk.2.ffn_down_exps.weight": Importance(draw.random((3, 96), np.float32), np.array([7, 0, 9], np.float32)),
            "blk.2.attn_q.weight": Importance(np.zeros((1, 1), np.float32), np.array([1024], np.float32)),
        },
        ("calib.txt", "ünïcode.txt"),
        2,
        512,
        name,
    )


def assert_same(found: ImportanceMatrix, wanted: ImportanceMatrix) -> None:
    assert set(found.entries) == set(wanted.entries)
    for name, entry in wanted.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (
        wanted.datasets,
        wanted.chunk_count,
        wanted.chunk_size,
    )


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The library named by QUANTPRESS_LIBGGML, else the one inside xllamacpp."""
    path = os.environ.get("QUANTPRESS_LIBGGML")
    if path is None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            pytest.skip("libggml is not here: install the extra llama-cpp, or set QUANTPRESS_LIBGGML")
        path = str(next(Path(spec.origin).parent.glob("xllamacpp.*.so")))
    library = ctypes.CDLL(path)
    for name in ("ggml_init", "gguf_init_empty", "ggml_new_tensor_2d", "ggml_get_data", "ggml_set_name"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def write_with_ggml(library: ctypes.CDLL, path: Path, matrix: ImportanceMatrix) -> None:
    """Does what llama-imatrix does to save a matrix (tools/imatrix/imatrix.cpp, save_imatrix)."""
    memory = ctypes.c_void_p(library.ggml_init(_InitParams(1 << 20, None, False)))
    file = ctypes.c_void_p(library.gguf_init_empty())
    library.gguf_set_val_str(file, b"general.type", b"imatrix")
    texts = (ctypes.c_char_p * len(matrix.datasets))(*(text.encode() for text in matrix.datasets))
    library.gguf_set_arr_str(file, b"imatrix.datasets", texts, ctypes.c_size_t(len(texts)))
    library.gguf_set_val_u32(file, b"imatrix.chunk_count", ctypes.c_uint32(matrix.chunk_count))
    library.gguf_set_val_u32(file, b"imatrix.chunk_size", ctypes.c_uint32(matrix.chunk_size))
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        for suffix, values in ((".in_sum2", entry.sums), (".counts", entry.counts[:, None])):
            sizes = (ctypes.c_int64(values.shape[1]), ctypes.c_int64(values.shape[0]))
            tensor = ctypes.c_void_p(library.ggml_new_tensor_2d(memory, ctypes.c_int(0), *sizes))
            library.ggml_set_name(tensor, f"{name}{suffix}".encode())
            data = np.ascontiguousarray(values, np.float32)
            ctypes.memmove(library.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
            library.gguf_add_tensor(file, tensor)
    library.gguf_write_to_file(file, os.fsencode(path), ctypes.c_bool(False))
    library.gguf_free(file)
    library.ggml_free(memory)


def test_the_bytes_are_those_that_llama_imatrix_writes(ggml: ctypes.CDLL, tmp_path: Path) -> None:
    written = write_importance(tmp_path / "ours.gguf", some_matrix())
    write_with_ggml(ggml, tmp_path / "theirs.gguf", some_matrix())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert written.nbytes == (tmp_path / "ours.gguf").stat().st_size == plan_importance(some_matrix()).nbytes()


def test_what_libggml_wrote_is_read(ggml: ctypes.CDLL, tmp_path: Path) -> None:
    write_with_ggml(ggml, tmp_path / "theirs.gguf", some_matrix())
    found = read_importance(tmp_path / "theirs.gguf")
    assert_same(found, some_matrix())
    assert found.name == "theirs.gguf"


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    matrix = some_matrix()
    write_importance(tmp_path / "ours.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == list(matrix.datasets)
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert [tensor.name for tensor in reader.tensors] == [
        name + suffix for name in sorted(matrix.entries) for suffix in (".in_sum2", ".counts")
    ]
    for tensor in reader.tensors:
        entry = matrix.entries[tensor.name.rpartition(".")[0]]
        values = entry.sums if tensor.name.endswith("in_sum2") else entry.counts
        np.testing.assert_array_equal(tensor.data.reshape(-1), values.reshape(-1))


def test_a_written_matrix_is_read_again(tmp_path: Path) -> None:
    write_importance(tmp_path / "one.gguf", some_matrix())
    assert_same(read_importance(tmp_path / "one.gguf"), some_matrix())
    with pytest.raises(UsageError, match="give --force"):
        write_importance(tmp_path / "one.gguf", some_matrix())
    write_importance(tmp_path / "one.gguf", some_matrix(), force=True)


def theirs_of(entry: Importance) -> list[float]:
    """llama-quantize's normalisation (tools/quantize/quantize.cpp, load_imatrix), number by number in float32."""
    sums, counts = entry.sums.reshape(-1), entry.counts
    row = sums.size // counts.size
    result = []
    for place, total in enumerate(sums):
        count = counts[place // row]
        result.append(np.float32(total / count) if count > 0 else np.float32(1))
    return result


def test_importance_is_the_mean_that_llama_quantize_takes() -> None:
    matrix = some_matrix()
    for name, shape in (("output.weight", (5, 64)), ("blk.2.ffn_down_exps.weight", (3, 2, 96))):
        found = matrix.of(name, shape)
        assert found is not None
        assert found.dtype == np.float32
        assert found.shape == (shape[0] if len(shape) == 3 else 1, shape[-1])
        np.testing.assert_array_equal(found.reshape(-1), theirs_of(matrix.entries[name]))


def test_an_expert_that_saw_nothing_counts_all_columns_alike_and_is_told() -> None:
    found = some_matrix().of("blk.2.ffn_down_exps.weight", (3, 2, 96))
    assert found is not None
    np.testing.assert_array_equal(found[1], 1)
    assert some_matrix().notes() == ("blk.2.ffn_down_exps.weight: 1 of 3 experts saw no token of the text",)


def test_one_count_may_stand_for_all_matrices_of_a_tensor() -> None:
    sums = np.arange(1, 13, dtype=np.float32)
    matrix = ImportanceMatrix({"blk.0.attn_k_b.weight": Importance(sums.reshape(1, 12), np.array([4], np.float32))})
    found = matrix.of("blk.0.attn_k_b.weight", (3, 7, 4))
    np.testing.assert_array_equal(found, (sums / 4).reshape(3, 4))


def test_a_tensor_without_an_entry_and_a_vector_have_none() -> None:
    assert some_matrix().of("blk.0.attn_q.weight", (4, 64)) is None
    assert some_matrix().of("output.weight", (64,)) is None


def test_an_entry_of_another_size_is_refused_by_name_but_for_the_embedding() -> None:
    matrix = some_matrix("wrong.gguf")
    with pytest.raises(InputError, match=r"wrong\.gguf: the entry of output\.weight has 64 values and 1 counts, the"):
        matrix.of("output.weight", (4, 128))
    with pytest.raises(InputError, match=r"blk\.2\.ffn_down_exps\.weight has 288 values and 3 counts"):
        matrix.of("blk.2.ffn_down_exps.weight", (9, 2, 32))
    other = ImportanceMatrix({"token_embd.weight": matrix.entries["output.weight"]})
    assert other.of("token_embd.weight", (4, 128)) is None  # as llama-quantize takes it
    assert other.of("token_embd.weight", (4, 64)) is not None


def test_a_matrix_of_another_model_is_refused() -> None:
    some_matrix().check_fits(["token_embd.weight", "output.weight"], "model")
    with pytest.raises(InputError, match=r"none of its 4 entries, such as 'output.weight', is a tensor of model"):
        some_matrix("x.gguf").check_fits(["token_embd.weight", "blk.0.attn_q.weight"], "model")


def test_the_metadata_of_a_file_made_with_it_is_llama_quantizes() -> None:
    """tools/quantize/quantize.cpp: file, dataset, entries_count and chunks_count; numbers are uint32 in the file."""
    assert some_matrix("imatrix.gguf").metadata() == {
        "quantize.imatrix.file": ("string", "imatrix.gguf"),
        "quantize.imatrix.dataset": ("string", "calib.txt"),
        "quantize.imatrix.entries_count": ("uint32", 4),
        "quantize.imatrix.chunks_count": ("uint32", 2),
    }
    long = ImportanceMatrix({}, ("ü" * 100,), name="n" * 200).metadata()
    assert long == {
        "quantize.imatrix.file": ("string", "n" * 127),
        "quantize.imatrix.dataset": ("string", "ü" * 63),  # 127 bytes would end within a character
        "quantize.imatrix.entries_count": ("uint32", 0),
    }


def legacy(entries: Sequence[tuple[str, int, Sequence[float]]], tail: bytes = b"") -> bytes:
    """The older form (common/imatrix-loader.cpp, common_imatrix_load_legacy)."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        raw = name.encode()
        parts.append(struct.pack(f"<i{len(raw)}sii{len(values)}f", len(raw), raw, calls, len(values), *values))
    return b"".join(parts) + tail


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [(b"", 0, ()), (struct.pack("<i", 7), 7, ()), (struct.pack("<ii5s", 7, 5, b"a.txt"), 7, ("a.txt",)),
     (struct.pack("<ii", 7, 0), 7, ())],
)  # fmt: skip
def test_the_older_form_is_read(tail: bytes, chunks: int, datasets: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([("blk.0.attn_q.weight", 4, [1, 2, 3, 4]), ("blk.0.e.weight", 0, [5, 6])], tail))
    found = read_importance(path)
    assert (found.chunk_count, found.chunk_size, found.datasets, found.name) == (chunks, 0, datasets, "imatrix.dat")
    np.testing.assert_array_equal(found.of("blk.0.attn_q.weight", (9, 4)), [[0.25, 0.5, 0.75, 1]])
    np.testing.assert_array_equal(found.of("blk.0.attn_q.weight", (2, 9, 2)), [[0.25, 0.5], [0.75, 1]])
    np.testing.assert_array_equal(found.of("blk.0.e.weight", (9, 2)), [[5, 6]])  # without calls: as they are


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the number of entries needs 4 bytes, 0 are left"),
        (struct.pack("<i", 0), "the number of entries is 0, wanted 1"),
        (struct.pack("<i", -1), "the number of entries is -1"),
        (struct.pack("<i", 1 << 30), "the number of entries is 1073741824"),
        (legacy([("a", 1, [1])])[:-1], "needs 4 bytes, 3 are left"),
        (legacy([("a", 1, [1]), ("a", 1, [1])]), "entry 'a' appears twice"),
        (legacy([("a", -3, [1])]), "the calls of entry 'a' is -3"),
        (legacy([("a", 1, [])]) + b"xxxx", "the values of entry 'a' is 0"),
        (struct.pack("<ii", 1, 1 << 20) + bytes(100), "the length of an entry's name is 1048576"),
        (legacy([("a", 1, [1, np.nan])]), "entry 'a': 1 of 2 sums are NaN or infinite"),
        (legacy([("a", 1, [1, -2])]), "entry 'a': sums go down to -2"),
        (legacy([("a", 1, [1])], b"\x01"), "the number of chunks needs 4 bytes, 1 are left"),
        (b"not a matrix at all, but a text file", "the number of entries is"),
    ],
)
def test_damaged_files_of_the_older_form_are_refused(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_importance(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def gguf_file(path: Path, tensors: dict[str, Any], *, without: str = "", datasets: Any = ("a",)) -> Path:
    writer = gguf.GGUFWriter(path, arch="", endianess=gguf.GGUFEndian.LITTLE)
    if datasets is not None:
        writer.add_array("imatrix.datasets", list(datasets))
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        if key != without:
            writer.add_uint32(key, 1)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONE = np.ones((1, 4), np.float32)
COUNT = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    ("tensors", "more", "said"),
    [
        ({"a.weight": ONE}, {}, "not an importance matrix: it has no tensor *.in_sum2"),
        ({"a.in_sum2": ONE}, {}, "tensor 'a.counts' is missing"),
        ({"a.in_sum2": ONE, "a.counts": COUNT, "b.counts": COUNT}, {}, "tensor 'b.in_sum2' is missing"),
        ({"a.in_sum2": ONE.astype(np.float16), "a.counts": COUNT}, {}, "tensor 'a.in_sum2' is F16"),
        ({"a.in_sum2": ONE, "a.counts": np.ones((3, 1), np.float32)}, {}, "4 values, which do not divide by the 3 of"),
        ({"a.in_sum2": ONE * np.inf, "a.counts": COUNT}, {}, "entry 'a': 4 of 4 sums are NaN or infinite"),
        ({"a.in_sum2": ONE, "a.counts": COUNT * np.nan}, {}, "entry 'a': 1 of 1 counts are NaN or infinite"),
        ({"a.in_sum2": -ONE, "a.counts": COUNT}, {}, "entry 'a': sums go down to -1"),
        ({"a.in_sum2": ONE, "a.counts": COUNT}, {"without": "imatrix.chunk_count"}, "imatrix.chunk_count is missing"),
        ({"a.in_sum2": ONE, "a.counts": COUNT}, {"datasets": None}, "imatrix.datasets is missing"),
        ({"a.in_sum2": ONE, "a.counts": COUNT}, {"datasets": (1, 2)}, "metadata imatrix.datasets is of type array"),
    ],
)
def test_gguf_files_that_are_no_whole_matrix_are_refused(
    tensors: dict[str, Any], more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = gguf_file(tmp_path / "x.gguf", tensors, **more)
    with pytest.raises(InputError) as caught:
        read_importance(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf"):
        read_importance(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans(), form=st.booleans())
def test_changed_bytes_are_refused_or_give_numbers(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int, cut: bool, form: bool
) -> None:
    """Whatever the bytes: an error with the file's name, or finite numbers that are not negative."""
    path = tmp_path_factory.getbasetemp() / f"mutated-{os.getpid()}"
    if form:
        write_importance(path, some_matrix(), force=True)
        data = bytearray(path.read_bytes())
    else:
        data = bytearray(legacy([("blk.0.attn_q.weight", 4, [1, 2, 3, 4]), ("e", 1, [5, 6])], struct.pack("<i", 7)))
    at = int(place * len(data))
    data[at] = byte
    path.write_bytes(data[:at] if cut else data)
    entries, said = {}, path.name
    try:
        entries = dict(read_importance(path).entries)
    except InputError as error:
        said = str(error)
    assert path.name in said
    for entry in entries.values():
        assert np.isfinite(entry.sums).all()
        assert (entry.sums >= 0).all()


def test_measured_sums_become_entries() -> None:
    sums, counts = {"a": np.array([[1.0, 2.5]])}, {"a": np.array([64])}
    found = ImportanceMatrix.measured(sums, counts, tokens=64, length=16, dataset="t.txt", name="n")
    assert (found.datasets, found.chunk_count, found.chunk_size, found.name) == (("t.txt",), 4, 16, "n")
    np.testing.assert_array_equal(found.entries["a"].sums, np.array([[1, 2.5]], np.float32))
    np.testing.assert_array_equal(found.entries["a"].counts, [64])
    with pytest.raises(InputError, match="'a': the squares of its inputs sum up to 1e\\+39, beyond float32"):
        ImportanceMatrix.measured({"a": np.array([[1e39]])}, counts, tokens=64, length=16, dataset="t.txt")
