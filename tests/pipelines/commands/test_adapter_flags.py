"""How adapters and weights are named on the command line, and how a ledger is put into a table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quantpress.convert.lora.ledger import LedgerEntry
from quantpress.pipelines.commands.adapters import pair_weights, parse_adapter, take_qlora
from quantpress.pipelines.commands.ledger_table import group_entries, show_ledger, target_kind
from quantpress.quant.errors import UsageError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tone", "tone=soft", "a=1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tone", (Path("tone"), 1.0)),
        ("tone=0.5", (Path("tone"), 0.5)),
        ("tone=-2e-1", (Path("tone"), -0.2)),
        ("tone=soft", (Path("tone=soft"), 1.0)),
        ("tone=soft=0.25", (Path("tone=soft"), 0.25)),
        ("a=1", (Path("a=1"), 1.0)),  # what exists is a folder
        ("a=1=2", (Path("a=1"), 2.0)),
        ("org/name", ("org/name", 1.0)),
        ("org/name@main=0.5", ("org/name@main", 0.5)),
        ("missing=soft", ("missing=soft", 1.0)),  # opening it says that there is no such folder
        ("missing=3", ("missing", 3.0)),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_weight_is_told_from_a_name_that_holds_an_equals_sign(text: str, wanted: tuple[object, float]) -> None:
    assert parse_adapter(text) == wanted


@pytest.mark.parametrize("text", ["tone=", "tone=half", "=0.5", "="])
@pytest.mark.usefixtures("folders")
def test_what_is_neither_a_folder_nor_a_number_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="DIR=WEIGHT"):
        parse_adapter(text)


@pytest.mark.usefixtures("folders")
def test_weights_go_to_the_adapters_in_order() -> None:
    assert pair_weights(("tone", "a=1"), (0.5, 2.0)) == ((Path("tone"), 0.5), (Path("a=1"), 2.0))
    assert pair_weights(("tone",), ()) == ((Path("tone"), 1.0),)
    for weights in ((0.5,), (0.5, 1.0, 2.0)):
        with pytest.raises(UsageError, match="one for each"):
            pair_weights(("tone", "a=1"), weights)
    with pytest.raises(UsageError, match=r"tone and --weight 0\.5"):
        pair_weights(("tone=0.5",), ())


def test_qlora_flags_without_what_they_speak_of_are_usage_errors() -> None:
    def flags(**given: object) -> dict[str, object]:
        return {"qlora_base": None, "qlora_type": None, "qlora_double_quant": None, **given}

    one = (("adapter", 1.0),)
    with pytest.raises(UsageError, match="--adapter"):
        take_qlora(flags(qlora_base="auto"), ())
    with pytest.raises(UsageError, match="--qlora-type"):
        take_qlora(flags(qlora_type="fp4"), one)
    with pytest.raises(UsageError, match="--qlora-double-quant"):
        take_qlora(flags(qlora_base="fp16", qlora_double_quant=False), one)
    given = flags(qlora_base="auto", qlora_double_quant=True)
    assert take_qlora(given, one) == {"base": "auto", "double_quant": True}
    assert not given


def entry(target: str, part: str, norm: float | None, **given: object) -> LedgerEntry:
    settings: dict[str, object] = {"kind": "lora", "rank": 8, "alpha": 16.0, "scale": 2.0}
    settings |= {"adapter": "tone", "weight": 1.0, **given}
    return LedgerEntry(name=f"{target}.{part}", shape=(8, 64), dtype="F32", target=target, delta_norm=norm, **settings)  # type: ignore[arg-type]


LEDGER = [
    entry(f"model.layers.{layer}.self_attn.{name}_proj.weight", part, 0.1 * (layer + 1))
    for name in ("q", "v")
    for layer in range(3)
    for part in ("lora_A", "lora_B")
] + [entry("model.embed_tokens.weight", "weight", 0.5, kind="whole", rank=None, alpha=None, scale=None)]


def test_entries_that_differ_in_the_layer_only_are_one_row() -> None:
    groups = group_entries(LEDGER)
    assert [(group.key.target, group.key.kind, group.modules) for group in groups] == [
        ("self_attn.q_proj", "lora", 3),
        ("self_attn.v_proj", "lora", 3),
        ("embed_tokens", "whole", 1),
    ]
    assert all(math.isclose(found, want) for found, want in zip(groups[0].norms, (0.1, 0.2, 0.3), strict=True))


def test_another_rank_is_another_row() -> None:
    one = entry("model.layers.0.mlp.up_proj.weight", "lora_A", 0.1)
    other = entry("model.layers.1.mlp.up_proj.weight", "lora_A", 0.1, rank=4)
    assert len(group_entries([one, other])) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj"),
        ("transformer.h.11.attn.c_attn.bias", "attn.c_attn.bias"),
        ("model.layers.3.mlp.experts.7.w1.weight", "mlp.experts.*.w1"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "embed_tokens"),
    ],
)
def test_a_target_is_named_as_in_every_layer(name: str, kind: str) -> None:
    assert target_kind(name) == kind


def test_a_table_shows_counts_and_norms_and_names_from_files_as_they_stand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_ledger([*LEDGER, entry("x[/red].\x1b[31mweight", "lora_A", None, adapter="[bold]")])
    found = capsys.readouterr().out
    row = next(line.split() for line in found.splitlines() if "self_attn.q_proj" in line)
    assert row == ["self_attn.q_proj", "lora", "8", "16", "2", "3", "0.1", "0.2", "0.3"]
    assert "x[/red]" in found
    assert "\x1b" not in found
    assert "[bold], weight 1" in found
    show_ledger(LEDGER, every_tensor=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum("self_attn" in line for line in lines) == 12
