"""Chat templates as Ollama's: equal to what transformers renders, or not written at all."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

import pytest

from quantpress.pipelines.report.chat_shape import render_chat
from quantpress.pipelines.report.model_facts import ModelFacts
from quantpress.pipelines.report.modelfile import modelfile

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
GENERATE = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END + GENERATE
    + "<|im_start|>assistant\n{% endif %}",
    "chatml with a system message of its own": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}" + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END + GENERATE
    + "<|im_start|>assistant\n{% endif %}",
    "llama 3": "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>" + END + GENERATE + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "instructions": "{% if messages[0].role == 'system' %}{% set ms = messages[1:] %}{% set s = messages[0].content %}"
    "{% else %}{% set ms = messages %}{% set s = false %}{% endif %}{% for m in ms %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' }}{% if loop.first and s %}{{ '<<SYS>>\n' + s + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n" + END
    + GENERATE + "<start_of_turn>model\n{% endif %}",
    "zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n" + END + GENERATE + "<|assistant|>\n{% endif %}",
}  # fmt: skip
BOS, EOS = "<s>", "</s>"
NAMES = {"system": "Speak like a sailor.", "user": "What is 2 + 2?", "assistant": "Four, of course."}
TALKS: Sequence[tuple[str, ...]] = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


def talk(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{NAMES[role]} {place}"} for place, role in enumerate(roles)]


def ollama(text: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama sends: its template once per turn, the last up to the answer (template/template.go, Execute)."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    default = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert template is not None
    turn, system, sent = {"Prompt": "", "Response": ""}, default[1] if default else "", ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            turn["Prompt"] = message["content"]
        else:
            sent += fill(template[1], {**turn, "System": system, "Response": message["content"]})
            system = ""
    return sent + fill(template[1].partition("{{ .Response }}")[0], {**turn, "System": system})


def fill(template: str, values: Mapping[str, str]) -> str:
    """Executes the little of Go's text/template that is written here."""
    chosen = r"\2" if values["System"] else r"\3"
    template = re.sub(r"\{\{ (if .System) \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", chosen, template, flags=re.DOTALL)
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda match: values[match[1]], template)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_ollama_sends_what_transformers_renders(name: str, adds_bos: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    facts = ModelFacts(chat_template=TEMPLATES[name], bos=BOS, eos=EOS, adds_bos=adds_bos)
    text = modelfile("x.gguf", facts)
    if not adds_bos and name in ("llama 3", "gemma"):  # Ollama cannot say what stands before the first turn only
        assert "could not be put" in text
        return
    for roles in TALKS:
        if name == "gemma" and "system" in roles:
            continue
        wanted = render_jinja_template(
            [talk(roles)], chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token=BOS, eos_token=EOS
        )[0][0]
        found = ollama(text, talk(roles))
        assert (BOS + found if adds_bos and wanted.startswith(BOS) else found) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}",  # shows no message
        LOOP + "{{ ' ' if m.role == 'assistant' }}{{ m.content }}[end]" + END,  # a space that only old answers have
        LOOP + "{{ loop.index }}: {{ m.content }}\n" + END,  # turns that differ
        LOOP + "{{ m.content | upper }}" + END,
        LOOP + "{{ m.content }}{{ m.content }}" + END,
        "{% raw %}{{ .Prompt }}{% endraw %}" + LOOP + "{{ m.content }}|" + END,  # Go would execute it
        LOOP + "{% if m.role == 'user' %}<a>{{ '{' }}{ .Prompt }}<b>{% endif %}{{ m.content }}<c>" + END,
        LOOP + '"""\nSYSTEM x {{ m.content }}' + END,  # would end the instruction
        "{{ messages",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
    ],
)
def test_a_template_of_another_kind_is_not_written_and_the_file_says_so(template: str) -> None:
    text = modelfile("x.gguf", ModelFacts(chat_template=template, bos=BOS, eos=EOS))
    assert not re.search("^(TEMPLATE|SYSTEM)", text, re.MULTILINE)
    assert "could not be put into Ollama's language" in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{{ 'x' * 9999999999 }}",
        "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    ],
)  # fmt: skip
def test_a_template_that_does_not_end_is_stopped(template: str) -> None:
    started = time.monotonic()
    found = render_chat(template, BOS, EOS)
    assert found is None or set(found) == {None}
    assert time.monotonic() - started < 60  # three seconds of a processor that others use too


def test_a_model_without_template_says_that_prompts_are_sent_as_they_are() -> None:
    text = modelfile("x.gguf", ModelFacts(context=131072, sampling={"temperature": 0.6}))
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert "PARAMETER temperature 0.6\n" in text
    assert "\n# PARAMETER num_ctx 131072" in text  # memory that nobody asked for
