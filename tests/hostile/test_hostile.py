"""Files from strangers through the command line: the exit code, the line that says why, and nothing written."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.hostile.case import Case
from tests.hostile.every import every_case
from tests.hostile.server import Server

CASES = every_case()
FRESH = [case for case in CASES if case.code][::40]  # these in a process of their own too
BUSY = 3.0  # times the processor time that a slow machine may need
LONGEST = 1000  # characters of an error


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def contents(folder: Path) -> Mapping[str, str]:
    """What lies in a folder: the hash of files, the target of links, the kind of others; nothing is waited for."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            said = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode):
            said = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            said = f"kind {stat.S_IFMT(mode)}"
        found[path.relative_to(folder).as_posix()] = said
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_from_a_stranger(case: Case, server: Server, tmp_path: Path) -> None:
    arguments = case.make(tmp_path)
    before = contents(tmp_path)
    ended = server.run(arguments, tmp_path)
    assert ended.code == case.code, ended.err or ended.out
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before, "an input was changed"
    new = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert new == {name.partition("/")[0] for name in case.writes}
    if case.code:
        _check_refusal(case, ended.err)
        assert ended.seconds < case.seconds * BUSY
    assert ended.megabytes < (case.megabytes if case.code else max(case.megabytes, 1000))  # a first run compiles


def _check_refusal(case: Case, said: str) -> None:
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    (line,) = lines
    assert line.isprintable()
    assert len(line) < LONGEST
    for words in case.words:
        assert words in line


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_process_of_its_own_says_the_same(case: Case, tmp_path: Path) -> None:
    arguments = case.make(tmp_path)
    words = [sys.executable, "-m", "quantpress", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == case.code
    _check_refusal(case, done.stderr)


def test_cases_are_many_and_distinct_and_every_group_has_a_good_twin() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
    assert sum(case.code != 0 for case in CASES) >= 120
    good = Counter(case.group for case in CASES if case.code == 0)
    assert {case.group for case in CASES} == set(good)
    assert all(case.words for case in CASES if case.code)
