"""The flags that name adapters, and how an adapter and its weight are told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.merge_stage import MergeLora

Command = TypeVar("Command", bound=Callable[..., Any])
Weighted = tuple[Path | str, float]
"""An adapter's folder or Hub id, and the factor on what it adds."""


def adapter_option(command: Command) -> Command:
    """Adds `--adapter DIR[=WEIGHT]`."""
    option = click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="DIR[=WEIGHT]",
        help="Adapter to merge into MODEL: folder or Hub id; may be repeated, applied in order.  [default weight: 1]",
    )
    return option(command)


def place(text: str) -> Path | str:
    """Gives what exists as a path, anything else as it stands: a Hub id."""
    return Path(text) if Path(text).exists() else text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_adapter(text: str) -> Weighted:
    """Tells DIR from DIR=WEIGHT, although a folder's name may hold "=" too: what exists is a folder.

    Raises:
        UsageError: what stands behind "=" is no number.
    """
    folder, separator, tail = text.rpartition("=")
    if not separator or Path(text).exists():
        return place(text), 1.0
    weight = _number(tail)
    if weight is not None and folder:
        return place(folder), weight
    if Path(folder).exists() or not folder:
        raise UsageError(f"--adapter {text!r}: wanted DIR or DIR=WEIGHT, as in ./adapter=0.5; {tail!r} is no number")
    return text, 1.0


def pair_weights(adapters: Sequence[str], weights: Sequence[float]) -> tuple[Weighted, ...]:
    """Pairs the adapters of `merge` with its --weight flags, in order.

    Raises:
        UsageError: there are weights, but not one for each adapter.
    """
    if weights and len(weights) != len(adapters):
        adapters_text = "1 adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
        raise UsageError(
            f"--weight is given {len(weights)} times for {adapters_text}: give one for each, in their order, or none"
        )
    for text in adapters:
        folder, _, tail = text.rpartition("=")
        if folder and _number(tail) is not None and not Path(text).exists():
            raise UsageError(f"{text}: merge takes the weight as a flag; write {folder} and --weight {tail}")
    return tuple((place(text), weight) for text, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True))


def merge_stages(adapters: Sequence[Weighted]) -> tuple[MergeLora, ...]:
    """Gives the stages that merge these adapters."""
    from quantpress.pipelines.merge_stage import MergeLora

    return tuple(MergeLora(adapter=adapter, weight=weight) for adapter, weight in adapters)


def adapter_weights(adapters: Sequence[Weighted]) -> list[Path]:
    """Gives the adapters' weight files, found by their names alone, so that their hashes can begin."""
    from quantpress.pipelines.hashing import likely_weights

    return [path for adapter, _ in adapters for path in likely_weights(str(adapter))]


def qlora_options(command: Command) -> Command:
    """Adds the flags for adapters that were trained on a quantized base."""
    options = [
        click.option(
            "--qlora-base",
            type=click.Choice(["fp16", "dequantized", "auto"]),
            help="For adapters trained on a quantized base: merge into MODEL's own weights (fp16, default), into what"
            " the training saw of them (dequantized), or measure both and take the better (auto).",
        ),
        click.option(
            "--qlora-type",
            type=click.Choice(["nf4", "fp4", "int8"]),
            help="bitsandbytes type of the training's base.  [default: nf4]",
        ),
        click.option(
            "--qlora-double-quant/--no-qlora-double-quant",
            default=None,
            help="Whether the training's base had its scales quantized too.  [default: yes]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def take_qlora(flags: dict[str, Any], adapters: Sequence[Weighted]) -> Mapping[str, Any]:
    """Takes the --qlora flags out of a command's flags.

    Raises:
        UsageError: they are given where they mean nothing.
    """
    base = flags.pop("qlora_base")
    details = {"quant_type": flags.pop("qlora_type"), "double_quant": flags.pop("qlora_double_quant")}
    if base is not None and not adapters:
        raise UsageError("--qlora-base says what an adapter is merged into: give --adapter too")
    if base not in ("dequantized", "auto") and any(value is not None for value in details.values()):
        flag = "--qlora-type" if details["quant_type"] is not None else "--qlora-double-quant"
        raise UsageError(f"{flag} describes a quantized base: give --qlora-base dequantized or auto too")
    return {"base": base, **{name: value for name, value in details.items() if value is not None}}
