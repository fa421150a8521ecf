"""How times and names are written for people: the same in the live view, in plain lines and in tables."""

from __future__ import annotations

import math

from quantpress.pipelines.batch.tasks import Task

__all__ = ["duration", "error_line", "printable", "roughly", "task_name", "time_class"]

_CLASSES = ((60.0, "seconds"), (40 * 60.0, "minutes"), (90 * 60.0, "an hour"), (48 * 3600.0, "hours"))
_TENTHS = 9.95  # seconds; from here on a tenth says nothing


def printable(text: str) -> str:
    """Escapes what a terminal would obey and what would break a line: names come from files and folders."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def error_line(text: str) -> str:
    """Gives an error as one line."""
    return printable(" ".join(text.split()))


def task_name(task: Task) -> str:
    """Names a task for people: job and step."""
    return printable(f"{task.job}: {task.title}")


def duration(seconds: float) -> str:
    """Writes a time that has passed: "4.2 s", "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < _TENTHS:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def roughly(seconds: float) -> str:
    """Writes a guess as roughly as it is meant: "a few seconds", "about 40 s", "about 2 h 20 min", "about 3 days"."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 95:
        return f"about {10 * math.ceil(seconds / 10)} s"
    if seconds < 58 * 60:
        return f"about {math.ceil(seconds / 60)} min"
    if seconds < 48 * 3600:
        tens = math.ceil(seconds / 600)
        return f"about {tens // 6} h" + (f" {tens % 6 * 10} min" if tens % 6 else "")
    return f"about {round(seconds / 86400)} days"


def time_class(seconds: float) -> str:
    """Gives the order of magnitude of an estimate: "seconds", "minutes", "an hour", "hours" or "days"."""
    return next((name for limit, name in _CLASSES if seconds < limit), "days")
