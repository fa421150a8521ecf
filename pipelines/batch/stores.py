"""Opens the places that URLs name: object stores, servers, other machines' disks, through fsspec.

fsspec and the packages for single stores are loaded when a URL is first opened. Options of a store (endpoint, profile,
anonymous access) come from where fsspec looks for them: environment variables `FSSPEC_<PROTOCOL>_...`, its
configuration files, and the store's own (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError, OutputError, QuantpressError, UsageError

__all__ = ["Place", "identity", "is_url", "local_path", "name_of", "open_place", "shown_url", "store_errors"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)  # two characters at least: "C:" is a disk of Windows
_LOCAL = frozenset({"file", "local"})
_HTTP = frozenset({"http", "https"})
_READ_ONLY = _HTTP | {"data", "gist", "git", "github", "libarchive", "reference", "tar", "zip"}
# A whole object appears at once when its upload ends, and moving one means to copy it.
_OBJECT_STORES = frozenset(
    {"abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "oci", "ocilake", "oss", "r2", "s3", "s3a", "tos"}
)
_CONNECT_SECONDS, _SILENT_SECONDS = 30.0, 120.0

# Packages whose names do not follow from fsspec's own message ("Install s3fs to access S3").
_PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}

# What stores raise beside OSError; the modules are there once such an error can have been raised.
_FAILURES = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("ftplib", "Error"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("paramiko.ssh_exception", "SSHException"),
    ("smbprotocol.exceptions", "SMBException"),
)

_CONTENT = (
    "etag",
    "e_tag",
    "content-md5",
    "content_md5",
    "contentmd5",
    "md5hash",
    "md5",
    "crc32c",
    "digest",
    "generation",
    "versionid",
    "version_id",
    "blob_id",
    "oid",
)
_TIMES = ("last-modified", "lastmodified", "last_modified", "mtime", "modified", "modify", "updated", "created")


@dataclass(frozen=True, slots=True)
class Place:
    """A URL that is opened.

    Attributes:
        fs: fsspec's file system.
        path: what the file system calls the place; without a `/` at the end.
        url: as it may stand in messages, see `shown_url`.
        folder: whether the URL ends in `/`.
        http: whether it is a web server, where only links tell what is in a folder.
        atomic: whether a file is seen there only when it is whole.
    """

    fs: Any
    path: str
    url: str
    folder: bool
    http: bool
    atomic: bool

    def within(self, name: str) -> str:
        """Gives the path of a file in this folder."""
        return f"{self.path}/{name}"


def is_url(text: str) -> bool:
    """Whether a text is a URL; a Hub id and a path are none."""
    return _URL.match(text) is not None


def local_path(url: str) -> Path | None:
    """Gives the path that a `file://` URL means; None for every other URL."""
    match = _URL.match(url)
    if match is None or match[1].lower() not in _LOCAL:
        return None
    rest = url[match.end() :]
    host, slash, tail = rest.partition("/")
    if host.lower() == "localhost" and slash:
        rest = slash + tail
    path = unquote(rest)
    return Path(path[1:] if re.match(r"/[A-Za-z]:[/\\]", path) else path)


def shown_url(url: str) -> str:
    """Gives a URL without what may be secret: a user's name and password, and the signature in a query."""
    return _scrubbed(url)


def _scrubbed(text: str) -> str:
    text = re.sub(r"(?<=://)[^\s/@'\"]*@", "", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)


def name_of(url: str) -> str:
    """Gives the last part of a URL, without a query."""
    path = urlsplit(url).path if _URL.match(url) and _protocol(url) in _HTTP else url.partition("://")[2]
    return unquote(path.rstrip("/").rpartition("/")[2])


def _protocol(url: str) -> str:
    match = _URL.match(url)
    return match[1].lower() if match else ""


