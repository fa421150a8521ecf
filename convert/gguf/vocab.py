"""From a checkpoint's tokenizer files to GGUF's `tokenizer.*` metadata that makes llama.cpp cut text the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.pretokenizers import detect, is_byte_level, named, split_steps
from quantpress.convert.gguf.vocab_merges import Merge, reaches_all_tokens, read_merges
from quantpress.convert.gguf.vocab_sentencepiece import BPE, SentencePieceModel, read_sentencepiece
from quantpress.convert.gguf.vocab_spaces import plan_spaces, read_spaces
from quantpress.convert.gguf.vocab_special import special_metadata, template_metadata
from quantpress.convert.gguf.vocab_tokens import TokenTable, TokenType
from quantpress.convert.gguf.vocab_unigram import (
    UNIGRAM_KEEPS,
    is_unigram,
    place_pieces,
    read_unigram,
    unigram_metadata,
)
from quantpress.convert.gguf.vocab_wordpiece import is_wordpiece, plan_wordpiece
from quantpress.convert.tokenizer import Tokenizer
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.quant.errors import InputError

__all__ = ["VocabPlan", "gguf_vocab", "plan_vocab"]

_SPM_KEEPS = frozenset({TokenType.UNKNOWN, TokenType.BYTE})


@dataclass(frozen=True, slots=True)
class VocabPlan:
    """Metadata of a vocabulary and what a user should know about it.

    Attributes:
        metadata: `tokenizer.*` keys and their values as `(GGUF type, value)` pairs.
        notes: sentences about texts that llama.cpp cuts differently from the checkpoint's tokenizer, and about what
            could not be written.
        apart: expression for characters -> a sentence: only texts with these are cut differently.
    """

    metadata: dict[str, MetadataValue]
    notes: tuple[str, ...]
    apart: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Draft:
    """A plan while it is made."""

    files: TokenizerFiles
    table: TokenTable
    pre: str | None
    tokenizer: Tokenizer | None = None
    metadata: dict[str, MetadataValue] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    apart: Mapping[str, str] = field(default_factory=dict)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def gguf_vocab(
    files: TokenizerFiles, *, vocab_size: int, model_type: str, pre: str | None = None
) -> dict[str, MetadataValue]:
    """Gives all `tokenizer.*` metadata of a checkpoint; see `plan_vocab`."""
    return plan_vocab(files, vocab_size=vocab_size, model_type=model_type, pre=pre).metadata


def plan_vocab(files: TokenizerFiles, *, vocab_size: int, model_type: str, pre: str | None = None) -> VocabPlan:
    """Plans the vocabulary of a GGUF file.

    Args:
        files: the checkpoint's tokenizer files.
        vocab_size: rows of the embedding; the list of tokens gets as many entries.
        model_type: `model_type` of config.json, for messages.
        pre: value for `tokenizer.ggml.pre` that the user names; nothing is detected then.

    Raises:
        InputError: a token has no row, the tokenizer is of a kind that llama.cpp cannot imitate, or its
            pre-tokenizer is not known.
    """
    file = "tokenizer.json" if files.tokenizer_json is not None else "tokenizer.model"
    draft = _Draft(files, TokenTable(vocab_size, files.where(file)), pre)
    if files.tokenizer_json is not None:
        draft.tokenizer = Tokenizer(files)  # the library checks the whole file against its schema
        _check_model(draft, files.tokenizer_json, model_type)
        if is_unigram(files.tokenizer_json):
            _plan_unigram(draft, files.tokenizer_json)
        elif is_wordpiece(files.tokenizer_json):
            _plan_wordpiece(draft, files.tokenizer_json)
        elif split_steps(files.tokenizer_json.get("pre_tokenizer")) is not None or is_byte_level(files.tokenizer_json):
            _plan_byte_level(draft, files.tokenizer_json)
        else:
            _plan_spaces(draft, files.tokenizer_json)
    elif "tokenizer.model" in files:
        model = read_sentencepiece(files.files["tokenizer.model"], where=files.where("tokenizer.model"))
        _plan_sentencepiece(draft, model)
    else:
        raise InputError(
            f"{files.name}: no tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt is needed"
        )
    draft.metadata |= special_metadata(files, draft.table, draft.note) | template_metadata(files)
    _note_tokens(draft)
    return VocabPlan(draft.metadata, tuple(draft.notes), draft.apart)


def _check_model(draft: _Draft, tokenizer_json: dict[str, Any], model_type: str) -> None:
    model, where = tokenizer_json["model"], draft.table.where
    kind = model.get("type", "BPE" if "merges" in model else None)
    if is_unigram(tokenizer_json) or is_wordpiece(tokenizer_json):
        return
    if kind != "BPE":
        raise InputError(
            f"{where}: tokenizer model {shown(kind)} of a {model_type!r} checkpoint is not supported; BPE "
            "(byte-level or SentencePiece style), Unigram and WordPiece are"
        )
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise InputError(f"{where}: the BPE model has no 'vocab' object or no 'merges' list")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"{where}: BPE with {key}={shown(model[key])} cannot be written to GGUF")


def _plan_unigram(draft: _Draft, tokenizer_json: dict[str, Any]) -> None:
    style = read_unigram(tokenizer_json, where=draft.table.where)
    draft.notes += (*style.notes, *place_pieces(draft.table, tokenizer_json["model"], style))
    draft.table.place_added(draft.files.added_tokens, keep=UNIGRAM_KEEPS)
    _refuse_pre(draft)
    draft.metadata |= unigram_metadata(draft.table, style)


def _plan_wordpiece(draft: _Draft, tokenizer_json: dict[str, Any]) -> None:
    _refuse_pre(draft)
    draft.metadata, notes, draft.apart = plan_wordpiece(draft.table, tokenizer_json, draft.files.added_tokens)
    draft.notes += notes


def _plan_byte_level(draft: _Draft, tokenizer_json: dict[str, Any]) -> None:
    """GPT-2's alphabet of bytes: `tokenizer.ggml.model` is "gpt2"; source: llama.cpp _set_vocab_gpt2."""
    model, where = tokenizer_json["model"], draft.table.where
    _check_normalizer(draft, tokenizer_json.get("normalizer"))
    merges = read_merges(model["merges"], where)
    if draft.pre is None:
        tokenizer = draft.tokenizer or Tokenizer(draft.files)
        pre, witness = detect(tokenizer_json, tokenizer.encode_in_template, where=where)
        if witness == "hash":
            draft.note(
                f"pre-tokenizer {pre!r} was recognized by token ids only, not by its structure; "
                "verify the file in llama.cpp"
            )
        _check_ignore_merges(draft, pre, model, merges)
    else:
        pre = draft.pre
    if caveat := named(pre).caveat:
        draft.note(caveat)
    for text, token_id in model["vocab"].items():
        draft.table.place(token_id, text, TokenType.NORMAL)
    draft.table.place_added(draft.files.added_tokens, keep=frozenset())
    _write_bpe(draft, pre, merges)


