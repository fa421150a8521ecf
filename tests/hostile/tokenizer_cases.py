"""Tokenizers that would explode when they run, lie about their ids, or lead elsewhere; templates with code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Case
from tests.hostile.model import edit, spoilt

WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
_FILE = "tokenizer.json"


def _said(change: Callable[[Any], object], name: str = _FILE) -> Callable[[Path], object]:
    return lambda model: edit(model / name, lambda said: change(said) and None)


def _step(place: str, step: Any) -> Callable[[Path], object]:
    return _said(lambda said: said.update({place: step}))


def _replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def _added(**changes: Any) -> Callable[[Path], object]:
    return _said(lambda s: s["added_tokens"].append({**s["added_tokens"][0], "content": "<x>", "id": 300, **changes}))


def _unigram(vocab: list[Any], **more: Any) -> Callable[[Path], object]:
    return _said(lambda said: said.update(model={"type": "Unigram", "unk_id": 0, "vocab": vocab, **more}))


_DOUBLING = [_replace({"String": " "}, "  ")] * 40  # 2**40 blanks for one
_PIECES = [[f"p{number}", -1.0] for number in range(320)]
_BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a normalizer that doubles 40 times": (_step("normalizer", _sequence(*_DOUBLING)), (_FILE,)),
    "a normalizer that writes a megabyte for a letter": (
        _step("normalizer", _sequence(_replace({"String": "e"}, "e" * 10**6), _replace({"String": "e"}, "e" * 10**6))),
        (_FILE,),
    ),
    "a normalizer that takes for ever": (_step("normalizer", _replace({"Regex": r"(\w+\s*)+$x"}, "")), (_FILE,)),
    "a pattern that takes for ever": (_step("pre_tokenizer", _split(r"(\w+\s*)+#$|(.+)+\x00")), (_FILE,)),
    "a pattern of groups in groups": (_step("pre_tokenizer", _split("(" * 500 + "a" + "){1,9}" * 500)), (_FILE,)),
    "a pattern repeated a milliard times": (
        _step("pre_tokenizer", _split("((a{0,99999}){0,99999}){0,99999}")),
        (_FILE,),
    ),
    "a pattern of a megabyte": (_step("pre_tokenizer", _split("(?:a|b)" * 150_000)), (_FILE,)),
    "a prefix of a megabyte": (_step("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}), (_FILE,)),
    "a map of characters that is garbage": (
        _step("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        (_FILE,),
    ),
    "a step that is text": (_step("normalizer", "NFC"), (_FILE,)),
    "steps that are an object": (_step("pre_tokenizer", {"type": "Sequence", "pretokenizers": {}}), (_FILE,)),
    "an added token whose id is another's": (_added(id=5), (_FILE, "<x>")),
    "an added token below zero": (_added(id=-1), (_FILE,)),
    "an added token whose id is text": (_added(id="7"), (_FILE,)),
    "an added token whose id is true": (_added(id=True), (_FILE,)),
    "an added token without a name": (_added(content=""), (_FILE,)),
    "an added token that is a number": (_added(content=7), (_FILE,)),
    "an added token without an id": (_said(lambda s: s["added_tokens"].append({"content": "<x>"})), (_FILE,)),
    "a hundred thousand added tokens": (
        _said(
            lambda s: s.update(
                added_tokens=[{**s["added_tokens"][0], "content": f"<{n}>", "id": n} for n in range(10**5)]
            )
        ),
        ("320 rows",),
    ),
    "pieces whose score is text": (_unigram([["a", "x"], *_PIECES[1:]]), (_FILE,)),
    "pieces without a score": (_unigram([["a"], *_PIECES[1:]]), (_FILE,)),
    "a piece for the unknown that is not there": (_unigram(_PIECES, unk_id=9999), (_FILE,)),
    "a piece twice": (_unigram([*_PIECES[1:], _PIECES[5]]), (_FILE,)),
    "no pieces": (_unigram([]), (_FILE,)),
    "a special token that is a list": (
        _said(lambda s: s.update(bos_token=[1]), "tokenizer_config.json"),
        ("bos_token",),
    ),
    "a template that is a number": (
        _said(lambda s: s.update(chat_template=7), "tokenizer_config.json"),
        ("tokenizer_config.json", "chat_template"),
    ),
    "a template of 65 MB": (
        lambda m: (m / "chat_template.jinja").write_bytes(b"x" * (65 << 20)),
        ("chat_template.jinja",),
    ),
    "a template that leads out": (
        lambda m: (m / "chat_template.jinja").symlink_to("/etc/passwd"),
        ("chat_template.jinja",),
    ),
    "a template that is no text": (
        lambda m: (m / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        ("chat_template.jinja",),
    ),
    "a template with a zero byte": (
        lambda m: (m / "chat_template.jinja").write_bytes(b"a\x00b"),
        ("chat_template.jinja", "zero byte"),
    ),
}
_PERPLEXITY = ("perplexity", "model", "--runtime", "torch", "--chunks", "1", "--context", "16")
_EXPLODING: dict[str, tuple[str, ...]] = {  # of these, what a run on a text says
    "a normalizer that doubles 40 times": ("more than 256 characters for one",),
    "a normalizer that writes a megabyte for a letter": ("more than 256 characters for one",),
    "a normalizer that takes for ever": ("cannot cut this text", "retry-limit"),
    "a pattern that takes for ever": ("cannot cut this text", "retry-limit"),
    "a pattern of groups in groups": ("groups 500 deep",),
    "a pattern of a megabyte": ("a pattern of 1050000 characters",),
    "a prefix of a megabyte": ("1024 before a text",),
}
_CODE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10**9) %}{{ a }}{% endfor %}"

CASES: tuple[Case, ...] = (
    *(Case("tokenizer steps", name, spoilt(change), words=words) for name, (change, words) in _BAD.items()),
    *(
        Case("tokenizer steps", f"{name}, run", spoilt(_BAD[name][0], _PERPLEXITY), words=(_FILE, *words))
        for name, words in _EXPLODING.items()
    ),
    Case(
        "tokenizer steps",
        "good, a special token that is nowhere is left out",
        spoilt(_said(lambda s: s.update(bos_token="<nowhere>"), "tokenizer_config.json")),
        code=0,
        writes=WRITTEN,
    ),
    Case(
        "tokenizer steps",
        "good, a template with code is shown and not run",
        spoilt(lambda m: (m / "chat_template.jinja").write_text(_CODE), ("inspect", "model")),
        code=0,
    ),
    Case("tokenizer steps", "good, NFC", spoilt(_step("normalizer", {"type": "NFC"})), code=0, writes=WRITTEN),
)
