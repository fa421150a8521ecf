"""What `make` installs has a version in constraints.txt: what the project needs, and what that needs in turn."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# triton: each build of torch asks for its own; the others come with builds of torch for CUDA, which name them exactly
UNPINNED = re.compile(r"triton|nvidia-.*|cuda-.*|quantpress")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, extras: frozenset[str], seen: dict[tuple[str, frozenset[str]], None]) -> None:
    """Follows requirements through what is installed here."""
    if (name, extras) in seen:
        return
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # for another system
    seen[name, extras] = None
    for each in map(Requirement, texts):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed(plain(each.name), frozenset(each.extras), seen)


def test_everything_that_is_installed_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and "," not in str(pin.specifier) for pin in pins)
    pinned = {plain(pin.name) for pin in pins}
    seen: dict[tuple[str, frozenset[str]], None] = {}
    needed("quantpress", frozenset({"dev"}), seen)
    names = {name for name, _ in seen}
    assert {"torch", "pytest", "ray", "jsonschema", "setuptools"} <= names
    assert {name for name in names - pinned if not UNPINNED.fullmatch(name)} == set()
