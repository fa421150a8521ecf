"""The text that is used when the user names none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from quantpress.pipelines.default_text import default_text
from quantpress.quant.errors import OutputError


def test_it_is_the_same_in_every_process_and_names_its_hash() -> None:
    script = "from quantpress.pipelines.default_text import default_text; print(default_text().sha256)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    text = default_text()
    assert text.sha256 == hashlib.sha256(text.text.encode("utf-8")).hexdigest() == other


def test_it_is_enough_for_twenty_chunks_of_512_at_five_characters_a_token() -> None:
    assert len(default_text().text) >= 2 * 20 * 512 * 5


def test_it_consists_of_whole_topics_in_alphabetical_order() -> None:
    from pydoc_data.topics import topics

    names = sorted(topics)
    text = default_text().text
    counts = [count for count in range(len(names) + 1) if "\n".join(topics[name] for name in names[:count]) == text]
    assert len(counts) == 1


def test_the_order_of_the_module_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics={"b": "second", "a": "first"}))
    assert default_text().text == "first\nsecond"


def test_a_python_without_the_topics_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(OutputError, match=r"pydoc_data\.topics.*--text"):
        default_text()
