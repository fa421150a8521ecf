"""No bytes make a parser do anything but parse or refuse; `python -m tests.fuzz.run` looks longer and sees more."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import pytest

from quantpress.quant.errors import InputError, OutputError
from tests.fuzz.engines import own_inputs
from tests.fuzz.known import targets
from tests.fuzz.mutate import mutated_once
from tests.fuzz.property import MAX_NBYTES, MAX_SECONDS, Outcome, Violation, check, prepared
from tests.fuzz.regressions import REGRESSIONS
from tests.fuzz.run import main
from tests.fuzz.surgery import SURGEONS
from tests.fuzz.target import Target

INPUTS = 200  # changed seeds of each target
# processor seconds after which a target has had its share: forty of them stay under a minute on a machine that is slow
SHARE = 1.0
TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_property_holds(name: str, tmp_path: Path) -> None:
    """Seeds, then changed ones, the same each time; a slow machine tries fewer of them."""
    target = TARGETS[name]
    folder = prepared(target, tmp_path / "model")
    _seeds_hold(target, folder)
    end = time.process_time() + SHARE
    for number, data in enumerate(islice(own_inputs(target, seed=0), INPUTS)):
        _holds(target, folder, data, f"changed seed {number}", tmp_path)
        if time.process_time() > end:
            break


def _seeds_hold(target: Target, folder: Path) -> None:
    """Every seed holds, the good ones are parsed; what is imported late is there the second time."""
    seeds = target.seeds()
    good = [name for name in seeds if name.startswith("good")]
    outcomes = {name: _checked(target, folder, data) for name, data in seeds.items()}
    refused = {name: outcomes[name].message for name in good if not outcomes[name].accepted}
    assert not refused
    assert any(outcome.accepted for outcome in outcomes.values())


def _checked(target: Target, folder: Path, data: bytes) -> Outcome:
    try:
        return check(target, folder, data)
    except Violation as violation:
        if violation.kind not in ("time", "memory", "forbidden"):
            raise
        return check(target, folder, data)


def _holds(target: Target, folder: Path, data: bytes, what: str, place: Path) -> None:
    try:
        check(target, folder, data)
    except Violation as violation:
        file = place / "input"
        file.write_bytes(data)
        pytest.fail(f"{what}: {violation}\npython -m tests.fuzz.run {target.name} --input {file}", pytrace=False)


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, found in REGRESSIONS.items() for what in found])
def test_what_was_found_once_is_refused(name: str, what: str, tmp_path: Path) -> None:
    folder = prepared(TARGETS[name], tmp_path)
    check(TARGETS[name], folder, next(iter(TARGETS[name].seeds().values())))
    assert not check(TARGETS[name], folder, REGRESSIONS[name][what]()).accepted


def _planted(parse: Callable[[Path], object]) -> Target:
    """A parser with a fault, behind one that has none."""
    return Target("planted", "input", lambda folder: None, parse, lambda: {"good": b"{}"})


def _writes(folder: Path) -> None:
    (folder / "more").write_bytes(b"x")


def _hides_what_it_did(folder: Path) -> None:
    try:
        (folder / "more").write_bytes(b"x")
    except BaseException as error:
        raise InputError("refused") from error


def _loops(folder: Path) -> None:
    while True:
        pass


def _raises(error: BaseException) -> Callable[[Path], None]:
    def parse(folder: Path) -> None:
        raise error

    return parse


class _Panic(BaseException):
    """As pyo3's, which is no Exception."""


