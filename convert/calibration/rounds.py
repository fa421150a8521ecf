"""Which inputs of a layer are looked at in one pass: those that follow from the same weights and fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantpress.convert.calibration.site import LayerMethod
from quantpress.convert.traits import Place

__all__ = ["STATISTICS_BYTES", "Round", "rounds_of"]

STATISTICS_BYTES = 1 << 30
"""Of Hessians of experts, and of what else a method sees of them, that are in memory at once; one expert at least."""

_FLOAT = 4  # bytes
_SQUARES = frozenset({"hessian", "drift"})  # statistics of (K, K) values


@dataclass(frozen=True, eq=False, slots=True)
class Round:
    """Places of one step that are looked at together.

    Attributes:
        step: their step.
        places: may be empty.
        wants: of each place, what the method is to know; nothing where only the sums of squares are wanted.
    """

    step: int
    places: tuple[Place, ...]
    wants: Mapping[Place, frozenset[str]]


def rounds_of(
    places: Sequence[Place],
    dims: Mapping[str, int],
    method: LayerMethod,
    is_target: Callable[[str], bool],
    *,
    powers: bool = False,
    max_memory: int | None = None,
) -> list[Round]:
    """Gives the rounds of a layer, at least one for each step.

    Args:
        places: of the layer, in the order of the computation.
        dims: sizes by their symbols.
        method: what will be made of them.
        is_target: whether a slot's weight is to be quantized.
        powers: the sums of squares of all inputs are wanted too.
        max_memory: bytes for activations; statistics take no more either, but for a single place.
    """
    wants = {place: _wants(place, places, method, is_target) for place in places}
    limit = STATISTICS_BYTES if max_memory is None else min(STATISTICS_BYTES, max_memory)
    found: list[Round] = []
    for step in sorted({place.step for place in places}):
        parts: list[list[Place]] = [[]]
        taken = 0
        for place in places:
            if place.step != step or not (wants[place] or powers):
                continue
            nbytes = dims[place.columns] ** 2 * _FLOAT * len(_SQUARES & wants[place])
            # what attention over a latent makes of its input follows from weights that are quantized before it
            apart = parts[-1] and place.input != parts[-1][-1].input and step == 0
            if parts[-1] and (apart or taken + nbytes > limit):
                parts.append([])
                taken = 0
            parts[-1].append(place)
            taken += nbytes
        found += [Round(step, tuple(part), {place: wants[place] for place in part}) for part in parts]
    return found


def _wants(
    place: Place, places: Sequence[Place], method: LayerMethod, is_target: Callable[[str], bool]
) -> frozenset[str]:
    """Gives what a method is to know of a place; nothing where it has no target and no other needs it."""
    if not any(is_target(slot) for other in _together(place, places, method) for slot in other.slots):
        return frozenset()
    if place.expert >= 0 and not method.sequential and "hessian" in method.wants:
        return method.wants - {"hessian"} | {"power"}
    return method.wants


def _together(place: Place, places: Sequence[Place], method: LayerMethod) -> list[Place]:
    """Gives the places that a method must see all of to make one scale: those that read the same norm."""
    if method.sequential or place.expert >= 0 or not place.before:
        return [place]
    return [other for other in places if other.before == place.before]
