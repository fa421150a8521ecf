"""Judges an output that stands already once more: by other limits, on another text or in another runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpress.pipelines.candidate import ftype_of
from quantpress.pipelines.content_proof import chosen_keys
from quantpress.pipelines.machine import peak_rss
from quantpress.pipelines.reference import Reference
from quantpress.pipelines.sidecar import rounded, write_sidecar
from quantpress.quant.errors import InputError

__all__ = ["prove_again"]


def prove_again(
    output: Path, contents: Mapping[str, Any], reference: Reference, judged_as: str = ""
) -> dict[str, Any]:  # fmt: skip
    """Judges an output without building it again, and says the new verdict in its sidecar.

    Args:
        output: the file or folder.
        contents: what its sidecar says.
        reference: the source it was made from.
        judged_as: type whose limits hold (`Artifact.judged_as`, else its `ftype`); "" to read it from the output.

    Returns:
        What the sidecar says now; all but `parity` and `timings` is as it was. Whether the verdict is passed is for
        the caller to look at.

    Raises:
        InputError: the output is not the one that the sidecar speaks of.
        OutputError: the sidecar cannot be written.
    """
    _check_sizes(output, contents)
    start = time.perf_counter()
    chosen = chosen_keys(contents.get("stages"))
    parity = reference.judge(output, judged_as or ftype_of(output), chosen=chosen)
    step = {"seconds": round(time.perf_counter() - start, 3), "peak_rss": peak_rss()}
    renewed = {
        **contents,
        "parity": rounded(parity.to_json()),
        "timings": {**contents.get("timings", {}), "verify": step},
    }
    write_sidecar(output, renewed)
    return renewed


def _check_sizes(output: Path, contents: Mapping[str, Any]) -> None:
    """Checks that the files have the bytes that the sidecar says; their hashes are for the caller to check."""
    for file in contents.get("outputs", ()):
        path = output / file["name"] if output.is_dir() else output
        try:
            nbytes = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be judged again: {error.strerror}") from error
        if nbytes != file["bytes"]:
            raise InputError(f"{path}: {nbytes} bytes, its sidecar says {file['bytes']}; write it again")
