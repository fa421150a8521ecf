"""Which launch parameters a product gets: of this GPU's file, of files that ship, by arithmetic; and damaged files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning import choice as tuning
from quantpress.kernels.tuning.choice import choose
from quantpress.kernels.tuning.tables import Table, Tuned, TuningError, merged, read_table, write_table

pytestmark = pytest.mark.usefixtures("no_launch_files")

GPU = "NVIDIA Test 9000"
LAYER = Problem(1, 4096, 4096, 4, 128, "bfloat16")


def number(value: int) -> Launch:
    """A launch that is told from others by its stages."""
    return Launch("tiled", stages=value)


def stored(rows: dict[Problem, int], **head: Any) -> Path:
    """Writes the file of the test's GPU."""
    path = tuning.device_file(GPU)
    write_table(path, Table(GPU, True, tuple(Tuned(each, number(value)) for each, value in rows.items()), **head))
    tuning.forget()
    return path


def test_the_very_product_gets_what_was_measured_for_it() -> None:
    other = replace(LAYER, rows=4097)
    stored({LAYER: 7, other: 9})
    assert (choose(LAYER, GPU), choose(other, GPU)) == (number(7), number(9))


@pytest.mark.parametrize(
    ("rows_in", "tuned"), [(1, 1), (3, 4), (4, 4), (5, 8), (65, 128), (1024, 1024), (1025, 4096), (10**6, 4096)]
)
def test_input_rows_between_two_sizes_get_the_launch_of_the_greater(rows_in: int, tuned: int) -> None:
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
    stored({replace(LAYER, rows_in=size): place + 1 for place, size in enumerate(sizes)})
    assert choose(replace(LAYER, rows_in=rows_in), GPU) == number(sizes.index(tuned) + 1)


def test_a_shape_that_was_not_measured_gets_the_launch_of_the_nearest() -> None:
    stored({replace(LAYER, rows=1000): 3, replace(LAYER, rows=4000): 5, replace(LAYER, rows=9000): 11})
    near = {2000: 3, 2001: 5, 5999: 5, 6001: 11}  # between sizes the middle is their geometric mean
    assert {rows: choose(replace(LAYER, rows=rows), GPU).stages for rows in near} == near


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"rows_in": 2}, {"kind": "nf4"}, {"dtype": "float32"}, {"rows": 4096 * 5}, {"group_size": 64}],
)
def test_what_is_too_different_gets_what_arithmetic_says(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "default_launch", lambda problem: number(99))
    stored({LAYER: 7})
    assert choose(replace(LAYER, **change), GPU) == number(99)


def test_launches_of_shorter_groups_serve_longer_ones_and_not_the_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "default_launch", lambda problem: number(99))
    whole = replace(LAYER, group_size=4096)
    stored({LAYER: 7})
    assert choose(replace(LAYER, group_size=256), GPU) == number(7)
    stored({whole: 8})
    assert choose(LAYER, GPU) == number(99)
    assert choose(replace(whole, columns=4000, group_size=4000), GPU) == number(8)


@pytest.mark.parametrize(
    ("kernel", "split", "rows", "columns", "wanted"),
    [
        ("gemv", 12, 4096, 8192, 12),  # K matters only where it has fewer tiles than that
        ("gemv", 12, 6144, 4096, 8),
        ("gemv", 12, 2730, 4096, 18),
        ("tiled", 8, 6144, 4096, 4),  # 5.3 programs
        ("tiled", 8, 2048, 4096, 16),
        ("gemv", 12, 16384, 4096, 3),
        ("gemv", 40, 2048, 4096, 64),  # of 80 programs, of which 64 have a tile
        ("gemv", 1, 2048, 4096, 1),
    ],
)
def test_for_another_shape_k_is_split_so_that_as_many_programs_run(
    kernel: str, split: int, rows: int, columns: int, wanted: int
) -> None:
    path = stored({})
    launch = Launch(kernel, split_k=split)
    write_table(path, Table(GPU, True, (Tuned(LAYER, launch),)))
    tuning.forget()
    assert choose(LAYER, GPU) == launch
    assert choose(replace(LAYER, rows=rows, columns=columns), GPU) == replace(launch, split_k=wanted)


