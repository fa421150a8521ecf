"""Reads a pipeline file: its jobs with every matrix, variable and default filled in, checked as far as can be.

No model is opened. Mistakes of a file are named together, each with its line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantpress.convert.files import shown
from quantpress.pipelines.batch.calls import check_order, stage_call
from quantpress.pipelines.batch.checking import check
from quantpress.pipelines.batch.document import Frame, JobFrame, parse_size
from quantpress.pipelines.batch.matrix import MAX_JOBS, Expanded, check_names, expanded
from quantpress.pipelines.batch.output_places import check_outputs
from quantpress.pipelines.batch.places import Places
from quantpress.pipelines.batch.problems import Problems, nearest
from quantpress.pipelines.batch.registry import find_stage
from quantpress.pipelines.batch.set_flags import with_sets
from quantpress.pipelines.batch.specs import BatchSpec, JobSpec, Settings
from quantpress.pipelines.batch.stores import is_url, local_path
from quantpress.pipelines.batch.variables import evaluated, filled
from quantpress.pipelines.batch.written import check_written
from quantpress.pipelines.batch.yaml_file import Node, read_yaml
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import BuildingStage, Stage
from quantpress.quant.errors import UsageError

__all__ = ["load_batch"]

_JUDGE = ("text", "context", "chunks", "runtime", "max_kld", "max_ppl_change", "min_top1")
_SHOWN = 20  # names that a message lists
_OWN = ("verify", "device", "threads", "max_memory", "allow_nonfinite")


def load_batch(path: Path | str, *, sets: Sequence[str] = (), jobs: Sequence[str] = ()) -> BatchSpec:
    """Reads a pipeline file.

    Args:
        path: the file.
        sets: `KEY=VALUE` texts that replace variables, or values by their path; see `with_sets`.
        jobs: names of the jobs that are wanted, or patterns with `*` and `?`; a name as the file has it stands for
            every job of its matrix. All jobs where there are none.

    Raises:
        UsageError: the file, `sets` or `jobs` are wrong: `FILE:LINE:COLUMN: what`, mistakes joined by "; ".
        InputError: the file cannot be read. That a job's model, adapter or text is not there is said in its
            `JobSpec.missing`.
    """
    path = Path(path)
    problems = Problems()
    document = with_sets(read_yaml(path), sets)
    check_written(document, problems)
    problems.raise_any()
    folder = path.absolute().parent
    places = Places(folder)
    variables = evaluated(document.get("variables"), problems)
    cache = _cache(document, variables, places, problems)
    templates = _expanded_all(document, variables, problems)
    problems.raise_any()
    made = []
    find = functools.cache(find_stage)
    for job in templates:
        lost = Problems()
        made.append((job, _job(job, find, places, problems, lost), lost))
        problems.take(lost)
    check_outputs([(job, spec) for job, spec, _ in made if spec is not None], path, cache, problems)
    problems.raise_any()
    chosen = _chosen(templates, jobs)
    specs = [spec for _, spec, _ in made if spec is not None]
    wanted = [(spec, lost) for _, spec, lost in made if spec is not None and spec.name in chosen]
    return BatchSpec(path, cache, tuple(replace(spec, missing=_missing(lost, places, specs)) for spec, lost in wanted))


def _missing(lost: Problems, places: Places, specs: Sequence[JobSpec]) -> str:
    """Says what of a job's inputs is not there."""
    found = Problems()
    for problem in lost.found:
        found.add(problem.mark, problem.message + _maker(places.lost[problem.mark], specs))
    return found.text()


def _maker(lost: Path, specs: Sequence[JobSpec]) -> str:
    """Says which job will write what is not there."""
    for spec in specs:
        if any(isinstance(call.stage, BuildingStage) and call.stage.output == lost for call in spec.stages):
            return f"; job {shown(spec.name)} writes it, but jobs do not wait for each other: make it one job"
    return ""


def _cache(document: Node, variables: dict[str, Node], places: Places, problems: Problems) -> Path:
    node = document.get("cache")
    text = Frame.model_fields["cache"].default if node is None else filled(node, variables, problems).value
    if not isinstance(text, str) or not text or (is_url(text) and local_path(text) is None):
        problems.add(node.mark if node is not None else document.mark, "cache: wanted a folder on a disk")
        return places.folder
    return places.absolute(text)


def _expanded_all(document: Node, variables: dict[str, Node], problems: Problems) -> list[Expanded]:
    """Gives the jobs of all templates."""
    found: list[Expanded] = []
    templates = document.items()["jobs"].value
    assert isinstance(templates, list)
    for template in templates:
        found += expanded(
            _with_defaults(template, document.get("defaults")), variables, MAX_JOBS - len(found), problems
        )
    if not problems.found:
        check_names(found, problems)
    return found


def _with_defaults(job: Node, defaults: Node | None) -> Node:
    """Gives a job with the settings of `defaults` that it has not itself."""
    if defaults is None:
        return job
    return Node({**defaults.items(), **job.items()}, job.mark, {**defaults.keys, **job.keys}, job.size)


def _job(
    job: Expanded, find: Callable[[str], type[Stage]], places: Places, problems: Problems, missing: Problems
) -> JobSpec | None:
    """Makes one job."""
    checked = check(JobFrame, job.node, problems)
    entries = job.node.items()["stages"].value
    if not isinstance(entries, list):
        return None
    calls = [stage_call(entry, find, places, problems, missing) for entry in entries]
    made = [call for call in calls if call is not None]
    if checked is None or len(made) < len(entries):
        return None
    check_order(entries, made, problems)
    model = places.model(checked["model"], job.node.items()["model"].mark, missing, "model")
    settings = _settings(checked, job.node, places, problems, missing)
    stages = tuple(made)
    return JobSpec(job.name, str(model), stages, settings, job.node.mark.line, job.values)


def _settings(checked: Any, node: Node, places: Places, problems: Problems, missing: Problems) -> Settings:
    """Gives what holds for a whole job."""
    judge = {name: checked[name] for name in _JUDGE if name in checked}
    own = {name: checked[name] for name in _OWN if name in checked}
    if judge.get("text") is not None:
        judge["text"] = places.text(judge["text"], node.items()["text"].mark, missing, "text")
    if own.get("max_memory") is not None:
        try:
            own["max_memory"] = parse_size(own["max_memory"])
        except ValueError as error:
            problems.add(node.items()["max_memory"].mark, f"max_memory: {error}")
            own["max_memory"] = None
    return Settings(judge=JudgeOptions(**judge), **own)


def _chosen(jobs: Sequence[Expanded], patterns: Sequence[str]) -> set[str]:
    """Gives the names of the jobs that are wanted.

    Raises:
        UsageError: a pattern that no job's name fits.
    """
    if not patterns:
        return {job.name for job in jobs}
    found: set[str] = set()
    for pattern in patterns:
        fitting = {job.name for job in jobs if fnmatchcase(job.name, pattern) or job.template.value == pattern}
        if not fitting:
            names = list(dict.fromkeys(job.name for job in jobs))
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            near = nearest(pattern, names) or f"; jobs are {', '.join(names[:_SHOWN])}{more}"
            raise UsageError(f"--job {shown(pattern)}: no such job{near}")
        found |= fitting
    return found
