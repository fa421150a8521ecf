"""Tiny random encoders of every family, each with a small tokenizer of its own kind, and what is asked of them.

The oracle is transformers' own class: its last hidden states, and the logits of its head for masked tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tiny import randomize

__all__ = ["ENCODERS", "TEXT", "EncoderCase", "encoder_case", "write_encoder"]

VOCABULARY = 320
TEXT = (
    "The press takes a model and gives a file. The file is read, run and compared with the model. "
    "What was written in the morning is read in the evening; what differs is thrown away. "
    "Numbers such as 12, 345 and 6.789 stay numbers, and names like gate, up and down stay names. "
    "Ein Café in Zürich, naïve words, UPPER case and (brackets): 'quotes' - all of it is cut into pieces."
)
_BERT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DISTIL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class EncoderCase:
    """A family with one set of options.

    Attributes:
        id: name of the test's parameter.
        family: as `ArchSpec.family`.
        model_type: of transformers' configuration class.
        options: keys of config.json.
        tokenizer: writes tokenizer.json's contents.
        masked: the head for masked tokens is in the checkpoint; else the bare model, with its pooler if it has one.
        pooling: what sentence-transformers' files say; "" for none.
        gguf: why llama.cpp cannot compute it, in words that the error has; empty: it can.
    """

    id: str
    family: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], str] = field(default=lambda: wordpiece(lowercase=True))
    masked: bool = True
    pooling: str = ""
    gguf: str = ""

    def __str__(self) -> str:
        return self.id


@functools.cache
def wordpiece(*, lowercase: bool) -> str:
    """Gives a tokenizer.json of BERT's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=list(_BERT_TOKENS), show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    return _filled(tokenizer, "[CLS]", "[SEP]")


@functools.cache
def byte_level() -> str:
    """Gives a tokenizer.json of RoBERTa's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(_ROBERTA_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    return _filled(tokenizer, "<s>", "</s>")


@functools.cache
def unigram() -> str:
    """Gives a tokenizer.json of XLM-RoBERTa's kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=list(_ROBERTA_TOKENS), unk_token="<unk>", show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    return _filled(tokenizer, "<s>", "</s>")


def _filled(tokenizer: Any, first: str, last: str) -> str:
    """Gives the tokenizer with its template; the vocabulary is filled up to `VOCABULARY` tokens."""
    from tokenizers import processors

    around = [(text, tokenizer.token_to_id(text)) for text in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=around
    )
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return str(tokenizer.to_str())


ENCODERS: tuple[EncoderCase, ...] = (
    EncoderCase("bert", "bert", "bert", _BERT),
    EncoderCase("bert-bare", "bert", "bert", _BERT, masked=False, pooling="cls"),
    EncoderCase("bert-mean", "bert", "bert", {**_BERT, "type_vocab_size": 1}, masked=False, pooling="mean"),
    EncoderCase("bert-untied", "bert", "bert", {**_BERT, "tie_word_embeddings": False}),
    EncoderCase("bert-cased", "bert", "bert", {**_BERT, "layer_norm_eps": 1e-3}, lambda: wordpiece(lowercase=False)),
    EncoderCase("bert-new", "bert", "bert", {**_BERT, "hidden_act": "gelu_new"}),
    EncoderCase("bert-relu", "bert", "bert", {**_BERT, "hidden_act": "relu"}, gguf="activation is 'relu'"),
    EncoderCase("roberta", "roberta", "roberta", _ROBERTA, byte_level),
    EncoderCase("roberta-untied", "roberta", "roberta", {**_ROBERTA, "tie_word_embeddings": False}, byte_level),
    EncoderCase("roberta-last", "roberta", "roberta", _ROBERTA, byte_level, False, "lasttoken"),
    EncoderCase("xlm-roberta", "roberta", "xlm-roberta", {**_ROBERTA, "type_vocab_size": 1}, unigram, pooling="cls"),
    EncoderCase("camembert", "roberta", "camembert", {**_ROBERTA, "type_vocab_size": 1}, unigram, masked=False),
    EncoderCase("distilbert", "distilbert", "distilbert", _DISTIL, pooling="mean"),
    EncoderCase("distilbert-bare", "distilbert", "distilbert", {**_DISTIL, "sinusoidal_pos_embds": True}, masked=False),
)


def encoder_case(name: str) -> EncoderCase:
    """Gives a case of `ENCODERS` by its id."""
    return next(case for case in ENCODERS if case.id == name)


def write_encoder(case: EncoderCase, folder: Path) -> Path:
    """Writes the case's checkpoint into a new folder and gives it."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    folder.mkdir(parents=True)
    made = AutoModelForMaskedLM if case.masked else AutoModel
    model = made.from_config(AutoConfig.for_model(case.model_type, **case.options))
    randomize(model, 0, zero_centred=False)
    model.float().save_pretrained(folder)
    tokenizer = case.tokenizer()
    folder.joinpath("tokenizer.json").write_text(tokenizer, encoding="utf-8")
    names = _BERT_TOKENS if "[CLS]" in tokenizer else _ROBERTA_TOKENS
    kinds = ("pad", "unk", "cls", "sep", "mask") if "[CLS]" in tokenizer else ("cls", "pad", "sep", "unk", "mask")
    settings = {f"{kind}_token": text for kind, text in zip(kinds, names, strict=True)}
    if "[CLS]" not in tokenizer:
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if case.pooling:
        write_pooling(folder, case.pooling)
    return folder


def write_pooling(folder: Path, mode: str) -> None:
    """Writes the files of sentence-transformers."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    folder.joinpath("modules.json").write_text(json.dumps(modules))
    folder.joinpath("1_Pooling").mkdir()
    kinds = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    switches = {f"pooling_mode_{kind}": kind.startswith(mode) for kind in kinds}
    folder.joinpath("1_Pooling", "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **switches}))
