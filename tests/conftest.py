"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the small real models and texts that the developers keep beside the repository."""
    root = Path(os.environ.get("QUANTPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "data" / "README.md").is_file():
        pytest.skip("real models and texts are not beside the repository (set QUANTPRESS_SHARED)")
    return root / "data"
