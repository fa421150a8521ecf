"""Checks a pipeline file as it was written, before variables are filled in."""

from __future__ import annotations

from quantpress.convert.files import shown
from quantpress.pipelines.batch.checking import check, found_text
from quantpress.pipelines.batch.document import JobFrame, JobSettings, WrittenFile, WrittenJob
from quantpress.pipelines.batch.problems import Problems, nearest
from quantpress.pipelines.batch.registry import BUILT_IN
from quantpress.pipelines.batch.yaml_file import Node

__all__ = ["check_written"]

_SETTINGS = tuple(JobSettings.model_fields)
_JOB = tuple(JobFrame.model_fields)


def check_written(document: Node, problems: Problems) -> None:
    """Checks keys and shapes; values of jobs are checked when they are filled in.

    Args:
        document: the file.
        problems: gets what is wrong.
    """
    version = document.get("version")
    if isinstance(document.value, dict) and (version is None or version.value != 1 or version.value is True):
        found = "is missing" if version is None else f"is {found_text(version)}"
        mark = document.mark if version is None else version.mark
        problems.add(mark, f"version {found}; this quantpress reads files that start with `version: 1`")
        return
    check(WrittenFile, document, problems)
    defaults, jobs = document.get("defaults"), document.get("jobs")
    if defaults is not None:
        _check_keys(defaults, _SETTINGS, "defaults", problems)
    for job in jobs.value if jobs is not None and isinstance(jobs.value, list) else ():
        _check_job(job, problems)


def _check_job(job: Node, problems: Problems) -> None:
    if not isinstance(job.value, dict):
        return  # `check` has said so
    name = job.get("name")
    label = f"job {shown(name.value)}" if name is not None and isinstance(name.value, str) else "job"
    _check_keys(job, _JOB, label, problems)
    check(WrittenJob, job, problems, where=f"{label}.", known=_JOB)


def _check_keys(node: Node, known: tuple[str, ...], label: str, problems: Problems) -> None:
    for key in node.items():
        if key not in known:
            near = nearest(key, known) or f"; known are {', '.join(known)}"
            if key in BUILT_IN and known == _JOB:
                near = f"; it is a stage: write it below `stages`, as `- {key}: ...`"
            problems.add(node.key_mark(key), f"unknown key {shown(key)} of {label}{near}")
