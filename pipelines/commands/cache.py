"""`quantpress cache`: what batches have kept, whether it is whole, and room for more."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.options import ByteSize
from quantpress.quant.errors import InputError, UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.cache.contents import Piece
    from quantpress.pipelines.cache.store import Cache

Command = TypeVar("Command", bound=Callable[..., Any])
_UNITS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 7 * 86400}
_DEFAULT = ".quantpress"

EXAMPLES = """
\b
Examples:
  quantpress cache ls
  quantpress cache ls release.yaml
  quantpress cache verify --cache /scratch/quantpress
  quantpress cache prune --older-than 30d --max-size 50G --dry-run
"""


class Age(click.ParamType[float]):
    """`30d` or `12h`; gives seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parses the text of a flag."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([SMHDW])", str(value).strip().upper())
        if not match:
            self.fail(f"{value!r} is not an age: write a number and s, m, h, d or w, as in 30d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.group(name="cache", epilog=EXAMPLES)
def command() -> None:
    """What `quantpress run` keeps for later runs: list it, check it, make room."""


def _place_options(function: Command) -> Command:
    """Adds what says which cache is meant."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--cache", "folder", type=click.Path(path_type=Path), help="The cache folder."),
        click.argument("pipeline", required=False, type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


def _open(pipeline: Path | None, folder: Path | None) -> Cache:
    """Opens the cache that is meant: of --cache, of a pipeline file, or the one in the working folder."""
    from quantpress.pipelines.cache.store import Cache

    if pipeline is not None and folder is not None:
        raise UsageError("give a pipeline file or --cache, not both")
    if pipeline is not None:
        from quantpress.pipelines.batch.yaml_file import read_yaml

        node = read_yaml(pipeline).get("cache")
        named = _DEFAULT if node is None else node.value
        if not isinstance(named, str) or not named:
            raise UsageError(f"{pipeline}: cache is to be the name of a folder")
        if "${" in named:
            raise UsageError(f"{pipeline}: the cache's place depends on variables; give it by --cache")
        folder = pipeline.parent / named
    cache = Cache(folder if folder is not None else Path(_DEFAULT))
    if not cache.folder.is_dir():
        raise InputError(f"{cache.folder}: no cache is there; give --cache DIR or the pipeline file that names one")
    return cache


@command.command(name="ls")
@_place_options
def list_(pipeline: Path | None, folder: Path | None, as_json: bool) -> None:
    """List what is kept, what was used last at the end."""
    from quantpress.pipelines.cache.contents import pieces
    from quantpress.pipelines.cache.explain import History

    with _open(pipeline, folder) as cache:
        found, labels = pieces(cache), History(cache).labels()
    if as_json:
        rows = [_record(piece) | {"for": labels.get(piece.name, [])} for piece in found]
        click.echo(json.dumps({"cache": str(cache.folder), "pieces": rows}, indent=2))
        return
    _table(found, labels)
    click.echo(f"{cache.folder}: {_count(found)}, {_size(sum(piece.nbytes for piece in found))}")


@command.command(name="verify")
@_place_options
@click.pass_obj
def verify(session: Session, /, pipeline: Path | None, folder: Path | None, as_json: bool) -> None:
    """Read every entry and compare it with its hashes."""
    with _open(pipeline, folder) as cache, session.progress() as progress:
        keys, problems = cache.kept_keys(), dict[str, str]()
        for done, key in enumerate(keys, start=1):
            if problem := cache.damage(key):
                problems[key] = problem
            progress("check entries", done, len(keys))
    if as_json:
        rows = [{"key": key, "whole": key not in problems, "problem": problems.get(key, "")} for key in keys]
        click.echo(json.dumps({"cache": str(cache.folder), "entries": rows}, indent=2))
    else:
        for problem in problems.values():
            click.echo(f"damaged: {problem}")
        click.echo(f"{cache.folder}: {len(keys) - len(problems)} of {len(keys)} entries are whole")
    if problems:
        raise InputError(
            f"{cache.folder}: {len(problems)} of {len(keys)} entries are damaged; the next run makes them again, and"
            " `quantpress cache prune --damaged` removes them"
        )


@command.command(name="prune")
@_place_options
@click.option("--older-than", type=Age(), help="Remove what was not used for so long, as in 30d.")
@click.option("--max-size", type=ByteSize(), help="Remove what was not used for longest, down to a size, as in 50G.")
@click.option("--damaged", is_flag=True, help="Remove entries that are damaged; reads all of them.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Remove everything that no run is using, and what is known of outputs: to replace them takes --force then.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune(
    pipeline: Path | None,
    folder: Path | None,
    as_json: bool,
    older_than: float | None,
    max_size: int | None,
    damaged: bool,
    everything: bool,
    dry_run: bool,
) -> None:
    """Make room: remove what is old or too much, never what a run is using."""
    from quantpress.pipelines.cache.prune import Wanted
    from quantpress.pipelines.cache.prune import prune as prune_cache

    if older_than is None and max_size is None and not damaged and not everything:
        raise UsageError("say what to remove: --older-than 30d, --max-size 50G, --damaged or --all")
    with _open(pipeline, folder) as cache:
        broken = frozenset(key for key in cache.kept_keys() if cache.damage(key)) if damaged else frozenset[str]()
        wanted = Wanted(older_than, max_size, everything, broken)
        result = prune_cache(cache, wanted, dry_run=dry_run)
    if as_json:
        record = {
            "cache": str(cache.folder),
            "dry_run": dry_run,
            "removed": [_record(piece) for piece in result.removed],
            "in_use": [_record(piece) for piece in result.in_use],
            "freed_bytes": result.freed,
            "left_bytes": result.left,
        }
        click.echo(json.dumps(record, indent=2))
        return
    _table(list(result.removed), {})
    would = "would be removed" if dry_run else "removed"
    click.echo(f"{cache.folder}: {_count(result.removed)} {would}, {_size(result.freed)}; {_size(result.left)} left")
    if result.in_use:
        click.echo(f"{len(result.in_use)} more in use by a run")


def _record(piece: Piece) -> dict[str, Any]:
    return {
        "state": piece.state,
        "kind": piece.kind,
        "name": piece.name,
        "bytes": piece.nbytes,
        "created": _utc(piece.created) if piece.created else None,
        "used": _utc(piece.used),
    }


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _table(found: list[Piece], labels: dict[str, list[str]]) -> None:
    if not found:
        return
    from rich.table import Table

    from quantpress.pipelines.batch.wording import printable
    from quantpress.pipelines.commands.showing import plain_console

    table = Table("kind", "state", "size", "used", "key", *(["for"] if labels else []))
    for piece in found:
        row = [printable(piece.kind), piece.state, _size(piece.nbytes), _ago(time.time() - piece.used), piece.name[:12]]
        table.add_row(*row, *([printable(", ".join(labels.get(piece.name, [])))] if labels else []))
    plain_console().print(table)


def _count(found: Any) -> str:
    return f"{len(found)} {'piece' if len(found) == 1 else 'pieces'}"


def _size(nbytes: int) -> str:
    from quantpress.pipelines.commands.showing import size_text

    return f"{nbytes / 1e3:.1f} kB" if nbytes < 1e5 else size_text(nbytes)


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name} ago"
    return "just now"
