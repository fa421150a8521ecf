"""Spoils a run, looks at what it left, and runs it again."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import judge
from tests.faults.cache_damage import damage
from tests.faults.commands import COMMANDS, Command, contents, lay_out
from tests.faults.forked import Ended, Started, run
from tests.faults.plan import Fault, Golden


class NotPossibleError(Exception):
    """This machine does not let a fault be made."""


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Attributes:
        wrong: what does not hold; () when everything does.
        code: how the spoiled run ended.
        said: what it said last.
    """

    fault: Fault
    wrong: tuple[str, ...]
    code: int = 0
    said: str = ""
    cpu: float = 0.0
    skipped: str = ""


def perform(fault: Fault, golden: Golden, material: Path, folder: Path) -> Verdict:
    """Does one fault in a folder of its own, which is removed when everything held.

    Args:
        fault: what goes wrong.
        golden: the undisturbed run.
        material: `inputs`, and `golden/COMMAND` as the undisturbed runs left them.
        folder: a new one.
    """
    command = COMMANDS[fault.command]
    place = folder / "run"
    folder.mkdir(parents=True)
    try:
        if fault.disk is not None:
            _mount(place, material / "inputs", fault.disk)
        _prepare(fault, material, place)
        wrong, ends = _spoil(fault, command, golden, folder, place)
        wrong += _again(fault, command, golden, material, folder, place, ends)
    except NotPossibleError as reason:
        return Verdict(fault, (), skipped=str(reason))
    finally:
        if fault.disk is not None:
            subprocess.run(["umount", place], check=False, capture_output=True)
    if not wrong:
        shutil.rmtree(folder)
    cpu = sum(ended.cpu for ended in ends)
    return Verdict(fault, tuple(wrong), ends[0].code, ends[0].said[-400:], cpu)


def _prepare(fault: Fault, material: Path, place: Path) -> None:
    if fault.damage is not None:
        shutil.copytree(material / "golden" / fault.command, place, symlinks=True)
        damage(place / "cache", random.Random(fault.damage))
        shutil.rmtree(place / "out")
        return
    shutil.copytree(material / "inputs", place, dirs_exist_ok=True)
    if fault.forced:
        shutil.copytree(material / "golden" / fault.command / "out", place / "out")


def _spoil(fault: Fault, command: Command, golden: Golden, folder: Path, place: Path) -> tuple[list[str], list[Ended]]:
    used = command.forced() if fault.forced else command
    started = [Started(place, used.arguments, fault.around, folder / f"log{n}") for n in range(fault.runs)]
    if fault.send is not None:
        name, share = fault.send
        time.sleep(share * golden.seconds)
        started[0].send(getattr(signal, name))
    ends = [each.wait() for each in started]
    wrong = [text for ended in ends for text in judge.spoiled(fault, command, place, ended, golden.files)]
    if fault.runs > 1 and (all(ended.code for ended in ends) or contents(place) != golden.files):
        wrong.append(f"several at once: exits {[ended.code for ended in ends]}, outputs {sorted(contents(place))}")
    if fault.disk is not None and _must_foresee(fault, golden) and "are needed" not in ends[0].said:
        wrong.append(f"a full disk was not foreseen: {ends[0].said[-600:]}")
    return wrong, ends


def _must_foresee(fault: Fault, golden: Golden) -> bool:
    """Whether the disk has no room even for the greatest file of the output."""
    assert fault.disk is not None
    return fault.command != "imatrix" and fault.disk < max(map(len, golden.files.values()))


def _again(
    fault: Fault, command: Command, golden: Golden, material: Path, folder: Path, place: Path, ends: list[Ended]
) -> list[str]:
    """Undoes what was done to the folders, runs the plain command again, and looks."""
    if fault.disk is not None:
        subprocess.run(["mount", "-o", "remount,size=1g", place], check=True, capture_output=True)
    if fault.kind == "folder":
        for name in ("out", "gone", "other"):
            path = place / name
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(material / "inputs", place, dirs_exist_ok=True)
    ends.append(run(place, command.arguments, folder / "again"))
    if (
        ends[-1].code in (2, 7 if fault.forced else 2) and "exist" in ends[-1].said
    ):  # it was whole, and nothing is replaced without --force
        ends.append(run(place, command.forced().arguments, folder / "forced"))
    return judge.repeated(fault, place, ends[-1], golden.files)


def _mount(place: Path, inputs: Path, free: int) -> None:
    """Mounts a small disk that has so many bytes left beside the inputs."""
    place.mkdir()
    page = 4096
    files = list(inputs.rglob("*"))
    used = sum(page + -(-path.stat().st_size // page) * page for path in files)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={used + free}", "faults", place], check=False, capture_output=True
    )
    if done.returncode:
        raise NotPossibleError("mount: " + done.stderr.decode(errors="replace").strip()[:100])


def undisturbed(names: Sequence[str], material: Path, round_name: str) -> dict[str, Golden]:
    """Runs commands as they are meant to be run."""
    found = {}
    for name in names:
        place = lay_out(material / "inputs", material / round_name / name)
        ended = run(place, COMMANDS[name].arguments, material / f"{round_name}-logs" / name)
        if ended.code:
            raise RuntimeError(f"{name} fails when nothing is spoiled: exit {ended.code}: {ended.said}")
        found[name] = Golden(contents(place), ended.steps, ended.seconds)
    return found
