"""The page that speaks of hostile files says how many there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.count import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trust.md"


def test_the_page_has_the_table_of_hostile_files() -> None:
    if not PAGE.is_file() or "| input |" not in PAGE.read_text():
        pytest.skip("the page has no table of hostile files yet: python -m tests.hostile.count prints it")
    assert table() in PAGE.read_text()
