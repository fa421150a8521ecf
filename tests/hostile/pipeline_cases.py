"""Pipeline files: YAML that explodes or runs code, keys and values that make no sense, jobs that overwrite."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.model import good_model

RUN = ("run", "batch.yaml", "--workers", "1")
GOOD = """\
version: 1
cache: cache
variables: {kind: q8_0}
defaults: {verify: false}
jobs:
  - name: one
    model: model
    stages:
      - gguf: {outtype: "${kind}", output: out-one.gguf}
"""
_JOB = "  - {name: two, model: model, stages: [{gguf: {outtype: f16, output: out-two.gguf}}]}\n"
_BOMB = "version: 1\nvariables:\n  a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)


def _written(data: str | bytes, arguments: Sequence[str] = RUN) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        good_model(folder)
        (folder / "batch.yaml").write_bytes(data.encode() if isinstance(data, str) else data)
        return arguments

    return make


def _with(old: str, new: str, *arguments: str) -> Callable[[Path], Sequence[str]]:
    assert old in GOOD
    return _written(GOOD.replace(old, new), (*RUN, *arguments))


def _tag(tag: str) -> Callable[[Path], Sequence[str]]:
    return _with("cache: cache", f"cache: {tag}")


_OPTION = 'outtype: "${kind}"'
_OUTPUT = "output: out-one.gguf"
_SYNTAX: Mapping[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("batch.yaml", "empty")),
    "a comment only": ("# nothing\n", ("batch.yaml", "empty")),
    "a list": ("- version: 1\n", ("batch.yaml:1:",)),
    "a text": ("version\n", ("batch.yaml:1:",)),
    "version missing": (GOOD.replace("version: 1\n", ""), ("version is missing",)),
    "version 2": (GOOD.replace("version: 1", "version: 2"), ("version is 2",)),
    "version true": (GOOD.replace("version: 1", "version: true"), ("version",)),
    "version as text": (GOOD.replace("version: 1", 'version: "1"'), ("version",)),
    "UTF-16": (GOOD.encode("utf-16"), ("batch.yaml:1:1", "UTF-8")),
    "no UTF-8": (GOOD.encode() + b"# \xff\n", ("UTF-8",)),
    "a NUL": (GOOD.encode() + b"# \x00\n", ("not allowed",)),
    "aliases that explode": (_BOMB, ("200000 values",)),
    "an alias of itself": ("version: 1\njobs: &a [*a]\n", ("hold itself",)),
    "an alias of nothing": ("version: 1\njobs: *nothing\n", ("*nothing", "no such anchor")),
    "deep lists": ("version: 1\njobs: " + "[" * 5000, ("nested deeper",)),
    "deep mappings": ("version: 1\njobs: " + "{a: " * 5000, ("nested deeper",)),
    "a key twice": (GOOD + "version: 1\n", ("'version' is here twice",)),
    "a key twice in a job": (
        GOOD.replace("    model: model\n", "    model: model\n    model: x\n"),
        ("'model'", "twice"),
    ),
    "two documents": (GOOD + "---\n" + GOOD, ("second document",)),
    "a key that is a list": (GOOD + "? [a]\n: 1\n", ("key",)),
    "tabs": (GOOD.replace("  - name", "\t- name"), ("batch.yaml:6", "tab")),
    "a brace that is missing": (GOOD.replace("gguf}", "gguf"), ("not YAML",)),
    "a number of 400 digits": (GOOD.replace("verify: false", "chunks: " + "9" * 400), ("digits",)),
    "a number that is infinite": (GOOD.replace("verify: false", "max_kld: .inf"), (".inf", "finite")),
}
_TAGS = ("!!python/object/apply:os.system [touch ran]", "!!python/name:os.system", "!!binary eA==", "!x y", "!!set {a}")
_FIELDS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "a key that nobody knows": ("cache: cache", "cahce: cache", ("cahce", '"cache"')),
    "a key of a job that nobody knows": ("    model: model", "    model: model\n    modle: x", ("modle", '"model"')),
    "a stage that nobody knows": ("- gguf:", "- ggfu:", ("ggfu", "gguf")),
    "a stage of another module": ("- gguf:", "- os.system:", ("os.system",)),
    "an option that nobody knows": (_OPTION, f"{_OPTION}, outtyp: x", ("outtyp", "outtype")),
    "a type that nobody knows": (_OPTION, "outtype: q9_z", ("q9_z",)),
    "an option that is a list": (_OPTION, "outtype: [q8_0]", ("outtype",)),
    "no output": (f", {_OUTPUT}", "", ("output",)),
    "no model": ("    model: model\n", "", ("model",)),
    "no name": ("- name: one\n    model", "- model", ("name",)),
    "no stages": ('      - gguf: {outtype: "${kind}", output: out-one.gguf}\n', "", ("stages",)),
    "a name that is a list": ("name: one", "name: [one]", ("name",)),
    "a name with a line break": ("name: one", 'name: "one\\nerror: two"', ("name",)),
    "a name with an escape": ("name: one", 'name: "one\\e[2J"', ("name",)),
    "a name of 300 characters": ("name: one", "name: " + "x" * 300, ("name",)),
    "a variable that is not there": ("${kind}", "${knid}", ("knid",)),
    "a variable of itself": ("kind: q8_0", 'kind: "${kind}"', ("kind",)),
    "variables of each other": ("kind: q8_0", 'kind: "${a}", a: "${kind}"', ("${a}", "no such variable")),
    "variables that explode": (
        "{kind: q8_0}",
        "{kind: q8_0, v0: " + "x" * 99 + ", "
        + ", ".join(f'v{n}: "{("${v" + str(n - 1) + "}") * 9}"' for n in range(1, 12)) + "}",
        ("v",),
    ),
    "a matrix that explodes": (
        "    model: model",
        "    matrix: {" + ", ".join(f"m{n}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for n in range(9)) + "}\n    model: model",
        ("jobs",),
    ),
    "a matrix without values": ("    model: model", "    matrix: {a: []}\n    model: model", ("a",)),
    "a matrix that no name tells": ("    model: model", "    matrix: {a: [1, 2]}\n    model: model", ("one",)),
    "defaults that nobody knows": ("{verify: false}", "{verfy: false}", ("verfy", '"verify"')),
    "defaults of another type": ("{verify: false}", '{verify: "no way"}', ("verify",)),
    "chunks below nought": ("{verify: false}", "{chunks: -1}", ("chunks",)),
    "memory of no size": ("{verify: false}", "{max_memory: lots}", ("max_memory",)),
    "a runtime that nobody knows": ("{verify: false}", "{runtime: magic}", ("runtime",)),
    "jobs that are a mapping": ("  - name: one\n", "    name: one\n", ("jobs",)),
    "jobs that are null": (GOOD[GOOD.index("jobs:"):], "jobs:\n", ("jobs",)),
    "an output that is the file": (_OUTPUT, "output: batch.yaml", ("batch.yaml",)),
    "an output in the cache": (_OUTPUT, "output: cache/out.gguf", ("cache",)),
    "a cache that is the model": ("cache: cache", "cache: model", ("model",)),
    "a cache that is a number": ("cache: cache", "cache: 7", ("cache",)),
    "a cache that is far away": ("cache: cache", "cache: s3://bucket/cache", ("cache",)),
}  # fmt: skip


def _kept(change: Callable[[Path], object], arguments: Sequence[str] = RUN) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        _written(GOOD)(folder)
        change(folder / "batch.yaml")
        return arguments

    return make


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _big(path: Path) -> None:
    path.write_bytes(b"# " + b"x" * (64 << 20))


_WRITES = ("cache", "out-one.gguf", "out-one.gguf.quantpress.json")
CASES: tuple[Case, ...] = (
    Case("pipeline", "good", _written(GOOD), code=0, writes=_WRITES),
    Case("pipeline", "good, with a byte order mark", _written(b"\xef\xbb\xbf" + GOOD.encode()), code=0, writes=_WRITES),
    Case("pipeline", "good, only planned", _written(GOOD, (*RUN, "--dry-run")), code=0),
    Case(
        "pipeline",
        "good, aliases that do not explode",
        _written(GOOD.replace(_OPTION, "<<: &o {outtype: q8_0}")),
        code=0,
        writes=_WRITES,
    ),
    *(Case("pipeline", name, _written(data), code=2, words=words) for name, (data, words) in _SYNTAX.items()),
    *(Case("pipeline", f"tag {tag}", _tag(tag), code=2, words=("tags are not read",)) for tag in _TAGS),
    *(Case("pipeline", name, _with(old, new), code=2, words=words) for name, (old, new, words) in _FIELDS.items()),
    Case("pipeline", "two jobs, one output", _written(GOOD + _JOB.replace("two.", "one.")), code=2, words=("out-one",)),
    Case(
        "pipeline",
        "two jobs, one name",
        _written(GOOD + _JOB.replace("name: two", "name: one")),
        code=2,
        words=("one",),
    ),
    Case("pipeline", "a job that is not there", _written(GOOD, (*RUN, "--job", "oen")), code=2, words=("oen", "one")),
    Case("pipeline", "a value set of nothing", _written(GOOD, (*RUN, "--set", "=x")), code=2, words=("--set",)),
    Case("pipeline", "a value set that is not there", _written(GOOD, (*RUN, "--set", "a.b=x")), code=2, words=("a",)),
    Case("pipeline", "missing", _written(GOOD, ("run", "x.yaml")), words=("x.yaml",)),
    Case("pipeline", "a pipe", _kept(_pipe), words=("batch.yaml", "named pipe")),
    Case("pipeline", "a folder", _written(GOOD, ("run", "model")), words=("model",)),
    Case("pipeline", "64 MB", _kept(_big), words=("batch.yaml",)),
    Case(
        "pipeline",
        "a cache that is a file",
        _with("cache: cache", "cache: batch.yaml"),
        code=2,
        words=("batch.yaml",),
    ),
    Case("pipeline", "too large", _written(GOOD + _JOB * 18_000), words=("batch.yaml", "bytes")),
    *(
        Case(
            "pipeline",
            f"an output that is the model{' '.join(('', *more))}",
            _with(_OUTPUT, "output: model/model.safetensors", *more),
            code=7,
            words=("model.safetensors",),
        )
        for more in ((), ("--force",))
    ),
)
