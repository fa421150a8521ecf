"""The model card: what it says, what it leaves out, and that its commands run."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from quantpress.pipelines.batch.results import BatchResult, JobResult
from quantpress.pipelines.report.writing import write_report
from tests.pipelines.report.batches import batch, output, parity, sidecar


def card(result: BatchResult, tmp_path: Path, **models: str) -> str:
    path = tmp_path / "README.md"
    write_report(result, path, models={name.replace("_", "-"): model for name, model in models.items()})
    return path.read_text(encoding="utf-8")


def facts(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def real_card(real_batch: BatchResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    return card(real_batch, tmp_path_factory.mktemp("card"))


def test_every_output_has_a_row_with_the_figures_of_its_sidecar(real_batch: BatchResult, real_card: str) -> None:
    rows = [line.split(" | ") for line in real_card.splitlines() if re.match(r"\| `", line)]
    outputs = [each for job in real_batch.jobs for each in job.outputs]
    assert [row[0].strip("| `") for row in rows] == [Path(each.path).name for each in outputs]
    for row, each in zip(rows, outputs, strict=True):
        assert each.parity is not None
        assert float(row[5]) == pytest.approx(each.parity["mean_kld"], rel=0.005)  # three digits are shown
        assert float(row[6].rstrip(" %")) / 100 == pytest.approx(each.parity["top1_agreement"], abs=5e-5)
        assert float(row[4].split(" ± ")[0].replace(",", "")) == pytest.approx(
            each.parity["candidate"]["perplexity"], rel=0.02
        )
    assert "broken" not in re.sub(r"<!--.*?-->", "", real_card, flags=re.DOTALL)


def test_licence_is_taken_from_the_model_and_nothing_is_made_up(real_card: str, tmp_path: Path) -> None:
    assert facts(real_card)["license"] == "apache-2.0"
    assert "base_model" not in facts(real_card)
    unknown = facts(card(batch(output()), tmp_path))
    assert "license" not in unknown
    assert "base_model" not in unknown


def test_base_model_is_the_hub_id_of_the_pipeline_file_without_its_revision(tmp_path: Path) -> None:
    found = facts(card(batch(output(), output()), tmp_path, job_0="org/model-1B@abc", job_1="org/model-1B"))
    assert found["base_model"] == ["org/model-1B"]
    assert found["base_model_relation"] == "quantized"
    adapted = sidecar(stages=[{"name": "merge_lora", "version": 1, "options": {"adapter": "tone", "weight": 1.0}}])
    found = facts(card(batch(output(sidecar=adapted)), tmp_path, job_0="org/model-1B"))
    assert "base_model_relation" not in found  # what adapters make of it is the author's to say
    assert "base_model" not in facts(card(batch(output()), tmp_path, job_0="/somewhere/models/x"))


def test_what_failed_is_named_only_where_readers_do_not_see_it(tmp_path: Path) -> None:
    bad = output("bad--name.gguf", proof=parity(0.9, passed=False))
    failed = JobResult("--> <script>x</script>", "failed", error="/home/someone/x", exit_code=3)
    text = card(batch(output(), bad, failed=[failed]), tmp_path)
    comment = re.search(r"<!--(.*?)-->", text, re.DOTALL)
    assert comment is not None
    assert "- -) <script)x</script): failed, exit code 3" in comment[1]
    assert "someone" not in text
    assert "bad- -name.gguf" in comment[1]
    seen = text.replace(comment[0], "")
    assert "bad" not in seen
    assert "script" not in seen


@pytest.mark.parametrize(
    "name", ["a|b.gguf", "a`b.gguf", "<img src=x>.gguf", "a](http:x).gguf", "``` x.gguf", "a\nb.gguf"]
)
def test_hostile_names_stay_inside_their_cells_and_fences(name: str, tmp_path: Path) -> None:
    import markdown_it  # of rich, the reader of CommonMark

    text = card(batch(output(name)), tmp_path)
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    kinds = {token.type for token in tokens} | {
        child.type for token in tokens for child in token.children or () if token.type == "inline"
    }
    assert not kinds & {"html_block", "html_inline", "image"}
    tables = [token for token in tokens if token.type == "tr_open"]
    assert len(tables) == 2
    cells = [token for token in tokens if token.type == "td_open"]
    assert len(cells) == 8
    first = tokens[tokens.index(cells[0]) + 1].children or []
    assert [child.content for child in first] == [name.replace("\n", "\\x0a")]
    headings = [token.tag for token in tokens if token.type == "heading_open"]
    assert headings in (["h1", "h3", "h3"], ["h1", "h3", "h3", "h3", "h4"])  # without commands, and with them


def test_shell_commands_quote_names(tmp_path: Path) -> None:
    text = card(batch(output("my model; rm -rf $HOME.gguf")), tmp_path)
    assert "-m 'my model; rm -rf $HOME.gguf'" in text
    assert "ollama create my-model--rm--rf--home " in text


def test_what_takes_one_file_only_is_given_a_split_model_merged(tmp_path: Path) -> None:
    names = [f"my x-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts = sidecar(outputs=[{"name": name, "sha256": "ef" * 32, "bytes": 1088} for name in names])
    text = card(batch(output(names[0], sidecar=parts)), tmp_path, job_0="org/model")
    merge = f"llama-gguf-split --merge '{names[0]}' 'my x.gguf'\n"
    llama_cpp, ollama, vllm = blocks(text, "bash")
    assert llama_cpp.startswith(f"llama-completion -m '{names[0]}' ")
    assert ollama.startswith(f"{merge}ollama create my-x -f Modelfile")
    assert vllm.startswith(merge)
    assert "vllm serve ./'my x.gguf'" in vllm
    assert "FROM ./my x.gguf" in text
    assert "--merge" not in card(batch(output()), tmp_path)


@pytest.mark.slow
def test_python_of_the_card_runs_beside_the_files(
    real_batch: BatchResult,
    real_card: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    for job in real_batch.jobs:
        for each in job.outputs:
            if Path(each.path).is_dir():
                shutil.copytree(each.path, tmp_path / Path(each.path).name)
    monkeypatch.chdir(tmp_path)
    programs = blocks(real_card, "python")
    assert len(programs) == 3  # plain, GPTQ, ONNX
    ran = [program for program in programs if "gptqmodel" not in program]  # which is not installed here
    for program in ran:
        exec(compile(program, "card", "exec"), {})
    assert len(ran) == 2
    assert capsys.readouterr().out.strip()


def test_a_url_and_a_missing_file_have_a_card_without_facts(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(output(), path="s3://bucket/x.gguf")
    text = card(batch(elsewhere, output("gone.gguf")), tmp_path)
    assert "`x.gguf`" in text
    assert "num_ctx" not in text


def test_the_same_batch_gives_the_same_card(real_batch: BatchResult, real_card: str, tmp_path: Path) -> None:
    assert card(real_batch, tmp_path) == real_card