def _write_bpe(draft: _Draft, pre: str, merges: Sequence[Merge]) -> None:
    texts, types, _ = draft.table.finish(unescape=not named(pre).byte_level)
    draft.metadata |= {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pre),
        "tokenizer.ggml.tokens": ("array[string]", texts),
        "tokenizer.ggml.token_type": ("array[int32]", types),
        # a literal space would be taken for the one between the parts; llama.cpp's converter writes it like a byte
        "tokenizer.ggml.merges": (
            "array[string]",
            [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges],
        ),
    }


def _check_normalizer(draft: _Draft, normalizer: dict[str, Any] | None) -> None:
    """llama.cpp does not rewrite text before byte-level BPE."""
    steps = (normalizer or {}).get("normalizers") if (normalizer or {}).get("type") == "Sequence" else None
    for kind in (part.get("type") for part in steps or ([normalizer] if normalizer else [])):
        if kind == "NFC":
            draft.note("text that is not in Unicode NFC is normalized by the tokenizer but not by llama.cpp")
        elif draft.pre is None:
            raise InputError(
                f"{draft.table.where}: normalizer {shown(kind)} rewrites text and llama.cpp does not; to convert "
                "all the same, name the pre-tokenizer with --override-kv tokenizer.ggml.pre=str:NAME"
            )
        else:
            draft.note(f"normalizer {kind!r} rewrites text; llama.cpp does not")


def _check_ignore_merges(draft: _Draft, pre: str, model: dict[str, Any], merges: Sequence[Merge]) -> None:
    """A name fixes `ignore_merges` in llama.cpp; when the checkpoint has the other value it must not matter."""
    wanted = bool(model.get("ignore_merges", False))
    if named(pre).ignore_merges == wanted:
        return
    added = {token["content"] for token in draft.files.added_tokens}
    if not reaches_all_tokens(model["vocab"], merges, (token for token in model["vocab"] if token not in added)):
        raise InputError(
            f"{draft.table.where}: ignore_merges is {str(wanted).lower()} here but not under llama.cpp's pre-tokenizer "
            f"{pre!r}, and some tokens are not made by merges; name another one with "
            "--override-kv tokenizer.ggml.pre=str:NAME"
        )


