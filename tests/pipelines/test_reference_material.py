"""What a kept reference is kept under: all that its windows depend on, and nothing else."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.default_text import default_text
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.reference_material import reference_material
from quantpress.quant.errors import InputError, UnknownFamilyError, UsageError
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("material") / "model", "llama")


@pytest.fixture(scope="module")
def source(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def test_defaults_are_filled_in(source: Checkpoint) -> None:
    material = reference_material(JudgeOptions(), source)
    assert material["text_sha256"] == default_text().sha256
    assert (material["context"], material["chunks"]) == (64, 8)  # the model was made for 64 tokens
    assert reference_material(JudgeOptions(context=64, chunks=8), source) == material


def test_a_text_counts_by_what_it_says_and_not_by_its_name(source: Checkpoint, tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.txt", "same.txt", "other.txt"))
    one.write_text("a text " * 99)
    same.write_bytes(one.read_bytes())
    other.write_text("a text. " * 99)
    found = [reference_material(JudgeOptions(text=path), source) for path in (one, same, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "change",
    [
        {"max_kld": 1.0},
        {"max_ppl_change": 1.0},
        {"min_top1": 0.1},
        {"runtime": "torch"},
        {"threads": 7},
        {"max_memory": 1},
    ],
    ids=str,
)
def test_limits_runtime_and_machine_do_not_count(source: Checkpoint, change: dict[str, object]) -> None:
    assert reference_material(JudgeOptions(**change), source) == reference_material(JudgeOptions(), source)


@pytest.mark.parametrize("change", [{"context": 32}, {"chunks": 3}, {"device": "cuda"}], ids=str)
def test_windows_and_device_count(source: Checkpoint, change: dict[str, object]) -> None:
    assert reference_material(JudgeOptions(**change), source) != reference_material(JudgeOptions(), source)


def test_the_number_of_a_device_does_not_count(source: Checkpoint) -> None:
    first, second = (reference_material(JudgeOptions(device=f"cuda:{number}"), source) for number in (0, 1))
    assert first == second


@pytest.mark.parametrize(
    ("one", "other"), [({"a": b"xy"}, {"ax": b"y"}), ({"a": b"", "b": b"c"}, {"a": b"c", "b": b""})], ids=str
)  # fmt: skip
def test_tokenizer_files_count_with_names_and_bounds(
    source: Checkpoint, one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    found = [
        reference_material(JudgeOptions(), dataclasses.replace(source, tokenizer_files=files)) for files in (one, other)
    ]
    assert found[0]["tokenizer_sha256"] != found[1]["tokenizer_sha256"]


def test_what_cannot_be_judged_is_said(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--context 65: model was made for 64 tokens"):
        reference_material(JudgeOptions(context=65), source)
    with pytest.raises(InputError, match="no such file"):
        reference_material(JudgeOptions(text=tmp_path / "none.txt"), source)
    unknown = dataclasses.replace(source, config={**source.config, "model_type": "nothing", "architectures": ["No"]})
    with pytest.raises(UnknownFamilyError):
        reference_material(JudgeOptions(), unknown)


def test_planning_does_not_wait_for_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from quantpress.convert.open import open_checkpoint\n"
        "from quantpress.pipelines.judging import JudgeOptions\n"
        "from quantpress.pipelines.reference_material import reference_material, shareable_base\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "assert reference_material(JudgeOptions(), source)\n"
        "assert shareable_base(JudgeOptions(), source) is None\n"
        "print(*{'torch', 'transformers', 'numba', 'scipy'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
