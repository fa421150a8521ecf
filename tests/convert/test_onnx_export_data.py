"""The data file of ONNX models: every tensor at its place, whatever comes first, and zeros between."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.onnx.data_file import write_data
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder, Placed
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError

pytest.importorskip("onnx")
Array = NDArray[Any]
PAGE = 65536


class Collected:
    """What was written, in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def write(self, data: bytes | memoryview) -> None:
        self.data += data


class Counted:
    """Only how much was written, and how much of that was not zero."""

    def __init__(self) -> None:
        self.nbytes = self.others = 0

    def write(self, data: bytes | memoryview) -> None:
        values = np.frombuffer(data, np.uint8)
        self.nbytes += values.size
        self.others += np.count_nonzero(values)


def group_of(*arrays: Array, rows: int = 3, delay: float = 0.0) -> StoredGroup:
    """A group whose pieces are `rows` rows of each array, the first task being the slowest."""

    def tasks() -> Iterator[Callable[[], Piece]]:
        for start in range(0, len(arrays[0]), rows):
            yield partial(piece, start)

    def piece(start: int) -> Piece:
        time.sleep(delay if start == 0 else 0.0)
        return tuple(np.ascontiguousarray(array[start : start + rows]) for array in arrays)

    types = {"float32": "FLOAT", "float16": "FLOAT16", "uint8": "UINT8"}
    tensors = tuple(StoredTensor(f"t{id(array)}", types[array.dtype.name], array.shape) for array in arrays)
    return StoredGroup(tensors, tasks, "F32")


