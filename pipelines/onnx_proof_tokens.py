"""The tokenizer beside a model's weights, compared with its source's: the same files, or the same vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.token_count import count_tokens
from quantpress.convert.tokenizer import Tokenizer, special_ids
from quantpress.convert.tokenizer_files import TOKENIZER_FILE_NAMES, TokenizerFiles
from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.default_text import default_text
from quantpress.quant.errors import QuantpressError

__all__ = ["TokensFound", "compare_tokens"]

_NO_TOKENS = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEXT = 4000  # characters that both encode


@dataclass
class TokensFound:
    """How many tokens were compared, what could not be, and what is wrong."""

    tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def differs(self, name: str, found: str, wanted: str) -> None:
        """Takes a difference."""
        self.findings.append(Finding("vocabulary", name, found, wanted))


def compare_tokens(source: Checkpoint, files: Mapping[str, bytes]) -> TokensFound:
    """Compares tokenizer files.

    Args:
        source: the model.
        files: name -> bytes, as they lie beside the weights.
    """
    found = TokensFound()
    names = [name for name in TOKENIZER_FILE_NAMES if name not in _NO_TOKENS]
    ours, theirs = ({name: each[name] for name in names if name in each} for each in (source.tokenizer_files, files))
    if not ours or not theirs:
        found.skipped.append(f"vocabulary: {'the folder' if ours else 'the source'} has no tokenizer")
        return found
    for name in _TEMPLATES:
        if source.tokenizer_files.get(name) != files.get(name):
            found.skipped.append(f"vocabulary: {name} differs, as may be wanted")
    if ours == theirs:
        found.tokens = count_tokens(source) or 0
        return found
    try:
        _compare(
            found,
            *(
                TokenizerFiles(each, name=name)
                for each, name in ((source.tokenizer_files, source.name), (files, "the folder"))
            ),
        )
    except QuantpressError as error:
        found.differs("tokenizer", shown(str(error), 300), "a tokenizer that opens as the source's does")
    return found


def _compare(found: TokensFound, source: TokenizerFiles, other: TokenizerFiles) -> None:
    ours, theirs = _vocabulary(source), _vocabulary(other)
    if ours is None or theirs is None:
        models = [each.files.get("tokenizer.model") for each in (source, other)]
        if None not in models and models[0] != models[1]:
            found.differs("tokenizer.model", "other bytes", "those of the source")
        found.skipped.append("vocabulary: a tokenizer of this kind is not taken apart")
        return
    found.tokens = len(ours)
    if ours != theirs:
        wrong = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
        if wrong:
            number, token = wrong[0]
            place = theirs.get(token)
            where = "missing" if place is None else f"id {place}"
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            found.differs(f"token {shown(token)}", where + more, f"id {number}")
        else:
            extra = min(set(theirs) - set(ours), key=lambda token: theirs[token])
            found.differs(f"token {shown(extra)}", f"id {theirs[extra]}", "no such token")
        return
    first, second = Tokenizer(source), Tokenizer(other)
    text = default_text().text[:_TEXT]
    ids = [list(map(int, each.encode(text, special=False))) for each in (first, second)]
    if ids[0] != ids[1]:
        found.differs("tokenizer", "cuts a text otherwise", "the source's tokens")
    special = [special_ids(files, each.token_id) for files, each in ((source, first), (other, second))]
    for kind in sorted(special[0]):
        if special[1].get(kind) != special[0][kind]:
            found.differs(f"{kind} token", f"id {special[1].get(kind)}", f"id {special[0][kind]}")


def _vocabulary(files: TokenizerFiles) -> dict[str, int] | None:
    """Gives token -> id through the tokenizers library; None where there is no tokenizer.json and none can be made."""
    described = files.tokenizer_json
    if described is None:
        return None
    import tokenizers

    found: dict[str, int] = tokenizers.Tokenizer.from_str(json.dumps(described)).get_vocab(with_added_tokens=True)
    return found
