"""The small files of a model folder: configuration, generation settings, and the tokenizer's files as they came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import new_file
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import inside
from quantpress.convert.hashed_output import Written

__all__ = ["json_bytes", "model_files", "write_files"]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Gives JSON as it is written to model folders."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def model_files(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Gives the tokenizer's files, config.json, and generation_config.json where there is one.

    Args:
        checkpoint: what they belong to.
        config: in place of the checkpoint's own.

    Returns:
        File name -> contents.
    """
    files = {"config.json": json_bytes(checkpoint.config if config is None else config)}
    if checkpoint.generation_config:
        files["generation_config.json"] = json_bytes(checkpoint.generation_config)
    return {**checkpoint.tokenizer_files, **files}


def write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, Written]:
    """Writes small files into a folder that is being made; for use inside `atomic_folder`.

    Args:
        folder: the new folder.
        files: name, which may hold a subfolder -> contents.

    Returns:
        Name -> hash and bytes.

    Raises:
        InputError: a name that leaves the folder.
        OutputError: a file cannot be written.
    """
    written: dict[str, Written] = {}
    for name, data in files.items():
        path = inside(folder, name)
        path.parent.mkdir(exist_ok=True)
        with new_file(path) as file:
            file.write(data)
        written[path.relative_to(folder).as_posix()] = Written(hashlib.sha256(data).hexdigest(), len(data))
    return written
