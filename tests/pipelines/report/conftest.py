"""A batch of real outputs of tiny models, made once."""

from __future__ import annotations

import pytest

import quantpress as qp
from quantpress.pipelines.batch.results import BatchResult, JobResult
from tests.pipelines.report.batches import output_of
from tests.tiny import tiny_checkpoint

JUDGE = qp.JudgeOptions(context=64, chunks=2, threads=1)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def real_batch(tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    """GGUF, plain and GPTQ safetensors and ONNX of one model, all proved, and a job that failed."""
    folder = tmp_path_factory.mktemp("report")
    model = tiny_checkpoint(folder / "tiny-llama", "llama")
    (model / "chat_template.jinja").write_text(CHATML)
    (model / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9, "do_sample": true}')
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model of letters.\n")
    pressed = [
        qp.export_gguf(model, folder / "tiny-Q8_0.gguf", outtype="q8_0", verify=True, judge=JUDGE, threads=1),
        qp.export_gguf(model, folder / "tiny-Q4_0.gguf", outtype="q4_0", verify=True, judge=JUDGE, threads=1),
        qp.export_safetensors(model, folder / "tiny-f16", dtype="f16", verify=True, judge=JUDGE, threads=1),
        qp.quantize(
            model, folder / "tiny-gptq", group_size=32, samples=4, sequence_length=64, verify=True, judge=JUDGE,
            threads=1,
        ),
        qp.export_onnx(model, folder / "tiny-onnx", precision="int4", verify=True, judge=JUDGE, threads=1),
    ]  # fmt: skip
    jobs = [JobResult(each.artifact.path.name, "verified", (output_of(each),)) for each in pressed]
    jobs.append(JobResult("broken", "failed", error="models/nowhere: no such file or folder", exit_code=3))
    return BatchResult(folder / "release.yaml", tuple(jobs), 12.5)
