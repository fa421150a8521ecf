"""pytorch_model.bin is opened weights-only, and nothing in it can run."""

from __future__ import annotations

import collections
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quantpress.convert.torch_bin import open_bin
from quantpress.quant.errors import InputError, OutputError


def test_tensors_are_those_that_torch_saved(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict(
        plain=base,
        transposed=base.t(),
        part=base[1:3],
        bf16=base.to(torch.bfloat16),
        fp8=base.to(torch.float8_e4m3fn),
        mask=base > 3,
        scalar=torch.tensor(2.5, dtype=torch.float16),
        parameter=torch.nn.Parameter(base.clone()),
        empty=torch.zeros(0, 3),
    )
    torch.save(state, tmp_path / "x.bin")
    shard = open_bin(tmp_path / "x.bin")
    assert list(shard.tensors) == list(state)
    for name, wanted in state.items():
        lazy = shard.tensors[name]
        assert lazy.shape == tuple(wanted.shape)
        raw = wanted.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert lazy.read().tobytes() == raw
        assert lazy.read().flags.c_contiguous
    assert np.array_equal(shard.tensors["transposed"].read_rows(2, 4), base.t()[2:4].numpy())
    assert shard.tensors["bf16"].dtype == "BF16"


_RAN: list[str] = []


def _ran() -> None:
    _RAN.append("code of the file")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return _ran, ()


def _zip_with(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return path


def _write_tar(path: Path, data: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


def _hostile(folder: Path) -> Iterator[tuple[Path, str]]:
    evil = pickle.dumps({"x": _Evil()}, protocol=2)
    torch.save({"x": _Evil()}, folder / "evil.bin")
    yield folder / "evil.bin", "refused by torch's weights-only loader"
    yield _zip_with(folder / "evil2.bin", evil), "'Unsupported global: GLOBAL .*'$"
    (folder / "pickle.bin").write_bytes(evil)
    yield folder / "pickle.bin", "plain pickles"
    torch.save({"x": torch.zeros(2)}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    yield folder / "legacy.bin", "plain pickles"
    yield _write_tar(folder / "tar.bin", evil), "tar files"
    yield _zip_with(folder / "bomb.bin", b"\0" * 30_000_000, compression=zipfile.ZIP_DEFLATED), "compressed"
    yield _zip_with(folder / "deep.bin", b"\x80\x02" + b"(" * 200_000), "refused"
    yield _zip_with(folder / "marks.bin", b"\x80\x02" + b"(" * 1_000_000), "1000000 lists in 1000002 bytes"
    yield _zip_with(folder / "system.bin", b"\x80\x02cposix\nsystem\n."), "unsupported GLOBAL posix.system"
    torch.save([torch.zeros(2)], folder / "list.bin")
    yield folder / "list.bin", "mapping from names to tensors, found list"
    torch.save({"x": 1}, folder / "int.bin")
    yield folder / "int.bin", "'x' is no tensor but int"
    torch.save({1: torch.zeros(1)}, folder / "key.bin")
    yield folder / "key.bin", "mapping from names"
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, folder / "expanded.bin")
    yield folder / "expanded.bin", "more values than the file holds"
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, folder / "complex.bin")
    yield folder / "complex.bin", "complex64"
    torch.save({"x": torch.zeros(2, 2).to_sparse()}, folder / "sparse.bin")
    yield folder / "sparse.bin", "'x' is a tensor of|refused"
    torch.save({"x": torch.zeros(100_000)}, folder / "cut.bin")
    (folder / "cut.bin").write_bytes((folder / "cut.bin").read_bytes()[:200_000])
    yield folder / "cut.bin", "damaged or cut short"
    (folder / "empty.bin").write_bytes(b"")
    yield folder / "empty.bin", "plain pickles"
    (folder / "end.bin").write_bytes(b"PK\x03\x04" + b"\0" * 30)
    yield folder / "end.bin", "damaged or cut short"


def test_hostile_and_damaged_files_are_refused_and_their_code_does_not_run(tmp_path: Path) -> None:
    for path, words in _hostile(tmp_path):
        with pytest.raises(InputError, match=words) as caught:
            open_bin(path)
        assert str(caught.value).startswith(str(path)), path
        assert "\n" not in str(caught.value)
    assert _RAN == []


def test_the_code_in_the_hostile_file_would_have_run_through_pickle(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps({"x": _Evil()}, protocol=2))
    assert _RAN.pop() == "code of the file"


def test_a_torch_whose_loader_can_be_broken_is_not_shown_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was shown the file"))
    for version in ("2.9.1+cu128", "2.6.0", "1.13", "nightly"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(OutputError, match=r"torch 2\.10 or newer"):
            open_bin(tmp_path / "pytorch_model.bin")
