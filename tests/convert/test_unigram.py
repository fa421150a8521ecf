"""Unigram vocabularies: the checkpoint's tokenizer, llama.cpp with our GGUF metadata, and the tokenizer rebuilt.

The judges are SentencePiece, which trains the vocabularies, transformers' classes, which make tokenizer.json of them,
the `tokenizers` library and llama.cpp; the GGUF file between them is written by the official `gguf` package.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.vocab import VocabPlan, plan_vocab
from quantpress.convert.gguf.vocab_rebuild import tokenizer_files_from_gguf
from quantpress.convert.gguf.vocab_unigram import read_charsmap, read_unigram
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.quant.errors import InputError

WORKER = Path(__file__).with_name("llama_tokenize.py")
ROWS = 640
HARD = [
    "",
    "I'VE been 'told he's, 'RE you'LL 'd WE'D o'clock 'ſ",
    "1234567 3.14 1930s ١٢٣ Ⅻ ½ x² 一二三",
    "  a  b   c\t\td \n\n e\r\n f\u00a0x\u3000y  ",
    "naïve cafe\u0301 Z͑ͫ̓ͪ",
    "👩‍👩‍👧‍👦 🇩🇪 ❤️ 😀😁",
    "नमस्ते दुनिया ภาษาไทย ქართული עִבְרִית العَرَبِيَّة",
    "中文字符，日本語テスト。한국어 시험!",
    "a_b-c/d\\e|f`g~h^i@j#k$l%m&n*o(p)q+r=s[t]u{v}w;x:y<z>",
    "ǅ ǈ ª º ﬁ İ ı ß ẞ",
    "\n\n\n \n \n",
    "     ",
    "a" * 50,
]


@pytest.fixture(scope="session")
def lines(shared: Path) -> list[str]:
    """Lines of three books and the difficult ones."""
    found: list[str] = []
    for name in ("wikitext2-raw.test.txt", "tinystories.test.txt", "alice.txt"):
        found += (shared / "text" / name).read_text(encoding="utf-8").splitlines()[:900:6]
    return found + HARD


@pytest.fixture(scope="session")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `t5.model` (pad, end, unknown first) and `xlm.model` (unknown, begin, end first)."""
    folder = tmp_path_factory.mktemp("unigram")
    sample = shared / "text" / "tinystories.calib.txt"
    options = {"input": str(sample), "vocab_size": 500, "model_type": "unigram", "minloglevel": 2}
    train = sentencepiece.SentencePieceTrainer.train
    train(**options, model_prefix=str(folder / "t5"), pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    train(**options, model_prefix=str(folder / "xlm"))
    return folder


def t5_files(trained: Path, **config: Any) -> TokenizerFiles:
    """As old T5 checkpoints are published: the SentencePiece file alone."""
    named = {"spiece.model": (trained / "t5.model").read_bytes(), "config.json": b'{"model_type": "t5"}'}
    return TokenizerFiles(named | _config(config), "t5")


def xlm_files(trained: Path, **config: Any) -> TokenizerFiles:
    named = {"sentencepiece.bpe.model": (trained / "xlm.model").read_bytes()}
    return TokenizerFiles(named | _config({"tokenizer_class": "XLMRobertaTokenizer", **config}), "xlm")


def _config(config: Mapping[str, Any]) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(config).encode()} if config else {}


def of_transformers(trained: Path, kind: str, folder: Path) -> TokenizerFiles:
    """As transformers saves the same tokenizer."""
    import transformers

    name, file, stem = {
        "t5": ("T5Tokenizer", "spiece.model", "t5"),
        "xlm": ("XLMRobertaTokenizer", "sentencepiece.bpe.model", "xlm"),
    }[kind]
    (folder / "from").mkdir()
    (folder / "from" / file).write_bytes((trained / f"{stem}.model").read_bytes())
    getattr(transformers, name).from_pretrained(folder / "from").save_pretrained(folder / "to")
    return TokenizerFiles({path.name: path.read_bytes() for path in (folder / "to").iterdir()}, kind)


