"""Ollama's Modelfile for a GGUF file: only what is known, and what is assumed is said in it.

Instructions and parameters: Ollama, docs/modelfile.mdx. A template is executed once for each turn, up to `.Response`
in the last (template/template.go, Execute), which is the form of docs/modelfile.mdx used here. Without TEMPLATE, Ollama
takes one of its own whose Jinja source is within an edit distance of 100 of the file's (template.Named), or none.
"""

from __future__ import annotations

import dataclasses
import re

from quantpress.pipelines.report.chat_shape import CONVERSATIONS, ChatShape, render_chat, shape_of
from quantpress.pipelines.report.model_facts import ModelFacts
from quantpress.pipelines.report.values import plain

__all__ = ["modelfile"]

_LIVE_CONTEXT = 8192  # tokens up to which the whole context is asked for: its memory is small
_UNSAYABLE = ("{{", "}}", '"""')


def modelfile(name: str, facts: ModelFacts) -> str:
    """Gives the text of a Modelfile.

    Args:
        name: of the GGUF file, which lies beside the Modelfile.
        facts: what the file says of itself.
    """
    lines = [f"FROM ./{name}", *_template(facts), *_context(facts)]
    if facts.sampling:
        lines.append("# from generation_config.json")
        lines += [f"PARAMETER {key} {value:.6g}" for key, value in facts.sampling.items()]
    else:
        lines.append("# The model says nothing of temperature and the like: Ollama's defaults hold.")
    return "\n".join(lines) + "\n"


def _template(facts: ModelFacts) -> list[str]:
    if not facts.chat_template:
        return ["# The file has no chat template: prompts go to the model as they are.", 'TEMPLATE """{{ .Prompt }}"""']
    shape = _shape(facts)
    if shape is None:
        return [
            "# The file's chat template could not be put into Ollama's language. Ollama takes a similar one of its own",
            "# if it knows one, and sends prompts as they are if not: look at `ollama show --modelfile NAME`.",
        ]
    lines = [
        f"# Read off the file's chat template, and equal to it on {len(CONVERSATIONS)} conversations without tools.",
        f'TEMPLATE """{_go(shape)}"""',
    ]
    if shape.default_system:
        lines.append(f'SYSTEM """{shape.default_system}"""')
    if not shape.system:
        lines.append("# The chat template takes no system messages.")
    if stop := _stop(shape.after_answer):
        lines.append(f'PARAMETER stop "{stop}"')
    return lines


def _stop(after_answer: str) -> str:
    """Gives what ends an answer, where it can be written in one line: the first token in brackets, or all of it."""
    ending = after_answer.strip()
    token = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]", ending)
    found = token[0] if token else ending
    return found if "\n" not in found and '"' not in found else ""


def _shape(facts: ModelFacts) -> ChatShape | None:
    rendered = render_chat(facts.chat_template, facts.bos, facts.eos)
    if rendered is None:
        return None
    shape = shape_of(rendered, bos=facts.bos, eos=facts.eos, adds_bos=facts.adds_bos)
    return shape if shape is not None and all(map(_sayable, dataclasses.astuple(shape))) else None


def _sayable(value: str | bool) -> bool:
    """Whether a text can stand in a Modelfile and in a template of Go as it is."""
    if isinstance(value, bool):
        return True
    joins = value[:1] + value[-1:]  # a brace or a quote there could join those around the text
    readable = all(char == "\n" or char == plain(char) for char in value)
    return readable and not any(mark in value for mark in _UNSAYABLE) and not set(joins) & set('{}"')


def _go(shape: ChatShape) -> str:
    """Writes the texts as a template of Go's text/template."""
    start = shape.before_user
    if shape.system:
        with_system = f"{shape.before_system}{{{{ .System }}}}{shape.after_system}"
        start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{shape.before_user}{{{{ end }}}}"
    return f"{start}{{{{ .Prompt }}}}{shape.before_answer}{{{{ .Response }}}}{shape.after_answer}"


def _context(facts: ModelFacts) -> list[str]:
    if not facts.context:
        return []
    line = f"PARAMETER num_ctx {facts.context}"
    return [line] if facts.context <= _LIVE_CONTEXT else [f"# {line}  (the model's whole context; it takes memory)"]
