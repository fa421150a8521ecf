"""The general part of the metadata: names as in the gguf package, facts from the model's files, and what users set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.container import encode_pair
from quantpress.convert.gguf.general import general_metadata, sampling_metadata, size_label
from quantpress.convert.gguf.model_card import read_card
from quantpress.convert.gguf.overrides import override, read_metadata_file
from quantpress.quant.errors import InputError, UsageError

GENERAL = gguf.constants.Keys.General

CARD = b"""---
license: apache-2.0
base_model:
- meta-llama/Llama-3.1-8B
- someone
tags: [chat, llama]
pipeline_tag: text-generation
language: en
---
# A model
"""


def general(checkpoint: Checkpoint, **options: Any) -> dict[str, tuple[str, Any]]:
    settings = {"parameters": 8_030_261_248, "file_type": 7, "quantized": True, **options}
    return general_metadata(checkpoint, "llama", **settings)


@pytest.mark.parametrize(
    "parameters",
    [1, 999, 1000, 260_032, 999_999, 10**6, 10**6 + 1, 134_515_008, 999_500_000, 8_030_261_248, 4 * 10**11],
)
def test_sizes_are_said_as_the_gguf_package_says_them(parameters: int) -> None:
    assert size_label(parameters) == gguf.size_label(parameters, parameters, 0, 0)


def test_a_model_says_what_it_is() -> None:
    found = general(Checkpoint("Tiny", {}, {}))
    assert found == {
        GENERAL.ARCHITECTURE: ("string", "llama"),
        GENERAL.TYPE: ("string", gguf.GGUFType.MODEL),
        GENERAL.NAME: ("string", "Tiny"),
        GENERAL.SIZE_LABEL: ("string", "8.0B"),
        GENERAL.FILE_TYPE: ("uint32", 7),
        GENERAL.QUANTIZATION_VERSION: ("uint32", gguf.GGML_QUANT_VERSION),
    }
    assert GENERAL.QUANTIZATION_VERSION not in general(Checkpoint("Tiny", {}, {}), quantized=False)
    assert GENERAL.SIZE_LABEL not in general(Checkpoint("Tiny", {}, {}), parameters=0)
    assert general(Checkpoint("Tiny", {}, {}), name="Other")[GENERAL.NAME] == ("string", "Other")


def test_sampling_defaults_have_llama_cpps_names() -> None:
    found = sampling_metadata({"temperature": 1, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": None,
                               "do_sample": True, "mirostat": 2, "sequence": "kp"})  # fmt: skip
    assert found == {
        GENERAL.SAMPLING_TEMP: ("float32", 1.0),
        GENERAL.SAMPLING_TOP_K: ("int32", 40),
        GENERAL.SAMPLING_TOP_P: ("float32", 0.9),
        GENERAL.SAMPLING_PENALTY_REPEAT: ("float32", 1.1),
        GENERAL.SAMPLING_MIROSTAT: ("int32", 2),
        GENERAL.SAMPLING_SEQUENCE: ("string", "kp"),
    }


@pytest.mark.parametrize("config", [{"top_k": "40"}, {"top_k": 1.5}, {"temperature": True}, {"sequence": 1}])
def test_a_sampling_default_of_a_wrong_type_is_refused_by_its_key(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(config))):
        sampling_metadata(config)


def test_a_gguf_source_keeps_what_describes_the_model_and_not_the_file() -> None:
    kept = {
        "general.license": ("string", "mit"),
        "general.file_type": ("uint32", 1),
        "general.alignment": ("uint32", 64),
        "general.name": ("string", "Kept"),
        "tokenizer.ggml.model": ("string", "llama"),
    }
    found = general(Checkpoint("file", {}, {}, metadata=kept, format="gguf"))
    assert found["general.license"] == ("string", "mit")
    assert found["general.name"] == ("string", "Kept")
    assert found["general.file_type"] == ("uint32", 7)
    assert not {"general.alignment", "tokenizer.ggml.model"} & set(found)


def test_a_model_card_gives_licence_ancestors_tags_and_languages() -> None:
    found = general(Checkpoint("m", {}, {}, tokenizer_files={"README.md": CARD}))
    base = "general.base_model.{}.{}"
    assert {key: value for key, (_, value) in found.items() if key in read_card(CARD)} == {
        GENERAL.LICENSE: "apache-2.0",
        GENERAL.BASE_MODEL_COUNT: 2,
        base.format(0, "name"): "Llama-3.1-8B",
        base.format(0, "organization"): "meta-llama",
        base.format(0, "repo_url"): "https://huggingface.co/meta-llama/Llama-3.1-8B",
        base.format(1, "name"): "someone",
        GENERAL.TAGS: ["chat", "llama", "text-generation"],
        GENERAL.LANGUAGES: ["en"],
    }
    for key, value in found.items():
        encode_pair(key, value)


@pytest.mark.parametrize(
    "front",
    [
        "license: [",
        "- a list",
        "license: 5",
        "license: {a: b}",
        "a: &a [x]\nlicense: *a",
        "license: " + "[" * 5000,
        "license: '" + "x" * 1000 + "'",
        "date: 2024-99-99\nlicense: mit",
        "license: !!python/object/apply:os.system ['true']",
        'license: "\\ud800"',
        "\x00license: mit",
        "",
        "license: !!bool maybe",
        "license: !!timestamp x",
        "license: !!int ''",
    ],
)
def test_a_strange_card_is_no_card(front: str) -> None:
    assert read_card(f"---\n{front}\n---\ntext".encode("utf-8", "surrogatepass")) == {}


@pytest.mark.parametrize("card", [b"", b"# Title\n---\nlicense: mit\n---", b"---\nlicense: mit\n", b"\xff\xfe---\n"])
def test_a_card_without_front_matter_says_nothing(card: bytes) -> None:
    assert read_card(card) == {}


def test_a_metadata_file_sets_what_llama_cpps_converter_takes(tmp_path: Path) -> None:
    content = {
        "general.name": "N",
        "general.sampling.temp": 1,
        "general.tags": ["a", "b"],
        "general.base_models": [{"name": "B", "repo_url": "https://x"}],
        "general.datasets": [{"name": "D"}],
    }
    (tmp_path / "m.json").write_text(json.dumps(content))
    found = read_metadata_file(tmp_path / "m.json")
    assert found == {
        "general.name": ("string", "N"),
        "general.sampling.temp": ("float32", 1),
        "general.tags": ("array[string]", ["a", "b"]),
        "general.base_model.count": ("uint32", 1),
        "general.base_model.0.name": ("string", "B"),
        "general.base_model.0.repo_url": ("string", "https://x"),
        "general.dataset.count": ("uint32", 1),
        "general.dataset.0.name": ("string", "D"),
    }
    for key, value in found.items():
        encode_pair(key, value)


@pytest.mark.parametrize(
    "content",
    [
        {"general.architecture": "llama"},
        {"general.alignment": 32},
        {"general.name": 5},
        {"name": "x"},
        {"general.sampling.heat": 1},
        {"general.sampling.top_k": 1.5},
        {"general.tags": "a"},
        {"general.base_models": {"name": "x"}},
        {"general.base_models": [{"nome": "x"}]},
        {"llama.block_count": 5},
    ],
)
def test_a_metadata_file_with_another_key_or_value_is_refused_by_its_key(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=next(iter(content))):
        read_metadata_file(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        read_metadata_file(tmp_path / "m.json")


HELD: dict[str, tuple[str, Any]] = {
    "a.count": ("uint32", 1),
    "a.ratio": ("float32", 0.5),
    "a.flag": ("bool", False),
    "a.name": ("string", "x"),
    "a.list": ("array[int32]", [1]),
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a.count=int:7", ("uint32", 7)),
        ("a.ratio=float:2", ("float32", 2.0)),
        ("a.flag=bool:true", ("bool", True)),
        ("a.name=str:b=c:d", ("string", "b=c:d")),
        ("new=int:5", ("uint32", 5)),
        ("new=int:-5", ("int64", -5)),
        ("new=float:1e-3", ("float32", 1e-3)),
        ("new=bool:false", ("bool", False)),
        ("new=str:", ("string", "")),
    ],
)
def test_a_setting_replaces_a_value_and_keeps_its_type(setting: str, value: tuple[str, Any]) -> None:
    changed = override(HELD, [setting])
    key = setting.partition("=")[0]
    assert changed[key] == value
    assert {name: pair for name, pair in changed.items() if name != key} == {
        name: pair for name, pair in HELD.items() if name != key
    }
    encode_pair(key, changed[key])


@pytest.mark.parametrize(
    "setting",
    [
        "a.count",
        "a.count=7",
        "=int:7",
        "a.count=int:x",
        "a.count=int:-1",
        "a.count=int:4294967296",
        "a.count=float:1",
        "a.ratio=float:nan",
        "a.ratio=int:1",
        "a.flag=bool:True",
        "a.flag=bool:1",
        "a.name=int:1",
        "a.list=int:1",
        "new=double:1",
        "general.alignment=int:64",
        "general.architecture=str:llama",
        "split.count=int:2",
    ],
)
def test_a_setting_that_makes_no_sense_is_a_usage_error(setting: str) -> None:
    with pytest.raises(UsageError, match="--override-kv"):
        override(HELD, [setting])
