"""A program that renders a chat template of a stranger: Jinja in a sandbox, in a process with little time and memory.

It reads JSON `{"template", "bos", "eos", "conversations"}` from stdin and writes a JSON list with a text for each
conversation, or null where the template refuses it. The environment is the one that transformers gives templates
(utils/chat_template_utils.py, _compile_jinja_template), without a clock.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

_SECONDS = 3
_BYTES = 1 << 30
_MAX_TEXT = 1 << 16  # characters of one conversation


def _render(template: str, tokens: Mapping[str, str], conversations: Sequence[Any]) -> list[str | None]:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> NoReturn:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    rendered: list[str | None] = []
    for messages in conversations:
        try:
            found = environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, bos_token=tokens["bos"], eos_token=tokens["eos"]
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
            found = None
        rendered.append(found if found is not None and len(found) <= _MAX_TEXT else None)
    return rendered


def main() -> None:
    """Renders what stdin asks for."""
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    asked = json.load(sys.stdin)
    json.dump(_render(asked["template"], asked, asked["conversations"]), sys.stdout)


if __name__ == "__main__":
    main()