def stored(*groups: StoredGroup) -> GraphBuilder:
    builder = GraphBuilder(compute="FLOAT", standard=False, opset=23)
    for group in groups:
        builder.store(group)
    return builder


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(1, 200, shape)
    return values.astype(dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_tensor_lies_where_the_graph_says_and_all_else_is_zero(threads: int) -> None:
    codes, scales, zeros = random(400, 1000, dtype="uint8"), random(400, 31, seed=1), random(400, 16, dtype="uint8")
    vector, large = random(70, dtype="float16", seed=2), random(600, 500, seed=3)  # 1.2 MB: begins at a page
    arrays = [vector, codes, scales, zeros, large, random(5, seed=4)]
    groups = [group_of(vector), group_of(codes, scales, zeros, delay=0.02), group_of(large), group_of(arrays[-1])]
    builder, output = stored(*groups), Collected()
    write_data(output, builder.groups, threads=threads)
    places = [place for _, found in builder.groups for place in found]
    assert [place.offset % 64 for place in places] == [0] * len(places)
    assert places[4].offset % PAGE == 0
    wanted = bytearray(builder.data_bytes)
    for place, array in zip(places, arrays, strict=True):
        wanted[place.offset : place.offset + array.nbytes] = array.tobytes()
    assert bytes(output.data) == bytes(wanted)


def test_pieces_come_from_threads_and_only_a_few_are_held() -> None:
    made, written, most = 0, 0, 0
    lock = threading.Lock()
    row = np.full((1, 1024), 7, np.uint8)

    def make() -> Piece:
        nonlocal made, most
        with lock:
            made += 1
            most = max(most, made - written)
        return (row,)

    class Slow(Collected):
        def write(self, data: bytes | memoryview) -> None:
            nonlocal written
            super().write(data)
            with lock:
                written += 1
            time.sleep(0.001)

    group = StoredGroup((StoredTensor("t", "UINT8", (60, 1024)),), lambda: iter([make] * 60), "INT8")
    output = Slow()
    write_data(output, stored(group).groups, threads=2)
    assert output.nbytes == 60 * 1024
    assert most <= 2 * 2 + 2


@pytest.mark.parametrize(
    ("rows", "words"), [(9, "got 36 bytes where 40 were planned"), (11, "got 44 bytes where 40 were planned")]
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_tensor_that_gets_other_bytes_than_planned_is_an_error(rows: int, words: str, which: int) -> None:
    tensors = (StoredTensor("first", "FLOAT", (10,)), StoredTensor("second", "FLOAT", (10,)))
    counts = [10, 10]
    counts[which] = rows
    piece = tuple(np.zeros(count, np.float32) for count in counts)
    group = StoredGroup(tensors, lambda: iter([lambda: piece]), "F32")
    with pytest.raises(ValueError, match=f"'{tensors[which].name}' {words}"):
        write_data(Collected(), stored(group).groups, threads=1)


def test_a_piece_of_too_few_arrays_is_an_error() -> None:
    group = StoredGroup(
        (StoredTensor("codes", "UINT8", (4,)), StoredTensor("scales", "FLOAT", (1,))),
        lambda: iter([lambda: (np.zeros(4, np.uint8),)]),
        "INT8",
    )
    with pytest.raises(ValueError, match="codes: a piece of 1 arrays for 2 tensors"):
        write_data(Collected(), stored(group).groups, threads=1)


def test_places_that_overlap_are_an_error() -> None:
    group = group_of(random(10))
    tensor = group.tensors[0]
    with pytest.raises(ValueError, match="inside the one before it"):
        write_data(Collected(), [(group, [Placed(tensor, 0)]), (group, [Placed(tensor, 32)])], threads=1)


def test_an_error_of_a_task_comes_out_as_it_is() -> None:
    def bad() -> Piece:
        raise InputError("model.safetensors: tensor 'w': 3 of 9 values are NaN or infinite")

    group = StoredGroup((StoredTensor("t", "FLOAT", (9,)),), lambda: iter([bad]), "F32")
    with pytest.raises(InputError, match="3 of 9 values"):
        write_data(Collected(), stored(group).groups, threads=2)


def test_progress_ends_at_the_bytes_of_all_tensors() -> None:
    told: list[tuple[int, int]] = []
    group = group_of(random(10, 4), random(10, 1))
    write_data(Collected(), stored(group).groups, threads=1, progress=lambda _, done, total: told.append((done, total)))
    assert told[-1] == (200, 200)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_offsets_beyond_two_and_four_gigabytes_are_what_the_layout_says() -> None:
    # written to a counter, which takes seconds and no disk: 1,000 rows of ones and 5 GB of zeros, a piece at a time
    zeros = np.zeros((1 << 25,), np.uint8)
    count = 150
    big = StoredTensor("big", "UINT8", (count, 1 << 25))
    group = StoredGroup((big,), lambda: iter([lambda: (zeros,)] * count), "INT8")
    small = np.ones(1000, np.uint8)
    last = StoredGroup((StoredTensor("last", "UINT8", (1000,)),), lambda: iter([lambda: (small,)]), "INT8")
    builder, output = stored(group, last), Counted()
    write_data(output, builder.groups, threads=1)
    place = builder.groups[1][1][0]
    assert place.offset == count << 25 > 1 << 32
    assert output.nbytes == builder.data_bytes == (count << 25) + 1000
    assert output.others == 1000


def test_a_runtime_reads_the_tensors_at_their_places(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx_ir as ir

    arrays: Sequence[Array] = [random(3, 7), random(700, 500, seed=1), random(9, seed=2)]
    builder = stored()
    values = [builder.store(group_of(array))[0] for array in arrays]
    for number, value in enumerate(values):
        copied = builder.add("Identity", [value], shape=arrays[number].shape)
        builder.output(copied, f"out{number}", "FLOAT", arrays[number].shape)
    output = Collected()
    write_data(output, builder.groups, threads=2)
    (tmp_path / DATA_FILE).write_bytes(output.data)
    (tmp_path / "model.onnx").write_bytes(
        ir.to_proto(builder.model(name="test", producer_version="0")).SerializeToString()
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for found, array in zip(session.run(None, {}), arrays, strict=True):
        np.testing.assert_array_equal(found, array)
    assert math.prod(arrays[1].shape) * 4 >= 1 << 20, "one of them begins at a page"