def test_the_same_type_and_kind_of_codes_is_nearer_than_another() -> None:
    half, zeros = replace(LAYER, dtype="float16"), replace(LAYER, symmetric=False)
    stored({half: 2, zeros: 3, LAYER: 4})
    assert [choose(each, GPU) for each in (half, zeros, LAYER)] == [number(2), number(3), number(4)]
    stored({half: 2})
    assert choose(LAYER, GPU) == number(2)


def test_the_weight_is_dequantized_from_as_many_rows_on_as_a_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "default_launch", lambda problem: number(99))
    stored({}, dense_from={"bfloat16": 512})
    assert choose(replace(LAYER, rows_in=512), GPU) == Launch("dense")
    assert choose(replace(LAYER, rows_in=256), GPU) == number(99)
    stored({replace(LAYER, rows_in=512): 6}, dense_from={"bfloat16": 512})
    assert choose(replace(LAYER, rows_in=512), GPU) == number(6)


def test_the_file_of_this_gpu_counts_more_than_what_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.json"
    write_table(shipped, Table("any", False, (Tuned(LAYER, number(1)), Tuned(replace(LAYER, bits=8), number(2)))))
    monkeypatch.setattr(tuning, "shipped_file", lambda name: shipped)
    stored({LAYER: 7})
    assert choose(LAYER, GPU) == number(7)
    assert choose(replace(LAYER, bits=8), GPU) == number(2)
    assert choose(LAYER, "another") == number(1)


def test_without_a_gpu_no_file_of_a_user_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuning.device_file("")
    path.parent.mkdir(parents=True)
    path.write_text("no table")
    monkeypatch.setattr(tuning, "default_launch", lambda problem: number(99))
    assert choose(LAYER, "") == number(99)


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", "default"),
        ("NVIDIA GeForce RTX 4090", "default"),
        ("", "default"),
    ],
)
def test_files_that_ship_are_found_by_a_word_of_the_name_and_are_whole(gpu: str, wanted: str) -> None:
    path = tuning.shipped_file(gpu)
    assert path.stem == wanted
    table = read_table(path)
    # no figure was measured yet: a row with a time would say so
    assert not table.measured
    assert all(row.microseconds is None for row in table.launches)
    assert set(table.dense_from) == {"float16", "bfloat16", "float32"}


def test_the_place_of_a_file_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.device_file("NVIDIA H200") == tmp_path / "cache/quantpress/kernels/nvidia-h200.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.device_file("A/../B") == tmp_path / ".cache/quantpress/kernels/a-b.json"


SIZES = st.integers(1, 2**31 - 1)
ROWS = st.builds(
    Tuned,
    st.builds(
        Problem, SIZES, SIZES, SIZES, st.sampled_from([2, 3, 4, 8]), SIZES,
        st.sampled_from(["float16", "bfloat16", "float32"]), st.booleans(),
    ),
    st.builds(
        Launch, st.sampled_from(["gemv", "tiled", "dense"]), st.sampled_from([1, 16, 512]), st.sampled_from([1, 1024]),
        st.sampled_from([1, 4096]), st.integers(1, 1024), st.sampled_from([1, 32]), st.integers(1, 16),
    ),
    st.none() | st.floats(0.001, 1e9).map(lambda value: round(value, 3)),
)  # fmt: skip


@given(st.lists(ROWS, max_size=3), st.booleans(), st.text())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Any, measured: bool, gpu: str) -> None:
    path = tmp_path_factory.mktemp("tables") / "table.json"
    table = Table(gpu, measured, tuple(rows), {"float16": 3}, {"torch": "2"})
    write_table(path, table)
    assert read_table(path) == table
    assert [each.name for each in path.parent.iterdir()] == ["table.json"]


