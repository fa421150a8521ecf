"""The package as it is installed: every folder is listed, and both command lines start."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_sub_package_is_listed_for_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    listed = set(re.findall(r'"(quantpress[.\w]*)"', block[1]))
    found = {"quantpress"}
    for folder in ("convert", "kernels", "pipelines", "quant"):
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("quantpress", *path.parent.relative_to(ROOT).parts)))
    assert listed == found
    for name in ("convert", "kernels", "pipelines", "quant"):
        assert f'"quantpress.{name}" = "{name}"' in text


def test_data_files_of_packages_are_of_a_kind_that_the_wheel_takes() -> None:
    files = (path for folder in ("convert", "quant", "pipelines") for path in (ROOT / folder).rglob("*.*"))
    assert {path.suffix for path in files if "__pycache__" not in path.parts} <= {".py", ".json"}
