"""Makes the jobs of a matrix: every combination of its values, but those that are excluded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantpress.convert.files import shown
from quantpress.pipelines.batch.checking import found_text
from quantpress.pipelines.batch.problems import Problems, nearest
from quantpress.pipelines.batch.variables import NAME, filled, text_of, used_names
from quantpress.pipelines.batch.yaml_file import Node

__all__ = ["MAX_JOBS", "Expanded", "check_names", "combinations", "expanded"]

MAX_JOBS = 10_000  # of a file


@dataclass(frozen=True, slots=True)
class Expanded:
    """One job of a template.

    Attributes:
        name: with its variables filled in.
        template: name as the file has it.
        node: all keys but `matrix` and `exclude`, filled in; settings of `defaults` are among them.
        values: of all variables, as text.
        axes: names of the matrix's variables.
    """

    name: str
    template: Node
    node: Node
    values: Mapping[str, str]
    axes: tuple[str, ...]


def expanded(job: Node, variables: Mapping[str, Node], room: int, problems: Problems) -> list[Expanded]:
    """Gives the jobs of a template.

    Args:
        job: the template, checked as far as it can be without its variables.
        variables: the file's, evaluated.
        room: so many jobs may still be made.
        problems: gets what is wrong.
    """
    axes = _axes(job, variables, problems)
    count = math.prod(len(values) for values in axes.values())
    if count > room:
        problems.add(job.mark, f"the matrix has {count} combinations; a file may hold {MAX_JOBS} jobs in all")
        return []
    name = job.items()["name"]
    body = {key: node for key, node in job.items().items() if key not in ("matrix", "exclude")}
    stripped = Node(body, job.mark, job.keys, job.size)
    jobs = []
    for values in combinations(job, axes, variables, problems):
        known = {**variables, **values}
        node = filled(stripped, known, problems)
        texts = {key: text_of(value) for key, value in known.items()}
        if isinstance(node.items()["name"].value, list):
            problems.add(name.mark, f"name: wanted a text, found a list in {shown(name.value)}")
        called = text_of(node.items()["name"])
        named = dataclasses.replace(node, value={**node.items(), "name": Node(called, name.mark)})
        jobs.append(Expanded(called, name, named, texts, tuple(axes)))
    if count and not jobs and not problems.found:
        problems.add(job.key_mark("exclude"), "every combination of the matrix is excluded")
    return jobs


def _axes(job: Node, variables: Mapping[str, Node], problems: Problems) -> dict[str, list[Node]]:
    """Gives the values of the matrix's variables; they may use the file's."""
    axes: dict[str, list[Node]] = {}
    matrix = job.get("matrix") or Node({}, job.mark)
    for name, node in matrix.items().items():
        if not NAME.fullmatch(name):
            problems.add(matrix.key_mark(name), f"{shown(name)}: a variable's name is letters, digits, _ and -")
        found = filled(node, variables, problems)
        if not isinstance(found.value, list) or not found.value:
            problems.add(node.mark, f"matrix.{name}: wanted a list that is not empty, found {found_text(found)}")
        axes[name] = found.value if isinstance(found.value, list) else []
        seen: set[str] = set()
        for value in axes[name]:
            if (text := text_of(value)) in seen:
                problems.add(value.mark, f"matrix.{name}: the value {shown(text)} is here twice")
            seen.add(text)
    return axes


def combinations(
    job: Node, axes: Mapping[str, list[Node]], variables: Mapping[str, Node], problems: Problems
) -> Iterator[dict[str, Node]]:
    """Gives the combinations in the order in which nested loops would, the last variable's fastest."""
    rules = _rules(job, axes, variables, problems)
    idle = set(range(len(rules)))
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        matching = {index for index, rule in enumerate(rules) if _matches(rule.items(), chosen)}
        idle -= matching
        if not matching:
            yield chosen
    as_written = all(value.mark.line for values in axes.values() for value in values)  # nothing by --set
    if as_written and not problems.found:
        for index in idle:
            problems.add(rules[index].mark, "exclude: no combination of the matrix has these values")


def _rules(job: Node, axes: Mapping[str, list[Node]], variables: Mapping[str, Node], problems: Problems) -> list[Node]:
    """Gives the entries of `exclude`."""
    excluded = job.get("exclude")
    if excluded is None or not isinstance(rules := filled(excluded, variables, problems).value, list):
        return []
    for rule in rules:
        for key in rule.items():
            if key not in axes:
                message = f"exclude: {shown(key)} is no variable of the matrix"
                problems.add(rule.key_mark(key), f"{message}{nearest(key, axes)}")
    return rules


def _matches(rule: Mapping[str, Node], chosen: Mapping[str, Node]) -> bool:
    return bool(rule) and all(
        key in chosen and chosen[key].plain() == node.plain() and type(chosen[key].value) is type(node.value)
        for key, node in rule.items()
    )


def check_names(jobs: list[Expanded], problems: Problems) -> None:
    """Checks that jobs can be told from each other by their names."""
    first: dict[str, Expanded] = {}
    for job in jobs:
        mark = job.template.mark
        if not job.name.isprintable() or set(job.name) & set("*?[]") or job.name != job.name.strip():
            problems.add(mark, f"name: {shown(job.name)}: no blanks at its ends, control characters, *, ?, [ and ]")
        if job.name not in first:
            first[job.name] = job
            continue
        other = first[job.name]
        text = f"two jobs are called {shown(job.name)}"
        differing = [axis for axis in job.axes if job.values[axis] != other.values.get(axis)]
        if job.template is other.template and (missing := [a for a in differing if a not in used_names(job.template)]):
            problems.add(mark, f"name: {text}; put ${{{'} or ${'.join(missing)}}} into the name")
        else:
            problems.add(mark, f"name: {text}; the other one is in line {other.template.mark.line}")
