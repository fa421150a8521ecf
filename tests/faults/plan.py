"""What is to go wrong in which run, from a seed: fault number n of a seed is the same however many there are."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.commands import COMMANDS
from tests.faults.forked import Surroundings
from tests.faults.shim import STEPS, Spoil

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS")
ALL = tuple(COMMANDS)
# Not gptq, imatrix and batch: with little memory one batch gave other GPTQ bytes, and why is not known (torch may take
# other ways to a product); another waited for ever in CPython for a thread that had no memory to begin.
DATA_FREE = ("gguf", "split", "onnx", "merge", "rtn")
FAST = tuple(name for name, command in COMMANDS.items() if not command.slow)


@dataclass(frozen=True)
class Golden:
    """What an undisturbed run of a command was like."""

    files: Mapping[str, bytes]
    steps: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        id: gives it again: `--only ID`.
        around: of the run that is spoiled.
        send: a signal and the share of an undisturbed run's time after which it is sent.
        runs: at once.
        disk: bytes that are free on the disk.
        damage: seed of what is done to the cache, which an undisturbed run has left.
        forced: an older output is there, and is replaced.
    """

    id: str
    kind: str
    command: str
    around: Surroundings = field(default_factory=Surroundings)
    send: tuple[str, float] | None = None
    runs: int = 1
    disk: int | None = None
    damage: int | None = None
    forced: bool = False

    @property
    def text(self) -> str:
        """What goes wrong, for people."""
        spoil = self.around.spoil
        said = [f"{key}={value}" for key, value in vars(spoil).items() if value] if spoil.at else []
        said += [f"{name} limit {value}" for name, value in self.around.limits]
        said += [f"{name} {value}" for name, value in vars(self.around).items() if value in ("full", "closed")]
        said += [f"{self.send[0]} at {self.send[1]:.0%}"] if self.send else []
        said += [f"{self.runs} at once"] if self.runs > 1 else []
        said += [f"{self.disk} bytes free"] if self.disk is not None else []
        said += [f"damage {self.damage}"] if self.damage is not None else []
        return f"{self.kind} {self.command}: {', '.join(said)}{' (over an older output)' if self.forced else ''}"


Parts = dict[str, object]


def _at(random: random.Random, golden: Golden, **spoil: object) -> Parts:
    return {"around": Surroundings(Spoil(at=random.randint(1, max(1, len(golden.steps))), **spoil))}  # type: ignore[arg-type]


def _kill(random: random.Random, golden: Golden) -> Parts:
    return _at(random, golden, signal="SIGKILL", short=random.random() < 0.5) | {"forced": random.random() < 0.3}


def _stop(random: random.Random, golden: Golden) -> Parts:
    return _at(random, golden, signal=random.choice(("SIGINT", "SIGTERM"))) | {"forced": random.random() < 0.3}


def _moment(random: random.Random, golden: Golden) -> Parts:
    del golden
    return {"send": (random.choice(("SIGKILL", "SIGINT", "SIGTERM")), random.random())}


def _errno(random: random.Random, golden: Golden) -> Parts:
    kind = random.choice(sorted(set(golden.steps)))
    spoil = Spoil(random.randint(1, golden.steps.count(kind)), (kind,), random.choice(ERRORS))
    return {"around": Surroundings(spoil), "forced": random.random() < 0.3}


def _short(random: random.Random, golden: Golden) -> Parts:
    count = max(1, golden.steps.count("write"))
    spoil = Spoil(random.randint(1, count), ("write",), random.choice(("ENOSPC", "EIO", "EDQUOT")), short=True)
    return {"around": Surroundings(spoil)}


def _full(random: random.Random, golden: Golden) -> Parts:
    kinds = tuple(kind for kind in STEPS if kind not in ("unlink", "remove", "rmdir", "rename", "replace"))
    error = random.choice(("ENOSPC", "EDQUOT", "EROFS"))
    if error == "EROFS":  # nothing works from then on
        kinds = ()
    return _at(random, golden, kinds=kinds, error=error, sticky=True)


def _file_size(random: random.Random, golden: Golden) -> Parts:
    largest = max(map(len, golden.files.values()))
    return {"around": Surroundings(limits=(("fsize", random.randint(0, largest + largest // 10)),))}


def _open_files(random: random.Random, golden: Golden) -> Parts:
    del golden
    return {"around": Surroundings(limits=(("nofile", random.randint(4, 24)),))}


def _memory(random: random.Random, golden: Golden) -> Parts:
    del golden
    return {"around": Surroundings(limits=(("as", random.randint(0, 256) << 20),))}


def _disk(random: random.Random, golden: Golden) -> Parts:
    return {"disk": int(random.uniform(0, 1.5) * sum(map(len, golden.files.values())))}


def _cache(random: random.Random, golden: Golden) -> Parts:
    del golden
    return {"damage": random.getrandbits(30)}


def _together(random: random.Random, golden: Golden) -> Parts:
    del golden
    return {"runs": random.choice((2, 2, 3)), "forced": random.random() < 0.3}


def _input(random: random.Random, golden: Golden) -> Parts:
    return _at(random, golden, act=random.choice(("truncated", "changed", "deleted", "replaced")))


def _streams(random: random.Random, golden: Golden) -> Parts:
    del golden
    pair = random.choice((("full", "file"), ("file", "full"), ("full", "full"), ("closed", "file"), ("file", "closed")))
    return {"around": Surroundings(stdout=pair[0], stderr=pair[1])}


def _folder(random: random.Random, golden: Golden) -> Parts:
    return _at(random, golden, act=random.choice(("gone", "moved", "link")))


_Make = Callable[[random.Random, Golden], Parts]
KINDS: Mapping[str, tuple[Sequence[str], _Make]] = {
    "kill": (ALL, _kill),
    "stop": (ALL, _stop),
    "moment": (ALL, _moment),
    "errno": (ALL, _errno),
    "short": (FAST, _short),
    "full": (FAST, _full),
    "file-size": (FAST, _file_size),
    "open-files": (FAST, _open_files),
    "memory": (DATA_FREE, _memory),
    "disk": (FAST, _disk),
    "cache": (("batch",), _cache),
    "together": (FAST, _together),
    "input": (FAST, _input),
    "streams": (FAST, _streams),
    "folder": (FAST, _folder),
}
_WEIGHTS = {"kill": 2, "stop": 2, "errno": 4, "cache": 6}  # how often a pair of kind and command comes in a round


def pairs(kinds: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Gives kinds and commands in the order in which faults are made of them, slow commands once a round."""
    found = [
        (kind, command)
        for kind in kinds
        for command in KINDS[kind][0]
        for _ in range(1 if COMMANDS[command].slow else _WEIGHTS.get(kind, 1))
    ]
    random.Random(seed).shuffle(found)
    return found


def fault(number: int, seed: int, kinds: Sequence[str], golden: Mapping[str, Golden]) -> Fault:
    """Gives a fault by its number."""
    order = pairs(kinds, seed)
    kind, command = order[number % len(order)]
    parts = KINDS[kind][1](random.Random(f"{seed}/{number}"), golden[command])
    return Fault(f"{seed}-{number}", kind, command, **parts)  # type: ignore[arg-type]
