"""How many hostile files there are, as a table: `python -m tests.hostile.count`."""

from __future__ import annotations

from collections import Counter

from tests.hostile.every import every_case

__all__ = ["table"]


def table() -> str:
    """Gives the table, in Markdown."""
    bad = Counter(case.group for case in every_case() if case.code)
    good = Counter(case.group for case in every_case() if not case.code)
    rows = [f"| {group} | {bad[group]} | {good[group]} |" for group in sorted(bad | good)]
    total = f"| all | {bad.total()} | {good.total()} |"
    return "\n".join(["| input | bad | good |", "|---|---|---|", *rows, total])


if __name__ == "__main__":
    print(table())  # noqa: T201 - a program
