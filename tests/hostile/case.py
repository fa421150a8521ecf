"""A bad file, handmade: how to make it, what to run on it, and how that must end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """One file or folder from a stranger.

    Attributes:
        group: what kind of input it is, `adapter`; each group has a good twin.
        name: what is wrong with it, in words; unique in its group.
        make: writes it into an empty folder and gives the arguments of `quantpress`; outputs go to `folder / "out..."`.
        code: exit code; 0 for a good twin.
        words: pieces that the one `error:` line must hold (a file, a tensor or key, what was found); for code 0 none.
        writes: names, relative to the folder, that may be there afterwards and were not before; for bad input none.
        seconds: CPU time allowed, in seconds, above what starting costs.
        megabytes: memory allowed above what the started program holds.
    """

    group: str
    name: str
    make: Callable[[Path], Sequence[str]]
    code: int = 3
    words: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    seconds: float = 2.0
    megabytes: int = 200

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"
