"""Applies `--set key=value`: replaces a variable, or any value of a pipeline file by its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from quantpress.convert.files import shown
from quantpress.pipelines.batch.problems import Mark, nearest
from quantpress.pipelines.batch.yaml_file import Node, parse_yaml
from quantpress.quant.errors import UsageError

__all__ = ["with_sets"]

_TOP = ("cache", "defaults", "jobs", "variables")


def with_sets(document: Node, sets: Sequence[str]) -> Node:
    """Gives the document with values replaced.

    Args:
        document: as it was read.
        sets: `NAME=VALUE` for a variable of the file or of a matrix, `cache=...`, `defaults.KEY=...`,
            `jobs.JOB.KEY=...`, `jobs.JOB.stages.STAGE.KEY=...`; values are YAML.

    Raises:
        UsageError: not of this form, or the file has nothing of the name.
    """
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {shown(text)}: wanted KEY=VALUE, as in outtype=Q8_0 or defaults.device=cpu")
        flag = f"--set {key.strip()}"
        node = _marked(_value(value, flag), Mark(flag))
        document = _set(document, key.strip(), node, flag)
    return document


def _value(text: str, flag: str) -> Node:
    """Parses a value as YAML; what is no YAML is a text, as `a note: b` is."""
    if not text.strip():
        return Node("", Mark(flag))
    if not text.lstrip().startswith(("[", "{", '"', "'")) and (": " in text or " #" in text):
        return Node(text, Mark(flag))
    return parse_yaml(text.encode("utf-8", "surrogateescape"), flag)


def _marked(node: Node, mark: Mark) -> Node:
    """Gives a value that says where it comes from."""
    if isinstance(node.value, list):
        return dataclasses.replace(node, value=[_marked(each, mark) for each in node.value], mark=mark)
    if isinstance(node.value, dict):
        entries = {key: _marked(each, mark) for key, each in node.value.items()}
        return dataclasses.replace(node, value=entries, mark=mark, keys=dict.fromkeys(entries, mark))
    return dataclasses.replace(node, mark=mark)


def _set(document: Node, key: str, node: Node, flag: str) -> Node:
    declared = _declared(document)
    if key in declared:
        return _set_variable(document, key, node)
    head, _, rest = key.partition(".")
    if head not in _TOP or (head != "cache") != bool(rest):
        if key in _defaults():
            raise UsageError(f"{flag}: no such variable; did you mean defaults.{key}?")
        known = f"; variables are {', '.join(declared)}" if declared else "; the file has no variables"
        near = nearest(key, (*declared, *(f"defaults.{each}" for each in _defaults())))
        raise UsageError(f"{flag}: no such variable{near or known}; a path is written as in defaults.device")
    if head == "jobs":
        return _set_in_job(document, rest, node, flag)
    if head == "variables":
        raise UsageError(
            f"{flag}: no such variable{nearest(rest, declared)}; write --set {rest}=... for one that is there"
        )
    return _put(document, key.split("."), node, flag)


def _declared(document: Node) -> list[str]:
    """Gives the names of all variables."""
    found = dict.fromkeys(_entries(document.get("variables")))
    for job in _jobs(document):
        found |= dict.fromkeys(_entries(job.get("matrix")))
    return list(found)


def _defaults() -> Iterable[str]:
    from quantpress.pipelines.batch.document import JobSettings

    return JobSettings.model_fields


def _entries(node: Node | None) -> dict[str, Node]:
    return node.items() if node is not None else {}


def _jobs(document: Node) -> list[Node]:
    jobs = document.get("jobs")
    return jobs.value if jobs is not None and isinstance(jobs.value, list) else []


def _set_variable(document: Node, name: str, node: Node) -> Node:
    """Replaces a variable, and in every matrix that has it the values that it takes."""
    if name in _entries(document.get("variables")):
        document = _put(document, ["variables", name], node, "")
    values = node if isinstance(node.value, list) else Node([node], node.mark, size=2)
    jobs = [
        _put(job, ["matrix", name], values, "") if name in _entries(job.get("matrix")) else job
        for job in _jobs(document)
    ]
    return _with_jobs(document, jobs)


def _with_jobs(document: Node, jobs: list[Node]) -> Node:
    found = document.get("jobs")
    if found is None or not isinstance(found.value, list):
        return document
    return _put(document, ["jobs"], dataclasses.replace(found, value=jobs), "")


def _set_in_job(document: Node, rest: str, node: Node, flag: str) -> Node:
    """Replaces a value in the job whose name the path starts with; names may hold dots."""
    names = {str(_entries(job)["name"].value): index for index, job in enumerate(_jobs(document)) if job.get("name")}
    fitting = [name for name in names if rest.startswith(f"{name}.") and rest != f"{name}."]
    if not fitting:
        raise UsageError(
            f"{flag}: wanted jobs.NAME.KEY with the name of a job as the file has it"
            f"{nearest(rest.rpartition('.')[0], names)}; jobs are {', '.join(names) or 'none'}"
        )
    name = max(fitting, key=len)
    jobs = _jobs(document)
    jobs = [*jobs]
    jobs[names[name]] = _put(jobs[names[name]], rest[len(name) + 1 :].split("."), node, flag)
    return _with_jobs(document, jobs)


def _put(node: Node, path: Sequence[str], value: Node, flag: str) -> Node:
    """Gives a copy of a value with what stands at a path replaced.

    Raises:
        UsageError: nothing stands there.
    """
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(node.value, list):
        index = _index(node, step, flag)
        entries = [*node.value]
        entries[index] = _put(entries[index], rest if step.isdigit() else path, value, flag)
        return dataclasses.replace(node, value=entries)
    if node.value is None:  # `- verify:` and `defaults:` with nothing behind
        node = dataclasses.replace(node, value={})
    if not isinstance(node.value, dict):
        if isinstance(node.value, str) and node.value == step and rest:  # the stage `- verify`
            return Node({step: _put(Node({}, node.mark), rest, value, flag)}, node.mark, {step: node.mark})
        raise UsageError(f"{flag}: there is no mapping with a key {shown(step)}")
    if rest and step not in node.value and step not in ("defaults", "matrix"):
        raise UsageError(f"{flag}: nothing is called {shown(step)} there{nearest(step, node.value)}")
    inner = node.value.get(step, Node({}, value.mark))
    keys = {**node.keys, step: node.keys.get(step, value.mark)}
    return dataclasses.replace(node, value={**node.value, step: _put(inner, rest, value, flag)}, keys=keys)


def _index(node: Node, step: str, flag: str) -> int:
    """Finds an entry of a list by its number from 1 on, or the only stage of a name."""
    assert isinstance(node.value, list)
    if step.isdigit() and 1 <= int(step) <= len(node.value):
        return int(step) - 1
    found = [index for index, each in enumerate(node.value) if step in each.items() or each.value == step]
    if len(found) != 1:
        names = [key for each in node.value for key in each.items()]
        which = f"{len(found)} entries are called {step}; give a number from 1 on" if found else "nothing has that name"
        raise UsageError(f"{flag}: {which}{'' if found else nearest(step, names)}")
    return found[0]
