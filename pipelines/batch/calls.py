"""Makes the stages of a job from what a pipeline file says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.convert.files import shown
from quantpress.pipelines.batch.checking import check, found_text
from quantpress.pipelines.batch.places import Places
from quantpress.pipelines.batch.problems import Mark, Problems
from quantpress.pipelines.batch.registry import kind_of
from quantpress.pipelines.batch.specs import StageCall
from quantpress.pipelines.batch.stage_options import StageOptions, options_of
from quantpress.pipelines.batch.yaml_file import Node
from quantpress.pipelines.stage import BuildingStage, Stage
from quantpress.quant.errors import QuantpressError, UsageError

__all__ = ["check_order", "stage_call", "stage_key"]


def stage_key(node: Node, problems: Problems) -> tuple[str, Mark, Node] | None:
    """Gives name, place and options of an entry of `stages`."""
    if isinstance(node.value, str) and node.value:
        return node.value, node.mark, Node({}, node.mark)
    if not isinstance(node.value, dict) or len(node.value) != 1:
        found = f"a mapping of {len(node.value)} keys" if isinstance(node.value, dict) else found_text(node)
        indent = "; options of a stage stand further to the right than its name" if "keys" in found else ""
        problems.add(node.mark, f"stages: wanted one stage as `name: {{options}}`, found {found}{indent}")
        return None
    ((name, options),) = node.value.items()
    if options.value is None:
        options = replace(options, value={})
    return name, node.key_mark(name), options


def stage_call(
    node: Node, find: Callable[[str], type[Stage]], places: Places, problems: Problems, missing: Problems
) -> StageCall | None:
    """Makes a stage.

    Args:
        node: an entry of `stages`, filled in.
        find: gives a stage's class, see `find_stage`.
        places: what paths mean.
        problems: gets what is wrong with the file.
        missing: gets inputs that are not there.

    Returns:
        None where something is wrong.
    """
    found = stage_key(node, problems)
    if found is None:
        return None
    name, mark, given = found
    try:
        options = options_of(find(name))
    except UsageError as error:
        problems.add(mark, str(error))
        return None
    checked = check(options.model, given, problems, where=f"{name}.", known=tuple(options.options))
    if checked is None:
        return None
    return _made(options, dict(checked), given, mark, places, problems, missing)


def _made(
    options: StageOptions,
    checked: dict[str, Any],
    given: Node,
    mark: Mark,
    places: Places,
    problems: Problems,
    missing: Problems,
) -> StageCall | None:
    """Makes a stage of options that were checked."""
    name, remote = options.stage.name, ""

    def to_path(option: str, text: str, either: bool) -> str | Path:
        where = (given.items()[option].mark, missing, f"{name}.{option}")
        return places.model(text, *where) if either else places.text(text, *where)

    if issubclass(options.stage, BuildingStage):
        output = checked.pop("output")
        label = f"{name}.output"
        checked_path, remote = places.output(output, given.items()["output"].mark, problems, label)
        values = options.values(checked, to_path) | {"output": checked_path}
    else:
        values = options.values(checked, to_path)
    try:
        return StageCall(options.stage(**values), mark.line, remote)
    except (QuantpressError, TypeError, ValueError) as error:  # of a third-party stage's own checks
        problems.add(mark, f"{name}: {' '.join(str(error).split())}")
        return None


def check_order(entries: list[Node], calls: list[StageCall], problems: Problems) -> None:
    """Checks that every stage has a use.

    Args:
        entries: of the file.
        calls: made of them.
        problems: gets stages that change nothing that is written, and proofs of nothing.
    """
    kinds = [kind_of(type(call.stage)) for call in calls]
    marks = [stage_key(entry, problems) for entry in entries]
    places = [each[1] if each is not None else entry.mark for each, entry in zip(marks, entries, strict=True)]
    if "building" not in kinds:
        outputs = "gguf, onnx, safetensors or quantize"
        problems.add(places[0], f"stages: none of them writes an output; add {outputs}")
        return
    last = max(index for index, kind in enumerate(kinds) if kind == "building")
    for index, (call, kind) in enumerate(zip(calls, kinds, strict=True)):
        name = shown(call.stage.name)[1:-1]
        if kind == "verify" and "building" not in kinds[:index]:
            problems.add(places[index], f"{name}: no stage before it writes an output that it could prove")
        elif kind in ("lazy", "preparing") and index > last:
            problems.add(places[index], f"{name}: no stage after it writes an output, so it has no use")
