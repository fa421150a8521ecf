"""The page of families is what the tables and the cases say."""

from __future__ import annotations

from pathlib import Path

from tests.families.page import page


def test_the_page_is_up_to_date() -> None:
    written = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    assert written.read_text(encoding="utf-8") == page(), "python -m tests.families.page > docs/families.md"