def in_llama_cpp(path: Path, plan: VocabPlan, texts: Sequence[str], *, special: bool) -> dict[str, Any]:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed (pip install quantpress[llama-cpp])")
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in plan.metadata.items():
        if kind.startswith("array"):
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_array(key, bytes(plain) if kind == "array[uint8]" else plain)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    library = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))[0]
    jobs = [{"gguf": str(path), "texts": list(texts), "special": special}]
    command = [sys.executable, str(WORKER), str(library)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    facts: dict[str, Any] = json.loads(done.stdout)[0]
    return facts


def cut(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    return [tokenizer.encode(text, special=special).tolist() for text in texts]


def assert_same(texts: Sequence[str], one: Sequence[list[int]], two: Sequence[list[int]]) -> None:
    wrong = [(text, a, b) for text, a, b in zip(texts, one, two, strict=True) if list(a) != list(b)]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts differ; first: {wrong[0]}"


@pytest.mark.parametrize("kind", ["t5", "xlm"])
@pytest.mark.parametrize("source", ["sentencepiece", "transformers"])
def test_a_unigram_tokenizer_is_cut_alike_by_all_three(
    trained: Path, tmp_path: Path, lines: list[str], kind: str, source: str
) -> None:
    own = {"t5": t5_files, "xlm": xlm_files}[kind](trained)
    files = own if source == "sentencepiece" else of_transformers(trained, kind, tmp_path)
    plan = plan_vocab(files, vocab_size=ROWS, model_type=kind)
    texts = [*lines, "a <extra_id_0> b <extra_id_99>.", "x</s> y", "</s>"]
    facts = in_llama_cpp(tmp_path / "vocab.gguf", plan, texts, special=True)
    assert_same(texts, cut(Tokenizer(files), texts), facts["ids"])
    rebuilt = Tokenizer(tokenizer_files_from_gguf(plain_metadata(plan.metadata)))
    assert_same(texts, cut(rebuilt, texts), facts["ids"])
    ends = {"t5": (-1, 1, False, True), "xlm": (0, 2, True, True)}[kind]
    assert (facts["bos"], facts["eos"], facts["add_bos"], facts["add_eos"]) == ends
    assert (rebuilt.eos_id, rebuilt.unk_id, rebuilt.pad_id) == {"t5": (1, 2, 0), "xlm": (2, 3, 1)}[kind]
    assert (rebuilt.add_bos, rebuilt.add_eos) == ends[2:]


@pytest.mark.parametrize("kind", ["t5", "xlm"])
def test_ids_are_those_of_transformers_class(trained: Path, tmp_path: Path, lines: list[str], kind: str) -> None:
    own = Tokenizer({"t5": t5_files, "xlm": xlm_files}[kind](trained))
    other = Tokenizer(of_transformers(trained, kind, tmp_path))
    assert own.size == other.size
    texts = [*lines, "a <extra_id_0> b"]
    assert_same(texts, cut(own, texts), cut(other, texts))
    template = [[*own.encode_in_template(text)] for text in lines[:20]]
    assert template == [[*other.encode_in_template(text)] for text in lines[:20]]


def test_pieces_are_those_of_sentencepiece_itself(trained: Path, lines: list[str]) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(trained / "t5.model"))
    assert_same(lines, cut(Tokenizer(t5_files(trained)), lines), [library.encode(line) for line in lines])


def test_metadata_are_what_llama_cpps_converter_writes(trained: Path) -> None:
    plan = plan_vocab(t5_files(trained), vocab_size=ROWS, model_type="t5")
    assert plan.notes == ()
    metadata = plain_metadata(plan.metadata)
    library = sentencepiece.SentencePieceProcessor(model_file=str(trained / "t5.model"))
    pieces = library.get_piece_size()
    assert metadata["tokenizer.ggml.model"] == "t5"
    assert metadata["tokenizer.ggml.tokens"][:pieces] == [library.id_to_piece(one) for one in range(pieces)]
    # those of special tokens are never looked at
    assert metadata["tokenizer.ggml.scores"][3:pieces] == [library.get_score(one) for one in range(3, pieces)]
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 2, 1]  # control, control, unknown, normal
    assert metadata["tokenizer.ggml.tokens"][pieces] == "<extra_id_99>"
    assert metadata["tokenizer.ggml.token_type"][pieces : pieces + 101] == [3] * 100 + [5]
    assert (metadata["tokenizer.ggml.add_space_prefix"], metadata["tokenizer.ggml.remove_extra_whitespaces"]) == (
        True,
        True,
    )
    kind, charsmap = plan.metadata["tokenizer.ggml.precompiled_charsmap"]
    assert kind == "array[uint8]"
    # SentencePiece keeps the map, as it is, in its own file
    assert charsmap.tobytes() in (trained / "t5.model").read_bytes()


