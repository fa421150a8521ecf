"""Proves on text that llama.cpp cuts words as the source's tokenizer does; a wrong pre-tokenizer shows nowhere else.

The perplexity of a file is computed on the source's own token ids, so a vocabulary that was written wrongly would pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.quant.errors import InputError

if TYPE_CHECKING:
    from quantpress.pipelines.llama_cpp import LlamaCppModel

MAX_CHARS = 40_000  # of the judged text: every kind of word it holds has come by then
# Where the pre-tokenizers of different models part: digits, case, contractions, blanks, scripts, marks, symbols.
HARD_CASES = (
    "In 1984 there were 1234567 of them, 3.14159 each; by 2024-11-05 only 12%.",
    "I'll say they've DON'T, she'd've, O'Brien's, we'RE and 'tis.",
    "tabs\tand  two blanks   three\n\n\nlines \n end  ",
    "def press(x: int) -> str:\n    return f'{x!r}' + \"\\n\"  # done\n\n\tif a!=b and c>=d: pass",
    "CamelCaseWords and snake_case_words, ALLCAPS, mixed123abc, x2y3.",
    "naïve café, Straße, Ångström, żółw, Ελληνικά, Русский язык, עברית, العربية",
    "中文句子没有空格。日本語の文章です。한국어 문장입니다. ภาษาไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🇪🇺 ½ ² ™ → ≠ … – — “quotes” «guillemets»",
    "https://example.org/a?b=c&d=e#f <tag attr='v'> $5.00 50€ #hash @at a/b\\c",
)


@dataclass(frozen=True, slots=True)
class TokenizerProof:
    """What was found.

    Attributes:
        exact: the two must agree on every text, as far as the exporter knows.
        difference: the first text that is cut differently, in words; empty if none is.
    """

    exact: bool
    difference: str


def prove_tokenizer(
    source: Checkpoint, tokenizer: Tokenizer, model: LlamaCppModel, text: str, *, rows: int
) -> TokenizerProof:
    """Cuts a text and hard cases with both tokenizers.

    Args:
        source: the checkpoint; where its tokenizer is known to differ from llama.cpp on some texts, or its vocabulary
            was copied from another GGUF file, a difference is no failure.
        tokenizer: the source's own.
        model: the file, loaded in llama.cpp.
        text: what the file is judged on.
        rows: rows of the source's embedding.
    """
    exact, apart = _must_agree(source, rows)
    for case in (*HARD_CASES, text[:MAX_CHARS]):
        case = apart.sub("", case) if apart is not None else case
        wanted = tokenizer.encode(case, special=False)
        found = model.tokenize(case, add_special=False)
        if not np.array_equal(wanted, found):
            difference = _describe(wanted.tolist(), found.tolist(), tokenizer)
            return TokenizerProof(exact, difference)
    return TokenizerProof(True, "")


def _must_agree(source: Checkpoint, rows: int) -> tuple[bool, re.Pattern[str] | None]:
    """Says whether the two must agree, and on which characters they are known not to."""
    if source.format == "gguf":
        return False, None
    try:
        files = TokenizerFiles(source.tokenizer_files, name=source.name)
        plan = plan_vocab(files, vocab_size=rows, model_type=str(source.config.get("model_type")))
    except InputError:
        return True, None  # the pre-tokenizer was named by hand, and only this proof tells whether it is the right one
    return not plan.notes, re.compile("|".join(plan.apart)) if plan.apart else None


def _describe(wanted: list[int], found: list[int], tokenizer: Tokenizer) -> str:
    pairs = zip(wanted, found, strict=False)
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))
    here = tokenizer.decode(wanted[max(0, place - 2) : place + 6])
    return (
        f"llama.cpp cuts {here!r} into tokens {found[place : place + 6]}, the source's tokenizer into "
        f"{wanted[place : place + 6]}"
    )
