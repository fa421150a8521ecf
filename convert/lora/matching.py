r"""Matches paths of modules as PEFT does, for lists of names as well as for regular expressions.

Each class stands for one of PEFT's rules and answers exactly as it does, in time that does not grow with the number of
names where they are plain names, which all but a few are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from quantpress.convert.lora.patterns import Budget, Pattern, compile_pattern, is_plain

__all__ = ["EndPatterns", "InnerNames", "Names", "path_ends"]


def path_ends(path: str) -> Iterator[str]:
    """Gives a path and what stands behind each of its dots, longest first."""
    yield path
    while path:
        _, dot, path = path.partition(".")
        if dot:
            yield path


@dataclass(frozen=True)
class Names:
    """`target_modules` and `exclude_modules`: a regular expression for the whole path, or a list of its ends.

    PEFT: tuners_utils.py check_target_module_exists.
    """

    names: str | tuple[str, ...]
    budget: Budget

    @cached_property
    def _pattern(self) -> Pattern | None:
        return compile_pattern(self.names, self.budget) if isinstance(self.names, str) else None

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(() if isinstance(self.names, str) else self.names)

    def names_whole(self, path: str) -> bool:
        """Whether the list holds the path itself and not only an end of it."""
        return self._pattern is None and path in self._ends

    @cached_property
    def _known(self) -> dict[str, bool]:
        return {}

    def match(self, path: str) -> bool:
        """Whether the path is meant."""
        if self._pattern is not None:
            if path not in self._known:
                self._known[path] = self._pattern.fullmatch(path)
            return self._known[path]
        return any(end in self._ends for end in path_ends(path))


@dataclass(frozen=True)
class InnerNames:
    r"""`modules_to_save` where it keeps adapters away: a pattern for whole parts anywhere in the path.

    PEFT: tuners_utils.py check_target_module_exists, `(^|.*\.){name}($|\..*)`.
    """

    names: tuple[str, ...]
    budget: Budget

    @cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset(name for name in self.names if is_plain(name) and "." not in name)

    @cached_property
    def _patterns(self) -> tuple[Pattern, ...]:
        others = (name for name in self.names if name not in self._parts)
        return tuple(compile_pattern(rf"(^|.*\.){name}($|\..*)", self.budget) for name in others)

    def match(self, path: str) -> bool:
        """Whether the path holds one of the names."""
        return not self._parts.isdisjoint(path.split(".")) or any(pattern.match(path) for pattern in self._patterns)


@dataclass
class _PlainEnds:
    """Plain patterns of one length with dots in the same places, where a dot stands for any character."""

    dots: tuple[int, ...]
    first: dict[str, int] = field(default_factory=dict)

    def masked(self, end: str) -> str:
        for place in self.dots:
            end = f"{end[:place]}.{end[place + 1 :]}"
        return end


@dataclass(frozen=True)
class EndPatterns:
    r"""Keys of `rank_pattern` and `alpha_pattern`: the first that matches an end of the path wins.

    PEFT: utils/other.py get_pattern_key, `(.*\.)?({key})$`.
    """

    keys: Sequence[str]
    budget: Budget

    @cached_property
    def _plain(self) -> dict[int, list[_PlainEnds]]:
        groups: dict[tuple[int, tuple[int, ...]], _PlainEnds] = {}
        for index, key in enumerate(self.keys):
            if is_plain(key):
                dots = tuple(place for place, char in enumerate(key) if char == ".")
                groups.setdefault((len(key), dots), _PlainEnds(dots)).first.setdefault(key, index)
        by_length: dict[int, list[_PlainEnds]] = {}
        for (length, _), group in groups.items():
            by_length.setdefault(length, []).append(group)
        return by_length

    @cached_property
    def _patterns(self) -> tuple[tuple[int, Pattern], ...]:
        return tuple(
            (index, compile_pattern(rf"(.*\.)?({key})$", self.budget))
            for index, key in enumerate(self.keys)
            if not is_plain(key)
        )

    def first(self, path: str) -> str | None:
        """Gives the key that PEFT takes for a path, or None."""
        found = len(self.keys)
        for end in path_ends(path):
            groups = self._plain.get(len(end), ())
            self.budget.spend(len(groups))
            found = min([found, *(group.first.get(group.masked(end), found) for group in groups)])
        for index, pattern in self._patterns:
            if index >= found or pattern.match(path):
                found = min(found, index)
                break
        return self.keys[found] if found < len(self.keys) else None
