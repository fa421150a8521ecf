"""The HTML report in a real browser: nothing overflows, nothing is reported, sorting works, dark is dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.batch.results import BatchResult, JobResult
from quantpress.pipelines.report.writing import write_report
from tests.pipelines.report.batches import batch, output, parity, sidecar, tensor

WIDTHS = (320, 375, 768, 1366)  # a small phone, a phone, a tablet, a laptop
PROBE = """<!doctype html><meta charset=utf-8><body><pre id=found></pre><script>
const widths = %s, found = [];
const frames = widths.map(width => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px`;
  frame.src = "report.html";
  document.body.append(frame);
  return frame;
});
addEventListener("load", () => {
  for (const frame of frames) {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(each => { each.open = true; });
    const wide = [...page.body.querySelectorAll("*")].filter(each =>
      each.getBoundingClientRect().right > root.clientWidth + 1 && !each.closest(".scroll, svg")).map(each => each.outerHTML.slice(0, 200));
    const table = page.querySelector("table.sortable"), names = () => [...table.tBodies[0].rows].map(row => row.id);
    const orders = [names()];
    const button = [...table.querySelectorAll("th button")].find(each => each.textContent === "size");
    for (let time = 0; time < 3; time++) { button.click(); orders.push(names()); }
    const input = page.querySelector(".filter input");
    if (input) { input.value = "m3"; input.dispatchEvent(new frame.contentWindow.Event("input")); }
    const left = [...table.tBodies[0].rows].filter(row => !row.hidden).length;
    found.push({width: root.clientWidth, scroll: root.scrollWidth, wide, orders, left,
      focus: button.tabIndex, sorted: table.querySelectorAll("[aria-sort]").length});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed (Debian: apt install chromium)")


def run(browser: str, folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    fixed = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    )
    return subprocess.run(
        [browser, *fixed, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=8000", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def ledger_entry(layer: int) -> dict[str, Any]:
    target = f"model.layers.{layer}.mlp.up_proj.weight"
    numbers = {"rank": 8, "alpha": 16.0, "scale": 2.0, "delta_norm": 0.1}
    return {"adapter": "tone", "weight": 1.0, "name": f"{layer}.lora_A", "target": target, "kind": "lora", **numbers}


def big_batch() -> BatchResult:
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    outputs = [
        output(
            f"a-rather-long-folder-name-of-a-model/m{place}-Q{place}_K_M-with-a-long-name.gguf",
            nbytes=10**9 - 10**7 * ((place * 7) % 20),
            kind=("gguf", "onnx", "safetensors", "else")[place % 4],
            ftype=f"Q{place}_K",
            sidecar=sidecar(
                tensors=[
                    tensor(f"model.layers.{layer}.{module}.weight", 0.01 * (place + layer), relative_loss=1e-5 * layer)
                    for layer in range(20)
                    for module in modules
                ],
                proof=parity(0.3 / (place + 1), 1 + 0.01 * place, passed=place != 5),
                adapters=[ledger_entry(layer) for layer in range(3)],
                notes=["output.weight: " + "a_long_word_without_any_space_" * 10],
            ),
        )
        for place in range(16)
    ]  # fmt: skip
    long = JobResult("broken-" + "x" * 80, "failed", error="/a/very/long/path/" * 20 + ": no such file", exit_code=3)
    return batch(*outputs, failed=[long])


@pytest.fixture(scope="module")
def probed(browser: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("browser")
    write_report(big_batch(), folder / "report.html")
    (folder / "probe.html").write_text(PROBE % json.dumps(WIDTHS))
    done = run(browser, folder, folder / "probe.html", "--dump-dom")
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    found: list[dict[str, Any]] = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found, done.stderr


def test_nothing_is_wider_than_the_window_on_a_phone_and_on_a_laptop(probed: tuple[list[dict[str, Any]], str]) -> None:
    found, _ = probed
    assert [each["width"] for each in found] == list(WIDTHS)
    for each in found:
        assert each["scroll"] <= each["width"], each
        assert not each["wide"], each["width"]


def test_the_console_stays_empty(probed: tuple[list[dict[str, Any]], str]) -> None:
    assert not [line for line in probed[1].splitlines() if "CONSOLE" in line]


def test_a_heading_sorts_up_then_down_then_as_it_was(probed: tuple[list[dict[str, Any]], str]) -> None:
    result = big_batch()
    sizes = {f"o{place}": job.outputs[0].nbytes for place, job in enumerate(result.jobs, 1) if job.outputs}
    for each in probed[0]:
        first, up, down, again = each["orders"]
        assert first == again == list(sizes)
        assert [sizes[name] for name in up] == sorted(sizes.values())
        assert [sizes[name] for name in down] == sorted(sizes.values(), reverse=True)
        assert each["focus"] == 0  # the keyboard reaches it
        assert each["sorted"] == 0
        assert each["left"] == 1  # the filter found "m3"


def test_screenshots_follow_the_colour_scheme(browser: str, tmp_path: Path, real_batch: BatchResult) -> None:
    image = pytest.importorskip("PIL.Image")
    write_report(real_batch, tmp_path / "report.html")
    for width in (500, 1366):  # a window of Chromium is never narrower than 500
        corners = []
        for scheme in (1, 0):  # blink::mojom::PreferredColorScheme: light and dark
            shot = tmp_path / f"{width}-{scheme}.png"
            flags = (f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={scheme}")
            run(browser, tmp_path, tmp_path / "report.html", *flags, f"--screenshot={shot}")
            picture = image.open(shot).convert("RGB")
            assert picture.width == width
            assert len(picture.getcolors(1 << 24)) > 50  # something is drawn
            corners.append(sum(picture.getpixel((2, 2))))
        assert corners[0] > 700
        assert corners[1] < 120