def test_new_rows_take_the_place_of_old_ones() -> None:
    other = replace(LAYER, rows=5)
    old, new = (Tuned(LAYER, number(1)), Tuned(other, number(2))), (Tuned(LAYER, number(3)),)
    assert merged(old, new) == (Tuned(LAYER, number(3)), Tuned(other, number(2)))


def _whole() -> dict[str, Any]:
    problem = {"rows_in": 1, "rows": 2, "columns": 3, "bits": 4, "group_size": 5, "dtype": "float16"}
    launch = {"kernel": "gemv", "block_m": 1, "block_n": 2, "block_k": 4, "split_k": 3, "warps": 8, "stages": 2}
    row = {**problem, "symmetric": True, "kind": "packed", "microseconds": 1.5, "launch": launch}
    return {"format": 1, "gpu": "x", "measured": True, "made_by": {}, "dense_from": {}, "launches": [row]}


ABSENT = object()
DAMAGES: list[tuple[tuple[Any, ...], Any]] = [
    *(((name,), value) for name in ("format", "gpu", "measured", "launches") for value in (ABSENT, None, 2, [0])),
    *((("dense_from",), value) for value in ([], {"float16": 0}, {"float16": True}, {"float16": "1"})),
    *((("made_by",), value) for value in (3, {"torch": 2})),
    *((("launches", 0, name), ABSENT) for name in ("rows_in", "rows", "columns", "bits", "dtype", "kind", "launch")),
    *((("launches", 0, "rows"), value) for value in (0, -1, True, 1.0, "7", 1 << 31, None)),
    *((("launches", 0, "symmetric"), value) for value in (0, None)),
    *((("launches", 0, "microseconds"), value) for value in (0, -1.0, "1", True, math.inf, math.nan)),
    *((("launches", 0, "launch", "kernel"), value) for value in (ABSENT, "cublas", 3, None)),
    *((("launches", 0, "launch", "block_n"), value) for value in (0, 3, 2048, True, "64", 64.0)),
    *((("launches", 0, "launch", "warps"), value) for value in (64, 6)),
    *((("launches", 0, "launch", name), 1 << 20) for name in ("block_m", "block_k", "split_k", "stages")),
    (("launches", 0, "launch", "num_ctas"), 2),
]


@pytest.mark.parametrize(("place", "value"), DAMAGES)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    path, whole = tmp_path / "table.json", _whole()
    path.write_text(json.dumps(whole))
    assert len(read_table(path).launches) == 1
    inner: Any = whole
    for key in place[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(TuningError, match=r"table\.json: not a table of launch parameters") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    assert "bench kernels --tune" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"launches": 1}'])
def test_files_that_are_no_tables_at_all_are_the_same_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text)
    with pytest.raises(TuningError, match=r"table\.json: not a table"):
        read_table(path)


def test_a_damaged_file_of_this_gpu_is_told_and_not_passed_over() -> None:
    path = stored({LAYER: 7})
    path.write_text("{}")
    tuning.forget()
    for _ in range(2):
        with pytest.raises(TuningError, match=r"nvidia-test-9000\.json"):
            choose(LAYER, GPU)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_table(tmp_path / "new" / "table.json", Table("x", True))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "kernel"),
    [
        (Problem(2, 4096, 4096, 4, 128, "bfloat16"), "gemv"),
        (Problem(4, 4096, 4096, 4, 128, "bfloat16"), "tiled"),
        (Problem(4, 4096, 4096, 4, 4096, "float16"), "tiled"),
        (Problem(4, 4096, 4096, 8, 128, "bfloat16"), "gemv"),
        (Problem(4, 4096, 4096, 4, 128, "float32"), "gemv"),
        (Problem(4, 4096, 4000, 4, 100, "bfloat16"), "gemv"),
        (Problem(4, 4096, 4096, 3, 16, "bfloat16"), "gemv"),
        (Problem(5, 4096, 4096, 8, 128, "bfloat16"), "tiled"),
    ],
)
def test_three_rows_are_for_tensor_cores_where_they_can_be_used(problem: Problem, kernel: str) -> None:
    assert choose(problem, "").kernel == kernel
