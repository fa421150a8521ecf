"""What the tests of `quantize` ask of an output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JUDGE = ("--chunks", 2, "--context", 64)
WINDOWS = ("--samples", 4, "--sequence-length", 64)


def sidecar(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantpress.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the sidecar, whose timings differ."""
    paths = (path for path in folder.iterdir() if path.name != "quantpress.json")
    return {path.name: path.read_bytes() for path in paths}
