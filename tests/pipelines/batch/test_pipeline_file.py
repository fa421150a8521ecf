"""Pipeline files: what they come to, and that every mistake is named with its line and what was probably meant."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.batch.specs import BatchSpec
from quantpress.pipelines.codes_stage import Gptq
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.merge_stage import MergeLora
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.verify_stage import Verify
from quantpress.quant.errors import UsageError

HEAD = "version: 1\n"
JOB = """\
jobs:
  - name: a
    model: models/smol
    stages:
      - gguf: {output: out/a.gguf}
"""
EXAMPLE = """\
version: 1
cache: .quantpress                 # content-addressed, shared by jobs and runs
defaults: {text: data/test.txt, device: auto}
jobs:
  - name: smol-${outtype}
    matrix: {outtype: [Q4_0, Q8_0]}
    model: models/smol
    stages:
      - merge_lora: {adapter: adapters/tone}
      - gguf: {outtype: "${outtype}", output: "out/smol-${outtype}.gguf"}
      - verify: {max_kld: 0.1}
  - name: smol-gptq-onnx
    model: models/smol
    stages:
      - gptq: {bits: 4, group_size: 128, calibration: data/calib.txt}
      - onnx: {precision: int4, output: out/smol-onnx}
      - safetensors: {format: gptq, output: out/smol-gptq}
