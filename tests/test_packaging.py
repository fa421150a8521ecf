"""The package as it is installed: every folder is listed, and both command lines start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    assert {path.suffix for path in files if "__pycache__" not in path.parts} <= {".css", ".j2", ".js", ".json", ".py"}


def _extra(name: str) -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{name} = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [Requirement(line) for line in re.findall(r'^  "(.*)",$', block[1], re.MULTILINE)]


def _line(name: str) -> list[Requirement]:
    """Requirements of an extra that stands on one line."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{name} = \[(.*)\]$", text, re.MULTILINE)
    assert block is not None
    return [Requirement(each) for each in re.findall(r'"(.*?)"', block[1])]


def test_what_tests_need_is_an_extra_with_versions_that_were_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {pin.name.lower().replace("_", "-"): pin for pin in map(Requirement, (x for x in lines if x[0] != "#"))}
    needed = [each for name in ("test", "dev") for each in _extra(name)] + _line("onnx") + _line("llama-cpp")
    wanted = {each.name.lower(): each for each in needed if each.name != "quantpress"}
    assert {"bitsandbytes", "compressed-tensors", "onnx", "onnxruntime", "peft", "transformers", "triton"} <= set(
        wanted
    )
    assert "triton" not in pinned  # torch itself asks for one version where it brings it
    assert str(wanted.pop("triton").marker) == 'platform_system == "Linux"'
    for name, each in wanted.items():
        assert each.specifier.contains(str(pinned[name].specifier).removeprefix("==")), name


@pytest.mark.parametrize("file", ["long_tests.txt", "smoke_tests.txt"])
def test_lists_of_longer_tests_name_tests_that_are_there(file: str) -> None:
    root = Path(__file__).resolve().parents[1]
    for name in (root / "tests" / file).read_text(encoding="utf-8").split():
        path, _, test = name.partition("::")
        assert (root / path).exists(), name
        if test:  # pytest finds nothing at all where one name is wrong
            assert f"def {test.partition('[')[0]}(" in (root / path).read_text(encoding="utf-8"), name
