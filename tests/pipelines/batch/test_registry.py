"""Stages of other packages: found by their entry point, and no package can break another one's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.batch.registry import BUILT_IN, find_stage, kind_of, package_of, stage_classes, stage_names
from quantpress.pipelines.batch.schema import pipeline_schema
from quantpress.pipelines.batch.stage_list import described_stages
from quantpress.quant.errors import UsageError

GOOD = """
import dataclasses, enum, pathlib, typing
from quantpress.pipelines.stage import Stage
from quantpress.quant.errors import UsageError

@dataclasses.dataclass(frozen=True, kw_only=True)
class Good(Stage):
    '''Does nothing at all.

    Attributes:
        table, other: files.
            On two lines.
        level: how much.
    '''
    name: typing.ClassVar[str] = "good"
    version: typing.ClassVar[int] = 3
    table: pathlib.Path | None = None
    other: tuple[pathlib.Path, ...] = ()
    level: typing.Literal["low", "high"] = "low"
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    model_dump: bool = False  # also a method of pydantic's models
    hidden: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        if self.numbers.get("n", 0) > 5:
            raise UsageError("n is more than 5")
        if self.numbers.get("n", 0) < 0:
            raise ValueError("n is less than 0")
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package as pip leaves it: modules, and a folder with its metadata."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def call(package: str, source: str, **stages: str) -> None:
        module = package.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        lines = [f"{name} = {module}:{value}" for name, value in stages.items()]
        (info / "entry_points.txt").write_text("[quantpress.stages]\n" + "\n".join(lines) + "\n")
        modules.append(module)

    yield call  # type: ignore[misc]
    for module in modules:
        sys.modules.pop(module, None)


def said(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        find_stage(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stage_of_another_package_is_found_described_and_filled_in(install: Install, tmp_path: Path) -> None:
    install("good-stages", GOOD, good="Good")
    assert stage_names() == (*BUILT_IN, "good")
    stage = find_stage("good")
    assert (kind_of(stage), package_of(stage)) == ("lazy", "good-stages 1.5")
    (described,) = described_stages({"good": stage})
    assert (described.version, described.description) == (3, "Does nothing at all.")
    assert [(each.name, each.type, each.description) for each in described.options] == [
        ("table", "path", "files. On two lines."),
        ("other", "list of paths", "files. On two lines."),
        ("level", "one of low, high", "how much."),
        ("numbers", "dict", ""),
        ("model_dump", "true or false", ""),
    ]
    (tmp_path / "t.csv").write_text("")
    path = tmp_path / "p.yaml"
    options = "{table: t.csv, other: [t.csv], level: high, numbers: {n: 5}, model_dump: true}"
    text = f"version: 1\njobs:\n- name: a\n  model: org/name\n  stages:\n  - good: {options}\n  - gguf: {{output: o}}\n"
    path.write_text(text)
    made = load_batch(path).jobs[0].stages[0].stage
    table = tmp_path / "t.csv"
    assert made == stage(table=table, other=(table,), level="high", numbers={"n": 5}, model_dump=True)
    for new, message in (
        ("level: mid", "p.yaml:6:49: good.level: wanted low or high, found the text 'mid'"),
        ("numbers: {n: x}", "good.numbers.n: wanted a whole number, found the text 'x'"),
        ("numbers: {n: 6}", "p.yaml:6:5: good: n is more than 5"),
        ("numbers: {n: -1}", "p.yaml:6:5: good: n is less than 0"),
        ("hidden: 1", "unknown key 'hidden' of good"),
    ):
        path.write_text(text.replace("level: high, numbers: {n: 5}", new))
        with pytest.raises(UsageError) as caught:
            load_batch(path)
        assert message in str(caught.value)
    properties = pipeline_schema({"good": stage})["$defs"]["stage_good"]["properties"]
    assert properties["level"]["default"] == "low"
    numbers = properties["numbers"]["anyOf"][0]["additionalProperties"]
    assert numbers == {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/variable"}]}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 +", "cannot be imported: SyntaxError: invalid syntax (bad_stages.py, line 1)"),
        ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
        ("Other = 1", "cannot be imported: AttributeError: module 'bad_stages' has no attribute 'Bad'"),
        ("Bad = 5", "is not a class derived from quantpress.pipelines.stage.Stage"),
        ("class Bad: name, version = 'bad', 1", "is not a class derived from quantpress.pipelines.stage.Stage"),
        (GOOD.replace("(frozen=True, kw_only=True)", "").replace("Good", "Bad"), "cannot be imported: TypeError: "),
        (
            GOOD.replace("Good", "Base") + "class Bad(Base):\n    name = 'bad'\n",
            "is not a frozen dataclass; write @data",
        ),
        (GOOD.replace("Good", "Bad"), 'must have the class attributes name = "bad" and a whole number as version'),
        (
            GOOD.replace("Good", "Bad").replace('"good"', '"bad"').replace("= 3", "= 'x'"),
            "must have the class attributes",
        ),
    ],
)
def test_a_broken_package_is_named_when_it_is_used_and_harms_no_other(
    install: Install, caplog: pytest.LogCaptureFixture, source: str, reason: str
) -> None:
    install("bad-stages", source, bad="Bad")
    found = said("bad")
    assert found.startswith('stage "bad" of bad-stages 1.5 (bad_stages:Bad) ')
    assert reason in found
    assert find_stage("gguf").name == "gguf"
    with caplog.at_level(logging.WARNING):
        assert set(stage_classes()) == set(BUILT_IN)
    assert [record.getMessage() for record in caplog.records] == [found]


@pytest.mark.parametrize(
    ("before", "kind", "reason"),
    [
        (
            "from __future__ import annotations",
            "Nowhere",
            "the type of an option is not known where the class stands: ",
        ),
        ("class NotPlain: pass", "NotPlain", "an option has a type that no file can hold: Unable to generate"),
    ],
)
def test_options_of_types_that_no_file_can_hold_are_refused_by_name(
    install: Install, tmp_path: Path, before: str, kind: str, reason: str
) -> None:
    install(
        "odd-stages", f"{before}\n{GOOD}".replace("level: typing", f"odd: {kind} = 0\n    level: typing"), good="Good"
    )
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\njobs:\n- name: a\n  model: org/name\n  stages: [good: {}, gguf: {output: o}]\n")
    with pytest.raises(UsageError) as caught:
        load_batch(path)
    assert f'p.yaml:5:12: stage "good": {reason}' in str(caught.value)


def test_a_name_that_two_packages_offer_is_refused_and_ours_cannot_be_taken(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("good-stages", GOOD, good="Good", gguf="Good")
    install("more-stages", GOOD, good="Good")
    assert said("good") == 'stage "good" is offered by good-stages 1.5 and more-stages 1.5; uninstall one of them'
    assert find_stage("gguf").__module__ == "quantpress.pipelines.gguf_stage"
    with caplog.at_level(logging.WARNING):
        assert "good" not in stage_classes()
    ours = 'stage "gguf" of good-stages 1.5 is not used: quantpress has a stage of that name'
    assert ours in [record.getMessage() for record in caplog.records]


def test_a_stage_that_is_not_installed_is_named_with_the_nearest() -> None:
    assert said("safetensor").startswith(
        'no stage is called "safetensor"; did you mean "safetensors"?; installed are me'
    )
