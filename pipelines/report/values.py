"""Reads what sidecars hold without trusting it, and says numbers as people do.

A sidecar may come from a third-party stage or from a disk where somebody edited it: a value of another type than was
promised counts as not there, and a text is shown with everything escaped that a terminal or a browser would act on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "bytes_text",
    "count",
    "items",
    "mapping",
    "memory_text",
    "number",
    "percent_text",
    "plain",
    "said",
    "seconds_text",
    "significant",
    "text",
]

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def mapping(value: Any) -> Mapping[str, Any]:
    """Gives a mapping, an empty one where something else is."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Mapping[str, Any]]:
    """Gives the mappings of a list."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, (list, tuple)) else []


def number(value: Any) -> float | None:
    """Gives a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def count(value: Any) -> int:
    """Gives a whole number that is not negative; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def text(value: Any, limit: int = 300) -> str:
    """Gives a text as `plain` does; empty for anything but a text."""
    return plain(value, limit) if isinstance(value, str) else ""


def said(value: Any, limit: int = 160) -> str:
    """Gives a text, a number or a yes or no as `plain` does, and a dash for anything else, nan and infinities too."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return plain(value, limit)
    found = number(value)
    return "–" if found is None else plain(value if isinstance(value, int) else f"{found:.6g}", limit)


def plain(value: object, limit: int = 300) -> str:
    """Gives a value as one line in which every character can be seen; the end is cut after `limit` characters."""
    whole = str(value)
    start = whole[:limit]
    if not start.isprintable():
        start = "".join(char if char.isprintable() else _escaped(char) for char in start)
    return start + ("…" if len(whole) > limit else "")


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def significant(value: float | None, digits: int = 3) -> str:
    """Gives a number with so many significant digits: 0.00482, 8.62e-08; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10**6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    return f"{value:.{digits - 1}e}"


def percent_text(share: float | None, places: int = 2) -> str:
    """Gives a share in per cent; a dash for None."""
    return "–" if share is None else f"{100 * share:.{places}f} %"


def bytes_text(nbytes: float | None) -> str:
    """Gives bytes in decimal units, as the Hub and file managers do; a dash for None and for nothing."""
    if not nbytes:
        return "–"
    size, unit = next(((size, unit) for size, unit in _UNITS if nbytes >= size), (1, "B"))
    return f"{nbytes:.0f} B" if size == 1 else f"{significant(nbytes / size)} {unit}"


def memory_text(nbytes: float | None) -> str:
    """Gives bytes of memory in MiB or GiB; a dash for None and for nothing."""
    if not nbytes:
        return "–"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


def seconds_text(seconds: float | None) -> str:
    """Gives a time as people say it: 0.8 s, 42 s, 3 min 5 s, 2 h 10 min; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
