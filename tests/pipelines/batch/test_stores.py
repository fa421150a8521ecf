"""URLs: which texts are some, what may be told of them, and what is missing to open them."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from quantpress.pipelines.batch.stores import identity, is_url, local_path, name_of, open_place, shown_url, store_errors
from quantpress.quant.errors import InputError, OutputError, UsageError


@pytest.mark.parametrize("text", ["s3://bucket/model", "https://host/m.gguf", "memory://m", "file:///a", "s3a://b/c"])
def test_a_protocol_makes_a_url(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@main", "models/m", "/a/b", r"C:\models", "C://models", "a:b", ""]
)
def test_hub_ids_and_paths_are_no_urls(text: str) -> None:
    assert not is_url(text)


def test_file_urls_are_paths() -> None:
    assert local_path("file:///models/my%20model") == Path("/models/my model")
    assert local_path("file://localhost/models") == Path("/models")
    assert local_path("s3://bucket/models") is None


def test_secrets_of_a_url_are_not_shown() -> None:
    shown = shown_url("https://user:password@host/m.gguf?X-Amz-Signature=abcdef")
    assert shown == "https://host/m.gguf?..."


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/model/", "model"),
        ("https://host/a/m%20x.gguf?download=true", "m x.gguf"),
        ("s3://bucket/a/what?.gguf", "what?.gguf"),
        ("memory://m.gguf", "m.gguf"),
    ],
)
def test_the_last_part_of_a_url_is_the_name(url: str, name: str) -> None:
    assert name_of(url) == name


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'s4'; did you mean s3a?://"):
        open_place("s4://bucket/model")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "missing", {"class": "no_such_package.FS", "err": "Install no-such"})
    with pytest.raises(OutputError, match="need a package that is missing: Install no-such"):
        open_place("missing://bucket/model")


def test_chained_urls_are_refused() -> None:
    with pytest.raises(UsageError, match="chained"):
        open_place("zip://m.gguf::s3://bucket/all.zip")


def test_web_servers_are_not_written_to() -> None:
    with pytest.raises(UsageError, match="nothing can be written to a https:// URL"):
        open_place("https://host/m.gguf", writing=True)


def test_errors_of_a_store_name_the_url_and_no_secret() -> None:
    with pytest.raises(InputError) as caught, store_errors("s3://b/m", InputError):
        raise ValueError("403 for https://me:secret@host/m?sig=secret\nand more")
    assert str(caught.value) == "s3://b/m: the store failed: 403 for https://host/m?... and more"


def test_a_bug_is_not_called_trouble_with_the_store() -> None:
    with pytest.raises(TypeError), store_errors("s3://b/m", InputError):
        raise TypeError("bug")


def test_a_hash_tells_a_version_and_the_time_does_not_matter_then() -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    later = now.replace(day=2)
    assert identity({"ETag": "a", "LastModified": now}) == identity({"etag": "a", "LastModified": later})
    assert identity({"ETag": "a"}) != identity({"ETag": "b"})
    assert identity({"mtime": 1.0}) != identity({"mtime": 2.0})
    assert identity({"name": "m", "size": 5, "type": "file", "ETag": None}) == ""
