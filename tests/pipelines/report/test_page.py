"""The HTML report: what it says, that nothing in it acts, and that no sidecar breaks it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
from quantpress.pipelines.report.markdown import markdown_report
from quantpress.pipelines.report.page import html_report
from quantpress.pipelines.report.rows import rows_of
from quantpress.pipelines.report.writing import write_report
from quantpress.quant.errors import UsageError
from tests.pipelines.report.batches import MODULES, PIPELINE, batch, output, parity, sidecar, tensor

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}{% raw %}", "a\u202egpj.exe",
    "a\x00b\x1b[31m", "]]>--></style><svg/onload=alert(1)>", "\ud800broken", "javascript:alert(1)", "x" * 5000,
    "é漢字🙂", " ", "",
)  # fmt: skip


class Page(HTMLParser):
    """Elements, their attributes and the texts outside of script and style."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        elif tag == "small" and self.rows:
            self.handle_data("\n")

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            return
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def page(result: BatchResult, **models: str) -> Page:
    return Page(html_report(result, models))


def test_the_table_has_the_figures_of_the_sidecars(real_batch: BatchResult) -> None:
    found = page(real_batch)
    outputs = [each for job in real_batch.jobs for each in job.outputs]
    rows = {row[0].split("\n")[0]: row for row in found.rows if row and row[0].startswith("tiny-") and len(row) == 11}
    assert len(rows) == len(outputs) == 5
    for each in outputs:
        row, proof = rows[Path(each.path).name], each.parity
        assert proof is not None
        assert row[1] == "✓ passed"
        assert row[2].split("\n") in (
            [each.ftype, each.kind],
            [each.ftype, f"{each.kind} · {'gptq' if each.kind == 'safetensors' else 'rtn'}"],
        )
        assert float(row[7]) == pytest.approx(proof["mean_kld"], rel=0.005)  # three digits are shown
        assert float(row[8].rstrip(" %")) / 100 == pytest.approx(proof["top1_agreement"], abs=5e-5)
        assert each.sidecar["outputs"][0]["sha256"] in found.text
    assert "✗ 1 of 6 failed" in found.text
    assert found.text.index("models/nowhere: no such file") < found.text.index("tiny-Q8_0.gguf")
    assert "GPTQ loss" in found.text


def test_bits_per_weight_are_those_of_the_files(real_batch: BatchResult) -> None:
    rows = {row.name: row for row in rows_of(real_batch)}
    reader = gguf.GGUFReader(rows["tiny-Q8_0.gguf"].output.path)
    weights = sum(int(each.n_elements) for each in reader.tensors)
    for name, row in rows.items():
        stored = sum(each["bytes"] for each in row.sidecar["tensors"])
        assert row.bits == pytest.approx(8 * stored / weights, rel=1e-9), name
    assert rows["tiny-f16"].bits == pytest.approx(16, rel=1e-9)
    q8 = [8 * int(each.n_bytes) for each in reader.tensors]
    assert rows["tiny-Q8_0.gguf"].bits == pytest.approx(sum(q8) / weights, rel=1e-9)


def test_nothing_is_loaded_from_elsewhere_and_only_the_own_script_may_run(real_batch: BatchResult) -> None:
    content = html_report(real_batch, {})
    found = Page(content)
    assert not re.findall(r"https?://|url\(|@import", content)
    active = {"img", "iframe", "object", "embed", "link", "base", "form", "video", "audio", "image", "use"}
    assert not active & {tag for tag, _ in found.elements}
    policy = next(each["content"] for tag, each in found.elements if each.get("http-equiv"))
    assert policy is not None
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")]
        assert (attributes.get("href") or "#").startswith("#")


@pytest.mark.parametrize("bad", HOSTILE)
def test_texts_from_files_are_only_ever_text(bad: str) -> None:
    adapter = {"adapter": bad, "weight": 1.0, "name": bad, "target": bad, "kind": bad, "shape": [1], "dtype": bad}
    record = sidecar(
        tensors=[tensor(bad, 0.1, bad), tensor(f"model.layers.0.{bad}.weight", 0.2, bad)],
        proof=parity(0.9, passed=False, reason=bad, text_sha256=bad, baseline={"runtime": bad, "perplexity": 3.0}),
        inputs=[{"name": bad, "sha256": bad, "bytes": 1}],
        adapters=[adapter],
        stages=[{"name": bad, "version": bad, "options": {bad: bad, "list": [bad, 1]}}],
        environment={"device": bad, "packages": {bad: bad}, "python": bad},
        outputs=[{"name": bad, "sha256": bad, "bytes": 1}],
        calibration={bad: bad},
        notes=[bad],
        timings={bad: {"seconds": 1.0, "peak_rss": 1}},
        created_by=bad,
    )
    outputs = [
        OutputResult(bad, f"/tmp/{place}{bad}", bad, bad, size, bad, record) for place, size in enumerate((10, 20))
    ]
    jobs = (JobResult(bad, bad, tuple(outputs), error=bad), JobResult(bad, "failed", error=bad, exit_code=3))
    content = html_report(BatchResult(Path(f"/tmp/{bad}"), jobs), {bad: bad})
    found = Page(content)
    assert not [tag for tag, _ in found.elements if tag in ("img", "iframe", "object", "link", "base", "form")]
    assert sum(tag in ("script", "style") for tag, _ in found.elements) == 2
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    hidden = set("".join(found.texts)) & set("\x00\x1b\u202e\ud800")
    assert not hidden
    content.encode("utf-8")  # no lone surrogate is left


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_sidecar_breaks_the_report(data: st.DataObject) -> None:
    """Any value of a real sidecar may be anything; the report leaves it out, and never says nan or None."""
    record: dict[str, Any] = sidecar(
        tensors=[
            tensor(f"model.layers.{layer}.{module}.weight", 0.1 * layer + 0.01)
            for layer in range(3)
            for module in MODULES
        ],
        adapters=[{"adapter": "tone", "weight": 1.0, "name": "a", "target": "b", "kind": "lora", "delta_norm": 0.1}],
    )
    for _ in range(data.draw(st.integers(1, 4))):
        spot: Any = record
        while True:
            key = data.draw(st.sampled_from(list(spot) if isinstance(spot, dict) else range(len(spot))))
            inner = spot[key]
            if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
                spot = inner
                continue
            spot[key] = data.draw(JSON)
            break
    result = batch(output(sidecar=record), output(sidecar=record), output(nbytes=2000))
    text = page(result).text
    figures = re.findall(r"(?<![\w\\'\"])(nan|NaN|None|inf|Infinity)(?![\w'\"])", text)
    said = json.dumps(record, default=str)
    assert not [each for each in figures if each not in said and each.lower() not in said.lower()]
    assert markdown_report(result, {}).startswith("---\n")


