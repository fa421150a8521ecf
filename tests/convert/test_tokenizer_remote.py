"""Special tokens that ChatGLM's class puts behind SentencePiece's, and pieces that llama.cpp cannot hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.gguf.vocab_tokens import TokenType
from quantpress.convert.token_count import count_tokens
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles

MASKS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def chatglm(shared: Path, model: str, *, pieces: bytes = b"", **config: object) -> TokenizerFiles:
    """A SentencePiece model of 512 pieces under ChatGLM's class."""
    data = (shared / "models" / "stories260k-llama2c" / "tok512.model").read_bytes()
    settings = {"tokenizer_class": "ChatGLMTokenizer", **config}
    files = {
        "tokenizer.model": data + pieces,
        "tokenizer_config.json": json.dumps(settings).encode(),
        "config.json": json.dumps({"_name_or_path": model, "eos_token_id": 2, "pad_token_id": 0}).encode(),
    }
    return TokenizerFiles(files, name="model")


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("THUDM/chatglm2-6b", MASKS), ("THUDM/chatglm3-6b", MASKS + ROLES), ("/models/mine", MASKS + ROLES)],
)
def test_chatglms_special_tokens_follow_the_pieces(shared: Path, model: str, tokens: list[str]) -> None:
    files = chatglm(shared, model)
    tokenizer = Tokenizer(files)
    assert [tokenizer.token_id(token) for token in tokens] == list(range(512, 512 + len(tokens)))
    assert tokenizer.size == 512 + len(tokens)
    assert count_tokens(Checkpoint(name="m", config={}, tensors={}, tokenizer_files=files.files)) == tokenizer.size
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, False)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)


def test_special_tokens_are_cut_out_of_a_text_that_may_hold_them(shared: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    files = chatglm(shared, "THUDM/chatglm3-6b")
    library = sentencepiece.SentencePieceProcessor(model_proto=files.files["tokenizer.model"])
    ids = Tokenizer(files).encode("[gMASK]sop<|user|>Once upon", special=True).tolist()
    assert ids == [513, 515, 518, *library.encode("Once upon")]
    assert Tokenizer(files).encode("<|user|>", special=False).tolist() == library.encode("<|user|>")


def test_the_files_own_word_on_a_token_goes_before_the_class(shared: Path) -> None:
    files = chatglm(shared, "THUDM/chatglm3-6b", added_tokens_decoder={"518": {"content": "<|me|>", "special": True}})
    tokenizer = Tokenizer(files)
    assert tokenizer.token_id("<|me|>") == 518
    assert tokenizer.token_id("<|user|>") is None


def test_gguf_marks_them_as_control_tokens(shared: Path) -> None:
    metadata = plan_vocab(chatglm(shared, "THUDM/chatglm3-6b"), vocab_size=544, model_type="chatglm").metadata
    texts, types = metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.token_type"][1]
    assert texts[512:521] == MASKS + ROLES
    assert set(types[512:521].tolist()) == {int(TokenType.CONTROL)}
    assert set(types[521:].tolist()) == {int(TokenType.UNUSED)}
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert metadata["tokenizer.ggml.eos_token_id"] == ("uint32", 2)


def test_a_piece_with_a_zero_byte_leaves_its_row_unused(shared: Path) -> None:
    piece = b"\x0a\x01\x00" + b"\x15" + struct.pack("<f", -1.0)  # text "\0" and a score, as InternLM2 has one
    files = chatglm(shared, "THUDM/chatglm2-6b", pieces=b"\x0a" + bytes((len(piece),)) + piece)
    plan = plan_vocab(files, vocab_size=544, model_type="internlm2")
    assert plan.metadata["tokenizer.ggml.tokens"][1][512:514] == ["[PAD512]", "[MASK]"]
    assert plan.metadata["tokenizer.ggml.token_type"][1][512] == TokenType.UNUSED
    assert any("token 512" in note for note in plan.notes)
