"""What outputs were made from and how: inputs with hashes, stages with options, texts, environment, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from quantpress.pipelines.report.rows import Row
from quantpress.pipelines.report.values import (
    bytes_text,
    count,
    items,
    mapping,
    memory_text,
    number,
    plain,
    said,
    seconds_text,
    significant,
    text,
)

__all__ = ["FileRow", "Making", "Source", "makings", "options_text", "sources"]

_MAX_OPTION = 160  # characters


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file with its hash."""

    name: str
    sha256: str
    size: str


@dataclass(frozen=True, slots=True)
class Source:
    """A model that outputs were made from, with its adapters.

    Attributes:
        title: what to call it, from the adapters and the jobs.
        files: inputs.
        rows: its outputs.
        anchor: name of its section.
    """

    title: str
    files: tuple[FileRow, ...]
    rows: tuple[Row, ...]
    anchor: str


@dataclass(frozen=True, slots=True)
class Making:
    """How one output was made.

    Attributes:
        row: the output.
        stages: name with version, and the options as text.
        facts: pairs of a name and a text: calibration, proof, environment.
        files: what was written.
        steps: name, seconds and peak memory of each step.
        notes: what a user should know.
    """

    row: Row
    stages: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    files: tuple[FileRow, ...]
    steps: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def sources(rows: Sequence[Row], models: Mapping[str, str]) -> tuple[Source, ...]:
    """Groups outputs by what they were made from.

    Args:
        rows: the outputs.
        models: job -> its model, as the pipeline file has it; may be empty.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.source, []).append(row)
    return tuple(
        Source(_title(key, group, models), _files(group[0].sidecar.get("inputs")), tuple(group), f"s{place}")
        for place, (key, group) in enumerate(groups.items(), 1)
    )


def _title(key: tuple[Any, ...], rows: Sequence[Row], models: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(plain(PurePath(models[row.job]).name) for row in rows if row.job in models))
    jobs = list(dict.fromkeys(row.job for row in rows))
    title = ", ".join(names) or ", ".join(jobs[:3]) + (f" and {len(jobs) - 3} more jobs" if len(jobs) > 3 else "")
    adapters = [PurePath(name).name + ("" if weight in (None, 1.0) else f"={weight:g}") for name, weight in key[1]]
    return title + "".join(f" + {adapter}" for adapter in adapters)


def _files(entries: Any) -> tuple[FileRow, ...]:
    return tuple(
        FileRow(text(each.get("name")), text(each.get("sha256"), 64), bytes_text(count(each.get("bytes"))))
        for each in items(entries)
    )


def makings(rows: Sequence[Row]) -> tuple[Making, ...]:
    """Gives how every output was made."""
    return tuple(_making(row) for row in rows)


def _making(row: Row) -> Making:
    sidecar = row.sidecar
    stages = [
        (f"{text(stage.get('name'), 60)} (version {said(stage.get('version'), 20)})", options_text(stage))
        for stage in items(sidecar.get("stages"))
    ]
    steps = [
        (plain(name, 60), seconds_text(number(step.get("seconds"))), memory_text(count(step.get("peak_rss"))))
        for name, value in mapping(sidecar.get("timings")).items()
        for step in [mapping(value)]
    ]
    notes = sidecar.get("notes")
    return Making(
        row=row,
        stages=tuple(stages),
        facts=tuple((name, value) for name, value in _facts(row) if value),
        files=_files(sidecar.get("outputs")),
        steps=tuple(steps),
        notes=tuple(plain(note, 500) for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
    )


def options_text(stage: Mapping[str, Any]) -> str:
    """Gives a stage's options in one line; where it wrote to, and what has no value, are left out."""
    options = {name: value for name, value in mapping(stage.get("options")).items() if name != "output"}
    return ", ".join(
        f"{plain(name, 60)}={_option(value)}" for name, value in options.items() if value is not None and value != []
    )


def _option(value: Any) -> str:
    if isinstance(value, list):
        return "[" + plain(", ".join(said(each) for each in value[:20]), _MAX_OPTION) + "]"
    return said(value, _MAX_OPTION)


def _facts(row: Row) -> list[tuple[str, str]]:
    sidecar = row.sidecar
    environment = mapping(sidecar.get("environment"))
    packages = mapping(environment.get("packages"))
    versions = ", ".join(f"{plain(name, 40)} {said(version, 40)}" for name, version in packages.items())
    return [
        ("calibration", calibration_text(mapping(sidecar.get("calibration")))),
        ("proof", _proof(mapping(row.output.parity))),
        ("limits", _limits(mapping(mapping(row.output.parity).get("limits")))),
        ("made by", text(sidecar.get("created_by"))),
        ("device", text(environment.get("device"))),
        ("python", text(environment.get("python"))),
        ("packages", versions),
    ]


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """Says what text activations were gathered on; empty where none was used."""
    return ", ".join(f"{plain(name, 40).replace('_', ' ')} {said(value, 80)}" for name, value in calibration.items())


def _proof(parity: Mapping[str, Any]) -> str:
    if not parity:
        return ""
    runtimes = [text(mapping(parity.get(side)).get("runtime"), 60) for side in ("candidate", "baseline")]
    return (
        f"{runtimes[0]} against {runtimes[1]}, {count(parity.get('tokens')):,} tokens in windows of "
        f"{count(parity.get('context'))}, text sha256 {text(parity.get('text_sha256'), 64) or '–'}"
    )


def _limits(limits: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{plain(name, 40).replace('_', ' ')} {significant(number(value))}" for name, value in limits.items()
    )
