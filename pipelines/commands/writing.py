"""What `convert` and `merge` share once their flags are read: plan or press, prove, and say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import Weighted, adapter_weights, merge_stages
from quantpress.pipelines.commands.options import take_judge_options, take_run_context
from quantpress.pipelines.hashing import BackgroundHashes, likely_weights

if TYPE_CHECKING:  # what loads numpy is imported while the weights are being hashed already
    from quantpress.convert.checkpoint import Checkpoint
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.qlora_choice import QloraBase
    from quantpress.pipelines.stage import BuildingStage, RunContext, Stage

UNMEASURED = "--qlora-base auto measures both bases, which a dry run does not: the plan is the same for either"


def write(
    session: Session, model: str, make_stage: Callable[[], BuildingStage], adapters: Sequence[Weighted],
    qlora: Mapping[str, Any], flags: dict[str, Any], *, tables: bool = False,
) -> None:  # fmt: skip
    """Merges adapters into a model and writes it.

    Args:
        session: the global flags.
        model: the base.
        make_stage: gives what to write; called when the inputs are being hashed already, for it loads numpy.
        adapters: what to merge, in order.
        qlora: as `take_qlora` gives it.
        flags: of the command: judging, writing and machine.
        tables: whether the ledger is printed as a table without being asked for.

    Raises:
        QuantpressError: see `press`; `ParityError` if the proof fails.
    """
    with BackgroundHashes() as hashes:
        if flags.pop("dry_run"):
            _plan(model, make_stage(), merge_stages(adapters), qlora, flags)
            return
        hashes.add([*likely_weights(model), *adapter_weights(adapters)])
        _write(session, model, make_stage(), merge_stages(adapters), qlora, flags, hashes, tables)


def _plan(
    model: str, stage: BuildingStage, lazy: Sequence[Stage], qlora: Mapping[str, Any], flags: Mapping[str, Any]
) -> None:
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.commands.showing import show_plan
    from quantpress.pipelines.merge_stage import run_lazy
    from quantpress.pipelines.stage import RunContext

    if flags["device"] == "cuda":
        take_judge_options(dict(flags), needs_torch=True)  # says now that there is none
    source, base = open_checkpoint(model), qlora["base"]
    context = RunContext()
    if base is not None:
        source = run_lazy(
            source, _base(source, {**qlora, "base": None if base == "auto" else base}, (), context), context
        )
    source = run_lazy(source, lazy, context)
    notes = source.adapted.notes if source.adapted is not None else ()
    show_plan(stage.plan(source), (*notes, UNMEASURED) if base == "auto" else notes, as_json=flags["as_json"])


def _base(
    source: Checkpoint, qlora: Mapping[str, Any], lazy: Sequence[Stage], context: RunContext,
    judge: JudgeOptions | None = None,
) -> Sequence[QloraBase]:  # fmt: skip
    """The stages before the adapters, where --qlora-base asks for one; measures for "auto"."""
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.qlora_choice import base_stages, choose_base

    details = {name: value for name, value in qlora.items() if name != "base"}
    measure = partial(choose_base, source, lazy, context, judge or JudgeOptions(), **details)
    return base_stages(source, qlora["base"], measure, **details)


def _write(
    session: Session, model: str, stage: BuildingStage, lazy: Sequence[Stage], qlora: Mapping[str, Any],
    flags: dict[str, Any], hashes: BackgroundHashes, tables: bool,
) -> None:  # fmt: skip
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.commands.showing import show_result
    from quantpress.pipelines.runner import press
    from quantpress.pipelines.stage import RunContext

    as_json, proved = flags.pop("as_json"), flags.pop("verify") and not getattr(stage, "vocab_only", False)
    every_tensor = flags.pop("verbose", False) or session.verbose
    judge = take_judge_options(flags, needs_torch=proved or stage.runs_model or qlora["base"] == "auto")
    arguments = take_run_context(flags, judge.device)
    with session.progress() as progress:
        context = RunContext(progress=progress, **arguments)
        source: Checkpoint | str = model
        before: Sequence[QloraBase] = ()
        if qlora["base"] is not None:
            source = open_checkpoint(model)
            before = _base(source, qlora, lazy, context, judge)
            lazy = [*before, *lazy]
        pressed = press(source, stage, context, lazy=lazy, judge=judge if proved else None, hashes=hashes)
    if not session.quiet and not as_json:
        for each in before:
            click.echo(each.summary())
    if not session.quiet or as_json:
        show_result(pressed, as_json=as_json, tables=tables, every_tensor=every_tensor)
    pressed.require_parity()
