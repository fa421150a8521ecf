"""Stages that merge: what they record, and what stands where."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantpress.convert.checkpoint import Checkpoint, SourceFile
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.merge_stage import (
    MergeLora,
    adapter_notes,
    input_names,
    ledger_of,
    merge_records,
    merged_names,
    run_lazy,
    stage_record,
)
from quantpress.pipelines.stage import Artifact, RunContext, Stage

EMPTY = Checkpoint("empty", {}, {})


def test_the_record_of_a_stage_has_names_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "tone"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    wanted = {"name": "merge_lora", "version": 1, "options": {"adapter": "tone", "weight": 0.5}}
    for path in (folder, tmp_path / "link", Path()):
        assert stage_record(MergeLora(adapter=path, weight=0.5)) == wanted
    assert stage_record(MergeLora(adapter="org/tone"))["options"]["adapter"] == "org/tone"


def test_a_model_without_adapters_has_nothing_to_tell(tmp_path: Path) -> None:
    assert merge_records(EMPTY) == []
    assert adapter_notes(EMPTY) == ()
    assert ledger_of(EMPTY) == ()
    assert merged_names(EMPTY) == frozenset()
    path = tmp_path / "config.json"
    assert input_names(Checkpoint("one", {}, {}, files=(SourceFile(path, 2),))) == {path: "config.json"}


def test_lazy_stages_run_in_order_and_a_building_one_is_none_of_them(tmp_path: Path) -> None:
    class Renamed(Stage):
        name = "renamed"
        version = 1

        def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
            return Checkpoint(source.name + "+", {}, {})

    assert run_lazy(EMPTY, [Renamed(), Renamed()], RunContext()).name == "empty++"

    class Writing(Gguf):
        def run(self, source: Checkpoint, context: RunContext) -> Artifact:
            return Artifact(self.output, "gguf", "F16", ())

    with pytest.raises(TypeError, match="stands last"):
        run_lazy(EMPTY, [Writing(output=tmp_path / "out.gguf")], RunContext())
