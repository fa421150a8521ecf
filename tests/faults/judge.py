"""What must hold after a run was spoiled, and after it was run again: RELIABILITY, as code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.commands import Command, contents, unfinished
from tests.faults.forked import Ended
from tests.faults.plan import Fault

_STOPPED = {"SIGKILL": (-9,), "SIGINT": (130,), "SIGTERM": (143,)}
_ALLOWED = {  # exit codes beside 0, by kind; a batch may say 7 instead
    "open-files": (3, 5),
    "memory": (3, 5, -6, -11, 127),  # native code that finds no memory ends the process, the C library with 127
    "input": (3,),
    "together": (2, 6),
    "streams": (1, 5),
}
_MESSAGE = 1500  # characters that an error has at most


def codes(fault: Fault) -> tuple[int, ...]:
    """Exit codes that a spoiled run may have; 0 only with everything as it should be."""
    stopped = fault.send[0] if fault.send else fault.around.spoil.signal
    if stopped:
        return (0, *_STOPPED[stopped])
    return (0, *_ALLOWED.get(fault.kind, (5,)), *((7,) if fault.command == "batch" else ()))


def spoiled(fault: Fault, command: Command, folder: Path, ended: Ended, whole: Mapping[str, bytes]) -> list[str]:
    """What does not hold after a run that was spoiled."""
    wrong = _ending(fault, ended)
    found = contents(folder)
    if fault.kind == "folder":  # what was written lies where the folder was moved to, or beside it
        found |= contents(folder, "gone") | contents(folder, "other")
    moved = fault.around.spoil.act in ("gone", "moved", "link")
    wrong += half(found, whole, killed=-9 in codes(fault) or moved)
    deleted = fault.around.spoil.act == "gone"  # perhaps when all was done
    if ended.code == 0 and fault.kind != "together" and not deleted and found != whole:
        wrong.append(f"exit 0 with other outputs: {_differing(found, whole)}")
    if ended.code in (0, 1, 2, 3, 5, 6, 7, 130, 143) and -9 not in codes(fault) and not _cannot_clean(fault):
        left = [name for name in unfinished(folder) if not (command.resumes and ".work" in name)]
        wrong += [f"left behind: {name}" for name in left]
    return wrong


def half(found: Mapping[str, bytes], whole: Mapping[str, bytes], *, killed: bool) -> list[str]:
    """Outputs of which only a part is there, or not what should be."""
    wrong = [f"{name} is not what it should be" for name, data in found.items() if whole.get(name) != data]
    for group in {_group(name) for name in found}:
        members = [name for name in whole if _group(name) == group and not name.endswith("quantpress.json")]
        missing = sorted(name for name in members if name not in found)
        if missing and not (killed and members[0] in missing and "-of-" in members[0]):
            wrong.append(f"half an output: {group} lacks {', '.join(missing)}")
    return wrong


def repeated(fault: Fault, folder: Path, ended: Ended, whole: Mapping[str, bytes]) -> list[str]:
    """What does not hold after the plain command was run again.

    A lock that could not be removed binds nobody, for nobody holds it; a batch whose outputs stand does not touch it.
    """
    wrong = [] if ended.code == 0 else [f"run again: exit {ended.code}: {ended.said[-600:]}"]
    found = contents(folder)
    if found != whole:
        wrong.append(f"run again: other outputs: {_differing(found, whole)}")
    left = [name for name in unfinished(folder) if not (_cannot_clean(fault) and name.endswith(".lock"))]
    return wrong + [f"run again: left behind: {name}" for name in left]


def _ending(fault: Fault, ended: Ended) -> list[str]:
    wrong = ["it hung"] if ended.hung else []
    if ended.code not in codes(fault):
        wrong.append(f"exit {ended.code}, not one of {codes(fault)}: {ended.said[-600:]}")
    if "Traceback" in ended.said or "Exception ignored" in ended.said or ended.traceback:
        wrong.append(f"a traceback: {(ended.traceback or ended.said)[-900:]}")
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    shown = fault.around.stderr == "file"
    if shown and ended.code in (2, 3, 5, 6, 7) and (len(errors) != 1 or len(errors[0]) > _MESSAGE):
        wrong.append(f"exit {ended.code} with {len(errors)} error lines: {ended.said[-600:]}")
    return wrong


def _cannot_clean(fault: Fault) -> bool:
    """Whether the fault is that nothing can be removed, or takes the folder away."""
    spoil = fault.around.spoil
    removing = {"unlink", "remove", "rmdir"} & set(spoil.kinds)
    return bool(removing) or (spoil.sticky and not spoil.kinds) or fault.kind in ("folder", "open-files")


def _group(name: str) -> str:
    """The output that a file belongs to: its folder, or the whole of a split file."""
    top = name.split("/")[0]
    return top.split("-0000")[0].removesuffix(".quantpress.json").removesuffix(".gguf")


def _differing(found: Mapping[str, bytes], whole: Mapping[str, bytes]) -> str:
    names: Sequence[str] = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
    return ", ".join(f"{name} ({'missing' if name not in found else 'differs'})" for name in names)[:600]
