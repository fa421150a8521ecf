"""Folders from strangers: everything wrong is a typed error in two seconds, and its good twin opens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from quantpress.convert.open import open_checkpoint
from quantpress.convert.safetensors_reader import MAX_HEADER
from tests.good_folder import VALUES, good_folder, refused


@pytest.fixture(autouse=True)
def within_two_seconds(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert "measures_itself" in request.keywords or time.perf_counter() - start < 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good folder with one file of weights."""
    return good_folder(tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """A good folder with two shards."""
    (model / "model.safetensors").unlink()
    for number, name in enumerate(VALUES, 1):
        save_file({name: VALUES[name]}, model / f"model-{number:05d}-of-00002.safetensors")
    _index(model, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return model


def _index(folder: Path, **weight_map: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_the_good_twins_open(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert {name: tensor.read().tolist() for name, tensor in checkpoint.tensors.items()} == {
        name: values.tolist() for name, values in VALUES.items()
    }
    assert checkpoint.config["hidden_size"] == 8
    assert checkpoint.name == "model"
    assert {file.path.name for file in checkpoint.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert all(file.nbytes == file.path.stat().st_size for file in checkpoint.files)


def test_the_good_sharded_twin_opens(sharded: Path) -> None:
    assert set(open_checkpoint(sharded).tensors) == {"a", "b"}


def test_safetensors_are_preferred_to_bin(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"nonsense")
    assert open_checkpoint(model).format == "safetensors"
    (model / "model.safetensors").unlink()
    refused(model, "not a file of torch.save")


# ---- headers


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_EIGHT = b"\0" * 8
_BAD_HEADERS: list[tuple[str, Any, bytes, str]] = [
    ("type of no name", {"x": _entry("F33")}, _EIGHT, "'x': type 'F33' is not supported"),
    ("type in small letters", {"x": _entry("f32")}, _EIGHT, "not supported"),
    ("type that is a number", {"x": _entry(7)}, _EIGHT, "type 7 is not supported"),
    ("type that is a list", {"x": _entry(["F32"])}, _EIGHT, "not supported"),
    ("negative size", {"x": _entry(shape=[-2])}, _EIGHT, "is not a list of"),
    ("negative sizes whose product fits", {"x": _entry(shape=[-1, -2])}, _EIGHT, "is not a list of"),
    ("size with a point", {"x": _entry(shape=[2.0])}, _EIGHT, "is not a list of"),
    ("size that is true", {"x": _entry(shape=[True, 2])}, _EIGHT, "is not a list of"),
    ("shape that is text", {"x": _entry(shape="2")}, _EIGHT, "is not a list of"),
    ("product beyond 64 bits", {"x": _entry(shape=[2**32, 2**32, 4])}, _EIGHT, "needs 2951479051793528258"),
    ("product that is 2 modulo 2**64", {"x": _entry(shape=[2**33, 2**31, 1])}, _EIGHT, "needs"),
    ("huge size beside a zero", {"x": _entry(shape=[0, 2**62], offsets=[0, 0])}, b"", "is not a list of"),
    ("too many sizes", {"x": _entry(shape=[1] * 9, offsets=[0, 4])}, b"\0" * 4, "is not a list of"),
    ("too few bytes", {"x": _entry(shape=[3])}, _EIGHT, "needs 12 bytes, data_offsets give 8"),
    ("too many bytes", {"x": _entry(shape=[1])}, _EIGHT, "needs 4 bytes, data_offsets give 8"),
    ("end before begin", {"x": _entry(offsets=[8, 0])}, _EIGHT, "data_offsets give -8"),
    ("negative place", {"x": _entry(offsets=[-8, 0])}, _EIGHT, "not two places"),
    ("one place", {"x": _entry(offsets=[8])}, _EIGHT, "not two places"),
    ("places that are text", {"x": _entry(offsets=["0", "8"])}, _EIGHT, "not two places"),
    ("end after the file", {"x": _entry()}, b"\0" * 7, "ends at byte 8 of 7"),
    ("bytes after the last tensor", {"x": _entry()}, b"\0" * 9, "1 bytes after the last tensor"),
    ("bytes without a tensor", {}, b"\0", "1 bytes after the last tensor"),
    ("hole at the start", {"x": _entry(offsets=[4, 12])}, b"\0" * 12, "leaves a hole"),
    ("hole", {"x": _entry(), "y": _entry(offsets=[9, 17])}, b"\0" * 17, "'y': leaves a hole"),
    ("overlap", {"x": _entry(), "y": _entry(offsets=[4, 12])}, b"\0" * 12, "'y': overlaps"),
    ("same place twice", {"x": _entry(), "y": _entry()}, _EIGHT, "'y': overlaps"),
    ("nothing about a tensor", {"x": {}}, b"", "must have dtype, shape"),
    ("more about a tensor", {"x": {**_entry(), "code": 1}}, _EIGHT, "must have dtype, shape"),
    ("tensor that is a list", {"x": [1]}, b"", "must have dtype, shape"),
    ("name of no length", {"": _entry()}, _EIGHT, "a name must have"),
    ("name of great length", {"x" * 5000: _entry()}, _EIGHT, "a name must have"),
    ("metadata that is no text", {"__metadata__": {"k": 1}, "x": _entry()}, _EIGHT, "__metadata__"),
    ("metadata that is a list", {"__metadata__": [], "x": _entry()}, _EIGHT, "__metadata__"),
    ("name twice", b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', b"", "key 'x' twice"),
    ("field twice", b'{"x":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "'dtype' twice"),
    ("deep", b'{"x":' + b"[" * 100_000, b"", "nested deeper"),
    ("NaN", b'{"x":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", "NaN"),
    ("no JSON", b"{nonsense", b"", "not JSON"),
    ("a list", b"[1]", b"", "opening brace"),
    ("a space first", b' {"x":1}', b"", "opening brace"),
    ("no UTF-8", b'{"\xff":1}', b"", "not UTF-8"),
    ("text after the JSON", b"{}x", b"", "not JSON"),
]


def _weights(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "data", "words"), [row[1:] for row in _BAD_HEADERS], ids=[r[0] for r in _BAD_HEADERS]
)
def test_a_bad_header_isrefused(model: Path, header: Any, data: bytes, words: str) -> None:
    _weights(model, header, data)
    assert "model.safetensors" in refused(model, words)


def test_headers_at_the_edge_of_what_is_allowed_open(model: Path) -> None:
    _weights(model, {"x": _entry(), "e": _entry(shape=[0], offsets=[8, 8]), "y": _entry(offsets=[8, 16])}, b"\0" * 16)
    assert set(open_checkpoint(model).tensors) == {"x", "e", "y"}
    _weights(model, {"__metadata__": {}, "s": _entry(shape=[], offsets=[0, 4])}, b"\0" * 4)
    assert open_checkpoint(model).tensors["s"].read().shape == ()
    _weights(model, b"{}   ", b"")
    assert open_checkpoint(model).tensors == {}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_a_file_too_short_for_a_header_isrefused(model: Path, length: int) -> None:
    (model / "model.safetensors").write_bytes(b"\x01" * length)
    refused(model, "too few for a header")


@pytest.mark.parametrize("length", [3, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused_before_it_is_read(model: Path, length: int) -> None:
    (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    refused(model, f"header of {length} bytes")


def test_a_header_over_the_limit_is_refused_although_the_file_is_that_long(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, MAX_HEADER + 100)
    refused(model, f"at most {MAX_HEADER} are possible")


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(model, "git lfs pull")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_isrefused(model: Path, keep: float) -> None:
    save_file({"x": np.zeros(1000, np.float32)}, model / "model.safetensors")
    size = (model / "model.safetensors").stat().st_size
    os.truncate(model / "model.safetensors", int(size * keep))
    refused(model, "cut short or damaged")


_BIG: dict[str, Callable[[int], bytes]] = {
    "commas": lambda size: b'{"x":[' + b"1," * (size // 2),
    "lists": lambda size: b'{"x":[' + b"[]," * (size // 3),
    "one text": lambda size: b'{"x":"' + b"y" * size + b'"}',
    "spaces": lambda size: b"{" + b" " * size,
    "wide text": lambda size: b'{"x":"' + "\N{GRINNING FACE}".encode() * (size // 4) + b'"}',
    "quotes": lambda size: b"{" + b'"' * size,
    "backslashes": lambda size: b'{"' + b"\\" * size,
    "deep": lambda size: b"{" + b"[" * size,
    "digits": lambda size: b'{"x":' + b"9" * size + b"}",
    "tensors": lambda size: (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        + b"".join(b',"%06x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(size // 60))
    ),
}
_PROBE = """
import sys, time
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError
from tests.good_folder import VALUES, good_folder, refused
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before, start = peak(), time.process_time()  # not the clock: other work on the machine is not ours
try:
    preflight(open_checkpoint(sys.argv[1]))
except InputError as error:
    print(time.process_time() - start, peak() - before, error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux gives it")
@pytest.mark.parametrize(
    ("where", "kind"), [*(("header", kind) for kind in _BIG), ("index", "lists"), ("index", "wide text")]
)
def test_64_megabytes_of_nonsense_are_refused_in_two_seconds_and_200_megabytes(
    model: Path, where: str, kind: str, request: pytest.FixtureRequest
) -> None:
    request.keywords["measures_itself"] = True  # without the time that it takes to write such a file
    text = _BIG[kind](64_000_000 - 100)
    if where == "header":
        _weights(model, text, b"")
    else:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_bytes(text)
    del text
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(model)], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, kilobytes, message = done.stdout.split(maxsplit=2)
    assert message.startswith(str(model))
    assert float(seconds) < 2
    assert int(kilobytes) < 200_000


# ---- what is named by other files


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../secret.safetensors", "leaves the model folder"),
        ("sub/../../secret.safetensors", "leaves the model folder"),
        ("/etc/passwd", "is absolute"),
        ("C:\\secret", "is absolute"),
        ("..\\secret.safetensors", "backslash"),
        ("secret\x00", "control character"),
        ("", "is not a file name"),
        (7, "not in a file"),
        (None, "not in a file"),
        ({"a": 1}, "not in a file"),
        ("missing.safetensors", "1 of 2 shards are missing"),
        ("config.json", "not a safetensors file"),
        ("sub", "a folder"),
    ],
)
def test_a_shard_name_that_leads_elsewhere_isrefused(sharded: Path, shard: Any, words: str) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(save({"a": VALUES["a"]}))
    (sharded / "sub").mkdir()
    _index(sharded, a=shard, b="model-00002-of-00002.safetensors")
    refused(sharded, words)


def test_a_shard_in_a_folder_of_the_model_opens(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    shutil.move(sharded / "model-00001-of-00002.safetensors", sharded / "sub" / "one.safetensors")
    _index(sharded, a="sub/one.safetensors", b="model-00002-of-00002.safetensors")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"[]", "a JSON object is expected"),
        (b"{}", "weight_map must map"),
        (b'{"weight_map": {}}', "weight_map must map"),
        (b'{"weight_map": []}', "weight_map must map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "key 'a' twice"),
        (b"", "not JSON"),
    ],
)
def test_an_index_that_is_none_isrefused(sharded: Path, index: bytes, words: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(index)
    refused(sharded, words)


def test_index_and_shards_must_hold_the_same_tensors(sharded: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    _index(sharded, a=one, b=two, c=two)
    refused(sharded, "1 tensors are not where the index says; 'c' is missing")
    _index(sharded, a=two, b=one)
    refused(sharded, f"2 tensors are not where the index says; 'a' is in '{one}', wanted in '{two}'")
    save_file({"b": VALUES["b"], "d": VALUES["b"]}, sharded / two)
    _index(sharded, a=one, b=two)
    refused(sharded, "1 tensors in the shards are not in the index, first 'd'")
    save_file({"b": VALUES["b"], "a": VALUES["a"]}, sharded / two)
    refused(sharded, f"'a' is in '{one}' and in '{two}'")


def test_thousands_of_shards_are_refused_before_they_are_looked_for(sharded: Path) -> None:
    _index(sharded, **{f"t{number}": f"{number}.safetensors" for number in range(3000)})
    refused(sharded, "3000 shards")


_OPENED = ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize("name", _OPENED)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "link to a pipe", "link to a device"])
def test_what_is_no_regular_file_of_this_folder_is_refused_and_never_waited_for(
    model: Path, name: str, kind: str
) -> None:
    (model / name).unlink(missing_ok=True)
    (model.parent / "outside").write_bytes(b"{}")
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).mkdir()
    elif kind == "link out":
        (model / name).symlink_to("../outside")
    elif kind == "link to a pipe":
        os.mkfifo(model / "pipe")
        (model / name).symlink_to("pipe")
    else:
        (model / name).symlink_to("/dev/zero")
    refused(model, "pipe|folder|link")


def test_a_pipe_as_a_shard_is_refused_and_never_waited_for(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    os.mkfifo(sharded / "model-00001-of-00002.safetensors")
    refused(sharded, "pipe")


def test_a_snapshot_of_the_hub_cache_opens_through_its_links(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b"}
