"""Axes, best points, tables of weights and numbers as text, against brute force."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantpress.pipelines.report.axes import fitting_axis
from quantpress.pipelines.report.charts import Point, pareto, scatter
from quantpress.pipelines.report.heatmap import CLASSES, heatmaps
from quantpress.pipelines.report.ledgers import ledgers
from quantpress.pipelines.report.rows import rows_of
from quantpress.pipelines.report.values import bytes_text, memory_text, plain, seconds_text, significant
from tests.pipelines.report.batches import batch, output, sidecar, tensor

FIGURES = st.floats(1e-9, 1e9)


def point(size: float, loss: float, failed: bool = False) -> Point:
    return Point(size, loss, f"Q{size:g}", "gguf", "o1", "title", failed, loss)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.booleans()), max_size=12))
def test_the_best_points_are_those_that_no_other_beats(values: list[tuple[int, int, bool]]) -> None:
    points = [point(*each) for each in values]
    sound = [each for each in points if not each.failed]

    def beaten(one: Point) -> bool:
        return any(
            other.size <= one.size and other.loss <= one.loss and (other.size, other.loss) != (one.size, one.loss)
            for other in sound
        )

    wanted = {(each.size, each.loss) for each in sound if not beaten(each)}
    front = pareto(points)
    assert {(points[place].size, points[place].loss) for place in front} == wanted
    assert len(front) == len(wanted)
    assert not any(points[place].failed for place in front)


@settings(max_examples=300)
@example([5e-324], True)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=6), st.sampled_from([True, False, None]))
def test_an_axis_has_room_for_every_value_and_keeps_their_order(values: list[float], log: bool | None) -> None:
    axis = fitting_axis(values, log=log)
    assert math.isfinite(axis.low)
    assert math.isfinite(axis.high)
    assert axis.low < axis.high
    shown = [value for value in values if value > 0] if axis.log else values
    places = [axis.place(value) for value in sorted(shown)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    assert len(axis.ticks) < 30
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert list(axis.ticks) == sorted(set(axis.ticks))


@given(st.lists(st.tuples(FIGURES, FIGURES, st.booleans()), min_size=2, max_size=20))
def test_every_point_is_drawn_once_inside_the_chart(values: list[tuple[float, float, bool]]) -> None:
    chart = scatter([point(*each) for each in values], title="figure", log=True)
    assert chart is not None
    spots = re.findall(r'translate\(([\d.-]+) ([\d.-]+)\)" class="(?:best|point)"', chart.svg)
    assert len(spots) == len(values)
    assert all(58 <= float(x) <= 466 and 12 <= float(y) <= 296 for x, y in spots)  # the frame
    assert "nan" not in chart.svg


def test_cells_have_the_worst_weight_of_their_layers_and_module() -> None:
    errors = {(layer, module): 0.001 * (layer + 1) * (module + 1) for layer in range(10) for module in range(3)}
    tensors = [
        tensor(f"blk.{layer}.m{module}.weight", error, relative_loss=None) for (layer, module), error in errors.items()
    ]
    tensors += [tensor("blk.0.norm.weight", 0.0), tensor("output.weight", 0.5)]
    whole = heatmaps(sidecar(tensors=tensors), most_cells=1000)
    assert [table.figure for table in whole] == ["relative error"]
    assert whole[0].modules == ("m0", "m1", "m2")
    for name, cells in whole[0].rows:
        for module, cell in enumerate(cells):
            assert cell is not None
            error = errors[int(name), module]
            assert float(cell.text) == pytest.approx(100 * error, rel=0.05)  # two digits of per cent
            assert f"blk.{name}.m{module}.weight" in cell.title
    assert "output.weight (Q8_0) 50.0" in whole[0].notes[0]
    assert "1 tensors are kept exactly" in whole[0].notes[1]
    banded = heatmaps(sidecar(tensors=tensors), most_cells=12)[0]
    assert [name for name, _ in banded.rows] == ["0–2", "3–5", "6–8", "9"]
    last = banded.rows[1][1][2]
    assert last is not None
    assert "blk.5.m2.weight" in last.title


def test_stronger_shades_are_greater_losses() -> None:
    tensors = [tensor(f"model.layers.{layer}.a.weight", 1e-3 * 1.3**layer) for layer in range(20)]
    cells = [cells[0] for _, cells in heatmaps(sidecar(tensors=tensors), most_cells=1000)[0].rows]
    shades = [cell.shade for cell in cells if cell is not None]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0, CLASSES - 1)


def test_experts_share_a_cell_and_gptq_shows_its_relative_loss() -> None:
    tensors = [
        tensor(f"model.layers.0.mlp.experts.{expert}.up.weight", None, loss=5.0, relative_loss=1e-4 * expert)
        for expert in range(8)
    ]
    (table,) = heatmaps(sidecar(tensors=tensors), most_cells=10)
    assert table.modules == ("mlp.experts.*.up",)
    cell = table.rows[0][1][0]
    assert cell is not None
    assert table.unit == "10⁻⁴"
    assert cell.text == "7.0"
    assert cell.title == "model.layers.0.mlp.experts.7.up.weight Q8_0: 0.0007000, worst of 8"


def test_a_ledger_has_a_row_for_each_kind_of_target() -> None:
    entries = [
        {"adapter": "tone", "weight": 0.5, "name": f"{layer}.{part}.{half}", "kind": "lora",
         "target": f"model.layers.{layer}.{part}.weight", "rank": 8,
         "alpha": 16.0, "scale": 2.0, "delta_norm": 0.1 * (layer + 1)}
        for layer in range(3) for part in ("q", "k") for half in "AB"
    ]  # fmt: skip
    rows = rows_of(batch(output(adapters=entries), output(adapters=entries), output()))
    (ledger,) = ledgers(rows)
    assert [(row.target, row.modules, row.norms) for row in ledger.rows] == [
        ("q", 3, "0.100 to 0.300"),
        ("k", 3, "0.100 to 0.300"),
    ]
    assert ledger.tensors == 12
    assert len(ledger.outputs) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (0.00482842, "0.00483"), (8.62216e-08, "8.62e-08"), (95.7994, "95.8"),
        (1234567.0, "1.23e+06"), (123456.0, "123,456"), (-0.5, "-0.500"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


@given(st.floats(1e-300, 1e300))
def test_a_shown_number_is_within_half_a_digit(value: float) -> None:
    assert float(significant(value).replace(",", "")) == pytest.approx(value, rel=0.0051)  # 1.005 shown as 1.00


def test_sizes_memory_and_times_are_said_as_people_say_them() -> None:
    assert [bytes_text(each) for each in (0, 999, 1000, 3581664, 4.2e9)] == [
        "–",
        "999 B",
        "1.00 kB",
        "3.58 MB",
        "4.20 GB",
    ]
    assert [memory_text(each) for each in (0, 3 << 20, 5 << 30)] == ["–", "3 MiB", "5.0 GiB"]
    assert [seconds_text(each) for each in (None, 0.04, 9.96, 59.6, 3725)] == [
        "–",
        "0.0 s",
        "10.0 s",
        "1 min 0 s",
        "1 h 2 min",
    ]


@given(st.text(max_size=50))
def test_a_shown_text_is_printable_and_another_for_another(value: str) -> None:
    shown = plain(value)
    assert shown.isprintable()
    if value.isprintable():
        assert shown == value
