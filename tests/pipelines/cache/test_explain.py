"""Reasons name what a person changed, and every difference of two materials gives one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.pipelines.cache.differences import differences
from quantpress.pipelines.cache.explain import FIRST, GONE, STOPPED, History
from quantpress.pipelines.cache.keys import canonical, key_of
from quantpress.pipelines.cache.store import Cache

A, B = "a" * 64, "b" * 64
MODEL = {"model": "smol", "files": [["config.json", A], ["model.safetensors", A]], "tokenizer": {"tokenizer.json": A}}
ENVIRONMENT = {"device": "cpu", "packages": {"numpy": "2.1", "quantpress": "0.1", "torch": "2.12"}, "python": "3.11.7"}
MERGE = {
    "stage": {"name": "merge_lora", "version": 1, "options": {"adapter": {"adapter_config.json": A}, "weight": None}},
    "files": [["adapter_model.safetensors", A]],
    "input": MODEL,
}
GPTQ = {
    "stage": {
        "name": "gptq",
        "version": 2,
        "options": {"bits": 4, "calibration": A, "skip": [], "damping": 0.01, "overrides": {"lm_head": {"bits": 8}}},
    },
    "environment": ENVIRONMENT,
    "input": MERGE,
}
OUTPUT = {
    "work": {"stage": {"name": "onnx", "version": 1, "options": {}}, "environment": ENVIRONMENT, "input": GPTQ},
    "place": "../out/smol-onnx",
}


def changed(material: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a place; `...` takes it away."""
    result = copy.deepcopy(material)
    *parents, last = path.split("/")
    place: Any = result
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "reasons"),
    [
        ("stage/options/bits", 3, ["option bits: 4 -> 3"]),
        ("stage/options/bits", 4.0, ["option bits: 4 -> 4.0"]),
        ("stage/options/act_order", True, ["option act_order: new, True"]),
        ("stage/options/bits", ..., ["option bits: gone, was 4"]),
        ("stage/options/calibration", B, ["option calibration: contents changed"]),
        ("stage/options/calibration", None, ["option calibration: other contents -> None"]),
        ("stage/options/skip", ["lm_head"], ["option skip: [] -> ['lm_head']"]),
        ("stage/options/overrides/lm_head/bits", 6, ["option overrides.lm_head.bits: 8 -> 6"]),
        ("stage/version", 3, ["stage gptq: version 2 -> 3"]),
        ("stage/name", "awq", ["stage gptq -> awq"]),
        ("environment/packages/torch", "2.13", ["torch 2.12 -> 2.13"]),
        ("environment/packages/quantpress", "0.2", ["quantpress 0.1 -> 0.2"]),
        ("environment/packages/numpy", ..., ["numpy 2.1 -> none"]),
        ("environment/device", "cuda", ["device cpu -> cuda"]),
        ("environment/python", "3.12.1", ["python 3.11.7 -> 3.12.1"]),
        ("input/input/files/1/1", B, ["input model.safetensors changed"]),
        ("input/input/files", [["config.json", A]], ["input model.safetensors is gone"]),
        ("input/input/files", [*MODEL["files"], ["x", A]], ["input x is new"]),
        ("input/input/tokenizer/tokenizer.json", B, ["input tokenizer.json changed"]),
        ("input/input/model", "other", ["model: smol -> other"]),
        ("input/files/0/1", B, ["input adapter_model.safetensors changed"]),
        ("input/stage/options/weight", 0.5, ["merge_lora: option weight: None -> 0.5"]),
        ("input/stage/options/adapter/adapter_config.json", B,
         ["merge_lora: option adapter.adapter_config.json: contents changed"]),
        ("input", MODEL, ["before it stands the model itself, it was stage merge_lora"]),
        ("input", B, ["what stands before it changed"]),
    ],
)  # fmt: skip
def test_a_change_is_told_in_the_words_of_the_pipeline_file(path: str, value: Any, reasons: list[str]) -> None:
    assert list(differences(GPTQ, changed(GPTQ, path, value))) == reasons


