"""Takes what a class's docstring says of its attributes (google style), for `quantpress stages` and the JSON Schema."""

from __future__ import annotations

import inspect
import re
import sys

__all__ = ["attribute_docs", "summary"]

_ENTRY = re.compile(r"((?:\w+,\s+)*\w+):\s+(.+)", re.DOTALL)
_AS_OTHER = re.compile(r"[Aa]s `(\w+)`\..*", re.DOTALL)


_POINTER = re.compile(r"; (?:further )?options (?:as|of) [^;.]*")


def summary(kind: type) -> str:
    """Gives the first line of a class's docstring; of one that speaks of options alone, its module's first sentence."""
    line = ((kind.__doc__ or "").strip().splitlines() or [""])[0]
    if line.startswith("Options of "):
        text = (getattr(sys.modules.get(kind.__module__), "__doc__", None) or line).strip()
        line = " ".join(text.partition("\n\n")[0].split())
    return _POINTER.sub("", line)


def attribute_docs(kind: type) -> dict[str, str]:
    """Gives the description of every attribute that the docstrings of a class and of its parents describe.

    What is described "as `Other`" is looked up in the class of that name, where the class's module has it.
    """
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        for name, text in _own_docs(parent).items():
            found[name] = re.sub(r"\bNone\b", "null", _followed(name, text, parent))
    return found


def _own_docs(kind: type) -> dict[str, str]:
    """Gives the entries of a docstring's `Attributes` section."""
    if "__doc__" not in vars(kind) or not kind.__doc__:
        return {}
    lines = inspect.cleandoc(kind.__doc__).splitlines()
    if "Attributes:" not in lines:
        return {}
    section: list[str] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        section.append(line)
    # an entry starts with the least indentation; what is deeper goes on with it
    body = inspect.cleandoc("\n" + "\n".join(section))
    entries = re.split(r"\n(?=\S)", body)
    found: dict[str, str] = {}
    for entry in entries:
        if match := _ENTRY.fullmatch(" ".join(entry.split())):
            found |= dict.fromkeys((name.strip() for name in match[1].split(",")), match[2])
    return found


def _followed(name: str, text: str, kind: type) -> str:
    """Gives the description that a text points to."""
    match = _AS_OTHER.fullmatch(text)
    if match is None:
        return text
    other = getattr(sys.modules.get(kind.__module__), match[1], None) or _class_named(match[1])
    if other is None or other is kind:
        return text
    return attribute_docs(other).get(name, text)


def _class_named(name: str) -> type | None:
    """Finds a stage's class by its name among the modules of this package that are loaded."""
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith("quantpress.") and isinstance(found := getattr(module, name, None), type):
            return found
    return None