FAULTS: Mapping[str, tuple[str, Callable[[Path], object]]] = {
    "writes": ("forbidden: open", _writes),
    "hides": ("forbidden: open", _hides_what_it_did),
    "renames": ("forbidden: os.rename", lambda folder: (folder / "input").rename(folder / "other")),
    "removes": ("forbidden: os.remove", lambda folder: (folder / "input").unlink()),
    "makes a folder": ("forbidden: os.mkdir", lambda folder: (folder / "sub").mkdir()),
    "runs a program": ("forbidden: subprocess.Popen", lambda folder: __import__("subprocess").run(["true"])),
    "opens a socket": ("forbidden: socket", lambda folder: __import__("socket").socket()),
    "runs the input": ("forbidden: compile", lambda folder: eval((folder / "input").read_text())),
    "loops": ("time: ", _loops),
    "computes": ("time: ", lambda folder: sum(range(30_000_000))),  # in C, where no signal is seen
    "allocates": ("memory: ", lambda folder: len(bytearray(MAX_NBYTES + (64 << 20)))),
    "KeyError": ("KeyError: ", _raises(KeyError("x"))),
    "panics": ("_Panic: ", _raises(_Panic("x"))),
    "another error": ("OutputError: ", _raises(OutputError("no such runtime"))),
    "exits": ("SystemExit: ", _raises(SystemExit(3))),
    "two lines": ("message: ", _raises(InputError("a\nb"))),
    "long": ("message: ", _raises(InputError("a" * 1000))),
    "says nothing": ("message: ", _raises(InputError(""))),
    "warns": ("UserWarning: ", lambda folder: warnings.warn("x", stacklevel=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault in ("loops", "computes"):
        monkeypatch.setattr("tests.fuzz.property.MAX_SECONDS", 0.1)
    kind, parse = FAULTS[fault]
    target = _planted(parse)
    with pytest.raises(Violation) as caught:
        check(target, prepared(target, tmp_path), b"{}")
    assert str(caught.value).startswith(kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input"]


def test_good_parser_is_let_be(tmp_path: Path) -> None:
    """It reads, imports, and takes memory below the bound."""
    target = _planted(lambda folder: (json.loads((folder / "input").read_text()), bytearray(MAX_NBYTES // 2)))
    outcome = check(target, prepared(target, tmp_path), b"{}")
    assert outcome.accepted
    assert outcome.nbytes >= MAX_NBYTES // 4  # some of it was there before, and free
    assert outcome.seconds < MAX_SECONDS


def test_same_seed_gives_same_inputs() -> None:
    """Otherwise a failure could not be seen again."""
    target = TARGETS["gguf"]
    assert list(islice(own_inputs(target, 3), 30)) == list(islice(own_inputs(target, 3), 30))
    assert list(islice(own_inputs(target, 3), 30)) != list(islice(own_inputs(target, 4), 30))


@pytest.mark.parametrize(
    ("name", "seed"), [("gguf", "good-model"), ("safetensors-header", "good"), ("safetensors-index", "good")]
)
def test_surgery_goes_past_the_header(name: str, seed: str, tmp_path: Path) -> None:
    """Changes of fields alone are refused for what they say and rarely for the lengths around it: some are good."""
    target, rng = TARGETS[name], random.Random(0)
    folder = prepared(target, tmp_path)
    data = target.seeds()[seed]
    changed = [one for number in range(400) for one in (_cut_open(data, rng),) if one != data]
    outcomes = [check(target, folder, one) for one in changed]
    assert len(changed) > 50
    assert len({outcome.message for outcome in outcomes}) > 10
    assert any(outcome.accepted for outcome in outcomes)
    assert mutated_once(data, random.Random(1)) != data


def _cut_open(data: bytes, rng: random.Random) -> bytes:
    return next(changed for surgeon in SURGEONS if (changed := surgeon(data, rng, ())) is not None)


@pytest.mark.parametrize("engine", ["own", "hypothesis", "atheris"])
def test_program_reports(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if engine == "atheris":
        pytest.importorskip("atheris", reason="atheris is not installed: quantpress[fuzz]")
    report = tmp_path / "report.json"
    code = main(["imatrix", "--seconds", "1", "--engine", engine, "--report", str(report)])
    (one,) = json.loads(report.read_text())["targets"]
    assert code == 0
    assert one["target"] == "imatrix"
    assert one["engine"] == engine
    assert one["inputs"] == one["accepted"] + one["refused"] > 11
    assert one["accepted"] > 3
    assert "1 targets" in capsys.readouterr().out


def test_program_tries_one_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "input"
    file.write_bytes(TARGETS["imatrix"].seeds()["good"])
    assert main(["imatrix", "--input", str(file)]) == 0
    assert capsys.readouterr().out.startswith("accepted")
    file.write_bytes(b"GGUF")
    assert main(["imatrix", "--input", str(file)]) == 0
    assert capsys.readouterr().out.startswith("refused: ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.property.MAX_MESSAGE", 5)
        assert main(["imatrix", "--input", str(file)]) == 1
    assert capsys.readouterr().out.startswith("message: ")


def test_process_that_dies_is_a_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last input is kept, and what it said."""
    from tests.fuzz.run import _died, _kept

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / TARGETS["imatrix"].file).write_bytes(b"last")
    (tmp_path / "output").write_bytes(b"panicked")
    died = _died("imatrix", -6, tmp_path)
    assert "ended with -6" in died["text"]
    assert "panicked" in died["text"]
    assert Path(_kept(tmp_path, "imatrix", died["input"], tmp_path / "found")).read_bytes() == b"last"
    assert os.listdir(tmp_path / "found") == ["imatrix-imatrix.gguf"]  # noqa: PTH208
