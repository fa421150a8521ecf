"""Matrices, variables and --set: which jobs a file comes to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.batch.problems import Problems
from quantpress.pipelines.batch.specs import BatchSpec
from quantpress.pipelines.batch.variables import filled
from quantpress.pipelines.batch.yaml_file import Node, parse_yaml
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.quant.errors import UsageError

FILE = """\
version: 1
variables: {root: models, model: "${root}/smol", bits: 4, quiet: false, share: 0.5, none: null, skips: [a, b]}
defaults: {verify: "${quiet}", context: 64}
jobs:
  - name: q.${type}-${pure}
    matrix: {type: [Q8_0, F16], pure: [true, false]}
    exclude:
      - {type: F16, pure: true}
    model: ${model}
    stages:
      - gguf: {outtype: "${type}", pure: "${pure}", output: "out/${type}-${pure}.gguf"}
  - name: codes
    model: ${model}
    context: 32
    stages:
      - quantize: {bits: "${ bits }", drift: "${share}", skip: "${skips}", clip_search: "${none}", output: "q${bits}"}
"""

Load = Callable[..., BatchSpec]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    for name in ("smol", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)

    def call(text: str = FILE, *sets: str, jobs: tuple[str, ...] = ()) -> BatchSpec:
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        return load_batch(path, sets=sets, jobs=jobs)

    return call


def names(batch: BatchSpec) -> list[str]:
    return [job.name for job in batch.jobs]


def said(load: Load, text: str, *sets: str, jobs: tuple[str, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        load(text, *sets, jobs=jobs)
    message = str(caught.value)
    return "F" + message.partition("p.yaml")[2] if "p.yaml" in message else message


AXES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d_e", "f-1"]),
    st.lists(st.integers(0, 9) | st.sampled_from(["x", "y", "z"]), min_size=1, max_size=3, unique=True),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(axes=AXES, draw=st.data())
def test_a_matrix_comes_to_the_jobs_of_nested_loops(
    tmp_path_factory: pytest.TempPathFactory, axes: dict[str, list[Any]], draw: st.DataObject
) -> None:
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    chosen = draw.draw(st.lists(st.sampled_from(combinations), max_size=3))
    exclude = [
        {key: each[key] for key in draw.draw(st.sets(st.sampled_from(list(each)), min_size=1))} for each in chosen
    ]
    wanted = [each for each in combinations if not any(rule.items() <= each.items() for rule in exclude)]
    label = "-".join(f"${{{key}}}" for key in axes)
    job = {
        "name": label,
        "matrix": axes,
        "exclude": exclude,
        "model": "org/name",
        "stages": [{"gguf": {"output": f"{label}.gguf"}}],
    }
    path = tmp_path_factory.mktemp("m") / "p.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "jobs": [job]}, sort_keys=False))
    if not wanted:
        with pytest.raises(UsageError, match="every combination of the matrix is excluded"):
            load_batch(path)
        return
    batch = load_batch(path)
    assert names(batch) == ["-".join(map(str, each.values())) for each in wanted]
    assert [job.variables for job in batch.jobs] == [{k: str(v) for k, v in each.items()} for each in wanted]


def test_variables_keep_their_types_and_are_written_out_inside_texts(load: Load, tmp_path: Path) -> None:
    batch = load()
    assert names(batch) == ["q.Q8_0-true", "q.Q8_0-false", "q.F16-false", "codes"]
    assert {job.model for job in batch.jobs} == {str(tmp_path / "models/smol")}
    first, *_, last = batch.jobs
    assert first.stages[0].stage == Gguf(outtype="Q8_0", pure=True, output=tmp_path / "out/Q8_0-true.gguf")
    assert last.stages[0].stage == Quantize(bits=4, drift=0.5, skip=("a", "b"), output=tmp_path / "q4")
    assert (first.settings.verify, first.settings.judge.context, last.settings.judge.context) == (False, 64, 32)
    assert last.variables["skips"] == "a,b"
    assert first.variables["type"] == "Q8_0"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("${a}", 1),
        ("${ a }", 1),
        ("x${a}", "x1"),
        ("${a}${b}", "1two"),
        ("$${a}", "${a}"),
        ("$${a} ${a} $a {a} $$", "${a} 1 $a {a} $$"),
        ("$$${a}", "$${a}"),
        ("${c}", "${a}"),  # what a variable holds is not looked at again
        ("${c}!", "${a}!"),
        ("x${n}y", "xy"),
        ("${n}", None),
        ("${t} ", "true "),
        ("${l}", ["p", 2]),
    ],
)
def test_a_text_is_filled_in_once_and_escapes_stay(text: str, result: Any) -> None:
    known = parse_yaml(b"{a: 1, b: two, c: '${a}', n: null, t: true, l: [p, 2]}", "v").items()
    problems = Problems()
    found = filled(parse_yaml(f"k: '{text}'".encode(), "f").items()["k"], known, problems).plain()
    assert (found, type(found), problems.found) == (result, type(result), [])


def test_keys_are_not_filled_in() -> None:
    node = parse_yaml(b"{'${a}': '${a}', l: ['${a}']}", "f")
    assert filled(node, {"a": Node(1, node.mark)}, Problems()).plain() == {"${a}": 1, "l": [1]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: ${model}", "model: ${modell}", 'F:9:12: ${modell}: no such variable; did you mean "model"?'),
        ("model: ${model}", "model: ${zzz}", "F:9:12: ${zzz}: no such variable; known are root, model, bits, "),
        ("model: ${model}", "model: x${model", "F:9:12: 'x${model': the } after ${model is missing"),
        ("model: ${model}", "model: x${skips}", "F:9:12: ${skips} is a list, which cannot stand inside a text"),
        ("model: ${model}", "model: ${HOME dir}", "F:9:12: ${HOME dir}: no such variable; known are "),
        ("{root:", "{m: '${root}', root:", "F:2:16: ${root}: no such variable; declare it under `variables` or in"),
        ("{root:", "{'a b': 1, root:", "F:2:13: 'a b': a variable's name is letters, digits, _ and -"),
        ("{root: models", "{root: {a: 1}", "F:2:19: variables.root: wanted "),
        ("pure: [true, false]", "pure: []", "F:6:39: job 'q.${type}-${pure}'.matrix.pure: wanted a list that is not "),
        ("pure: [true, false]", "pure: '${bits}'", "F:6:39: matrix.pure: wanted a list that is not empty, found 4"),
        ("pure: [true, false]", "pure: [true, true]", "F:6:46: matrix.pure: the value 'true' is here twice"),
        ("pure: [true, false]", "pure: [true, {a: 1}]", "F:6:46: job 'q.${type}-${pure}'.matrix.pure[2]: wanted "),
        ("type: F16, pure: true", "type: F16, pur: true", "F:8:21: exclude: 'pur' is no variable of the matrix; did "),
        ("type: F16, pure: true", "type: F32", "F:8:9: exclude: no combination of the matrix has these values"),
        ("type: F16, pure: true", "pure: 1", "F:8:9: exclude: no combination of the matrix has these values"),
        ("type: F16, pure: true", "type: F16, pure: 'true'", "F:8:9: exclude: no combination of the matrix has these"),
        ("name: q.${type}-${pure}", "name: q", "F:5:11: name: two jobs are called 'q'; put ${pure} into the name"),
        ("name: q.${type}-${pure}", "name: q.${type}", "F:5:11: name: two jobs are called 'q.Q8_0'; put ${pure} into"),
        ("name: codes", "name: q.F16-false", "F:12:11: name: two jobs are called 'q.F16-false'; the other one is in "),
        ("${type}-${pure}.gguf", "${type}.gguf", "F:11:61: gguf.output: q.Q8_0-false and q.Q8_0-true both write "),
    ],
)
def test_mistakes_of_matrices_and_variables_are_named_with_their_place(
    load: Load, old: str, new: str, message: str
) -> None:
    assert old in FILE
    found = said(load, FILE.replace(old, new))
    assert found.startswith(message), found


def test_a_variable_that_is_set_wins_over_the_file_and_over_the_matrix(load: Load, tmp_path: Path) -> None:
    assert {job.model for job in load(FILE, "root=./models").jobs} == {str(tmp_path / "models/smol")}
    assert {job.model for job in load(FILE, "model=models/other").jobs} == {str(tmp_path / "models/other")}
    assert names(load(FILE, "type=F32")) == ["q.F32-true", "q.F32-false", "codes"]
    assert names(load(FILE, "type=F32", "pure=false")) == ["q.F32-false", "codes"]
    assert names(load(FILE, "type=[F16, F32]")) == ["q.F16-false", "q.F32-true", "q.F32-false", "codes"]
    stage = load(FILE, "bits=8", "none=true").jobs[-1].stages[0].stage
    assert stage == Quantize(
        bits=8, drift=0.5, skip=("a", "b"), clip_search=True, output=tmp_path / "q8"
    )  # fmt: skip


def test_a_value_is_set_by_its_path(load: Load, tmp_path: Path) -> None:
    cache = f"cache={tmp_path}/elsewhere"
    batch = load(FILE, cache, "defaults.context=16", "defaults.max_kld=1e-3", "jobs.codes.chunks=2")
    assert batch.cache == tmp_path / "elsewhere"
    assert [job.settings.judge.context for job in batch.jobs] == [16, 16, 16, 32]
    assert {job.settings.judge.max_kld for job in batch.jobs} == {0.001}
    assert [job.settings.judge.chunks for job in batch.jobs] == [None] * 3 + [2]
    name = "jobs.q.${type}-${pure}"  # with a dot in it
    batch = load(FILE, f"{name}.stages.gguf.model_name=x: y # z", f"{name}.stages.1.gguf.output=o/${{type}}${{pure}}")
    stage = batch.jobs[0].stages[0].stage
    assert stage == Gguf(outtype="Q8_0", pure=True, output=tmp_path / "o/Q8_0true", model_name="x: y # z")


def test_a_path_may_add_what_the_file_does_not_say(load: Load) -> None:
    text = FILE.replace('defaults: {verify: "${quiet}", context: 64}\n', "") + "      - verify\n"
    batch = load(text, "defaults.context=16", "jobs.codes.stages.verify.max_kld=0.5")
    assert batch.jobs[0].settings.judge.context == 16
    assert batch.jobs[-1].stages[1].stage.max_kld == 0.5  # type: ignore[attr-defined]


def test_of_names_that_begin_alike_the_longest_is_meant(load: Load) -> None:
    job = "  - {name: NAME, model: org/name, stages: [gguf: {output: NAME.gguf}]}\n"
    text = "version: 1\njobs:\n" + "".join(job.replace("NAME", name) for name in ("q", "q.model", "q.model.x"))
    batch = load(text, "jobs.q.model.model=org/second", "jobs.q.model=org/first", "jobs.q.model.x.model=org/third")
    assert [job.model for job in batch.jobs] == ["org/first", "org/second", "org/third"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("bits", "--set 'bits': wanted KEY=VALUE, as in outtype=Q8_0 or defaults.device=cpu"),
        ("=1", "--set '=1': wanted KEY=VALUE"),
        ("bitz=1", '--set bitz: no such variable; did you mean "bits"?; a path is written as in defaults.device'),
        ("zzz=1", "--set zzz: no such variable; variables are root, model, bits, quiet, share, none, skips, type, pu"),
        ("device=cpu", "--set device: no such variable; did you mean defaults.device?"),
        ("variables.bits=1", "--set variables.bits: no such variable"),
        ("defaults=1", "--set defaults: no such variable"),
        ("defaults.devise=cpu", "--set defaults.devise: unknown key 'devise' of defaults; did you mean \"device\"?"),
        ("defaults.device=gpu", "--set defaults.device: device: wanted one of auto, cpu, cuda, found the text 'gpu'"),
        ("bits=[1", "--set bits:1:"),
        ("bits=five", "F:16:"),  # where the variable is used
        ("jobs.code.model=x", '--set jobs.code.model: wanted jobs.NAME.KEY with the name of a job as the file has it'),
        ("jobs.codes.stages.gguf.pure=1", "--set jobs.codes.stages.gguf.pure: nothing has that name"),
        ("jobs.codes.stages.7.pure=1", "--set jobs.codes.stages.7.pure: nothing has that name"),
        ("jobs.codes.stages.quantize.bitz=1", "F:16:9: unknown key"),
        ("jobs.codes.name.x=1", "--set jobs.codes.name.x: there is no mapping with a key 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_refused_by_the_name_of_the_flag(load: Load, flag: str, message: str) -> None:
    found = said(load, FILE, flag)
    if flag.startswith(("bits=five", "jobs.codes.stages.quantize")):
        assert "quantize" in found
        return
    assert found.startswith(message), found


def test_jobs_are_chosen_by_name_by_pattern_and_by_the_name_of_the_template(load: Load) -> None:
    assert names(load(jobs=("codes",))) == ["codes"]
    assert names(load(jobs=("q.*",))) == ["q.Q8_0-true", "q.Q8_0-false", "q.F16-false"]
    assert names(load(jobs=("q.${type}-${pure}",))) == ["q.Q8_0-true", "q.Q8_0-false", "q.F16-false"]
    assert names(load(jobs=("codes", "*-true"))) == ["q.Q8_0-true", "codes"]  # in the order of the file
    assert said(load, FILE, jobs=("code",)) == "--job 'code': no such job; did you mean \"codes\"?"
    assert said(load, FILE, jobs=("z*",)).startswith("--job 'z*': no such job; jobs are q.Q8_0-true, q.Q8_0-false, ")


def test_anchors_and_merge_keys_serve_where_a_stage_is_used_again(load: Load, tmp_path: Path) -> None:
    text = """\
version: 1
jobs:
  - &first
    name: a
    model: models/smol
    stages: [gguf: &options {outtype: F16, pure: true, output: a.gguf}]
  - <<: *first
    name: b
    stages: [gguf: {<<: *options, output: b.gguf}]
"""
    batch = load(text)
    assert batch.jobs[1].stages[0].stage == Gguf(outtype="F16", pure=True, output=tmp_path / "b.gguf")