def open_place(url: str, *, writing: bool = False) -> Place:
    """Opens the store that a URL names; of most stores nothing is asked yet.

    Args:
        url: with a protocol that fsspec knows.
        writing: whether files are to be put there.

    Raises:
        UsageError: an unknown protocol, or one that cannot be written to.
        OutputError: the package for it is not installed.
    """
    protocol = _protocol(url)
    if "::" in url:
        raise UsageError(f"{shown_url(url)}: URLs chained with '::' are not supported; name the file itself")
    if writing and protocol in _READ_ONLY:
        raise UsageError(f"{shown_url(url)}: nothing can be written to a {protocol}:// URL; use an object store")
    import fsspec

    _check_known(protocol, url)
    kind = OutputError if writing else InputError
    try:
        with store_errors(url, kind):
            fs, path = fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        how = f"pip install {package}" if package else str(error)
        raise OutputError(f"{shown_url(url)}: {protocol}:// URLs need a package that is missing: {how}") from error
    return Place(
        fs=fs,
        path=path if path == "/" else path.rstrip("/"),
        url=shown_url(url),
        folder=url.endswith("/"),
        http=protocol in _HTTP,
        atomic=protocol in _OBJECT_STORES,
    )


def _check_known(protocol: str, url: str) -> None:
    from fsspec.registry import known_implementations, registry

    known = {*known_implementations, *registry}
    if protocol not in known:
        near = difflib.get_close_matches(protocol, sorted(known), 1, 0.5)
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise UsageError(f"{shown_url(url)}: no store is known by the protocol {shown(protocol)}{hint}")


def _options(protocol: str) -> dict[str, Any]:
    """Options without which a web server's large files fail: aiohttp ends every transfer after five minutes."""
    if protocol not in _HTTP:
        return {}
    from fsspec.config import conf

    aiohttp = importlib.import_module("aiohttp")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    own = conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, **own}}


def failures() -> tuple[type[Exception], ...]:
    """Gives the errors that mean trouble with a store and not a bug."""
    found: list[type[Exception]] = [OSError, ValueError, EOFError]
    for module, name in _FAILURES:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            found.append(kind)
    return tuple(found)


@contextlib.contextmanager
def store_errors(url: str, kind: type[QuantpressError]) -> Iterator[None]:
    """Turns what a store raises into one line that names the URL.

    Raises:
        kind: the store refuses, or cannot be reached.
        OutputError: the disk here is full.
    """
    try:
        yield
    except failures() as error:
        raise _explained(shown_url(url), error, kind) from error


def _explained(url: str, error: Exception, kind: type[QuantpressError]) -> QuantpressError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return OutputError(f"{url}: the disk cannot take it: {error.strerror}")  # type: ignore[attr-defined]
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is None:
        return kind(f"{url}: there is no such file or folder")
    if isinstance(error, FileNotFoundError) and cause is not None:
        return kind(f"{url}: cannot be reached, or there is no such file: {_reason(cause)}")
    if isinstance(error, PermissionError):
        return kind(f"{url}: access is refused; check the credentials and the rights on it ({_reason(error)})")
    return kind(f"{url}: the store failed: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """First line of an error without secrets, cut."""
    text = " ".join(_scrubbed(str(error)).split()) or type(error).__name__
    plain = "".join(char if char.isprintable() else "?" for char in text)
    return plain if len(plain) <= 200 else plain[:200] + "..."


def identity(info: Mapping[str, Any]) -> str:
    """Gives what tells one version of a file from the next: hashes and versions, else times; "" where nothing does.

    Args:
        info: what `fs.info` says of a file; each store has its own keys (S3 `ETag`, GCS `md5Hash`, sftp `mtime`, ...).
    """
    plain = {str(key).lower(): str(value) for key, value in info.items() if value not in (None, "", b"")}
    for keys in (_CONTENT, _TIMES):
        if found := {key: plain[key] for key in keys if key in plain}:
            return json.dumps(found, sort_keys=True)
    return ""
