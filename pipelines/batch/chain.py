"""A job's model after each of its stages, with the key of all that it was made from.

The driver walks a job to plan it and a worker walks it again to do a part of it; what takes work is looked up in the
cache by its key, so both see the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.batch.registry import OWN_PACKAGE, package_of
from quantpress.pipelines.batch.specs import JobSpec
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.codes_stage import LazyCodesStage
from quantpress.pipelines.merge_stage import input_names
from quantpress.pipelines.sidecar import environment
from quantpress.pipelines.stage import BuildingStage, PreparingStage, RunContext, Stage
from quantpress.pipelines.upstream import Upstream, run_stages
from quantpress.pipelines.verify_stage import Verify
from quantpress.quant.errors import UsageError

__all__ = ["FileHashes", "Known", "Point", "Step", "stage_material", "walk"]

_MAX_FILES = 10_000  # in a folder that an option names


class FileHashes(Protocol):
    """What gives the SHA-256 and the size of files."""

    def hashes(self, paths: Iterable[Path]) -> Mapping[Path, tuple[str, int]]:
        """Gives them for files that are there."""
        ...


@dataclass(frozen=True)
class Known:
    """A checkpoint with all that it was made from, as keys have it."""

    checkpoint: Checkpoint
    material: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A model between two stages.

    Attributes:
        model: what the next stage is given.
        upstream: what was done to it, and what outputs are judged against.
        yardstick: what outputs are judged against, with what it was made from.
        passed: the models before, the job's own first.
        needs: keys of the cache's entries that the model reads.
    """

    model: Known
    upstream: Upstream
    yardstick: Known
    passed: tuple[Known, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """What the next stage is given."""
        return self.model.checkpoint

    def known(self, checkpoint: Checkpoint | None) -> Known | None:
        """Finds a model that the job has passed; None where a stage made it inside."""
        models = (*self.passed, self.yardstick, self.model)
        return next((known for known in models if known.checkpoint is checkpoint), None)


@dataclass(frozen=True)
class Step:
    """A stage with the model that it is given.

    Attributes:
        index: of the stage in the job.
        stage: with every default filled in.
        before: the model.
        key, material: of a stage that prepares or builds: what names its work.
    """

    index: int
    stage: Stage
    before: Point
    key: str = ""
    material: Mapping[str, Any] | None = None


def walk(
    job: JobSpec, source: Checkpoint, hashes: FileHashes, device: str,
    folder_of: Callable[[str], Path | None], localized: Callable[[Any], Any], threads: int | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Gives the stages of a job that do work, in order: those that prepare and those that build.

    Args:
        job: the job.
        source: its model.
        hashes: of files.
        device: what stages that run the model run it on.
        folder_of: folder of a cache entry; None where the model is only planned with.
        localized: gives a stage whose files are all on this machine.
        threads: worker threads of stages that work when they are read; None for all.

    Raises:
        QuantpressError: a stage that does not fit the model or those before it.
    """
    point, context = _begin(source, hashes), RunContext() if threads is None else RunContext(threads=threads)
    for index, call in enumerate(job.stages):
        stage = call.stage
        if isinstance(stage, Verify):
            continue
        if isinstance(stage, BuildingStage):
            stage = localized(stage).resolved(point.checkpoint)
            material = _material(stage, point, hashes, device)
            yield Step(index, stage, point, key_of(material), material)
        elif isinstance(stage, PreparingStage):
            stage = localized(stage).resolved(point.checkpoint)
            material = _material(stage, point, hashes, device)
            key = key_of(material)
            yield Step(index, stage, point, key, material)
            point = _after_preparing(point, stage, key, material, folder_of(key))
        else:
            point = _after_lazy(point, localized(stage), hashes, context)


def stage_material(stage: Stage, hashes: FileHashes) -> dict[str, Any]:
    """Describes a stage for a key: files by their contents, not by their names, and never the output.

    A third-party stage's package counts too: its authors may forget to raise the stage's version.
    """
    described = dict(stage.describe())
    options = dict(described["options"])
    options.pop("output", None)
    for field in fields(stage):
        value = getattr(stage, field.name)
        if isinstance(value, Path) and field.name != "output":
            options[field.name] = _contents(value, hashes)
    package = package_of(type(stage))
    return {**described, "options": options, **({} if package == OWN_PACKAGE else {"package": package})}


def _material(stage: Stage, point: Point, hashes: FileHashes, device: str) -> dict[str, Any]:
    return {"stage": stage_material(stage, hashes), "environment": environment(device), "input": point.model.material}


def _contents(path: Path, hashes: FileHashes) -> Any:
    """What an option's path stands for: a file's hash, or those of a folder's files; its name if nothing is there."""
    if path.is_file():
        return hashes.hashes([path])[path][0]
    if not path.is_dir():
        return str(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if len(files) > _MAX_FILES:
        raise UsageError(f"{path}: holds more than {_MAX_FILES} files; give the folder of one model or adapter")
    found = hashes.hashes(files)
    return {file.relative_to(path).as_posix(): found[file][0] for file in files}


def _begin(source: Checkpoint, hashes: FileHashes) -> Point:
    names = input_names(source)
    found = hashes.hashes(list(names))
    material = {
        "model": source.name,
        "files": sorted([names[path], found[path][0]] for path in names),
        "tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in source.tokenizer_files.items()},
    }
    known = Known(source, material)
    return Point(known, Upstream.of(source), known)


def _after_lazy(point: Point, stage: Stage, hashes: FileHashes, context: RunContext) -> Point:
    resolved = stage.resolved(point.checkpoint) if isinstance(stage, LazyCodesStage) else stage
    view, upstream = run_stages(point.checkpoint, [stage], context, point.upstream)
    material = {
        "stage": stage_material(resolved, hashes),
        "files": _new_files(point.checkpoint, view, hashes),
        "environment": environment("cpu"),
    }
    model = Known(view, {**material, "input": point.model.material})
    yardstick = point.yardstick
    if upstream.source is not yardstick.checkpoint:
        yardstick = Known(upstream.source, {**material, "input": yardstick.material})
    return replace(point, model=model, upstream=upstream, yardstick=yardstick, passed=(*point.passed, point.model))


def _new_files(before: Checkpoint, after: Checkpoint, hashes: FileHashes) -> list[list[str]]:
    """Gives names and hashes of the files that a stage brought: an adapter's."""
    known = {file.path for file in before.files}
    names = {path: name for path, name in input_names(after).items() if path not in known}
    found = hashes.hashes(list(names))
    return sorted([name, found[path][0]] for path, name in names.items())


def _after_preparing(
    point: Point, stage: PreparingStage, key: str, material: Mapping[str, Any], folder: Path | None
) -> Point:
    before = point.checkpoint
    prepared = stage.planned(before) if folder is None else stage.opened(before, folder)
    return replace(
        point,
        model=Known(prepared.checkpoint, material),
        upstream=point.upstream.with_prepared(prepared, stage),
        passed=(*point.passed, point.model),
        needs=(*point.needs, key),
    )
