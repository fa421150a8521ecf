"""Sidecars that somebody changed: written anew where an output stands, refused where it is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantpress.pipelines.batch.outputs import Standing, restore
from quantpress.pipelines.batch.published import publish
from quantpress.pipelines.cache import input_hashes
from quantpress.pipelines.cache.sealed import write_sealed
from quantpress.pipelines.sidecar import sidecar_path
from quantpress.quant.errors import InputError


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", '{"a": 1, "a": 1}', "\xff"], ids=["deep", "empty", "twice", "other"]
)
def test_a_sidecar_that_is_damaged_is_written_anew(text: str, tmp_path: Path) -> None:
    output = tmp_path / "tiny.gguf"
    output.write_bytes(b"GGUF")
    sidecar_path(output).write_text(text, encoding="latin-1")
    restore(Standing({"path": str(output)}, {"schema": 1}))
    assert json.loads(sidecar_path(output).read_bytes()) == {"schema": 1}


@pytest.mark.parametrize("text", ["[]", "5", "null"])
def test_a_sidecar_that_is_no_object_is_not_published(text: str, tmp_path: Path) -> None:
    output = tmp_path / "tiny.gguf"
    output.write_bytes(b"GGUF")
    sidecar_path(output).write_text(text)
    with pytest.raises(InputError, match=r"tiny\.gguf\.quantpress\.json: a JSON object is expected"):
        publish(output, "memory://bucket/tiny.gguf")


@pytest.mark.parametrize("value", [[], {"files": 5}, {"files": [["/a"]]}, {"files": [["/a", 5, "0"]]}])
def test_remembered_hashes_of_another_form_are_none(value: object, tmp_path: Path) -> None:
    write_sealed(tmp_path / "input-hashes.json", value)
    assert input_hashes._read(tmp_path / "input-hashes.json") == {}
