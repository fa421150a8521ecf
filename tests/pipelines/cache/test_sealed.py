"""A sealed file is JSON for everybody, and no change of one byte of it goes unnoticed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from quantpress.pipelines.cache.sealed import read_sealed, replace_sealed, sealed, write_sealed
from quantpress.quant.errors import InputError, UsageError

VALUE = {"name": "ä", "numbers": [1, 0.1, -0.0], "inner": {"x": None}}


def test_any_json_reader_reads_it(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", VALUE)
    assert json.loads((tmp_path / "a.json").read_text())["value"] == VALUE
    assert read_sealed(tmp_path / "a.json") == VALUE


def test_every_change_of_one_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    whole, path = sealed(VALUE), tmp_path / "a.json"
    for place in range(len(whole)):
        for change in (1, 0x20, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            with pytest.raises(InputError):
                read_sealed(path)
        path.write_bytes(whole[:place])
        with pytest.raises(InputError):
            read_sealed(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(InputError, match="damaged"):
        read_sealed(path)


def test_a_replaced_file_holds_the_new_value_and_leaves_no_other(tmp_path: Path) -> None:
    replace_sealed(tmp_path / "a.json", {"a": 1})
    replace_sealed(tmp_path / "a.json", {"a": 2})
    assert read_sealed(tmp_path / "a.json") == {"a": 2}
    with pytest.raises(UsageError):
        replace_sealed(tmp_path / "a.json", {"a": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_whoever_reads_while_it_is_replaced_finds_one_of_the_two_values(tmp_path: Path) -> None:
    values = [{"a": "x" * 3000}, {"a": "y" * 5000}]
    replace_sealed(tmp_path / "a.json", values[0])
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            replace_sealed(tmp_path / "a.json", values[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert read_sealed(tmp_path / "a.json") in values
        reads += 1
    writer.join()
    assert reads
