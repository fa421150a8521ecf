"""Makes runs go wrong, one fault each, and checks what RELIABILITY promises.

Usage: python -m tests.faults.run [--faults N] [--seed N] [--kind NAME]... [--command NAME]... [--only ID]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults import shim

shim.prepare()  # before quantpress is imported

from tests.faults.commands import COMMANDS, make_inputs  # noqa: E402
from tests.faults.forked import in_child, preload  # noqa: E402
from tests.faults.perform import Verdict, perform, undisturbed  # noqa: E402
from tests.faults.plan import KINDS, Fault, Golden, fault, pairs  # noqa: E402
from tests.faults.planted import PLANTED  # noqa: E402


def prepare(material: Path, names: Sequence[str]) -> dict[str, Golden]:
    """Makes the inputs, imports what the commands import, and runs each command undisturbed."""
    inputs = material / "inputs"
    inputs.mkdir(parents=True)
    in_child(lambda: make_inputs(inputs), material / "making")
    os.environ["QUANTPRESS_FAULTS_MODULES"] = "1"
    undisturbed(names, material, "first")
    del os.environ["QUANTPRESS_FAULTS_MODULES"]
    for name in names:
        preload(material / "first-logs" / name / "modules")
    return undisturbed(names, material, "golden")


def planned(options: argparse.Namespace, golden: dict[str, Golden]) -> list[Fault]:
    """Gives the faults that are asked for."""
    kinds = tuple(options.kind or KINDS)
    if options.only:
        seed, number = options.only.split("-")
        return [fault(int(number), int(seed), kinds, golden)]
    order = pairs(kinds, options.seed)
    wanted = [place for place, pair in enumerate(order) if not options.command or pair[1] in options.command]
    numbers = (place + rounds * len(order) for rounds in itertools.count() for place in wanted)
    return [fault(number, options.seed, kinds, golden) for number in itertools.islice(numbers, options.faults)]


def work(faults: Sequence[Fault], golden: dict[str, Golden], root: Path, jobs: int) -> list[Verdict]:
    """Does faults in so many processes, which share out their numbers."""
    if jobs == 1:
        return [_one(each, golden, root) for each in faults]
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.starmap(_one, [(each, golden, root) for each in faults], chunksize=1)


def until_broken(faults: Sequence[Fault], golden: dict[str, Golden], root: Path) -> list[Verdict]:
    """Does faults one by one until one finds something; what is planted may hang in the others."""
    verdicts: list[Verdict] = []
    for each in faults:
        verdicts.append(_one(each, golden, root))
        if verdicts[-1].wrong:
            break
    return verdicts


def _one(each: Fault, golden: dict[str, Golden], root: Path) -> Verdict:
    verdict = perform(each, golden[each.command], root / "material", root / each.id)
    if verdict.wrong:
        say("\n    ".join((f"BROKEN {each.id} {each.text}", *verdict.wrong)))
    return verdict


def say(text: str) -> None:
    """Writes at once, for several processes write."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(verdicts: Sequence[Verdict]) -> str:
    """Faults, those after which everything held, and those after which it did not, by kind and command."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for verdict in verdicts:
        state = "skipped" if verdict.skipped else "broken" if verdict.wrong else "held"
        for command in (verdict.fault.command, "all"):
            for kind in (verdict.fault.kind, "all"):
                counts[kind, command, state] += 1
    commands = [name for name in (*COMMANDS, "all") if any(key[1] == name for key in counts)]
    lines = [f"{'held/faults':12}" + "".join(f"{name:>10}" for name in commands)]
    for kind in (*KINDS, "all"):
        cells = []
        for command in commands:
            held, broken, skipped = (counts[kind, command, state] for state in ("held", "broken", "skipped"))
            said = f"{held}/{held + broken}" if held + broken else ""
            cells.append(f"{said + (f' -{skipped}' if skipped else ''):>10}")
        if any(cell.strip() for cell in cells):
            lines.append(f"{kind:12}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; 1 when something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100, help="how many [100]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only these kinds")
    parser.add_argument("--command", action="append", choices=list(COMMANDS), help="only these commands")
    parser.add_argument("--only", help="one fault by its id, with the --kind of the run that named it")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", type=Path, help="JSON of every fault and of what held")
    parser.add_argument("--plant", choices=list(PLANTED), help="break the product so, to see that it is found")
    parser.add_argument("--keep", type=Path, help="a new folder for the work, which stays")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    kinds = tuple(options.kind or KINDS)
    names = [name for name in COMMANDS if name in {pair[1] for pair in pairs(kinds, 0)}]
    if options.only is None and options.command:
        names = [name for name in names if name in options.command]
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        root = options.keep or Path(place)
        golden = prepare(root / "material", names)
        if options.plant:
            PLANTED[options.plant].plant()
            verdicts = until_broken(planned(options, golden), golden, root)
        else:
            verdicts = work(planned(options, golden), golden, root, options.jobs)
    say(table(verdicts))
    if options.report:
        options.report.write_text(json.dumps([_record(verdict) for verdict in verdicts], indent=1))
    broken = [verdict.fault.id for verdict in verdicts if verdict.wrong]
    if broken:
        again = "".join(f" --kind {kind}" for kind in options.kind or ())
        say(f"{len(broken)} broken; again: python -m tests.faults.run{again} --only {broken[0]}")
    return 1 if broken else 0


def _record(verdict: Verdict) -> dict[str, object]:
    fault = verdict.fault
    record = {"id": fault.id, "kind": fault.kind, "command": fault.command, "fault": fault.text, "code": verdict.code}
    return record | {"wrong": verdict.wrong, "said": verdict.said, "cpu": verdict.cpu, "skipped": verdict.skipped}


if __name__ == "__main__":
    sys.exit(main())
