"""Split GGUF files, against the bytes that the gguf package writes and the rules of llama-gguf-split."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.atomic_files import atomic_files
from quantpress.convert.gguf.file_plan import FilePlan, Slot
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.gguf.split import (
    MAX_PARTS,
    SplitOptions,
    check_parts,
    part_paths,
    split_files,
    whole_path,
)
from quantpress.convert.gguf.writer import write_container, write_parts
from quantpress.quant.errors import UsageError

METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("string", "llama"),
    "tokenizer.ggml.tokens": ("array[string]", ["a", "ü"]),
}
SIZES = (3, 64, 1, 1, 40, 200, 8)  # values of the tensors; bytes that are not multiples of 32, one larger than a part


def _arrays(sizes: tuple[int, ...] = SIZES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {f"t{number}": random.standard_normal(size, np.float32) for number, size in enumerate(sizes)}


def _plan(arrays: dict[str, np.ndarray]) -> FilePlan:
    return FilePlan(METADATA, [Slot(name, array.shape, 0, array.nbytes) for name, array in arrays.items()])


def _write(path: Path, options: SplitOptions | None, arrays: dict[str, np.ndarray], **more: Any) -> list[Path]:
    pieces = [(number, piece) for number, array in enumerate(arrays.values()) for piece in np.array_split(array, 2)]
    chunks = [(number, piece) for number, piece in pieces if len(piece)]
    written = write_parts(path, split_files(_plan(arrays), options), chunks, force=more.pop("force", False), **more)
    for place, file in written.items():
        data = place.read_bytes()
        assert (file.sha256, file.nbytes) == (hashlib.sha256(data).hexdigest(), len(data))
    return list(written)


def _with_the_gguf_package(folder: Path, options: SplitOptions, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    folder.mkdir()
    writer = gguf.GGUFWriter(
        folder / "m.gguf", "llama", split_max_tensors=options.max_tensors, split_max_size=options.max_size
    )
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü"])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        SplitOptions(max_tensors=1),
        SplitOptions(max_tensors=2),
        SplitOptions(max_tensors=3, max_size=300),
        SplitOptions(max_size=1),
        SplitOptions(max_size=268),  # tensors of 12 and 256 bytes fit exactly
        SplitOptions(max_size=267),
        SplitOptions(max_size=400),
        SplitOptions(max_size=1000),
        SplitOptions(max_size=10_000),  # all fit into one
        SplitOptions(max_tensors=7),
    ],
    ids=str,
)
def test_the_parts_are_byte_for_byte_those_of_the_gguf_package(tmp_path: Path, options: SplitOptions) -> None:
    arrays = _arrays()
    wanted = _with_the_gguf_package(tmp_path / "theirs", options, arrays)
    paths = _write(tmp_path / "ours" / "m.gguf", options, arrays)
    assert {path.name: path.read_bytes() for path in paths} == wanted
    assert sorted(path.name for path in paths) == sorted(each.name for each in (tmp_path / "ours").iterdir())
    assert [path.name for path in paths] == sorted(wanted)


def test_any_split_reads_back_as_the_whole_file(tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    for number in range(30):
        arrays = _arrays(tuple(int(size) for size in random.integers(1, 60, random.integers(1, 12))))
        options = SplitOptions(int(random.integers(0, 400)), int(random.integers(0, 5)))
        paths = _write(tmp_path / f"{number}.gguf", options, arrays)
        file = open_gguf_file(paths[-1])
        assert [path.name for path in file.paths] == [path.name for path in paths]
        assert dict(file.metadata) == METADATA
        assert {name: file.read(each, 0, each.nbytes) for name, each in file.tensors.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }


def test_an_alignment_of_the_metadata_holds_for_the_first_part_only(tmp_path: Path) -> None:
    # The other parts do not say it, so a reader (llama.cpp: gguf_init_from_file) takes 32 for them.
    plan = FilePlan({**METADATA, "general.alignment": ("uint32", 128)}, [Slot(n, (3,), 0, 12) for n in "abcd"])
    chunks = [(number, np.full(3, number, "<f4")) for number in range(4)]
    paths = list(write_parts(tmp_path / "m.gguf", split_files(plan, SplitOptions(0, 2)), chunks, force=False))
    offsets = [tensor.data_offset for path in paths for tensor in gguf.GGUFReader(path).tensors]
    assert [offset % 128 for offset in offsets[:2]] == [0, 0]
    assert offsets[3] - offsets[2] == 32
    file = open_gguf_file(paths[0])
    assert [np.frombuffer(file.read(each, 0, 12), "<f4")[2] for each in file.tensors.values()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("300M", 300_000_000), ("2G", 2_000_000_000), ("7k", 7000), ("50g", 50_000_000_000), ("123", 123), ("1G", 10**9)],
)
def test_sizes_are_decimal_as_llama_cpp_has_them(text: str, nbytes: int) -> None:
    assert SplitOptions.of(text, None) == SplitOptions(max_size=nbytes)


def test_limits_of_nothing_do_not_split() -> None:
    assert SplitOptions.of(None, None) is SplitOptions.of("0", 0) is SplitOptions.of("0M", None) is None
    assert SplitOptions.of("0", 5) == SplitOptions(max_tensors=5)


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "1T", "2GB", "1 M", "١M", "9" * 30, "9" * 5000, "nan"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--split-max-size .*, as in 300M or 2G"):
        SplitOptions.of(text, None)


def test_a_negative_number_of_tensors_is_refused() -> None:
    with pytest.raises(UsageError, match="--split-max-tensors -1"):
        SplitOptions.of(None, -1)


def test_more_parts_than_can_be_opened_are_refused() -> None:
    plan = FilePlan(METADATA, [Slot(f"t{number}", (1,), 0, 4) for number in range(MAX_PARTS + 1)])
    with pytest.raises(UsageError, match="give 1001 parts, at most 1000"):
        split_files(plan, SplitOptions(max_tensors=1))
    assert len(split_files(plan, SplitOptions(max_tensors=2))) == 501


def test_names_are_those_that_llama_cpp_looks_for() -> None:
    wanted = [Path(f"x/m.Q4-00001-of-0000{count}.gguf") for count in (2,)]
    assert part_paths(Path("x/m.Q4.gguf"), 2)[:1] == wanted
    assert part_paths(Path("x/m.GGUF"), 2)[1] == Path("x/m-00002-of-00002.gguf")
    assert part_paths(Path("x/Llama-3.1"), 2)[1] == Path("x/Llama-3.1-00002-of-00002.gguf")
    assert part_paths(Path("x/m.gguf"), 1) == [Path("x/m.gguf")]
    assert whole_path(Path("x/m-00002-of-00003.gguf")) == whole_path(Path("x/m.gguf")) == Path("x/m.gguf")


def test_the_first_part_names_the_output_as_well() -> None:
    assert part_paths(Path("m-00001-of-00002.gguf"), 2) == part_paths(Path("m.gguf"), 2)
    assert part_paths(Path("m-00001-of-00001.gguf"), 1) == [Path("m-00001-of-00001.gguf")]
    for name in ("m-00002-of-00002.gguf", "m-00001-of-00003.gguf"):
        with pytest.raises(UsageError, match=r"not of the first of 2; name it m\.gguf"):
            part_paths(Path(name), 2)
    with pytest.raises(UsageError, match=r"not of the first of 1; name it m\.gguf"):
        part_paths(Path("m-00001-of-00003.gguf"), 1)


def test_existing_parts_need_force(tmp_path: Path) -> None:
    arrays, options = _arrays(), SplitOptions(max_tensors=3)
    paths = _write(tmp_path / "m.gguf", options, arrays)
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    other = {name: -array for name, array in arrays.items()}
    with pytest.raises(UsageError, match=r"m-00002-of-00003\.gguf: the output exists; give --force"):
        _write(tmp_path / "m.gguf", options, other)
    assert [path.read_bytes() for path in paths[1:]] == before[1:]
    _write(tmp_path / "m.gguf", options, other, force=True)
    assert [path.read_bytes() for path in paths] != before
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]


@pytest.mark.parametrize("force", [False, True])
def test_parts_of_another_count_are_never_mixed_with(tmp_path: Path, force: bool) -> None:
    arrays = _arrays()
    paths = _write(tmp_path / "m.gguf", SplitOptions(max_tensors=3), arrays)
    _write(tmp_path / "n.gguf", SplitOptions(max_tensors=2), arrays)  # another name is another output
    with pytest.raises(UsageError, match=r"m-00001-of-00003\.gguf: a part of 3 lies where 4 parts are to be written"):
        _write(tmp_path / "m.gguf", SplitOptions(max_tensors=2), arrays, force=force)
    with pytest.raises(UsageError, match="a part of 3 lies where 4 parts"):
        check_parts(tmp_path / "m.gguf", 4, force=force)
    assert open_gguf_file(paths[0]).paths == tuple(paths)


def test_a_run_that_waited_for_another_one_looks_again(tmp_path: Path) -> None:
    arrays, errors = _arrays(), list[UsageError]()
    plans = split_files(_plan(arrays), SplitOptions(max_tensors=2))

    def second() -> None:
        try:
            write_parts(tmp_path / "m.gguf", plans, enumerate(arrays.values()), force=True)
        except UsageError as error:
            errors.append(error)

    names = [path.name for path in part_paths(tmp_path / "m.gguf", 3)]
    waiting = threading.Thread(target=second)
    with atomic_files(tmp_path / "m.gguf", names) as folder:
        waiting.start()  # it sees nothing, and waits for the lock
        time.sleep(0.3)
        for name in names:
            (folder / name).write_bytes(b"first")
    waiting.join()
    assert "a part of 3 lies where 4 parts are to be written" in str(errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_chunks_that_are_not_what_was_planned_leave_nothing(tmp_path: Path) -> None:
    arrays = _arrays()
    plans = split_files(_plan(arrays), SplitOptions(max_tensors=3))
    chunks = [(number, array) for number, array in enumerate(arrays.values()) if number != 4]
    with pytest.raises(ValueError, match="tensor 't4' got 0 bytes where 160 were planned"):
        write_parts(tmp_path / "m.gguf", plans, chunks, force=False)
    with pytest.raises(ValueError, match="tensor 't6' got 0 bytes"):
        write_parts(tmp_path / "m.gguf", plans, list(enumerate(arrays.values()))[:-1], force=False)
    with pytest.raises(ValueError, match="tensor 't0' got 0 bytes"):
        write_parts(tmp_path / "m.gguf", plans, [], force=False)
    assert list(tmp_path.iterdir()) == []


def test_a_first_part_without_tensors_is_read(tmp_path: Path) -> None:
    # As convert_hf_to_gguf.py --no-tensor-first-split and llama-gguf-split write it.
    keys: dict[str, tuple[str, Any]] = {"split.count": ("uint16", 2), "split.tensors.count": ("int32", 1)}
    first, second = part_paths(tmp_path / "m.gguf", 2)
    write_container(first, FilePlan({**METADATA, "split.no": ("uint16", 0), **keys}, []), [], force=False)
    plan = FilePlan({"split.no": ("uint16", 1), **keys}, [Slot("t", (2,), 0, 8)])
    write_container(second, plan, [(0, np.ones(2, "<f4"))], force=False)
    file = open_gguf_file(first)
    assert file.read(file.tensors["t"], 0, 8) == np.ones(2, "<f4").tobytes()
    assert dict(file.metadata) == METADATA
