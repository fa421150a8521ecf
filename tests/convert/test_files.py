"""Files that strangers name are opened only if they are regular, small enough and inside their folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from quantpress.convert.files import inside, open_regular, read_bounded, shown
from quantpress.quant.errors import InputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "sub" / "b.bin").write_bytes(b"b")
    (tmp_path / "outside.bin").write_bytes(b"secret")
    return folder


def test_names_inside_the_folder_are_given_as_real_paths(model: Path) -> None:
    assert inside(model, "a.bin") == (model / "a.bin").resolve()
    assert inside(model, "sub/b.bin").read_bytes() == b"b"
    assert inside(model, "not-there.bin") == model.resolve() / "not-there.bin"
    assert inside(model, "..a.b..").name == "..a.b.."
    (model / "link.bin").symlink_to("sub/b.bin")
    assert inside(model, "link.bin").read_bytes() == b"b"


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "sub/../../outside.bin",
        "sub/../a.bin",
        "/etc/passwd",
        "//etc/passwd",
        "C:/windows/a.bin",
        "c:a.bin",
        "..\\outside.bin",
        "sub\\b.bin",
        "a.bin\0",
        "a\nb",
        "",
        ".",
        "..",
        "./a.bin",
        "sub//b.bin",
        "sub/",
        "x" * 2000,
        "a\u2028b.bin",
        "a\u202egpj.bin",
        "\ud7ff.bin",
        7,
        None,
        ["a.bin"],
    ],
    ids=repr,
)
def test_names_that_could_leave_the_folder_are_refused(model: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        inside(model, name)
    assert "\n" not in str(caught.value)


def test_links_that_leave_the_folder_are_refused(model: Path) -> None:
    (model / "file.bin").symlink_to("../outside.bin")
    (model / "absolute.bin").symlink_to(model.parent / "outside.bin")
    (model / "up").symlink_to("..")
    (model / "twice.bin").symlink_to("file.bin")
    (model / "dangling.bin").symlink_to("../nothing.bin")
    for name in ("file.bin", "absolute.bin", "up/outside.bin", "twice.bin", "dangling.bin"):
        with pytest.raises(InputError, match="leaves the model folder"):
            inside(model, name)
    (model / "round.bin").symlink_to("round.bin")
    with pytest.raises(InputError, match=r"cannot be followed|cannot be opened"):
        read_bounded(inside(model, "round.bin"))


def test_a_model_folder_may_itself_be_a_link(model: Path) -> None:
    (model.parent / "alias").symlink_to("model")
    assert inside(model.parent / "alias", "a.bin").read_bytes() == b"abc"


def test_links_into_the_blobs_of_the_same_hub_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    (snapshot / "sub").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "77aa").write_bytes(b"weights")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_bytes(b"0123abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/77aa")
    (snapshot / "sub" / "x").symlink_to("../../../blobs/77aa")
    assert inside(snapshot, "model.safetensors").read_bytes() == b"weights"
    assert inside(snapshot, "sub/x").read_bytes() == b"weights"
    assert inside(snapshot / "sub", "x").read_bytes() == b"weights"
    (tmp_path / "hub" / "models--org--other" / "blobs").mkdir(parents=True)
    (snapshot / "ref").symlink_to("../../refs/main")
    (snapshot / "other").symlink_to("../../../models--org--other/blobs/1")
    (snapshot / "out").symlink_to("../../../../../etc/passwd")
    (cache / "blobs" / "evil").symlink_to("/etc/passwd")
    (snapshot / "evil").symlink_to("../../blobs/evil")
    for name in ("ref", "other", "out", "evil"):
        with pytest.raises(InputError, match="leaves the model folder"):
            inside(snapshot, name)


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a named pipe"), (tmp_path / "s", "a socket")):
            with pytest.raises(InputError, match=kind):
                open_regular(path)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="a device"):
            open_regular(device)
    with pytest.raises(InputError, match="no such file"):
        open_regular(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be opened"):
        open_regular(str(tmp_path / "a\0b"))
    with pytest.raises(InputError, match="cannot be opened"):
        open_regular(tmp_path / ("x" * 300))


def test_a_pipe_that_takes_the_place_of_a_file_after_it_was_looked_at_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    before = (tmp_path / "file").stat()
    monkeypatch.setattr(os, "stat", lambda path, **_: before)
    with pytest.raises(InputError, match="a named pipe"):
        open_regular(tmp_path / "pipe")


def test_a_file_larger_than_agreed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bounded(tmp_path / "x", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes, at most 4"):
        read_bounded(tmp_path / "x", 4)


def test_values_in_messages_stay_short_and_in_one_line() -> None:
    for value in ("a\nb\x1b[31m" * 1000, ["x" * 1000] * 1000, {"k": "v" * 1000}, "\ud800", b"\xff" * 1000):
        assert len(shown(value)) < 100
        assert shown(value).isprintable()
