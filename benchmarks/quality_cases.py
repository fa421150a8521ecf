"""Models, texts and settings of the quality benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with the texts it is calibrated and judged on.

    Attributes:
        name: in tables.
        folder: of the checkpoint.
        calibration, test: texts that share nothing.
        length: tokens of a calibration window.
        samples: calibration windows.
        context: tokens of a window that is judged; the second half of each is scored.
        chunks: such windows.
        groups: group sizes; -1 for one group a row.
        odd: regular expression of weights whose rows no group divides: they get one group a row instead.
        bits: of a code.
        row_bits: bits that are tried with one group a row only.
    """

    name: str
    folder: Path
    calibration: Path
    test: Path
    length: int
    samples: int
    context: int
    chunks: int
    groups: tuple[int, ...] = (32, 128, -1)
    odd: str | None = None
    bits: tuple[int, ...] = (4, 3, 2)
    row_bits: tuple[int, ...] = (8,)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the tables: a method with the options that make it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


METHODS = (
    Method("rtn", {"method": "rtn", "clip_search": False}),
    Method("rtn + clip", {"method": "rtn", "clip_search": True}),
    Method("gptq, no drift", {"method": "gptq", "drift": 0.0}),
    Method("gptq + clip, no drift", {"method": "gptq", "drift": 0.0, "clip_search": True}),
    Method("gptq", {"method": "gptq", "drift": 1.0, "clip_search": True}),
    Method("hqq, asym", {"method": "hqq"}),
    Method("awq, asym", {"method": "awq"}),
    Method("rtn, asym", {"method": "rtn", "clip_search": False, "symmetric": False}),
    Method("gptq, asym", {"method": "gptq", "symmetric": False, "drift": 1.0, "clip_search": True}),
)
_QUICK = METHODS[:-2]


@dataclass(frozen=True, slots=True)
class Case:
    """One quantized checkpoint: a method on a grid."""

    method: Method
    bits: int
    group_size: int


def cases(subject: Subject, *, quick: bool) -> Iterator[Case]:
    """Gives what is tried of a model; quick: four and three bits on the first group size, without the last two."""
    methods = _QUICK if quick else METHODS
    for bits in subject.bits[:2] if quick else subject.bits:
        for group_size in subject.groups[:1] if quick else subject.groups:
            yield from (Case(method, bits, group_size) for method in methods)
    for bits in () if quick else subject.row_bits:
        yield from (Case(method, bits, -1) for method in METHODS)
    if not quick:
        yield Case(Method("smoothquant, W8A8", {"method": "smoothquant"}), 8, -1)


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """Cuts a text in two at a line, where a model has no other text of its own."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    first, second = folder / f"first-{text.name}", folder / f"second-{text.name}"
    first.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    second.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
    return first, second


def subjects(data: Path, smollm2: Path | None, folder: Path, *, quick: bool) -> list[Subject]:
    """Gives the models that are there.

    Args:
        data: folder with `models/` and `text/`.
        smollm2: checkpoint folder of SmolLM2-135M, or None.
        folder: for texts that are made.
        quick: fewer windows.
    """
    models, text = data / "models", data / "text"
    wiki = {"calibration": text / "wikitext2-raw.valid.txt", "test": text / "wikitext2-raw.test.txt"}
    tales = {"calibration": text / "tinystories.calib.txt", "test": text / "tinystories.test.txt"}
    alice, rest = halves(text / "alice.txt", folder)
    few = 4 if quick else 1
    found = [
        Subject(
            "mix6m", models / "mix6m-hf", **wiki, length=512, samples=32 // few, context=512, chunks=24 // few,
            groups=(128, 32),
        ),
        Subject(
            "stories260k", models / "stories260k-hf", **tales, length=512, samples=64 // few, context=512,
            chunks=80 // few, groups=(32, -1), odd="down_proj",
        ),
        Subject(
            "glasslm-en", models / "glasslm-en-hf", calibration=alice, test=rest, length=128, samples=128 // few,
            context=128, chunks=160 // few, groups=(32, -1), odd="down_proj",
        ),
    ]  # fmt: skip
    if smollm2 is not None:
        found.append(
            Subject(
                "SmolLM2-135M", smollm2, **wiki, length=512, samples=16 // few, context=512, chunks=8 // few,
                groups=(64,), bits=(4,), row_bits=(),
            )
        )  # fmt: skip
    return found
