"""Merges an adapter into a checkpoint, lazily: the building stage that follows reads each tensor once, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.stage import RunContext, Stage

if TYPE_CHECKING:
    from quantpress.convert.lora.ledger import LedgerEntry

__all__ = [
    "MergeLora",
    "adapter_notes",
    "input_names",
    "ledger_of",
    "merge_records",
    "merged_names",
    "run_lazy",
    "stage_record",
]


@dataclass(frozen=True, kw_only=True)
class MergeLora(Stage):
    """Options of the stage.

    Attributes:
        adapter: the adapter's folder, or a Hub id as text.
        weight: factor on what the adapter adds; what it replaces is replaced whatever the weight.
    """

    name: ClassVar[str] = "merge_lora"
    version: ClassVar[int] = 1

    adapter: Path | str
    weight: float = 1.0

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Gives the merged view; reads headers only."""
        del context
        from quantpress.convert.lora.merge import merge_lora

        return merge_lora(source, self.adapter, self.weight)


def stage_record(stage: Stage) -> dict[str, Any]:
    """Describes a stage for the sidecar; paths are kept by name, so that a run elsewhere gives the same record."""
    record = dict(stage.describe())
    options = dict(record["options"])
    for field in fields(stage):
        value = getattr(stage, field.name)
        if isinstance(value, Path):
            options[field.name] = _folder_name(value)
    return record | {"options": options}


def _folder_name(path: Path) -> str:
    """What a path is called, as the adapter in it is: a link's own name says nothing, nor does "."."""
    return path.resolve().name if path.name in ("", "..") or path.is_dir() else path.name


def merge_records(source: Checkpoint) -> list[dict[str, Any]]:
    """Gives the records of the stages that made a merged checkpoint, as if they had been run as stages."""
    applied = source.adapted.applied if source.adapted is not None else ()
    return [stage_record(MergeLora(adapter=each.adapter.name, weight=each.weight)) for each in applied]


def adapter_notes(source: Checkpoint) -> tuple[str, ...]:
    """Reads the small tensors of a merged checkpoint's adapters and gives what a user must know of them.

    Raises:
        InputError: NaN or infinity in an adapter.
    """
    if source.adapted is None:
        return ()
    return tuple(dict.fromkeys((*source.adapted.notes, *source.adapted.check())))


def merged_names(source: Checkpoint) -> frozenset[str]:
    """Gives the names of the tensors that a checkpoint's adapters change."""
    return frozenset(source.adapted.changed) if source.adapted is not None else frozenset()


def ledger_of(source: Checkpoint) -> tuple[LedgerEntry, ...]:
    """Gives what became of every tensor of a checkpoint's adapters; reads what nobody has read yet."""
    return source.adapted.ledger() if source.adapted is not None else ()


def input_names(source: Checkpoint) -> Mapping[Path, str]:
    """Names a checkpoint's files for the sidecar, in its folder; an adapter's with its own, many are called alike."""
    adapters = source.adapted.applied if source.adapted is not None else ()
    behind = {file.path for each in adapters for file in each.adapter.files}
    root = source.files[0].path.parent if source.files else Path()
    return {
        file.path: f"{_folder_name(file.path.parent)}/{file.path.name}"
        if file.path in behind
        else _name_in(root, file.path)
        for file in source.files
    }


def _name_in(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def run_lazy(source: Checkpoint, stages: Sequence[Stage], context: RunContext) -> Checkpoint:
    """Runs stages that give views, in order."""
    for stage in stages:
        view = stage.run(source, context)
        if not isinstance(view, Checkpoint):
            raise TypeError(f"stage {stage.name} writes files: it stands last, not among the lazy ones")
        source = view
    return source
