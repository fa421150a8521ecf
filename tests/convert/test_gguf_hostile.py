"""Damaged and hostile GGUF files: each is refused with words that say what is wrong, soon, and within bounds."""

from __future__ import annotations

import os
import re
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.quant.errors import InputError, QuantpressError


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", item, count) + items


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    start: bytes = b"GGUF\x03\x00\x00\x00",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    counts = counts or (len(tensors), len(pairs))
    head = start + struct.pack("<QQ", *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


ARCHITECTURE = pair("general.architecture", 8, text("llama"))
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
TWO = [tensor("a", (4, 2), F32, 0), tensor("b", (32, 2), Q8_0, 32)]
GOOD = container([ARCHITECTURE], TWO, bytes(32 + 96))
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
HUGE = 2**63


def with_tensor(row: bytes, nbytes: int = 64) -> bytes:
    return container([ARCHITECTURE], [row], bytes(nbytes))


def with_pair(value: bytes) -> bytes:
    return container([ARCHITECTURE, value], TWO, bytes(128))


BAD: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic needs 4 bytes, 0 are left"),
    "text": (b"Once upon a time" * 9, r"not a GGUF file: it starts with b'Once'"),
    "zip": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "magic only": (b"GGUF", "the version needs 4 bytes"),
    "version 1": (container(start=b"GGUF\x01\x00\x00\x00"), "version 1 is not supported"),
    "version 4": (container(start=b"GGUF\x04\x00\x00\x00"), "version 4 is not supported"),
    "version 0": (container(start=b"GGUF\x00\x00\x00\x00"), "not supported"),
    "big-endian": (container(start=b"GGUF\x00\x00\x00\x03"), "big-endian GGUF is not supported"),
    "counts cut off": (b"GGUF\x03\x00\x00\x00" + bytes(12), "the counts needs 8 bytes, 4 are left"),
    "too many pairs": (container([ARCHITECTURE], counts=(0, HUGE)), f"{HUGE} metadata pairs do not fit"),
    "more pairs than bytes": (container([ARCHITECTURE], counts=(0, 40)), "40 metadata pairs do not fit"),
    "one pair too few": (container([ARCHITECTURE], TWO, bytes(128), counts=(2, 2)), "GGUF|needs|left|type"),
    "too many tensors": (container([ARCHITECTURE], counts=(HUGE, 1)), f"{HUGE} tensors do not fit"),
    "a tensor too few": (container([ARCHITECTURE], TWO, bytes(128), counts=(1, 1)), "bytes follow the last tensor"),
    "key of all bytes": (container([struct.pack("<Q", 2**64 - 1)], counts=(0, 1)), "metadata"),
    "key longer than file": (with_pair(struct.pack("<Q", 10**6) + b"key"), "a metadata key has 1000000 bytes"),
    "empty key": (with_pair(pair("", U32, bytes(4))), "'' is not a metadata key"),
    "key not utf-8": (with_pair(pair(b"\xff\xfe", U32, bytes(4))), "a metadata key is not UTF-8"),
    "key with a line break": (with_pair(pair("a\nb", U32, bytes(4))), r"'a\\nb' is not a metadata key"),
    "key twice": (container([ARCHITECTURE, ARCHITECTURE], TWO, bytes(128)), "'general.architecture' appears twice"),
    "unknown value type": (with_pair(pair("k", 13, bytes(8))), "metadata 'k' has the unknown value type 13"),
    "bool of 2": (with_pair(pair("k", BOOL, b"\x02")), "is the byte 2, a bool is 0 or 1"),
    "string longer than file": (with_pair(pair("k", STRING, struct.pack("<Q", 2**40))), f"has {2**40} bytes"),
    "string not utf-8": (with_pair(pair("k", STRING, text(b"\xc3("))), "metadata 'k' is not UTF-8"),
    "array of arrays": (with_pair(pair("k", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))), "an array of arrays"),
    "array of unknown type": (with_pair(pair("k", ARRAY, array(99, 1, bytes(4)))), "of the unknown value type 99"),
    "array longer than file": (with_pair(pair("k", ARRAY, array(U32, 2**61, bytes(4)))), "numbers of metadata"),
    "strings longer than file": (with_pair(pair("k", ARRAY, array(STRING, 2**61, b""))), "strings of metadata"),
    "string in array longer than file": (
        with_pair(pair("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 2**62)))),
        f"a string of metadata 'k' has {2**62} bytes",
    ),
    "array of bools of 3": (with_pair(pair("k", ARRAY, array(BOOL, 2, b"\x01\x03"))), "a bool is 0 or 1"),
    "alignment of 0": (with_pair(pair("general.alignment", U32, bytes(4))), "general.alignment is 0 of type uint32"),
    "alignment of 24": (with_pair(pair("general.alignment", U32, struct.pack("<I", 24))), "power of two"),
    "alignment of 2^31": (with_pair(pair("general.alignment", U32, struct.pack("<I", 2**31))), "power of two up to"),
    "alignment of another type": (with_pair(pair("general.alignment", 10, struct.pack("<Q", 32))), "of type uint64"),
    "alignment as text": (with_pair(pair("general.alignment", STRING, text("32"))), "of type string"),
    "empty tensor name": (with_tensor(tensor("", (4,), F32, 0)), "'' is not a tensor name"),
    "long tensor name": (with_tensor(tensor("x" * 64, (4,), F32, 0)), "is not a tensor name of 1 to 63 bytes"),
    "tensor name not utf-8": (with_tensor(tensor(b"\xff", (4,), F32, 0)), "a tensor's name is not UTF-8"),
    "tensor name with escape": (with_tensor(tensor("a\x1b[2J", (4,), F32, 0)), "is not a tensor name"),
    "tensor name longer than file": (with_tensor(struct.pack("<Q", 2**33)), "a tensor's name|tensors do not fit"),
    "five dimensions": (with_tensor(tensor("a", (1,) * 5, F32, 0)), "tensor 'a' has 5 dimensions, at most 4"),
    "2^32-1 dimensions": (with_tensor(text("a") + b"\xff" * 40), "has 4294967295 dimensions"),
    "dimension of 0": (with_tensor(tensor("a", (4, 0), F32, 0)), r"shape \(0, 4\), without any values"),
    "dimensions that overflow": (with_tensor(tensor("a", (2**32, 2**32), F32, 0)), "tensor 'a' ends at byte 737869"),
    "dimensions that wrap to 0": (with_tensor(tensor("a", (2**62, 4), F32, 0)), "the file has"),
    "removed type": (with_tensor(tensor("a", (32,), 4, 0)), r"tensor 'a': ggml type id 4 \(Q4_2\) was removed"),
    "unknown type": (with_tensor(tensor("a", (32,), 999, 0)), "tensor 'a': unknown ggml type id 999"),
    "half a block": (with_tensor(tensor("a", (48,), Q8_0, 0)), "rows of 48 values, Q8_0 stores blocks of 32"),
    "offset past the end": (with_tensor(tensor("a", (4,), F32, 2**40)), "leaves a hole before it; 0 is wanted"),
    "offset not aligned": (with_tensor(tensor("a", (4,), F32, 4)), "starts at 4, not at a multiple of 32"),
    "offset of all bits": (with_tensor(tensor("a", (4,), F32, 2**64 - 32)), "leaves a hole"),
    "overlap": (container([ARCHITECTURE], [TWO[0], tensor("b", (4,), F32, 0)], bytes(64)), "'b' starts at 0 and ov"),
    "hole": (container([ARCHITECTURE], [TWO[0], tensor("b", (4,), F32, 64)], bytes(96)), "'b' starts at 64 and l"),
    "tensor twice": (container([ARCHITECTURE], [TWO[0], tensor("a", (4,), F32, 32)], bytes(64)), "'a' appears twice"),
    "data cut off": (GOOD[:-70], "it is cut off or damaged, download it again"),
    "no data": (container([ARCHITECTURE], TWO), "tensor 'a' ends at byte"),
    "cut inside the table": (GOOD[:120], "left"),
    "bytes behind the data": (GOOD + bytes(32), "32 bytes follow the last tensor"),
    "bytes behind a vocabulary": (container([ARCHITECTURE], data=bytes(64)), "64 bytes follow"),
}  # fmt: skip

FINE: Mapping[str, bytes] = {
    "good": GOOD,
    "version 2": container([ARCHITECTURE], TWO, bytes(128), start=b"GGUF\x02\x00\x00\x00"),
    "last tensor without padding": container([ARCHITECTURE], TWO, bytes(32 + 68)),
    "vocabulary only": container([ARCHITECTURE]),
    "vocabulary without padding": (b"GGUF\x03\x00\x00\x00" + struct.pack("<QQ", 0, 1) + ARCHITECTURE),
    "alignment of 64": container(
        [pair("general.alignment", U32, struct.pack("<I", 64))],
        [tensor("a", (4, 2), F32, 0), tensor("b", (4,), F16, 64)],
        bytes(128),
        alignment=64,
    ),
    "empty array": with_pair(pair("k", ARRAY, array(U32, 0, b""))),
    "four dimensions": with_tensor(tensor("a", (4, 2, 1, 2), F32, 0)),
    "scalar": with_tensor(tensor("a", (), F32, 0), 32),
    "name of 63 bytes": with_tensor(tensor("x" * 63, (4, 4), F32, 0)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_words_and_at_once(tmp_path: Path, case: str) -> None:
    content, words = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(InputError, match=words) as caught:
        open_gguf_file(path)
    assert time.perf_counter() - start < 2
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", FINE)
def test_its_good_twin_is_read(tmp_path: Path, case: str) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(FINE[case])
    open_gguf_file(path)


def test_the_good_file_is_good_for_the_gguf_package_as_well(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(GOOD)
    assert [each.name for each in gguf.GGUFReader(tmp_path / "good.gguf").tensors] == ["a", "b"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="a regular file is expected"):
        open_gguf_file(tmp_path / "x.gguf")


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_gguf_file(tmp_path / "x.gguf")


SIZE = 64 << 20
_MANY = SIZE - 200  # bytes for items


def _tiny_strings() -> bytes:
    return with_pair(pair("k", ARRAY, array(STRING, _MANY // 10, (struct.pack("<Q", 2) + b"ab") * (_MANY // 10))))


def _one_long_string() -> bytes:
    return with_pair(pair("k", STRING, text("🦙".encode() + b"a" * (_MANY - 4))))


def _pairs() -> bytes:
    """As many as the budget allows, and then one too strange."""
    rows = [pair(f"{number:x}", U32, bytes(4)) for number in range(180_000)]
    return container([*rows, pair("last", 77, bytes(_MANY - sum(map(len, rows))))])


def _tensors() -> bytes:
    rows = [tensor(f"{number:x}", (), F32, 32 * number) for number in range(125_000)]
    return container([], [*rows, tensor("last", (), 999, 0)], bytes(_MANY - sum(map(len, rows))))


def _numbers() -> bytes:
    return with_pair(pair("k", ARRAY, array(U32, _MANY // 4, bytes(_MANY // 4 * 4))))[:-150]


def _long_strings() -> bytes:
    one = text("🦙".encode() + b"a" * (1 << 20))
    return with_pair(pair("k", ARRAY, array(STRING, 60, one * 60)))


# VmHWM starts anew with a program; ru_maxrss would count what the parent process once had.
_OPEN = """
import sys, time
import quantpress.convert.gguf.reader as reader
from quantpress.quant.errors import InputError
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, start = peak(), time.process_time()
try:
    reader.open_gguf_file(sys.argv[1])
except InputError as error:
    print(error)
else:
    print("opened")
print(time.process_time() - start, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
@pytest.mark.parametrize("build", [_tiny_strings, _one_long_string, _long_strings, _pairs, _tensors, _numbers])
def test_64_megabytes_of_nonsense_cost_two_seconds_and_200_megabytes_at_most(
    tmp_path: Path, build: Callable[[], bytes]
) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(build())
    assert path.stat().st_size > SIZE * 0.9
    done = subprocess.run([sys.executable, "-c", _OPEN, str(path)], capture_output=True, text=True, check=True)
    message, figures = done.stdout.splitlines()
    seconds, megabytes = map(float, figures.split())
    path.unlink()
    assert re.search("would take more memory|cut off|unknown value type 77|unknown ggml type id 999", message)
    assert seconds < 2
    assert megabytes < 200


def test_a_file_of_2_terabytes_with_a_hole_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    head = with_pair(pair("k", ARRAY, array(STRING, 2**37, b"")))
    path.write_bytes(head)
    os.truncate(path, 2**41)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(InputError, match="137438953472 strings of metadata 'k' would take more memory"):
        open_gguf_file(path)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The good file with some bytes, some numbers, or its end changed."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        width = draw(st.sampled_from([1, 4, 8]))
        edges = [0, 1, 2, 31, 32, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
        number = draw(st.one_of(st.sampled_from(edges), st.integers(0, 2**64 - 1)))
        content[place : place + width] = (number % 256**width).to_bytes(width, "little")
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_whatever_happens_to_a_header_the_answer_is_a_file_or_a_typed_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mutant.gguf"
    path.write_bytes(content)
    try:
        file = open_gguf_file(path)
    except QuantpressError:
        return
    for each in file.tensors.values():
        assert len(file.read(each, 0, each.nbytes)) == each.nbytes
