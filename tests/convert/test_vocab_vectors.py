"""The test vectors of llama.cpp's own repository, cut by the tokenizer that is rebuilt from each vocabulary file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.pretokenizers import name_by_hash, probe_text
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.gguf.vocab_rebuild import tokenizer_files_from_gguf
from quantpress.convert.tokenizer import Tokenizer

# vocabulary -> names that the hash of its ids of the probe text must give (the table of llama.cpp's converter)
BYTE_LEVEL = {
    "gpt-2": "gpt-2",
    "mpt": "olmo",  # one tokenizer, two names; the later one wins in the converter too
    "falcon": "falcon",
    "starcoder": "starcoder",
    "refact": "refact",
    "deepseek-coder": "deepseek-coder",
    "deepseek-llm": "deepseek-llm",
}
SENTENCEPIECE = ("llama-spm", "phi-3")


def metadata_of(shared: Path, name: str) -> dict[str, Any]:
    return plain_metadata(open_gguf_file(shared / "gguf-vocabs" / f"ggml-vocab-{name}.gguf").metadata)


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    base = shared / "gguf-vocabs" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text(encoding="utf-8").split("\n")
    return [(text, [int(one) for one in line.split()]) for text, line in zip(texts, lines, strict=False)]


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_rebuilt_tokenizer_gives_the_published_ids(shared: Path, name: str) -> None:
    metadata = metadata_of(shared, name)
    files = tokenizer_files_from_gguf(metadata, name=name)
    tokenizer = Tokenizer(files)
    cases = vectors(shared, name)
    assert len(cases) >= 46
    wrong = [(text, ids) for text, ids in cases if tokenizer.encode(text, special=False).tolist() != ids]
    assert not wrong
    plan = plan_vocab(files, vocab_size=len(metadata["tokenizer.ggml.tokens"]), model_type="llama")
    for key in ("tokens", "merges"):  # and the way back writes the same lists
        if f"tokenizer.ggml.{key}" in metadata:
            assert plan.metadata[f"tokenizer.ggml.{key}"][1] == metadata[f"tokenizer.ggml.{key}"]
    if name in BYTE_LEVEL:
        assert plan.metadata["tokenizer.ggml.pre"] == ("string", BYTE_LEVEL[name])
        with_bos = tokenizer.encode_in_template(probe_text())
        assert name_by_hash(with_bos) == BYTE_LEVEL[name]
    else:
        same_order(metadata, plan.metadata["tokenizer.ggml.scores"][1])


def same_order(metadata: dict[str, Any], scores: Any) -> None:
    """Scores derived from merges order the tokens that merges make as the original scores do."""
    stored, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    made = [one for one, token in enumerate(tokens) if types[one] == 1 and len(token) > 1]
    by_stored = sorted(made, key=lambda one: (-stored[one], one))
    by_derived = sorted(made, key=lambda one: (-scores[one], one))
    assert by_stored == by_derived
    assert all(math.isfinite(score) for score in scores)


@pytest.mark.parametrize("name", ["baichuan", "gpt-neox"])
def test_vocabulary_without_vectors_survives_there_and_back(shared: Path, name: str) -> None:
    metadata = metadata_of(shared, name)
    files = tokenizer_files_from_gguf(metadata, name=name)
    plan = plan_vocab(files, vocab_size=len(metadata["tokenizer.ggml.tokens"]), model_type="llama")
    again = Tokenizer(tokenizer_files_from_gguf(plain_metadata(plan.metadata)))
    tokenizer = Tokenizer(files)
    for text, _ in vectors(shared, "gpt-2"):
        ids = tokenizer.encode(text, special=True).tolist()
        assert again.encode(text, special=True).tolist() == ids
        assert tokenizer.decode(ids).lstrip(" ") == text.lstrip(" ")


def test_wordpiece_gives_the_published_ids_there_and_back(shared: Path) -> None:
    metadata = metadata_of(shared, "bert-bge")
    files = tokenizer_files_from_gguf(metadata, name="bge")
    tokenizer, cases = Tokenizer(files), vectors(shared, "bert-bge")
    wrong = [text for text, ids in cases if tokenizer.encode(text, special=False).tolist() != ids]
    assert len(cases) >= 46
    assert not wrong
    first, last = (metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("cls", "seperator"))
    assert tokenizer.encode_in_template("press") == [first, *tokenizer.encode("press", special=False), last]
    plan = plan_vocab(files, vocab_size=len(metadata["tokenizer.ggml.tokens"]), model_type="bert")
    assert plan.metadata["tokenizer.ggml.model"] == ("string", "bert")
    written, stored = plan.metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.tokens"]
    # the file is older than the marks before "[unused0]": no text holds those
    assert [(a, b) for a, b in zip(written, stored, strict=True) if a != b and "[unused" not in a] == []
    assert not plan.notes
    assert len(plan.apart) == 1