def test_the_number_of_sentinels_is_that_of_the_configuration(trained: Path) -> None:
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 7}
    assert Tokenizer(t5_files(trained, **config)).size == 507
    assert Tokenizer(t5_files(trained, tokenizer_class="T5Tokenizer")).size == 600
    with pytest.raises(InputError, match="'extra_ids'"):
        Tokenizer(t5_files(trained, tokenizer_class="T5Tokenizer", extra_ids="many"))


@pytest.mark.parametrize("named", ["AlbertTokenizer", "CamembertTokenizer", "MBart50Tokenizer"])
def test_a_class_whose_ids_are_not_known_is_refused(trained: Path, named: str) -> None:
    with pytest.raises(InputError, match=f"{named} gives its pieces is not known"):
        Tokenizer(t5_files(trained, tokenizer_class=named))


def unigram(**changes: Any) -> dict[str, Any]:
    """A small tokenizer.json."""
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -2.0], ["▁a", -1.0], ["b", -1.5]]}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    base = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": space}
    return {**base, "post_processor": None, "decoder": None, "model": model, **changes}


def files_of(tokenizer: dict[str, Any]) -> TokenizerFiles:
    return TokenizerFiles({"tokenizer.json": json.dumps(tokenizer).encode()}, "ck")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase.* rewrites text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace.* is not what llama.cpp does"),
        ({"pre_tokenizer": None}, "spaces are not written as U\\+2581"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        plan_vocab(files_of(unigram(**changes)), vocab_size=8, model_type="t5")


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"pre_tokenizer": [{"type": "WhitespaceSplit"}]}, "tabs and newlines"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_said(changes: dict[str, Any], note: str) -> None:
    tokenizer = unigram()
    if isinstance(changes.get("pre_tokenizer"), list):
        steps = [*changes["pre_tokenizer"], tokenizer["pre_tokenizer"]]
        changes = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    plan = plan_vocab(files_of(tokenizer | changes), vocab_size=8, model_type="t5")
    assert any(note in sentence for sentence in plan.notes)


def test_pieces_that_go_beyond_a_word_are_kept_from_llama_cpp(tmp_path: Path) -> None:
    model = unigram()["model"]
    model["vocab"].append(["▁a▁a", -0.1])  # the tokenizer cuts before it could be found
    files = files_of(unigram(model=model))
    plan = plan_vocab(files, vocab_size=8, model_type="t5")
    assert any("beyond a word" in note for note in plan.notes)
    texts = ["a a", "ab a a b"]
    facts = in_llama_cpp(tmp_path / "vocab.gguf", plan, texts, special=False)
    assert_same(texts, cut(Tokenizer(files), texts, special=False), facts["ids"])


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", (9).to_bytes(4, "little") + b"x", (0).to_bytes(4, "little") + b"unended"],
    ids=["empty is none", "too short", "longer than it is", "no end"],
)
def test_a_damaged_character_map_is_refused(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    if not data:
        assert read_charsmap(text, "x") == b""
        return
    with pytest.raises(InputError, match="no character map"):
        read_charsmap(text, "x")


def test_steps_are_read_in_every_spelling() -> None:
    squeeze = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}
    style = read_unigram(unigram(normalizer={"type": "Sequence", "normalizers": [squeeze]}), where="x")
    assert (style.prefix, style.squeezes, style.words) == (True, True, True)
    style = read_unigram(unigram(pre_tokenizer=old), where="x")
    assert (style.prefix, style.squeezes) == (False, False)


def test_scores_that_are_no_numbers_are_refused() -> None:
    for bad in ("x", None, float("inf")):
        model = {"type": "Unigram", "unk_id": 0, "vocab": [["a", bad]]}
        with pytest.raises(InputError):
            plan_vocab(files_of(unigram(model=model)), vocab_size=8, model_type="t5")
