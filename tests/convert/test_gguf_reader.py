"""Reading GGUF files that the gguf package and llama.cpp wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.gguf.writer import FilePlan, Slot, write_container
from quantpress.quant.errors import InputError

Q = gguf.GGMLQuantizationType


def write_with_the_gguf_package(path: Path, arrays: dict[str, tuple[np.ndarray, Q]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("texts", ["a", "ü", "▁x"])
    writer.add_array("numbers", [1, -2, 3])
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = {
        "matrix": (random.standard_normal((5, 64), np.float32), Q.F32),
        "half": (random.standard_normal((3, 7), np.float32), Q.F16),
        "cube": (random.standard_normal((2, 3, 96), np.float32), Q.Q8_0),
        "codes": (random.standard_normal((4, 32), np.float32), Q.Q4_0),
        "vector": (random.standard_normal(9, np.float32), Q.F32),
    }
    path = write_with_the_gguf_package(tmp_path / "a.gguf", arrays)
    file = open_gguf_file(path)
    values = plain_metadata(file.metadata)
    assert (values["u8"], values["i64"], values["f64"], values["yes"]) == (200, -5, 0.1, True)
    assert (values["texts"], values["numbers"]) == (["a", "ü", "▁x"], [1, -2, 3])
    assert file.version == 3
    assert list(file.tensors) == list(arrays)
    for name, (array, kind) in arrays.items():
        tensor = file.tensors[name]
        assert (tensor.shape, tensor.type.name) == (array.shape, kind.name)
        assert file.read(tensor, 0, tensor.nbytes) == gguf.quants.quantize(array, kind).tobytes()


def test_vocabularies_of_llama_cpp_are_read_as_the_gguf_package_reads_them(shared: Path) -> None:
    paths = sorted((shared / "gguf-vocabs").glob("*.gguf"), key=lambda path: path.stat().st_size)
    assert len(paths) > 5
    for path in paths[:2]:  # the package needs seconds for each
        found = plain_metadata(open_gguf_file(path).metadata)
        fields = gguf.GGUFReader(path).fields
        wanted = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
        assert found == wanted


def test_a_vocabulary_of_250_000_tokens_is_read_in_half_a_second(tmp_path: Path) -> None:
    tokens = [f"▁token{number}" for number in range(250_000)]
    metadata: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.tokens": ("array[string]", tokens),
        "tokenizer.ggml.scores": ("array[float32]", np.zeros(250_000, np.float32)),
        "tokenizer.ggml.token_type": ("array[int32]", np.ones(250_000, np.int32)),
    }
    write_container(tmp_path / "vocab.gguf", FilePlan(metadata, []), [], force=False)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        file = open_gguf_file(tmp_path / "vocab.gguf")
        seconds.append(time.process_time() - start)
    assert file.metadata["tokenizer.ggml.tokens"][1] == tokens
    assert min(seconds) < 0.5


def _parts(folder: Path, count: int = 2, **changes: Any) -> Path:
    """A model of `count` tensors, one in each part; `changes` replaces the number in a key of the last part."""
    for number in range(count):
        keys = {"split.no": number, "split.count": count, "split.tensors.count": count}
        if number == count - 1:
            keys |= {key.replace("_", "."): value for key, value in changes.items()}
        metadata: dict[str, tuple[str, Any]] = {key: ("uint16", value) for key, value in keys.items() if value >= 0}
        if number == 0:
            metadata["general.architecture"] = ("string", "llama")
        plan = FilePlan(metadata, [Slot(f"t{number}", (2,), 0, 8)])
        data = [(0, np.full(2, number, "<f4"))]
        write_container(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf", plan, data, force=True)
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_the_parts_of_a_split_model_are_one_file(tmp_path: Path) -> None:
    file = open_gguf_file(_parts(tmp_path, 3))
    assert [path.name for path in file.paths] == [f"m-{number}-of-00003.gguf" for number in ("00001", "00002", "00003")]
    assert dict(file.metadata) == {"general.architecture": ("string", "llama")}
    assert [file.read(tensor, 0, 8) for tensor in file.tensors.values()] == [
        np.full(2, number, "<f4").tobytes() for number in range(3)
    ]


def test_a_model_split_by_the_gguf_package_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full((2, 3), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf_file(tmp_path / "s-00001-of-00003.gguf")
    assert [np.frombuffer(file.read(each, 0, 24), "<f4")[0] for each in file.tensors.values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split_no": 0}, "split.no and split.count are 0 and 2, wanted 1 and 2"),
        ({"split_count": 3}, "split.no and split.count are 1 and 3"),
        ({"split_no": -1}, "split.no is missing"),
    ],
)
def test_a_part_of_another_model_is_refused(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_gguf_file(_parts(tmp_path, **changes))


def test_a_missing_part_is_refused_by_its_name(tmp_path: Path) -> None:
    first = _parts(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf is missing beside it; the model has 2 parts"):
        open_gguf_file(first)


def test_a_part_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    first = _parts(folder)
    (folder / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere.gguf")
    (folder / "m-00002-of-00002.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(InputError, match="leaves the model folder"):
        open_gguf_file(first)


def test_every_missing_part_is_counted(tmp_path: Path) -> None:
    first = _parts(tmp_path, 4)
    for number in (2, 4):
        (tmp_path / f"m-0000{number}-of-00004.gguf").unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00004\.gguf and 1 more parts are missing"):
        open_gguf_file(first)


@pytest.mark.parametrize("number", [2, 3])
def test_a_split_model_is_opened_by_any_of_its_parts(tmp_path: Path, number: int) -> None:
    first = open_gguf_file(_parts(tmp_path, 3))
    other = open_gguf_file(tmp_path / f"m-{number:05d}-of-00003.gguf")
    assert (other.paths, other.sizes, other.tensors) == (first.paths, first.sizes, first.tensors)
    assert dict(other.metadata) == {"general.architecture": ("string", "llama")}
    for tensor in other.tensors.values():
        assert other.read(tensor, 0, 8) == first.read(tensor, 0, 8)


def test_a_part_whose_name_does_not_say_which_it_is_is_refused(tmp_path: Path) -> None:
    first = _parts(tmp_path)
    with pytest.raises(InputError, match=r"its name does not say which; name the parts \.\.\.-00001-of-00002"):
        open_gguf_file(first.rename(tmp_path / "renamed.gguf"))


def test_parts_that_changed_their_names_are_refused(tmp_path: Path) -> None:
    first = _parts(tmp_path)
    second, between = tmp_path / "m-00002-of-00002.gguf", tmp_path / "between"
    first.rename(between)
    second.rename(first)
    between.rename(second)
    with pytest.raises(InputError, match=r"split\.no and split\.count are 1 and 2, wanted 0 and 2"):
        open_gguf_file(first)


def test_parts_that_are_links_into_a_hub_cache_keep_their_names(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    first = _parts(snapshot, 2)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        file = open_gguf_file(snapshot / name)
        assert file.paths == (first, snapshot / "m-00002-of-00002.gguf")
        assert [file.read(tensor, 0, 4) for tensor in file.tensors.values()] == [
            np.float32(number).tobytes() for number in range(2)
        ]


def test_a_single_part_of_one_is_a_file_like_any_other(tmp_path: Path) -> None:
    file = open_gguf_file(_parts(tmp_path, 1))
    assert dict(file.metadata) == {"general.architecture": ("string", "llama")}
    assert list(file.tensors) == ["t0"]


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    first = _parts(tmp_path)
    plan = FilePlan({"split.no": ("uint16", 1), "split.count": ("uint16", 2)}, [Slot("t0", (2,), 0, 8)])
    write_container(tmp_path / "m-00002-of-00002.gguf", plan, [(0, np.zeros(2, "<f4"))], force=True)
    with pytest.raises(InputError, match="tensor 't0' is in an earlier part as well"):
        open_gguf_file(first)


def test_a_number_of_tensors_that_the_parts_do_not_hold_is_refused(tmp_path: Path) -> None:
    first = _parts(tmp_path)
    keys = {"split.no": 0, "split.count": 2, "split.tensors.count": 7}
    plan = FilePlan({key: ("uint16", value) for key, value in keys.items()}, [Slot("t0", (2,), 0, 8)])
    write_container(first, plan, [(0, np.zeros(2, "<f4"))], force=True)
    with pytest.raises(InputError, match=r"split.tensors.count is 7, the parts hold 2 tensors"):
        open_gguf_file(first)


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(tmp_path: Path) -> None:
    path = write_with_the_gguf_package(tmp_path / "a.gguf", {"m": (np.ones((4, 32), np.float32), Q.F32)})
    file = open_gguf_file(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 64)
    with pytest.raises(InputError, match="ended inside tensor 'm'"):
        file.read(file.tensors["m"], 0, 512)