def _plan_spaces(draft: _Draft, tokenizer_json: dict[str, Any]) -> None:
    """SentencePiece style in tokenizer.json: "llama" (scores) where that merges the same way, else "gpt2" (merges)."""
    where = draft.table.where
    style = read_spaces(tokenizer_json, where=where)
    draft.notes += style.notes
    if "tokenizer.model" in draft.files and draft.pre is None:
        model = read_sentencepiece(draft.files.files["tokenizer.model"], where=draft.files.where("tokenizer.model"))
        if model.model_type == BPE and _same_pieces(draft, model, tokenizer_json["model"]["vocab"]):
            _plan_sentencepiece(draft, model, prefix=style.prefix)
            return
    merges = read_merges(tokenizer_json["model"]["merges"], where)
    plan = plan_spaces(tokenizer_json["model"], merges, style, pre=draft.pre, where=where)
    draft.notes += plan.notes
    for token_id, (text, kind, score) in plan.tokens.items():
        draft.table.place(token_id, text, kind, score)
    draft.table.place_added(draft.files.added_tokens, keep=_SPM_KEEPS)
    if plan.pre is not None:
        _write_bpe(draft, plan.pre, merges)
    else:
        _write_spm(draft, prefix=style.prefix, squeezes=style.squeezes)


def _same_pieces(draft: _Draft, model: SentencePieceModel, vocab: dict[str, int]) -> bool:
    """Whether tokenizer.model is the vocabulary of tokenizer.json; added tokens may have replaced pieces."""
    added = {token["id"] for token in draft.files.added_tokens}
    for token_id, (piece, _, _) in enumerate(model.pieces):
        if token_id not in added and vocab.get(piece) != token_id:
            draft.note(
                f"tokenizer.model was not used: its piece {token_id} {shown(piece)} is not what tokenizer.json has"
            )
            return False
    return True


def _plan_sentencepiece(draft: _Draft, model: SentencePieceModel, prefix: bool | None = None) -> None:
    """tokenizer.model: `tokenizer.ggml.model` is "llama"; source: llama.cpp _create_vocab_sentencepiece."""
    where = draft.files.where("tokenizer.model")
    if model.model_type != BPE:
        raise InputError(
            f"{where}: SentencePiece model type {model.model_type} (unigram is 1) is not supported; BPE is"
        )
    if model.suffix_spaces or not model.escape_whitespaces:
        raise InputError(f"{where}: spaces behind words or unescaped spaces are not what llama.cpp does")
    if prefix is None and model.normalizes:
        draft.note("tokenizer.model rewrites text (Unicode normalization); llama.cpp does not")
    if prefix is None and model.remove_extra_whitespaces:
        draft.note("the tokenizer drops outer and doubled spaces; llama.cpp keeps them")
    for token_id, (text, score, kind) in enumerate(model.pieces):
        if "\0" in text:  # llama.cpp reads texts up to it, and would take an empty token (InternLM2 has one)
            draft.note(f"token {token_id} is {shown(text)}, which llama.cpp cannot hold; its row is left unused")
        else:
            draft.table.place(token_id, text, TokenType(kind), score)
    draft.table.place_added(draft.files.added_tokens, keep=_SPM_KEEPS)
    _write_spm(
        draft,
        prefix=model.add_dummy_prefix if prefix is None else prefix,
        squeezes=model.remove_extra_whitespaces,
    )


def _write_spm(draft: _Draft, *, prefix: bool, squeezes: bool) -> None:
    _refuse_pre(draft)
    texts, types, scores = draft.table.finish(unescape=True)
    draft.metadata |= {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("array[string]", texts),
        "tokenizer.ggml.scores": ("array[float32]", scores),
        "tokenizer.ggml.token_type": ("array[int32]", types),
        "tokenizer.ggml.add_space_prefix": ("bool", prefix),
        "tokenizer.ggml.remove_extra_whitespaces": ("bool", squeezes),
    }


def _refuse_pre(draft: _Draft) -> None:
    if draft.pre not in (None, "default"):
        raise InputError(
            f"{draft.table.where}: a vocabulary of this kind has no pre-tokenizer in llama.cpp; "
            f"leave out tokenizer.ggml.pre={shown(draft.pre)}"
        )


def _note_tokens(draft: _Draft) -> None:
    stripping = [token["content"] for token in draft.files.added_tokens if token["lstrip"] or token["rstrip"]]
    if stripping:
        draft.note(
            f"{len(stripping)} added tokens take the spaces beside them with them ({shown(stripping[0])} for one); "
            "llama.cpp does that only for models whose name holds 'phi-3'"
        )
    for text in draft.table.left_out:
        draft.note(f"{text} has no row in the embedding and is left out; text never holds it")
