"""What `convert` and `merge` share once their flags are read: plan or press, prove, and say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import Weighted, adapter_weights, merge_stages
from quantpress.pipelines.commands.options import take_judge_options, take_run_context
from quantpress.pipelines.hashing import BackgroundHashes, likely_weights

if TYPE_CHECKING:  # what loads numpy is imported while the weights are being hashed already
    from quantpress.pipelines.stage import BuildingStage, Stage


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
        if not flags["dry_run"]:
            hashes.add([*likely_weights(model), *adapter_weights(adapters)])
        _write(session, model, make_stage(), merge_stages(adapters), qlora, flags, hashes, tables)


def _write(
    session: Session, model: str, stage: BuildingStage, lazy: Sequence[Stage], qlora: Mapping[str, Any],
    flags: dict[str, Any], hashes: BackgroundHashes, tables: bool,
) -> None:  # fmt: skip
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.commands.showing import show_plan, show_result
    from quantpress.pipelines.merge_stage import run_lazy
    from quantpress.pipelines.runner import press
    from quantpress.pipelines.stage import RunContext

    as_json, dry_run, proved = flags.pop("as_json"), flags.pop("dry_run"), flags.pop("verify")
    every_tensor = flags.pop("verbose", False) or session.verbose
    proved = proved and not getattr(stage, "vocab_only", False)
    measured = qlora["base"] == "auto"
    judge = take_judge_options(flags, needs_torch=(proved or measured) and not dry_run)
    arguments = take_run_context(flags, judge.device)
    if dry_run:
        source = run_lazy(open_checkpoint(model), lazy, RunContext())
        show_plan(stage.plan(source), source.adapted.notes if source.adapted is not None else (), as_json=as_json)
        return
    with session.progress() as progress:
        context = RunContext(progress=progress, **arguments)
        pressed = press(model, stage, context, lazy=lazy, judge=judge if proved else None, hashes=hashes)
    if not session.quiet or as_json:
        show_result(pressed, as_json=as_json, tables=tables, every_tensor=every_tensor)
    pressed.require_parity()
