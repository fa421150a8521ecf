"""The texts that judge and calibrate a model when the user names none: the help topics that ship with every Python.

It is English prose mixed with code, public, present without a download and the same for everybody on one Python
version. It differs between Python versions, so reports carry its SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass

from quantpress.quant.errors import OutputError

__all__ = ["BUILT_IN_NOTE", "Text", "calibration_text", "default_text"]

_MODULE = "pydoc_data.topics"
_CHARS = 160_000  # 40,000 tokens and more: 78 chunks of 512 with the largest vocabularies, some hundred with small ones
BUILT_IN_NOTE = (
    "calibrated on the built-in text, Python's help topics: give --calibration with text like what the model will read"
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its identity.

    Attributes:
        text: the characters.
        sha256: SHA-256 of the text in UTF-8, lower-case hexadecimal.
        name: where it comes from, for reports.
    """

    text: str
    sha256: str
    name: str


def default_text() -> Text:
    """The help topics in alphabetical order, whole topics, until at least 160,000 characters are reached.

    Raises:
        OutputError: this Python comes without the topics (some distributions leave them out).
    """
    judging, _ = _topics("--text")
    return _joined(judging)


def calibration_text() -> Text:
    """The topics that `default_text` leaves: what a model was calibrated on must not judge it.

    Raises:
        OutputError: this Python comes without the topics.
    """
    _, rest = _topics("--calibration")
    return _joined(rest)


def _topics(flag: str) -> tuple[list[str], list[str]]:
    """Gives the topics that judge, and the rest."""
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise OutputError(
            f"the built-in text is the standard library's {_MODULE}, which this Python lacks; name a text with {flag}"
        ) from error
    topics: dict[str, str] = module.topics
    judging: list[str] = []
    rest: list[str] = []
    chars = 0
    for name in sorted(topics):
        (judging if chars < _CHARS else rest).append(topics[name])
        chars += len(topics[name])
    return judging, rest


def _joined(parts: list[str]) -> Text:
    text = "\n".join(parts)
    return Text(text, hashlib.sha256(text.encode("utf-8")).hexdigest(), f"{_MODULE} of the standard library")