def test_a_batch_of_nothing_and_one_where_all_failed_are_reports() -> None:
    assert "✓ all 0" in page(BatchResult(PIPELINE, ())).text
    text = page(BatchResult(PIPELINE, (JobResult("a", "failed", error="why", exit_code=5),))).text
    assert "✗ 1 of 1 failed" in text
    assert "exit code 5" in text


def test_an_output_without_proof_is_not_called_verified() -> None:
    made = OutputResult("x", "/somewhere/x", "other", "", 10, "done", sidecar(parity=None) | {"parity": None})
    text = page(BatchResult(PIPELINE, (JobResult("a", "written", (made,)),))).text
    assert "– not proved" in text
    assert "verified" not in text


@pytest.mark.parametrize("passed", ["yes", 1, None, [True]])
def test_only_a_plain_true_is_a_passed_proof(passed: object) -> None:
    assert "✗ failed" in page(batch(output(proof={**parity(), "passed": passed}))).text


def test_figures_that_are_not_finite_are_no_figures() -> None:
    for bad in (math.nan, math.inf, -math.inf, 10**400, True, "1", None):
        (row,) = rows_of(batch(output(proof=parity(mean_kld=bad, ppl_ratio=bad, top1_agreement=bad))))
        assert (row.mean_kld, row.ppl_ratio, row.top1) == (None, None, None)


def test_a_report_shows_no_folder_above_the_pipeline_file() -> None:
    inside, outside = output("a.gguf"), OutputResult("g", "/home/someone/b.gguf", "gguf", "F16", 9, "done", sidecar())
    text = page(batch(inside, outside)).text
    assert "a.gguf out/ · job-0" in text
    assert "b.gguf" in text
    assert "someone" not in text
    assert "/somewhere" not in text


def test_a_batch_of_hundreds_stays_small() -> None:
    weights = [
        tensor(f"model.layers.{layer}.{module}.weight", 0.01 + 0.001 * layer, relative_loss=1e-4 * (layer + 1))
        for layer in range(100)
        for module in MODULES
    ]
    outputs = [
        output(f"m{place}.gguf", nbytes=10**9 + place, sidecar=sidecar(
            tensors=[{**each, "relative_error": each["relative_error"] * (1 + place)} for each in weights],
            proof=parity(0.1 / (place + 1)),
        ))
        for place in range(150)
    ]  # fmt: skip
    content = html_report(batch(*outputs), {})
    assert len(content) < 4_000_000
    assert content.count('<tr id="o') == 150


def test_the_name_says_the_form_and_others_are_refused_before_the_work(tmp_path: Path) -> None:
    for name in ("a.html", "a.HTM", "a.md", "a.markdown"):
        write_report(batch(output()), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 500
    for name in ("a.pdf", "a", "html", ".html"):
        with pytest.raises(UsageError, match=r"\.html or \.md"):
            write_report(batch(output()), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.HTM", "a.html", "a.markdown", "a.md"]


def test_an_older_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old" * 100_000)
    write_report(batch(output()), path)
    assert path.read_text().startswith("<!doctype html>")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_asking_for_the_form_loads_no_template_engine() -> None:
    code = (
        "import sys; from pathlib import Path; from quantpress.pipelines.report.writing import report_form;"
        "report_form(Path('a.md')); print(sorted({'jinja2', 'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_shades_can_be_read_in_light_and_dark() -> None:
    """Contrast of every text with its ground by WCAG 2.2, success criterion 1.4.3: at least 4.5."""
    style = (Path(__file__).parents[3] / "pipelines" / "report" / "report.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        pairs = [(f"c{shade}", "ink-low" if shade < 5 else "ink-high") for shade in range(8)]
        pairs += [
            (ground, ink) for ground in ("page", "band") for ink in ("text", "soft", "link", "good", "bad", "mark")
        ]
        pairs.append(("bad-band", "bad"))
        for ground, ink in pairs:
            assert contrast(theme[ground], theme[ink]) >= 4.5, (ground, ink, theme[ground], theme[ink])


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return math.fsum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
