"""Finds the fixed texts around the messages of a chat template, and checks that they say all that it does.

A template is a program and Ollama's templates are written in another language, so it is not translated but watched:
it renders a few conversations, the texts between the messages are read off, and the same conversations put together
from these texts must give the same. Templates that do more than that (reasoning, tools) are refused or, where it shows
only there, are right without it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CONVERSATIONS", "ChatShape", "render_chat", "shape_of"]

_SECONDS = 20
_PROGRAM = (  # isolated, so that no file of the working folder is taken for a module of Python
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from quantpress.pipelines.report.chat_render import main; main()"
)
_MAX_TEMPLATE = 1 << 18


def _talk(*roles: str) -> tuple[Mapping[str, str], ...]:
    return tuple({"role": role, "content": f"z{role}{place}z"} for place, role in enumerate(roles))


CONVERSATIONS: tuple[tuple[Mapping[str, str], ...], ...] = (
    _talk("user"),
    _talk("user", "assistant", "user"),
    _talk("system", "user"),
    _talk("system", "user", "assistant", "user"),
    _talk("user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """A chat as texts around messages, each turn a user's message and the answer.

    Attributes:
        before_system, after_system: around the system message of the first turn; empty where there is none.
        system: whether the template takes system messages.
        default_system: what it says where none is given, or empty.
        before_user: before a user's message without a system message.
        before_answer, after_answer: around the model's answer.
    """

    before_system: str
    after_system: str
    system: bool
    default_system: str
    before_user: str
    before_answer: str
    after_answer: str

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Puts a conversation together up to where the model answers."""
        found, system = "", self.default_system
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system = content
            elif message["role"] == "user":
                start = f"{self.before_system}{system}{self.after_system}" if system else self.before_user
                found, system = f"{found}{start}{content}{self.before_answer}", ""
            else:
                found += content + self.after_answer
        return found


def render_chat(template: str, bos: str, eos: str) -> list[str | None] | None:
    """Renders `CONVERSATIONS` in a process of its own.

    Args:
        template: Jinja source of a stranger.
        bos: text of the token.
        eos: text of the token.

    Returns:
        A text for each, None where the template refuses it; None for all where it does not end, or takes too much.
    """
    if len(template) > _MAX_TEMPLATE:
        return None
    asked = json.dumps({"template": template, "bos": bos, "eos": eos, "conversations": CONVERSATIONS})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, json.dumps(sys.path)],
            input=asked, capture_output=True, text=True, timeout=_SECONDS, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == len(CONVERSATIONS) else None


def shape_of(rendered: Sequence[str | None], *, bos: str, eos: str, adds_bos: bool) -> ChatShape | None:
    """Reads the fixed texts off rendered conversations.

    Args:
        rendered: of `CONVERSATIONS`, as `render_chat` gives them.
        bos: text of the token.
        eos: text of the token.
        adds_bos: whether the runtime puts `bos` first itself, so that the texts must not.

    Returns:
        The texts, or None where they do not give back every conversation.
    """
    texts = [None if text is None else text.removeprefix(bos) if adds_bos and bos else text for text in rendered]
    single, double, with_system = texts[0], texts[1], texts[2]
    if single is None or double is None:
        return None
    alone = _around(single, "zuser0z")
    between = _around(double, "zassistant1z", "zuser2z")
    if alone is None or between is None:
        return None
    before_user, before_answer = alone
    system = None if with_system is None else _around(with_system, "zsystem0z", "zuser1z")
    shape = _shape(before_user, before_answer, between[1], system, eos)
    for text, messages in zip(texts, CONVERSATIONS, strict=True):
        refused = text is None and messages[0]["role"] == "system"
        if not refused and shape.text(messages) != text:
            return None
    return shape


def _shape(before_user: str, before_answer: str, between: str, system: Sequence[str] | None, eos: str) -> ChatShape:
    if system is None:
        after = between.removesuffix(before_user)
        return ChatShape("", "", False, "", before_user, before_answer, after)
    before_system, after_system = system[0], system[1]
    default = ""
    if not between.endswith(before_user):  # the first turn says more than the others: a system message of its own
        if before_user.startswith(before_system) and before_user.endswith(after_system):
            default = before_user[len(before_system) : len(before_user) - len(after_system)]
        ending = re.match(rf".*?{re.escape(eos)}\s*", between, re.DOTALL) if eos else None
        before_user = between[ending.end() :] if ending else between
    return ChatShape(
        before_system, after_system, True, default, before_user, before_answer, between.removesuffix(before_user)
    )


def _around(text: str, *parts: str) -> list[str] | None:
    """Cuts a text at parts that it holds once each, in this order."""
    pieces = []
    for part in parts:
        if text.count(part) != 1:
            return None
        piece, _, text = text.partition(part)
        pieces.append(piece)
    return [*pieces, text]
