"""The tables before and after a batch, in 80 columns and in many."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantpress.pipelines.batch.plan_table import CACHED, TO_DO, PlanRow, plan_json, shared_with, show_plan_table
from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
from quantpress.pipelines.batch.summary_table import show_batch
from quantpress.pipelines.batch.tasks import Estimate
from quantpress.pipelines.batch.wording import duration, roughly, time_class

LONG = "smollm2-135m-instruct-gptq-int4-group32-tone-and-facts"
ROWS = [
    PlanRow(LONG, "gptq", TO_DO, Estimate(seconds=4000, memory=5 * 10**9, disk=3 * 10**8)),
    PlanRow(LONG, "gguf Q4_0", TO_DO, Estimate(4, 5 * 10**8, 10**8, 9 * 10**7), "/o/a.gguf", ("option bits: 4 -> 3",)),
    PlanRow("two", "gptq", shared_with(LONG)),
    PlanRow("two", "onnx int4", CACHED, Estimate(output_bytes=10**8), "/o/onnx"),
]
PARITY = {
    "passed": True,
    "tokens": 512,
    "mean_kld": 0.00412,
    "top1_agreement": 0.9651,
    "candidate": {"perplexity": 13.089},
}


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False)


def text_of(made: Console) -> str:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


def planned(width: int, rows: list[PlanRow] = ROWS) -> str:
    made = console(width)
    show_plan_table(rows, made)
    return text_of(made)


def output(name: str, parity: Any = PARITY, **values: Any) -> OutputResult:
    made = OutputResult("gguf", name, "gguf", "Q8_0", 144_800_000, "done", {"parity": parity})
    return dataclasses.replace(made, **values)


def summed_up(*jobs: JobResult, width: int = 80, seconds: float = 100.0) -> str:
    made = console(width)
    show_batch(BatchResult(Path("release.yaml"), jobs, seconds), made)
    return text_of(made)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_plan_fits_its_width_and_loses_no_name(width: int) -> None:
    text = planned(width)
    table = [line for line in text.splitlines() if "─" not in line and "nothing was written" not in line]
    assert all(len(line) <= width for line in table)
    first_column = table[2].index("gptq")
    assert LONG in "".join(line[1:first_column].strip() for line in table[2:]) + text  # folded, or whole


def test_the_totals_count_what_is_to_be_done_alone() -> None:
    last = planned(160).splitlines()[-1]
    assert last == (
        "2 jobs, 4 steps, 2 to do: an hour if one follows the other, 90.0 MB of outputs, 400.0 MB of disk, "
        "5.00 GB of memory for the largest; nothing was written"
    )


def test_a_plan_with_nothing_to_do_says_so() -> None:
    assert planned(80, ROWS[3:]).splitlines()[-1] == "1 job, 1 step, 0 to do; nothing was written"
    assert planned(80, []).splitlines()[-1] == "0 jobs, 0 steps, 0 to do; nothing was written"


def test_the_plan_says_why_where_that_is_known() -> None:
    assert f"{LONG}: gguf Q4_0: option bits: 4 -> 3" in planned(160)


def test_the_plan_as_json_holds_every_figure() -> None:
    record = json.loads(json.dumps(plan_json(ROWS)))
    assert [step["state"] for step in record["steps"]] == ["to do", "to do", f"shared with {LONG}", "cached"]
    assert record["steps"][1]["reasons"] == ["option bits: 4 -> 3"]
    assert record["total"] == {
        "to_do": 2,
        "seconds": 4004,
        "time": "an hour",
        "bytes": 9 * 10**7,
        "peak_memory": 5 * 10**9,
        "disk_needed": 4 * 10**8,
        "gpu": False,
    }


def test_the_summary_fits_80_columns() -> None:
    jobs = [
        JobResult("smol-Q8_0", "verified", (output("/far/away/out/smol-Q8_0.gguf"),), seconds=4.2),
        JobResult("smol-onnx", "verified", (output("s3://bucket/smol-onnx-int4/", ftype="INT4 g32"),), seconds=42),
        JobResult(LONG, "verified", (output(f"/o/{LONG}.gguf", state="cached"),), cached=True),
    ]
    text = summed_up(*jobs)
    rows = text.splitlines()
    assert all(len(row) <= 80 for row in rows)
    assert "smol-Q8_0.gguf Q8_0 144.8 MB 13.089 0.0041 96.5% verified 4.2 s" in " ".join(text.split())
    assert "smol-onnx-int4" in text
    assert "42 s" in text
    assert "cached" in text
    assert rows[-1] == "3 jobs: 3 verified, 1 of them cached; 1 min 40 s"


def test_a_wide_summary_names_jobs_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = JobResult("two", "verified", (output(str(tmp_path / "out" / "a.gguf")), output("/elsewhere/b")), seconds=5)
    text = summed_up(job, width=160)
    assert " two  out/a.gguf    Q8_0" in text
    assert " /elsewhere/b " in text
    assert text.count("5.0 s") == 1  # the job's time stands once


def test_failed_jobs_are_named_with_their_errors_whatever_they_hold() -> None:
    failed = {**PARITY, "passed": False}
    text = summed_up(
        JobResult("good", "verified", (output("/o/good.gguf"),)),
        JobResult("bad", "failed", (output("/o/bad.gguf", failed),), "mean KL\ndivergence 0.3 \x1b[2J" + "x" * 200, 4),
        JobResult("[bold]worse", "failed", (), "no such file", 3),
        JobResult("late", "cancelled"),
    )
    assert "verified" in text
    assert "FAILED" in text
    assert "bad: failed: mean KL divergence 0.3 \\x1b[2J" + "x" * 200 + "\n" in text
    assert "[bold]worse: failed: no such file\n" in text
    assert "late: cancelled\n" in text
    assert "\x1b" not in text
    assert text.splitlines()[-1] == "4 jobs: 1 verified, 2 failed, 1 cancelled; 1 min 40 s"


@pytest.mark.parametrize(
    "parity",
    [None, {}, {"passed": False, "tokens": 0, "reason": "empty"}, {"passed": True, "tokens": 5, "mean_kld": None},
     {"tokens": 5, "mean_kld": float("nan"), "candidate": "x", "top1_agreement": True}],
)  # fmt: skip
def test_figures_that_are_missing_are_dashes(parity: Any) -> None:
    text = summed_up(JobResult("a", "written", (output("/o/a", parity),)))
    assert "nan" not in text.lower().replace("none", "")
    assert "None" not in text
    assert " - " in text


def test_times_are_written_as_roughly_as_they_are_known() -> None:
    assert [duration(s) for s in (0, 4.24, 9.96, 59.4, 59.6, 200, 3599.6, 7500)] == [
        "0.0 s", "4.2 s", "10 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    assert [roughly(s) for s in (3, 31, 95, 3600, 8000, 200_000)] == [
        "a few seconds", "about 40 s", "about 2 min", "about 1 h", "about 2 h 20 min", "about 2 days",
    ]  # fmt: skip
    assert [time_class(s) for s in (1, 60, 3600, 7200, 10**6)] == ["seconds", "minutes", "an hour", "hours", "days"]
