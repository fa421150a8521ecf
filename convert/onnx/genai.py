"""genai_config.json: what onnxruntime-genai must know of a model to generate with it.

Keys and their meaning: onnxruntime-genai 0.18, src/config.cpp; values as its model builder chooses them
(models/builders/base.py, make_genai_config), except that the folder's own files are looked at and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.tokenizer_files import TokenizerFiles

__all__ = ["MODEL_TYPE", "genai_config", "has_genai"]

MODEL_TYPE = "decoder"  # genai's type of every decoder whose inputs and outputs are named in the file itself
# search option of generation_config.json -> (default, least, greatest)
_SEARCH: Mapping[str, tuple[float, float, float]] = {
    "diversity_penalty": (0.0, 0.0, 1e6),
    "length_penalty": (1.0, 0.0, 1e6),
    "repetition_penalty": (1.0, 1e-3, 1e6),
    "temperature": (1.0, 0.0, 1e6),
    "top_p": (1.0, 0.0, 1.0),
}
_TOP_K = 50  # transformers' default, GenerationConfig


def has_genai(hyper: Hyperparameters) -> bool:
    """Whether onnxruntime-genai runs such a model: it continues texts, and has one size for keys and values."""
    return hyper.causal and (hyper.latent is None or hyper.latent.value == hyper.head_dim)


def genai_config(
    checkpoint: Checkpoint, hyper: Hyperparameters, *, filename: str, share_buffer: bool
) -> dict[str, Any]:
    """Gives the contents of genai_config.json.

    Args:
        checkpoint: whose config.json and generation_config.json say which tokens begin and end a text, and how the
            model likes to be sampled.
        hyper: its sizes.
        filename: of the model.
        share_buffer: whether the model writes its new keys and values into the buffer of the old ones, which
            GroupQueryAttention can.

    Returns:
        Plain JSON values.
    """
    tokens = _Tokens(checkpoint, hyper.vocab)
    begin, ends, padding = tokens.ids("bos"), tokens.ends(), tokens.ids("pad")
    layers = {"key": "%d.key", "value": "%d.value"}
    return {
        "model": {
            **({"bos_token_id": begin[0]} if begin else {}),
            "context_length": hyper.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": hyper.head_dim,
                "hidden_size": hyper.hidden,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"}
                | {f"past_{part}_names": f"past_key_values.{name}" for part, name in layers.items()},
                "outputs": {"logits": "logits"}
                | {f"present_{part}_names": f"present.{name}" for part, name in layers.items()},
                "num_attention_heads": hyper.heads,
                "num_hidden_layers": hyper.layers,
                "num_key_value_heads": hyper.kv_heads,
            },
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": (padding or ends or [0])[0],
            "type": MODEL_TYPE,
            "vocab_size": hyper.vocab,
        },
        "search": _search(checkpoint.generation_config, hyper, share_buffer),
    }


def _search(settings: Mapping[str, Any], hyper: Hyperparameters, share_buffer: bool) -> dict[str, Any]:
    """The model's own way of sampling where generation_config.json says one; genai refuses what is out of its range."""
    beams = _count(settings, "num_beams", 1, least=1)
    search: dict[str, Any] = {
        "do_sample": settings.get("do_sample") is True,
        "early_stopping": True,
        "max_length": hyper.context,
        "min_length": 0,
        "no_repeat_ngram_size": _count(settings, "no_repeat_ngram_size", 0),
        "num_beams": beams,
        "num_return_sequences": _count(settings, "num_return_sequences", 1, least=1, greatest=beams),
        "past_present_share_buffer": share_buffer,
        "top_k": _count(settings, "top_k", min(_TOP_K, hyper.vocab), greatest=hyper.vocab),
    }
    for name, (default, least, greatest) in _SEARCH.items():
        value = settings.get(name)
        number = float(value) if isinstance(value, float) or _is_count(value) else default
        search[name] = number if least <= number <= greatest else default
    return dict(sorted(search.items()))


def _count(settings: Mapping[str, Any], name: str, default: int, *, least: int = 0, greatest: int = 1 << 16) -> int:
    value = settings.get(name)
    return value if _is_count(value) and least <= value <= greatest else default


class _Tokens:
    """Ids of special tokens: generation_config.json's first, then config.json's, then the tokenizer's own."""

    def __init__(self, checkpoint: Checkpoint, vocab: int) -> None:
        config = checkpoint.config
        parts = (checkpoint.generation_config, config, config.get("text_config"))
        self._places = [part for part in parts if isinstance(part, Mapping)]
        self._files = TokenizerFiles(checkpoint.tokenizer_files, name=checkpoint.name)
        self._vocab = vocab

    def ids(self, kind: str) -> list[int]:
        """Gives the ids, of which there may be several; those that the model does not know are passed over."""
        for place in self._places:
            value = place.get(f"{kind}_token_id")
            if found := self._known(value if isinstance(value, list) else [value]):
                return found
        return self.of_tokenizer(kind)

    def of_tokenizer(self, kind: str) -> list[int]:
        """Gives the id of the token that the tokenizer's files name."""
        text = self._files.special_token(kind)
        return self._known([each["id"] for each in self._files.added_tokens if each["content"] == text])

    def ends(self) -> list[int]:
        """Gives the ids that end a text.

        A chat model's config.json often names the end of a document only, and the end of a turn is what its tokenizer
        calls the end: without generation_config.json both are given.
        """
        found = self.ids("eos")
        if self._places and not self._places[0].get("eos_token_id"):
            found = list(dict.fromkeys([*self.of_tokenizer("eos"), *found]))
        return found

    def _known(self, values: list[Any]) -> list[int]:
        return list(dict.fromkeys(each for each in values if _is_count(each) and each < self._vocab))


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