def test_an_output_names_what_changed_before_it() -> None:
    assert list(differences(OUTPUT, changed(OUTPUT, "work/input/stage/options/bits", 3))) == [
        "gptq: option bits: 4 -> 3"
    ]
    assert list(differences(OUTPUT, changed(OUTPUT, "place", "../out/b"))) == ["place: ../out/smol-onnx -> ../out/b"]


def test_what_is_nearest_to_the_work_comes_first() -> None:
    new = changed(changed(changed(GPTQ, "input/files/0/1", B), "environment/device", "cuda"), "stage/options/bits", 3)
    first, *_, last = differences(GPTQ, new)
    assert (first, last) == ("option bits: 4 -> 3", "input adapter_model.safetensors changed")


def test_texts_that_would_break_a_line_are_escaped() -> None:
    reasons = list(differences(GPTQ, changed(GPTQ, "stage/options/skip", "a\nb\x1b[31m")))
    assert reasons == [r"option skip: [] -> 'a\nb\x1b[31m'"]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["", "x", A, B]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "stage",
                    "name",
                    "options",
                    "input",
                    "files",
                    "environment",
                    "packages",
                    "work",
                    "version",
                    "tokenizer",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=14,
)


MATERIALS = st.dictionaries(st.sampled_from(["stage", "input", "work", "files", "environment", "x"]), PLAIN, max_size=4)


@given(MATERIALS, MATERIALS)
def test_whatever_the_materials_hold_there_is_a_reason_where_they_differ(old: Any, new: Any) -> None:
    assert bool(list(differences(old, new))) == (canonical(old) != canonical(new))


def test_a_history_tells_first_runs_changes_and_lost_entries(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    history = History(cache)
    assert history.why("job/gptq", GPTQ) == (FIRST,)
    assert not cache.folder.exists()
    history.remember("job/gptq", GPTQ)
    again = History(Cache(tmp_path / "cache"))
    assert again.why("job/gptq", GPTQ) == (GONE,)
    assert again.why("other/gptq", GPTQ) == (FIRST,)
    other = changed(GPTQ, "stage/options/bits", 3)
    assert again.why("job/gptq", other) == ("option bits: 4 -> 3",)
    again.remember("job/gptq", other)
    again.remember("job/gptq", other)
    assert history.why("job/gptq", GPTQ) == ("option bits: 3 -> 4",)
    assert history.labels() == {key_of(other): ["job/gptq"]}


def test_work_that_was_stopped_is_told(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with cache.making(key_of(GPTQ), "prepare", GPTQ) as making:
        (making.folder / "step").touch()
    assert History(cache).why("job/gptq", GPTQ) == (STOPPED,)
    History(cache).remember("job/gptq", changed(GPTQ, "stage/options/bits", 3))
    assert History(cache).why("job/gptq", GPTQ) == (STOPPED, "option bits: 3 -> 4")
    History(cache).remember("job/gptq", GPTQ)
    assert History(cache).why("job/gptq", GPTQ) == (STOPPED,)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    History(cache).remember("a", {"stage": {"name": "x", "options": {f"o{n}": 0 for n in range(50)}}})
    reasons = History(cache).why("a", {"stage": {"name": "x", "options": {f"o{n}": 1 for n in range(50)}}})
    assert len(reasons) == 20
    assert reasons[-1] == "and 31 more differences"


def test_a_damaged_memory_is_a_first_run(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    History(cache).remember("a", GPTQ)
    (path,) = cache.layout.labels.iterdir()
    path.write_bytes(path.read_bytes().replace(b"gptq", b"gptx"))
    assert History(cache).why("a", GPTQ) == (FIRST,)
    assert History(cache).labels() == {}


def test_labels_of_any_text_are_told_apart(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    labels = ["a/b", "a", "../../x", "ä" * 300, "\n", "A"]
    for number, label in enumerate(labels):
        History(cache).remember(label, {"n": number})
    assert [History(cache).why(label, {"n": number}) for number, label in enumerate(labels)] == [(GONE,)] * len(labels)
