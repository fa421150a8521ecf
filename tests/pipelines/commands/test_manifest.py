"""`verify --manifest`: any changed bit of an output or an input is found, and a sidecar from a stranger is refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.pipelines.cli import run
from tests.pipelines.commands.peft_adapters import make_adapter
from tests.tiny import tiny_checkpoint

FLIPS = 200
KINDS = {
    "q8_0.gguf": ["convert", "MODEL", "OUT", "--outtype", "q8_0"],
    "adapted.gguf": ["convert", "MODEL", "OUT", "--outtype", "q4_0", "--adapter", "ADAPTER"],
    "part-00001-of-00003.gguf": ["convert", "MODEL", "part.gguf", "--split-max-tensors", "12"],
    "onnx": ["convert", "MODEL", "OUT", "--to", "onnx", "--precision", "int4"],
    "int4": ["quantize", "MODEL", "OUT", "--method", "rtn", "--group-size", "32"],
    "merged": ["merge", "MODEL", "ADAPTER", "OUT"],
}  # fmt: skip


LOOSE = ["--context", "32", "--chunks", "2", "--max-kld", "9", "--max-ppl-change", "9", "--min-top1", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, and an output of every kind; copied before anything is changed."""
    folder = tmp_path_factory.mktemp("manifests")
    model = tiny_checkpoint(folder / "model", "llama")
    adapter = make_adapter(model, folder / "adapter")
    known = {"MODEL": str(model), "ADAPTER": str(adapter), "part.gguf": str(folder / "part.gguf")}
    for name, words in KINDS.items():
        done = [{**known, "OUT": str(folder / name)}.get(word, word) for word in words]
        assert run(["-q", *done, "--no-verify"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def sidecar(folder: Path, name: str) -> Path:
    path = folder / name
    return path / "quantpress.json" if path.is_dir() else folder / f"{name}.quantpress.json"


@pytest.mark.parametrize("name", KINDS)
def test_untouched_files_pass_by_sidecar_and_by_output(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for given in (sidecar(folder, name), folder / name):
        report = qp.verify_manifest(given, against=folder / "model", adapters=[folder / "adapter"])
        assert report.passed, report.reason
        assert {each.state for each in (*report.outputs, *report.inputs)} == {"same"}
    assert run(["verify", "--manifest", str(folder / name), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["passed"]
    assert {each["state"] for each in said["inputs"]} == {"not looked for"}
    on_disk = {
        each["name"]: hashlib.sha256(_place(folder, name, each["name"]).read_bytes()).hexdigest()
        for each in said["outputs"]
    }
    assert on_disk == {each["name"]: each["found"] for each in said["outputs"]}
    if (folder / name).is_dir():
        assert set(on_disk) == {path.name for path in (folder / name).iterdir()} - {"quantpress.json"}


def _place(folder: Path, name: str, file: str) -> Path:
    return folder / name / file if (folder / name).is_dir() else folder / file


def test_any_flipped_bit_is_found(folder: Path) -> None:
    chance = random.Random(11)
    for number in range(FLIPS):
        name = chance.choice(list(KINDS))
        report = qp.verify_manifest(folder / name, against=folder / "model", adapters=[folder / "adapter"])
        kind, each = chance.choice([*(("out", e) for e in report.outputs), *(("in", e) for e in report.inputs)])
        path = _place(folder, name, each.name)
        if kind == "in":
            path = folder / each.name if "/" in each.name else folder / "model" / each.name
        place, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
        _flip(path, place, bit)
        spoilt = qp.verify_manifest(folder / name, against=folder / "model", adapters=[folder / "adapter"])
        assert spoilt.problems == (f"{each.name} is different",), (number, path, place)
        _flip(path, place, bit)


def _flip(path: Path, place: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (value,) = file.read(1)
        file.seek(place)
        file.write(bytes([value ^ bits]))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors is different"),
    "a byte more": (lambda folder: _append(folder / "model.safetensors"), "model.safetensors is different"),
    "gone": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "renamed": (
        lambda folder: (folder / "config.json").rename(folder / "config2.json"),
        "config.json is missing, and 1 more",
    ),
    "one more": (lambda folder: (folder / "modeling.py").write_text("x"), "modeling.py is unexpected"),
    "one more below": (lambda folder: _below(folder), "sub/modeling.py is unexpected"),
    "one that looks like a leftover": (
        lambda folder: (folder / ".quantpress-x").write_text("x"),
        ".quantpress-x is unexpected",
    ),
    "a link more": (lambda folder: (folder / "x.json").symlink_to("/etc/hostname"), "x.json is unexpected"),
}


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _below(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "modeling.py").write_text("x")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_an_output_folder_end_with_4(folder: Path, change: str, capfd: pytest.CaptureFixture[str]) -> None:
    act, words = CHANGES[change]
    act(folder / "merged")
    assert run(["verify", "--manifest", str(folder / "merged")]) == 4
    said = capfd.readouterr()
    assert f"error: {folder / 'merged' / 'quantpress.json'}: {words}" in said.err
    assert "FAILED" in said.out


def test_swapped_parts_of_a_split_file_are_found(folder: Path) -> None:
    first, second = (folder / f"part-0000{number}-of-00003.gguf" for number in (2, 3))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    report = qp.verify_manifest(folder / "part-00001-of-00003.gguf")
    assert {each.name for each in report.outputs if each.state == "different"} == {first.name, second.name}


def test_an_input_that_is_given_and_another_one_fails_and_one_that_is_not_given_does_not(folder: Path) -> None:
    _append(folder / "model" / "tokenizer.json")
    (folder / "adapter" / "adapter_config.json").unlink()
    assert qp.verify_manifest(folder / "adapted.gguf").passed
    report = qp.verify_manifest(folder / "adapted.gguf", against=folder / "model", adapters=[folder / "adapter"])
    assert report.problems == ("tokenizer.json is different", "adapter/adapter_config.json is missing")
    assert qp.verify_manifest(folder / "adapted.gguf", adapters=[folder / "adapter"]).problems == (
        "adapter/adapter_config.json is missing",
    )


def test_inputs_are_found_where_adapters_have_other_names_and_models_lie_elsewhere(folder: Path) -> None:
    (folder / "adapter").rename(folder / "tone")
    (folder / "model").rename(folder / "base")
    report = qp.verify_manifest(folder / "adapted.gguf", against=folder / "base", adapters=[folder / "tone"])
    assert {each.state for each in report.inputs} == {"same"}
    _append(folder / "tone" / "adapter_config.json")
    report = qp.verify_manifest(folder / "adapted.gguf", against=folder / "base", adapters=[folder / "tone"])
    assert report.problems == ("adapter/adapter_config.json is different",)
    assert run(["verify", "--manifest", str(folder / "adapted.gguf"), "--against", str(folder / "model")]) == 3


def test_any_part_of_a_split_file_leads_to_its_sidecar(folder: Path) -> None:
    report = qp.verify_manifest(folder / "part-00003-of-00003.gguf")
    assert report.passed
    assert len(report.outputs) == 3


def test_the_sidecar_of_another_file_proves_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "other.gguf").write_bytes(b"GGUF")
    shutil.copy(sidecar(folder, "q8_0.gguf"), folder / "other.gguf.quantpress.json")
    assert run(["verify", "--manifest", str(folder / "other.gguf")]) == 3
    assert "it speaks of 'q8_0.gguf', not of 'other.gguf'" in capfd.readouterr().err


def test_names_with_marks_of_a_terminal_library_are_shown_as_they_are(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "merged" / "[red]x[_red].json").write_text("x")
    (folder / "merged" / "[").mkdir()
    (folder / "merged" / "[" / "bold]").write_text("x")
    assert run(["verify", "--manifest", str(folder / "merged")]) == 4
    said = capfd.readouterr().out
    assert "[red]x[_red].json" in said
    assert "[/bold]" in said


def test_hashing_stops_when_it_is_told_to_and_says_how_far_it_is(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = qp.verify_manifest(
        folder / "adapted.gguf",
        against=folder / "model",
        adapters=[folder / "adapter"],
        progress=lambda phase, done, total: seen.append((done, total)),
    )
    total = sum(each.nbytes for each in (*report.outputs, *report.inputs))
    assert seen[-1] == (total, total)
    stop = threading.Event()
    stop.set()
    with pytest.raises(qp.CancelledError):
        qp.verify_manifest(folder / "adapted.gguf", cancel=stop)


def test_outputs_of_a_batch_are_as_their_sidecars_say(folder: Path) -> None:
    stages = [{"rtn": {"bits": 4, "group_size": 32}}, {"safetensors": {"format": "gptq", "output": "out/int4"}}]
    stages.append({"gguf": {"outtype": "q4_0", "output": "out/int4.gguf"}})
    batch = {"version": 1, "defaults": {"verify": False}, "jobs": [{"name": "a", "model": "model", "stages": stages}]}
    (folder / "batch.yaml").write_text(json.dumps(batch))
    qp.run_pipeline(folder / "batch.yaml", workers=0).require_success()
    for name in ("int4", "int4.gguf"):
        report = qp.verify_manifest(folder / "out" / name, against=folder / "model")
        assert {each.state for each in (*report.outputs, *report.inputs)} == {"same"}
        _append(_place(folder / "out", name, report.outputs[0].name))
        assert not qp.verify_manifest(folder / "out" / name).passed


@pytest.mark.parametrize("name", KINDS)
def test_every_sidecar_is_a_statement_of_in_toto(made: Path, name: str) -> None:
    text = sidecar(made, name).read_text()
    said = json.loads(text)
    assert [(each["name"], each["sha256"]) for each in said["outputs"]] == [
        (each["name"], each["digest"]["sha256"]) for each in said["subject"]
    ]
    assert said["predicate"]["buildDefinition"]["externalParameters"]["stages"] == said["stages"]
    assert [each["digest"]["sha256"] for each in said["predicate"]["buildDefinition"]["resolvedDependencies"]] == [
        each["sha256"] for each in said["inputs"]
    ]
    assert said["environment"]["device"] == "cpu"
    official = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    parsed = importlib.import_module("google.protobuf.json_format").Parse(
        text, importlib.import_module("in_toto_attestation.v1.statement_pb2").Statement(), ignore_unknown_fields=True
    )
    official.Statement.copy_from_pb(parsed).validate()


def test_a_signature_over_the_folder_notices_what_no_hash_of_the_sidecar_is_over(folder: Path) -> None:
    signing = pytest.importorskip("model_signing", reason="model-signing is not installed")
    keys = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    forms = importlib.import_module("cryptography.hazmat.primitives.serialization")
    key = keys.generate_private_key(keys.SECP256R1())
    (folder / "key").write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()))
    public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    (folder / "pub").write_bytes(public)
    signing.signing.Config().use_elliptic_key_signer(private_key=folder / "key").sign(folder / "merged", folder / "sig")
    check = signing.verifying.Config().use_elliptic_key_verifier(public_key=folder / "pub")
    check.verify(folder / "merged", folder / "sig")
    path = sidecar(folder, "merged")
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert qp.verify_manifest(folder / "merged").passed
    with pytest.raises(ValueError, match=r"quantpress\.json"):
        check.verify(folder / "merged", folder / "sig")


def test_a_run_and_a_manifest_go_together(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "verify",
        str(folder / "q8_0.gguf"),
        "--against",
        str(folder / "model"),
        "--manifest",
        str(folder / "q8_0.gguf"),
    ]
    assert run([*words, *LOOSE, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["passed"]
    assert said["manifest"]["passed"]
    assert {each["state"] for each in said["manifest"]["inputs"]} == {"same"}


def test_a_pipe_in_place_of_a_sidecar_is_not_waited_for(folder: Path) -> None:
    sidecar(folder, "q8_0.gguf").unlink()
    os.mkfifo(sidecar(folder, "q8_0.gguf"))
    assert run(["verify", "--manifest", str(folder / "q8_0.gguf")]) == 3
    assert run(["verify", str(folder / "q8_0.gguf"), "--against", str(folder / "model"), *LOOSE]) == 0


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no schema": (lambda said: said.pop("schema"), "not a sidecar"),
    "another predicate": (lambda said: said.update(predicateType="x"), "not a sidecar"),
    "an input that climbs": (lambda said: said["inputs"][0].update(name="../x"), "leaves the model folder"),
    "another statement": (lambda said: said.update(_type="x"), "not a sidecar"),
    "no outputs": (lambda said: said.update(outputs=[], subject=[]), "speaks of no file"),
    "outputs that are text": (lambda said: said.update(outputs="x"), "outputs: wanted a list"),
    "an output that is a number": (lambda said: said["outputs"].append(7), "outputs: None is not a file name"),
    "an output twice": (lambda said: said["outputs"].append(said["outputs"][0]), "named twice"),
    "another subject": (lambda said: said["subject"][0]["digest"].update(sha256="0" * 64), "subject and outputs"),
    "a subject less": (lambda said: said["subject"].pop(), "subject and outputs"),
    "a subject without a digest": (
        lambda said: said["subject"][0].pop("digest"),
        "subject: wanted a name and a digest",
    ),
    "a hash too short": (lambda said: said["outputs"][0].update(sha256="ab"), "64 hexadecimal digits"),
    "bytes below zero": (lambda said: said["outputs"][0].update(bytes=-1), "bytes must be"),
    "bytes that are true": (lambda said: said["outputs"][0].update(bytes=True), "bytes must be"),
    "a name with a line": (lambda said: _name(said, "a\nb"), "is not a file name"),
    "a name that climbs": (lambda said: _name(said, "../model/config.json"), "leaves the model folder"),
    "an absolute name": (lambda said: _name(said, "/etc/passwd"), "absolute"),
}


def _name(said: dict[str, Any], name: str) -> None:
    said["outputs"][0]["name"] = said["subject"][0]["name"] = name


@pytest.mark.parametrize("change", SPOILT)
def test_a_sidecar_that_makes_no_sense_ends_with_3(
    folder: Path, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    act, words = SPOILT[change]
    path = sidecar(folder, "merged")
    said = json.loads(path.read_text())
    act(said)
    path.write_text(json.dumps(said))
    assert run(["verify", "--manifest", str(path)]) == 3
    assert words in capfd.readouterr().err


def test_links_pipes_and_files_that_are_no_sidecars_are_refused(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = folder / "merged" / "config.json"
    target.unlink()
    target.symlink_to(folder / "model" / "config.json")
    assert run(["verify", "--manifest", str(folder / "merged")]) == 3
    assert "leaves the model folder" in capfd.readouterr().err
    target.unlink()
    os.mkfifo(target)
    assert run(["verify", "--manifest", str(folder / "merged")]) == 3
    assert "named pipe" in capfd.readouterr().err
    assert run(["verify", "--manifest", str(folder / "model" / "config.json")]) == 3
    assert run(["verify", "--manifest", str(folder / "nothing")]) == 3
    assert run(["verify"]) == 2
    assert run(["verify", str(folder / "q8_0.gguf")]) == 2


def test_a_bit_of_the_weights_that_no_other_figure_shows_fails_a_file_that_is_run(folder: Path) -> None:
    file = folder / "q8_0.gguf"
    loose = qp.JudgeOptions(context=32, chunks=2, max_kld=9, max_ppl_change=9, min_top1=0)
    assert qp.verify(file, folder / "model", options=loose).passed
    _flip(file, file.stat().st_size - 30, 1)  # the lowest bit of a code
    found = qp.verify(file, folder / "model", options=loose)
    assert not found.passed
    assert found.failures == ("manifest",)
    assert "q8_0.gguf: not the bytes that were written" in found.reason
    sidecar(folder, "q8_0.gguf").unlink()
    assert qp.verify(file, folder / "model", options=loose).passed
