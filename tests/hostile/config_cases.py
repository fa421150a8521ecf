"""Settings and tokenizers: values that no model has, documents that no parser should follow, code that must not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.case import Case
from tests.hostile.model import edit, spoilt
from tests.tiny import VOCABULARY

WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
MARK = "import pathlib; pathlib.Path('ran').touch()"  # what must never run


def _config(**settings: Any) -> Callable[[Path], object]:
    return lambda model: edit(model / "config.json", lambda said: said.update(settings))


def _without(key: str) -> Callable[[Path], object]:
    return lambda model: edit(model / "config.json", lambda said: said.pop(key) and None)


def _text(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(data)


_ODD: tuple[tuple[str, Any], ...] = (
    ("null", None), ("a text", "32"), ("true", True), ("a list", [32]), ("an object", {"a": 1}), ("zero", 0),
    ("below zero", -4), ("a fraction", 2.5), ("beyond 32 bits", 1 << 40),
)  # fmt: skip
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


def _sizes() -> list[Case]:
    return [
        Case("config", f"{key} is {what}", spoilt(_config(**{key: value})), words=(key,))
        for key in _SIZES
        for what, value in _ODD
    ]


_SETTINGS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no model_type": (
        lambda m: edit(m / "config.json", lambda s: {"hidden_size": 32}),
        ("model_type",),
    ),
    "an unknown model_type": (
        _config(model_type="nobody", architectures=["NobodyForCausalLM"]),
        ("NobodyForCausalLM", "not implemented"),
    ),
    "no hidden_size": (_without("hidden_size"), ("hidden_size",)),
    "heads that do not divide": (_config(num_attention_heads=5), ("num_attention_heads",)),
    "heads that their keys do not divide": (_config(num_key_value_heads=3), ("num_key_value_heads",)),
    "more key heads than heads": (_config(num_key_value_heads=8), ("num_key_value_heads",)),
    "an odd head": (_config(head_dim=7), ("config.json", "7 of 7")),
    "an epsilon of zero": (_config(rms_norm_eps=0), ("rms_norm_eps",)),
    "an epsilon below zero": (_config(rms_norm_eps=-1e-5), ("rms_norm_eps",)),
    "an epsilon that is text": (_config(rms_norm_eps="1e-5"), ("rms_norm_eps",)),
    "a base of zero": (_config(rope_theta=0), ("rope_theta",)),
    "a base that is a list": (_config(rope_theta=[1]), ("rope_theta",)),
    "a scaling that nobody knows": (_config(rope_scaling={"rope_type": "magic", "factor": 2.0}), ("magic",)),
    "a scaling without a factor": (_config(rope_scaling={"rope_type": "linear"}), ("factor",)),
    "a factor of zero": (_config(rope_scaling={"rope_type": "linear", "factor": 0}), ("factor",)),
    "a scaling that is a number": (_config(rope_scaling=2), ("rope_scaling",)),
    "an activation that nobody knows": (_config(hidden_act="sin"), ("hidden_act",)),
    "a context of zero": (_config(max_position_embeddings=0), ("max_position_embeddings",)),
    "a thousand million layers": (_config(num_hidden_layers=10**9), ("num_hidden_layers",)),
    "one layer less than there is": (_config(num_hidden_layers=1), ("layer 1 is unexpected",)),
    "one layer more than there is": (_config(num_hidden_layers=3), ("layer 2 is missing",)),
    "a wider model": (_config(hidden_size=64), ("shape",)),
    "rows that the embedding lacks": (_config(vocab_size=VOCABULARY + 1), ("embed_tokens", str(VOCABULARY + 1))),
    "codes of a quantizer that nobody knows": (_config(quantization_config={"quant_method": "magic"}), ("magic",)),
    "settings of a quantizer that are text": (_config(quantization_config="gptq"), ("quantization_config",)),
    "codes that are not there": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("model",),
    ),
    "a key twice": (_text("config.json", b'{"model_type": "llama", "model_type": "gpt2"}'), ("'model_type' twice",)),
    "not a number": (_text("config.json", b'{"model_type": "llama", "rms_norm_eps": NaN}'), ("NaN",)),
    "infinity": (_text("config.json", b'{"model_type": "llama", "rms_norm_eps": 1e999}'), ("1e999",)),
    "a number of 10,000 digits": (_text("config.json", b'{"hidden_size": ' + b"9" * 10_000 + b"}"), ("64 bits",)),
    "deep": (_text("config.json", b"[" * 100_000), ("deeper",)),
    "a byte order mark": (_text("config.json", b"\xef\xbb\xbf{}"), ("byte order mark",)),
    "UTF-16": (_text("config.json", '{"model_type": "llama"}'.encode("utf-16")), ("config.json",)),
    "no UTF-8": (_text("config.json", b'{"model_type": "\xff"}'), ("not UTF-8",)),
    "half a surrogate pair": (_text("config.json", b'{"model_type": "\\ud800"}'), ("surrogate",)),
    "a list": (_text("config.json", b"[]"), ("config.json",)),
    "cut short": (_text("config.json", b'{"model_type": "lla'), ("not JSON",)),
    "8 million brackets": (_text("config.json", b'{"a": [' + b"[]," * 4_000_000 + b"[]]}"), ("config.json",)),
    "65 MB of blanks": (_text("config.json", b" " * (65 << 20)), ("config.json", "bytes")),
}


def _json(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda model: edit(model / name, lambda said: change(said) and None)


def _vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], object]:
    return _json("tokenizer.json", lambda said: change(said["model"]["vocab"]))


_TOKENIZERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "an id beyond the embedding": (_vocabulary(lambda v: v.update(zzz=10**6)), ("the tokenizer has", "320 rows")),
    "an id below zero": (_vocabulary(lambda v: v.update(zzz=-1)), ("tokenizer.json",)),
    "an id that is text": (_vocabulary(lambda v: v.update(zzz="7")), ("tokenizer.json",)),
    "an id beyond 32 bits": (_vocabulary(lambda v: v.update(zzz=1 << 40)), ("the tokenizer has", "320 rows")),
    "an id twice": (_vocabulary(lambda v: v.update(zzz=5)), ("tokenizer.json",)),
    "a merge of what is no token": (
        _json("tokenizer.json", lambda s: s["model"]["merges"].append(["zz", "yy"])),
        ("tokenizer.json",),
    ),
    "a merge that is a number": (
        _json("tokenizer.json", lambda s: s["model"]["merges"].append(7)),
        ("tokenizer.json",),
    ),
    "a merge of three": (
        _json("tokenizer.json", lambda s: s["model"]["merges"].append(["a", "b", "c"])),
        ("tokenizer.json",),
    ),
    "a model that nobody knows": (
        _json("tokenizer.json", lambda s: s["model"].update(type="Magic")),
        ("tokenizer.json",),
    ),
    "no model": (_json("tokenizer.json", lambda s: s.pop("model")), ("tokenizer.json",)),
    "a model that is a list": (_json("tokenizer.json", lambda s: s.update(model=[])), ("tokenizer.json",)),
    "a vocabulary that is a list": (
        _json("tokenizer.json", lambda s: s["model"].update(vocab=["a"])),
        ("tokenizer.json",),
    ),
    "a step that nobody knows": (
        _json("tokenizer.json", lambda s: s.update(pre_tokenizer={"type": "Magic"})),
        ("tokenizer.json",),
    ),
    "a pattern that is none": (
        _json(
            "tokenizer.json",
            lambda s: s.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
            ),
        ),
        ("tokenizer.json",),
    ),
    "an added token beyond the embedding": (
        _json(
            "tokenizer.json",
            lambda s: s["added_tokens"].append({**s["added_tokens"][0], "id": 10**6, "content": "<x>"}),
        ),
        ("the tokenizer has", "320 rows"),
    ),
    "added tokens that are text": (_json("tokenizer.json", lambda s: s.update(added_tokens="x")), ("tokenizer.json",)),
    "steps a thousand deep": (
        _text("tokenizer.json", b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 1000),
        ("tokenizer.json",),
    ),
    "a key twice": (_text("tokenizer.json", b'{"model": {}, "model": {}}'), ("tokenizer.json", "twice")),
    "settings that are a list": (_text("tokenizer_config.json", b"[]"), ("tokenizer_config.json",)),
}


def _two(first: Callable[[Path], object], second: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda model: (first(model), second(model))


def _garbage_model(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 50)


def _own_code(model: Path) -> None:
    """A model with code of its own: the code is there, named, and a table knows the family without it."""
    edit(model / "config.json", lambda said: said.update(auto_map={"AutoModelForCausalLM": "modeling_x.X"}))
    for name in ("modeling_x.py", "__init__.py", "configuration_x.py", "tokenization_x.py"):
        (model / name).write_text(MARK)


def _pickle(folder: Path) -> Sequence[str]:
    """Weights whose opening would run a command."""
    import pickle

    class Runs:
        def __reduce__(self) -> Any:
            return exec, (MARK,)

    make = spoilt(lambda model: (model / "model.safetensors").unlink())
    arguments = make(folder)
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Runs()}))
    return arguments


_TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10**9) %}{{ a }}{% endfor %}"

CASES: tuple[Case, ...] = (
    Case("config", "good", spoilt(_config(rope_theta=500_000, pad_token_id=None)), code=0, writes=WRITTEN),
    Case("config", "good, with code of its own that is not run", spoilt(_own_code), code=0, writes=WRITTEN),
    Case(
        "config",
        "good, with settings that nobody reads",
        spoilt(_config(x=[[[1]]], y="z" * 9999)),
        code=0,
        writes=WRITTEN,
    ),
    *_sizes(),
    *(Case("config", name, spoilt(change), words=words) for name, (change, words) in _SETTINGS.items()),
    Case("tokenizer", "good", spoilt(lambda model: None), code=0, writes=WRITTEN),
    Case(
        "tokenizer",
        "good, a template with code is kept and not run",
        spoilt(_json("tokenizer_config.json", lambda s: s.update(chat_template=_TEMPLATE))),
        code=0,
        writes=WRITTEN,
    ),
    *(Case("tokenizer", name, spoilt(change), words=words) for name, (change, words) in _TOKENIZERS.items()),
    Case("tokenizer", "SentencePiece's file is garbage", spoilt(_garbage_model), words=("tokenizer.model",)),
    Case(
        "pickle",
        "good twin: looked at, in safetensors",
        spoilt(lambda model: None, ("inspect", "model", "--json")),
        code=0,
    ),
    Case("pickle", "weights that would run code", _pickle, words=("pytorch_model.bin",)),
)
