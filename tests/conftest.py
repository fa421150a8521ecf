"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples each time, so that a change is judged by itself; `make fuzz` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("default" if os.environ.get("QUANTPRESS_FUZZ") else "fixed")


def _interpret_kernels() -> None:
    """Imports the Triton kernels so that its interpreter runs them, where there is no GPU.

    Triton decides when a kernel is decorated. The variable is taken back: what tests start as programs, and wrappers
    that ask for it, must find what a user has.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None or "TRITON_INTERPRET" in os.environ:
        return
    import quantpress.kernels

    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for module in pkgutil.walk_packages(quantpress.kernels.__path__, "quantpress.kernels."):
            importlib.import_module(module.name)
        with contextlib.suppress(ImportError):  # newer versions import it at the first launch, and want the variable
            importlib.import_module("triton.experimental.gluon")
    finally:
        del os.environ["TRITON_INTERPRET"]


_interpret_kernels()


def _listed(file: str) -> tuple[str, ...]:
    """Beginnings of the names of tests that `make test` leaves out."""
    return tuple(Path(__file__).with_name(file).read_text(encoding="utf-8").split())


LONG, SMOKE = _listed("long_tests.txt"), _listed("smoke_tests.txt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the longer tests to `make smoke` and the longest proofs to `make proofs`."""
    if os.environ.get("QUANTPRESS_LONG"):
        return
    smoke = () if os.environ.get("QUANTPRESS_SMOKE") else SMOKE
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.skip(reason="takes long: make proofs"))
        elif item.nodeid.startswith(smoke):
            item.add_marker(pytest.mark.skip(reason="longer: make smoke"))


@pytest.fixture(autouse=True)
def plain_logging() -> None:
    """A command that ran in this process has set the level, and a handler for a stream that may be closed by now."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the small real models and texts that the developers keep beside the repository."""
    root = Path(os.environ.get("QUANTPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "data" / "README.md").is_file():
        pytest.skip("real models and texts are not beside the repository (set QUANTPRESS_SHARED)")
    return root / "data"


@pytest.fixture
def no_launch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of launch parameters are looked for in an empty folder, and what was read elsewhere is forgotten."""
    from quantpress.kernels.tuning import choice

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choice.forget()
    yield
    choice.forget()
