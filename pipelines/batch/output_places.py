"""Checks that no output of a batch takes the place of another one, or of what the batch needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from quantpress.convert.files import shown
from quantpress.pipelines.batch.calls import stage_key
from quantpress.pipelines.batch.matrix import Expanded
from quantpress.pipelines.batch.problems import Mark, Problems
from quantpress.pipelines.batch.specs import JobSpec, StageCall
from quantpress.pipelines.batch.stores import shown_url
from quantpress.pipelines.stage import BuildingStage

__all__ = ["check_outputs"]


def check_outputs(jobs: Sequence[tuple[Expanded, JobSpec]], file: Path, cache: Path, problems: Problems) -> None:
    """Checks the outputs of all jobs against each other.

    An output whose name still holds `{ftype}` or `{name}` is only compared with those of the same model and stages:
    what it will be called is known when the model is open.

    Args:
        jobs: as the file has them, and as they were made.
        file: the pipeline file.
        cache: the cache's folder.
        problems: gets outputs that cannot all be there.
    """
    places: dict[str, tuple[Mark, str]] = {}
    kept = [file.absolute().as_posix(), cache.as_posix()]
    for name, spec, call, mark in _outputs(jobs):
        output = _place(spec, call)
        if output in places:
            other, other_name = places[output]
            hint = (
                "; put a ${variable} of the matrix into it" if other == mark else f"; line {other.line} writes it too"
            )
            both = f"{name} writes {{}} twice" if name == other_name else f"{name} and {other_name} both write {{}}"
            said = both.replace("{}", _shown(output))
            problems.add(mark, f"{call.stage.name}.output: {said}{hint}")
        places.setdefault(output, (mark, name))
        if not call.remote and (taken := next((each for each in kept if _holds(output, each)), "")):
            problems.add(mark, f"{call.stage.name}.output: {_shown(output)} would take the place of {taken}")
        if not call.remote and _holds(cache.as_posix(), output):
            problems.add(mark, f"{call.stage.name}.output: {_shown(output)} is in the cache, whose files come and go")
    for output, (mark, name) in places.items():
        for parent in _parents(output):
            if parent in places and parent != output:
                said = f"{_shown(output)} of {name} lies in {_shown(parent)} of {places[parent][1]}"
                problems.add(mark, f"output: {said}, a folder that is written as a whole")


def _outputs(jobs: Sequence[tuple[Expanded, JobSpec]]) -> Iterator[tuple[str, JobSpec, StageCall, Mark]]:
    for job, spec in jobs:
        entries = job.node.items()["stages"].value
        assert isinstance(entries, list)
        for entry, call in zip(entries, spec.stages, strict=True):
            if isinstance(call.stage, BuildingStage):
                found = stage_key(entry, Problems())
                assert found is not None
                yield spec.name, spec, call, found[2].items()["output"].mark


def _place(spec: JobSpec, call: StageCall) -> str:
    assert isinstance(call.stage, BuildingStage)
    output = call.remote or call.stage.output.as_posix()
    if "{ftype}" not in output and "{name}" not in output:
        return output
    before = [each for each in spec.stages[: spec.stages.index(call)] if not isinstance(each.stage, BuildingStage)]
    options = [repr(each.stage.describe()) for each in (*before, call)]
    return f"{output}\n{spec.model}\n{options}"


def _shown(output: str) -> str:
    return shown(shown_url(output.partition("\n")[0]), 200)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _parents(output: str) -> Iterator[str]:
    path = output.partition("\n")[0]
    while "/" in path.rstrip("/"):
        path = path.rstrip("/").rpartition("/")[0]
        yield path
