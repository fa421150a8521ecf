"""Small JSON files that notice when they are damaged: the text of the value stands behind its own SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import new_file, output_errors
from quantpress.convert.disk import remove, sync_folder
from quantpress.convert.files import MAX_SMALL_FILE, read_bounded
from quantpress.convert.json_reader import parse_json
from quantpress.pipelines.cache.keys import canonical
from quantpress.quant.errors import InputError, OutputError

__all__ = ["read_sealed", "replace_sealed", "sealed", "write_sealed"]

_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","value":', b"}\n"
_START = len(_HEAD) + 64 + len(_MIDDLE)


def sealed(value: Any) -> bytes:
    """Gives the bytes of a file: a JSON object of the hash and the value.

    Raises:
        UsageError: the value is not plain (see `keys.plain`).
        OutputError: it is too large to be read again.
    """
    body = canonical(value)
    if len(body) + _START + len(_TAIL) > MAX_SMALL_FILE:
        raise OutputError(f"a record of {len(body)} bytes is too large for the cache, which keeps {MAX_SMALL_FILE}")
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def read_sealed(path: Path) -> Any:
    """Reads the value back.

    Raises:
        InputError: the file is missing, cannot be read, or is not as it was written.
    """
    data = read_bounded(path)
    body = data[_START : -len(_TAIL)]
    digest = hashlib.sha256(body).hexdigest().encode()
    if data[:_START] != _HEAD + digest + _MIDDLE or data[_START + len(body) :] != _TAIL:
        raise InputError(f"{path}: the file is damaged: it is not as it was written")
    return parse_json(body, name=str(path))


def write_sealed(path: Path, value: Any) -> None:
    """Writes a new file and syncs it; in a folder that is being made.

    Raises:
        UsageError, OutputError: see `sealed`; the disk is full.
    """
    data = sealed(value)
    with new_file(path) as file:
        file.write(data)


def replace_sealed(path: Path, value: Any) -> None:
    """Writes a file in the place of an older one, so that a reader finds one of the two whole.

    Two that do so at once both succeed, and one of them is what stays.

    Raises:
        UsageError, OutputError: see `sealed`; the disk is full.
    """
    data = sealed(value)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(remove, temporary)
        with new_file(temporary, path) as file:
            file.write(data)
        with output_errors(path):
            temporary.replace(path)
            sync_folder(path.parent)