"""

Load = Callable[..., BatchSpec]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as a pipeline file, in a folder with a model, an adapter and two texts."""
    for folder in ("models/smol", "adapters/tone", "data"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("test.txt", "calib.txt"):
        (tmp_path / "data" / name).write_text("text")

    def call(text: str, **options: object) -> BatchSpec:
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        return load_batch(path, **options)  # type: ignore[arg-type]

    return call


def said(load: Load, text: str, kind: type[Exception] = UsageError, **options: object) -> str:
    """The message, with the file's name cut short."""
    with pytest.raises(kind) as caught:
        load(text, **options)
    assert type(caught.value) is kind
    return shortened(str(caught.value))


def missing(load: Load, text: str) -> str:
    """What the first job misses."""
    return shortened(load(text).jobs[0].missing)


def shortened(message: str) -> str:
    assert "\n" not in message
    head, found, rest = message.partition("p.yaml:")
    return found.replace("p.yaml", "F") + rest if found else head


def test_the_example_of_the_interface_comes_to_its_three_jobs(load: Load, tmp_path: Path) -> None:
    batch = load(EXAMPLE)
    smol, text = str(tmp_path / "models/smol"), tmp_path / "data/test.txt"
    assert batch.cache == tmp_path / ".quantpress"
    assert [(job.name, job.model, job.line) for job in batch.jobs] == [
        ("smol-Q4_0", smol, 5), ("smol-Q8_0", smol, 5), ("smol-gptq-onnx", smol, 12),
    ]  # fmt: skip
    assert [call.stage for call in batch.jobs[1].stages] == [
        MergeLora(adapter=tmp_path / "adapters/tone"),
        Gguf(outtype="Q8_0", output=tmp_path / "out/smol-Q8_0.gguf"),
        Verify(max_kld=0.1),
    ]
    assert [call.stage for call in batch.jobs[2].stages] == [
        Gptq(bits=4, group_size=128, calibration=tmp_path / "data/calib.txt"),
        Onnx(precision="int4", output=tmp_path / "out/smol-onnx"),
        Safetensors(format="gptq", output=tmp_path / "out/smol-gptq"),
    ]
    assert [call.line for call in batch.jobs[2].stages] == [15, 16, 17]
    assert all(job.settings.judge == JudgeOptions(text=text) for job in batch.jobs)
    assert [dict(job.variables) for job in batch.jobs] == [{"outtype": "Q4_0"}, {"outtype": "Q8_0"}, {}]
    assert pickle.loads(pickle.dumps(batch)) == batch


def test_a_jobs_setting_wins_over_the_default_and_null_takes_it_back(load: Load, tmp_path: Path) -> None:
    defaults = (
        "defaults: {text: data/test.txt, max_kld: 0.5, threads: 2, max_memory: 1.5G, device: cpu, verify: false}\n"
    )
    first, second = JOB, JOB.replace("jobs:\n", "").replace("name: a", "name: b").replace("a.gguf", "b.gguf")
    second = second.replace(
        "    stages", "    text:\n    max_kld: 1\n    verify: true\n    max_memory: 4096\n    stages"
    )
    batch = load(HEAD + defaults + first + second)
    one, two = (job.settings for job in batch.jobs)
    assert (one.judge.text, one.judge.max_kld, one.verify) == (tmp_path / "data/test.txt", 0.5, False)
    assert (one.threads, one.max_memory, one.device) == (2, 1_500_000_000, "cpu")
    assert (two.judge.text, two.judge.max_kld, two.verify, two.max_memory) == (None, 1.0, True, 4096)
    assert (two.threads, two.device) == (2, "cpu")


def test_verify_replaces_what_the_job_says_and_leaves_the_rest() -> None:
    options = JudgeOptions(text=Path("a"), max_kld=0.5, chunks=3)
    assert Verify(max_kld=0.1, runtime="torch").judged(options) == JudgeOptions(
        text=Path("a"), max_kld=0.1, chunks=3, runtime="torch"
    )
    assert Verify().judged(options) == options


def test_lists_mappings_and_numbers_become_what_the_stages_take(load: Load, tmp_path: Path) -> None:
    stages = """\
      - gguf:
          output: "{name}-{ftype}.gguf"
          tensor_types: {ffn_down: q8_0, "blk\\\\.0\\\\.": f16}
          override_kv: [general.name=str:x]
      - quantize: {output: ~/q, bits: 4, skip: [lm_head], drift: 0, damping: 1e-2, symmetric: true}
      - verify
"""
    batch = load(HEAD + JOB.replace("      - gguf: {output: out/a.gguf}\n", stages))
    gguf, quantize, verify = (call.stage for call in batch.jobs[0].stages)
    types = (("ffn_down", "q8_0"), ("blk\\.0\\.", "f16"))
    output = tmp_path / "{name}-{ftype}.gguf"
    assert gguf == Gguf(output=output, tensor_types=types, override_kv=("general.name=str:x",))
    assert quantize == Quantize(
        output=Path.home() / "q", bits=4, skip=("lm_head",), drift=0.0, damping=0.01, symmetric=True
    )
    assert isinstance(quantize, Quantize)
    assert type(quantize.drift) is float  # 0 and 0.0 must give the same key
    assert verify == Verify()


@pytest.mark.parametrize("model", ["org/name", "org/name@main", "s3://bucket/model", "https://host/a.gguf"])
def test_hub_ids_and_urls_stay_as_they_are(load: Load, model: str) -> None:
    stages = f"stages:\n      - merge_lora: {{adapter: '{model}'}}\n"
    batch = load(HEAD + JOB.replace("models/smol", model).replace("stages:\n", stages))
    assert batch.jobs[0].model == model
    assert batch.jobs[0].stages[0].stage == MergeLora(adapter=model)


def test_urls_of_texts_stay_texts_and_those_of_outputs_are_told_apart(load: Load, tmp_path: Path) -> None:
    stages = "      - quantize: {output: 'memory://b/dir/q4/', calibration: 'https://host/c.txt'}\n"
    batch = load(HEAD + f"defaults: {{text: 's3://b/t.txt'}}\ncache: file://{tmp_path}/kept\n" + JOB + stages)
    assert batch.jobs[0].settings.judge.text == "s3://b/t.txt"
    local, far = batch.jobs[0].stages
    assert local.remote == ""
    assert far.remote == "memory://b/dir/q4"
    assert far.stage == Quantize(output=Path("q4"), calibration="https://host/c.txt")  # type: ignore[arg-type]
    assert batch.cache == tmp_path / "kept"


def test_what_is_there_is_never_a_hub_id_and_links_are_not_followed(load: Load, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(tmp_path / "models/smol")
    assert load(HEAD + JOB.replace("models/smol", "org/name")).jobs[0].model == str(tmp_path / "org/name")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1\n", "", "1:1: version is missing; this quantpress reads files that start with `version: 1`"),
        ("version: 1", "version: 2", "1:10: version is 2; "),
        ("version: 1", "version: true", "1:10: version is true; "),
        (HEAD + JOB, "- a", "1:1: the file: wanted a mapping, found a list"),
        (JOB, "", "1:1: jobs is missing"),
        (JOB, "jobs: []", "2:7: jobs: wanted a list that is not empty, found an empty list"),
        ("jobs:\n", "default: {}\njobs:\n", "2:1: unknown key 'default'; did you mean \"defaults\"?"),
        ("jobs:\n", "cache: 's3://b/c'\njobs:\n", "2:8: cache: wanted a folder on a disk"),
        ("    model:", "    modle:", "3:5: job 'a': model is missing; is 'modle' it?; 4:5: unknown key 'modle' of jo"),
        ("name: a", "nmae: a", "3:5: unknown key 'nmae' of job; did you mean \"name\"?; 3:5: job: name is missing; "),
        ("name: a", "name: [a]", "3:11: job.name: wanted a text or a whole number or a number, found a list"),
        ("      - gguf:", "    gguf:", "5:12: job 'a'.stages: wanted a list, found nothing; write it as a list, in ["),
        ("stages:\n      -", "gguf: {}\n    stages:\n      -", "5:5: unknown key 'gguf' of job 'a'; it is a stage: w"),
        ("models/smol", "~/none/x", "4:12: model: '~/none/x': no such file or folder"),
        ("name: a", "name: 'a*'", "3:11: name: 'a*': no blanks at its ends, control characters, "),
        ("output", "outptu", "6:15: gguf: output is missing; is 'outptu' it?; 6:16: unknown key 'outptu' of gguf; did"),
        ("gguf:", "ggfu:", '6:9: no stage is called "ggfu"; did you mean "gguf"?; installed are merge_lora, '),
        ("{out", "{pure: yes, out", "6:22: gguf.pure: wanted true or false, found the text 'yes'; write true"),
        ("{out", "{outtype: Q9, out", "6:25: gguf.outtype: wanted one of F32, F16, BF16, "),
        ("out/a.gguf", "12", "6:24: gguf.output: wanted a text, found 12; write it in quotation marks"),
        ("gguf: {", "quantize: {bits: '4', ", "6:26: quantize.bits: wanted one of 2, 3, 4, 8, found the text '4'; wr"),
        ("gguf: {", "quantize: {bits: 5, ", "6:26: quantize.bits: wanted one of 2, 3, 4, 8, found 5"),
        ("gguf: {", "quantize: {samples: true, ", "6:29: quantize.samples: wanted a whole number, found true"),
        ("gguf: {", "quantize: {samples: 1_0, ", "6:29: quantize.samples: wanted a whole number, found the text '1_0"),
        ("gguf: {", "quantize: {skip: lm_head, ", "6:26: quantize.skip: wanted a list, found the text 'lm_head'; wri"),
        ("gguf: {output: out/a.gguf}", "gptq: {}", "6:9: stages: none of them writes an output; add gguf, "),
        ("stages:\n", "stages:\n      - verify\n", "6:9: verify: no stage before it writes an output that it could"),
        (".gguf}", ".gguf}\n      - gptq", "7:9: gptq: no stage after it writes an output, so it has no use"),
        ("{output: out/a.gguf}", "\n        output: x", "6:9: stages: wanted one stage as `name: {options}`, found a"),
        (".gguf}", ".gguf}\n      - 5", "7:9: stages: wanted one stage as `name: {options}`, found 5"),
        (".gguf}", ".gguf}\n      - gguf: {output: out/a.gguf}", "7:24: gguf.output: a writes 'DIR/out/a.gguf' twice"),
        (".gguf}", ".gguf}\n      - onnx: {output: out}", "6:24: output: 'DIR/out/a.gguf' of a lies in 'DIR/out' of "),
        ("out/a.gguf", ".", "6:24: gguf.output: 'DIR' would take the place of DIR/p.yaml"),
        ("out/a.gguf", ".quantpress/a", "6:24: gguf.output: 'DIR/.quantpress/a' is in the cache, whose files come an"),
        ("out/a.gguf", '"a\\0b"', "6:24: gguf.output: 'a\\x00b': a place has no control characters"),
        ("models/smol", '"a\\nb"', "4:12: model: 'a\\nb': a place has no control characters"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_is_wanted(
    load: Load, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = HEAD + JOB
    assert old in text
    find = missing if "no such file" in message else said
    found = find(load, text.replace(old, new)).replace(str(tmp_path), "DIR")
    assert found.startswith(f"F:{message}"), found


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ("{maxKld: 1}", "2:12: unknown key 'maxKld' of defaults; did you mean \"max_kld\"?"),
        ("{zzz: 1}", "2:12: unknown key 'zzz' of defaults; known are text, context, "),
        ("{verify: no}", "2:20: verify: wanted true or false, found the text 'no'; write false"),
        ("{verify: 'true'}", "2:20: verify: wanted true or false, found the text 'true'; write true, without quotati"),
        ("{max_memory: 8Q}", "2:24: max_memory: wanted a size as in 8G or a whole number, found the text '8Q'"),
        ("{max_memory: 0G}", "2:24: max_memory: a size is a number and K, M or G, as in 8G"),
        ("{context: 4}", "2:21: context: wanted at least 8, found 4"),
        ("{context: 00512}", "2:21: context: wanted a whole number, found the text '00512'; write 512, without"),
        ("{min_top1: 1.5}", "2:22: min_top1: wanted at most 1, found 1.5"),
        ("{max_kld: '0.1'}", "2:21: max_kld: wanted a number, found the text '0.1'; write 0.1, without quotation mar"),
        ("{device: gpu}", "2:20: device: wanted one of auto, cpu, cuda, found the text 'gpu'"),
        ("[text]", "2:11: defaults: wanted a mapping, found a list"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_defaults_is_named_where_it_stands(load: Load, defaults: str, message: str) -> None:
    found = said(load, f"{HEAD}defaults: {defaults}\n{JOB}")
    assert found.startswith(f"F:{message}"), found


def test_several_mistakes_are_named_in_one_line_in_the_order_of_the_file(load: Load) -> None:
    found = said(load, HEAD + "defaults: {devise: cpu}\n" + JOB.replace("name: a", "name: a\n    modle: x"))
    assert found.startswith("F:2:12: unknown key 'devise' of defaults")
    assert "; 5:5: unknown key 'modle' of job 'a'" in found
    found = said(load, HEAD + "defaults: {verify: no}\n" + JOB.replace("{output", "{pur: 1, pure: 1, output"))
    places = ("F:2:20: verify", "; 7:16: unknown key 'pur'", "; 7:30: gguf.pure: wanted")
    assert [found.find(place) >= 0 for place in places] == [True] * 3
    assert sorted(places, key=found.index) == list(places)


def test_a_mistake_of_a_template_is_named_once_whatever_its_matrix(load: Load) -> None:
    job = JOB.replace("name: a", "name: a-${x}\n    matrix: {x: [1, 2, 3]}").replace(
        "out/a.gguf}", "'${x}.gguf', pure: 1}"
    )
    found = said(load, HEAD + job)
    assert found.count("gguf.pure") == 1


def test_more_mistakes_than_can_be_read_are_counted(load: Load) -> None:
    stages = "".join(f"      - gguf: {{output: out/{n}.gguf, pure: {n}}}\n" for n in range(25))
    found = said(load, HEAD + JOB + stages)
    assert found.count("gguf.pure") == 10
    assert found.endswith("; and 15 more")


HUB = "; for the model of that name on the Hub write models/smoll@main"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("models/smol", "models/smoll", '4:12: model: \'models/smoll\': GONE; did you mean "models/smol"?' + HUB),
        ("models/smol", "./modles/smol", '4:12: model: \'./modles/smol\': GONE; did you mean "models/smol"?'),
        ("models/smol", "x.gguf", "4:12: model: 'x.gguf': GONE"),
        ("jobs:\n", "defaults: {text: data/tst.txt}\njobs:\n", "2:18: text: 'data/tst.txt': GONE; did you mean \"dat"),
        ("gguf: {", "quantize: {calibration: c.txt, ", "6:33: quantize.calibration: 'c.txt': GONE"),
        ("stages:", "stages:\n      - merge_lora: {adapter: ./ton}", "6:31: merge_lora.adapter: './ton': GONE"),
    ],
)  # fmt: skip
def test_an_input_that_is_not_there_is_said_of_its_job_with_its_line(
    load: Load, tmp_path: Path, old: str, new: str, message: str
) -> None:
    found = missing(load, (HEAD + JOB).replace(old, new))
    assert found.startswith("F:" + message.replace("GONE", f"no such file or folder in {tmp_path}")), found


def test_an_input_that_another_job_writes_is_told_from_others(load: Load) -> None:
    text = HEAD + JOB.replace("models/smol", "./b.gguf") + "  - name: b\n    model: models/smol\n    stages: [STAGE]\n"
    found = missing(load, text.replace("STAGE", "gguf: {output: b.gguf}"))
    assert found.endswith("; job 'b' writes it, but jobs do not wait for each other: make it one job")
    assert "job 'b'" not in missing(load, text.replace("STAGE", "gguf: {output: c.gguf}"))


def test_an_input_that_is_missing_is_missing_in_its_job_alone(load: Load) -> None:
    text = HEAD + JOB + JOB.replace("jobs:\n", "").replace("name: a", "name: b").replace("a.gguf", "b.gguf")
    text = text.replace("model: models/smol", "model: ./gone", 1)
    assert ["./gone" in job.missing for job in load(text).jobs] == [True, False]
    assert [job.missing for job in load(text, jobs=["b"]).jobs] == [""]


def test_a_wrong_file_is_a_wrong_file_even_where_inputs_are_missing_too(load: Load) -> None:
    text = HEAD + JOB.replace("models/smol", "./gone").replace("{output", "{pure: 1, output")
    assert "gguf.pure" in said(load, text)


def test_a_name_that_is_filled_in_later_may_stand_twice_where_stages_differ(load: Load) -> None:
    stage = "      - gguf: {output: '{name}-{ftype}.gguf', outtype: TYPE}\n"
    text = HEAD + JOB + stage.replace("TYPE", "F16") + stage.replace("TYPE", "Q8_0")
    assert len(load(text).jobs[0].stages) == 3
    assert "twice; line 8 writes it too" in said(load, text + stage.replace("TYPE", "Q8_0"))


@pytest.mark.slow
def test_ten_thousand_jobs_are_read_in_seconds_and_one_more_is_refused(load: Load) -> None:
    numbers = ", ".join(map(str, range(100)))
    matrix = f"matrix: {{x: [{numbers}], y: [{numbers}]}}"
    text = HEAD + JOB.replace("name: a", f"name: a-${{x}}-${{y}}\n    {matrix}").replace(
        "out/a.gguf", "'${x}-${y}.gguf'"
    )
    start = time.process_time()
    assert len(load(text).jobs) == 10_000
    assert time.process_time() - start < 30  # of two seconds where nothing else runs
    more = said(load, text.replace("x: [0,", "x: [-1, 0,"))
    assert more == "F:3:5: the matrix has 10100 combinations; a file may hold 10000 jobs in all"
