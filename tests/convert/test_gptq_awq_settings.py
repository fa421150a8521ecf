"""What config.json says of packed weights is what transformers, vLLM and GPTQModel look for."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.gptq.rules import read_settings
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.qtensor import QuantizedForm

_PARTS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("up", "gate", "down")),
)


def _forms(layers: int = 12, **kinds: QuantizedForm) -> dict[str, QuantizedForm]:
    """A form for every weight; `kinds` gives those of some parts, by their last name."""
    return {
        f"model.layers.{layer}.{part}.weight": kinds.get(part.rpartition(".")[2], _form())
        for layer in range(layers)
        for part in _PARTS
    }


def _form(bits: int = 4, group_size: int = 128, *, symmetric: bool = True, columns: int = 256) -> QuantizedForm:
    return QuantizedForm((64, columns), bits, group_size, symmetric)


def gptqmodel_override(dynamic: dict[str, dict[str, Any]], module: str) -> dict[str, Any] | bool | None:
    """GPTQModel's and vLLM's rule: the first pattern that `re.match`es decides; False where it begins with `-:`."""
    for pattern, changes in dynamic.items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return False if pattern.startswith("-:") else changes
    return None


def test_one_form_needs_no_rules_and_has_what_vllm_requires() -> None:
    settings = GPTQ_V1.settings(_forms(), ["lm_head.weight"], {"method": "gptq", "damping": 0.01, "act_order": True})
    assert {key: settings[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
    }  # fmt: skip
    assert settings["checkpoint_format"] == "gptq"
    assert settings["lm_head"] is False
    assert "dynamic" not in settings
    assert "modules_in_block_to_quantize" not in settings
    assert settings["meta"]["damp_percent"] == 0.01
    assert GPTQ_V2.settings(_forms(), [], {})["checkpoint_format"] == "gptq_v2"


def test_quantize_config_json_says_the_same() -> None:
    settings = GPTQ_V2.settings(_forms(up_proj=_form(8)), [], {})
    files = GPTQ_V2.files(settings)
    assert {name: json.loads(text) for name, text in files.items()} == {"quantize_config.json": settings}
    assert AWQ.files(AWQ.settings(_forms(), [], {})) == {}


def test_modules_that_differ_get_rules_that_gptqmodel_follows() -> None:
    forms = _forms(o_proj=_form(8, 32), up_proj=_form(symmetric=False))
    forms["model.layers.1.self_attn.q_proj.weight"] = _form(3)
    forms["model.layers.11.self_attn.q_proj.weight"] = _form(3)
    left = ["lm_head.weight", "model.layers.2.mlp.gate_proj.weight", "model.layers.10.mlp.gate_proj.weight"]
    for name in left[1:]:
        del forms[name]
    settings = GPTQ_V2.settings(forms, left, {})
    wanted = {"o_proj": {"bits": 8, "group_size": 32}, "up_proj": {"sym": False}}
    for name in [*forms, *left[1:]]:
        module = name.removesuffix(".weight")
        rule = gptqmodel_override(settings["dynamic"], module)
        if name in left:
            assert rule is False
        elif "q_proj" in name and re.search(r"\.(1|11)\.", name):
            assert rule == {"bits": 3}
        else:
            assert rule == wanted.get(module.rpartition(".")[2])
    assert gptqmodel_override(settings["dynamic"], "lm_head") is None
    assert len(settings["dynamic"]) == 4  # one for all layers, not one for each


def test_rules_are_read_as_they_were_written() -> None:
    forms = _forms(o_proj=_form(8, 32), up_proj=_form(2, symmetric=False), k_proj=_form(group_size=256))
    del forms["model.layers.3.mlp.gate_proj.weight"]
    settings = GPTQ_V2.settings(forms, ["model.layers.3.mlp.gate_proj.weight"], {})
    rules = read_settings(settings, "config", len(forms))
    for name, form in forms.items():
        found = rules.of(name.removesuffix(".weight"))
        size = 256 if found.group_size == -1 else found.group_size
        assert (found.bits, size, found.symmetric) == (form.bits, form.group_size, form.symmetric)
    with pytest.raises(InputError, match=r"leaves 'model\.layers\.3\.mlp\.gate_proj' out, but it is quantized"):
        rules.of("model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        r"^model\.layers\.1\.mlp\.up$",
        r"^model\.layers\.1\.mlp\.up_proj$",
        r"model\.layers\.1",
        "model.layers.1",
        "mlp",
        r".*mlp\.(up|gate)_proj$",
        r"model\.layers\.[02]\..*",
        r"(?!.*k_proj).*self_attn",
        "",
        r".*\.1\..*q_proj",
        "model$",
    ],
)
def test_a_rule_holds_where_re_match_finds_it(pattern: str) -> None:
    base = {"bits": 4, "group_size": 128, "dynamic": {f"+:{pattern}": {"bits": 8}}}
    names = [name.removesuffix(".weight") for name in _forms(13)]
    rules = read_settings(base, "config", len(names))
    assert [rules.of(name).bits == 8 for name in names] == [re.match(pattern, name) is not None for name in names]


def test_parts_that_vllm_computes_together_have_a_rule_for_the_whole() -> None:
    dynamic = GPTQ_V2.settings(_forms(q_proj=_form(8), k_proj=_form(8), v_proj=_form(8)), [], {})["dynamic"]
    assert gptqmodel_override(dynamic, "model.layers.4.self_attn.qkv_proj") == {"bits": 8}
    assert gptqmodel_override(dynamic, "model.layers.4.mlp.gate_up_proj") is None
    dynamic = GPTQ_V2.settings(_forms(up_proj=_form(8)), [], {})["dynamic"]
    assert gptqmodel_override(dynamic, "model.layers.4.mlp.gate_up_proj") is None  # its halves differ


def test_modules_of_optimum_name_what_is_quantized_and_nothing_else() -> None:
    forms = _forms()
    everywhere = [name for name in forms if "o_proj" in name]
    names = GPTQ_V1.settings(_without(forms, everywhere), everywhere, {})["modules_in_block_to_quantize"]
    assert sorted(names[0]) == sorted(set(_PARTS) - {"self_attn.o_proj"})
    once = ["model.layers.1.mlp.up_proj.weight"]
    names = GPTQ_V1.settings(_without(forms, once), once, {})["modules_in_block_to_quantize"][0]
    for name in forms:
        module = name.removesuffix(".weight")
        assert any(module.endswith(text) for text in names) == (name not in once)  # optimum: convert_model
        assert any(text in module for text in names) == (name not in once)  # vLLM: is_layer_gptq_quantized


def _without(forms: dict[str, QuantizedForm], names: list[str]) -> dict[str, QuantizedForm]:
    return {name: form for name, form in forms.items() if name not in names}


def test_experts_share_a_rule() -> None:
    forms = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": _form(8 if part == "down_proj" else 4)
        for layer in range(3)
        for expert in range(4)
        for part in ("up_proj", "gate_proj", "down_proj")
    }
    dynamic = GPTQ_V2.settings(forms, [], {})["dynamic"]
    assert dynamic == {r"+:^model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj$": {"bits": 8}}
    forms["model.layers.1.mlp.experts.2.up_proj.weight"] = _form(8)
    dynamic = GPTQ_V2.settings(forms, [], {})["dynamic"]
    for name, form in forms.items():
        assert (gptqmodel_override(dynamic, name.removesuffix(".weight")) is not None) == (form.bits == 8)


def test_short_rows_are_covered_by_the_group_size_of_the_others() -> None:
    """A row of 64 in groups of 128 is one group either way; a row of 512 is not."""
    settings = GPTQ_V1.settings(_forms(k_proj=_form(group_size=64, columns=64)), [], {})
    assert (settings["group_size"], settings.get("dynamic")) == (128, None)
    settings = GPTQ_V1.settings(_forms(k_proj=_form(group_size=512, columns=512)), [], {})
    assert set(map(str, settings["dynamic"].values())) == {"{'group_size': -1}"}
    assert GPTQ_V1.settings(_forms(2, **dict.fromkeys(("q_proj", "k_proj"), _form())), [], {})["group_size"] == 128


def test_rows_are_minus_one() -> None:
    forms = {name: _form(group_size=256) for name in _forms()}
    assert GPTQ_V1.settings(forms, [], {})["group_size"] == -1
    assert AWQ.settings(forms, [], {})["group_size"] == -1


def test_awq_has_one_group_size_and_names_what_is_left() -> None:
    left = ["lm_head.weight", *(name for name in _forms() if "o_proj" in name)]
    settings = AWQ.settings(_without(_forms(), left), left, {"method": "awq"})
    assert {key: settings[key] for key in ("quant_method", "version", "bits", "group_size", "zero_point")} == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True,
    }  # fmt: skip
    assert settings["modules_to_not_convert"] == [name.removesuffix(".weight") for name in left]
    assert settings["dynamic"] == {r"-:^model\.layers\.\d+\.self_attn\.o_proj$": {}}
    assert AWQ.settings(_forms(), [], {})["modules_to_not_convert"] is None
    with pytest.raises(LayoutError, match=r"one group size for all weights, found 128 .* and 32 .*gptq_v2"):
        AWQ.settings(_forms(k_proj=_form(group_size=32)), [], {})
    with pytest.raises(LayoutError, match=r"found 128 .* and a row of 64"):
        AWQ.settings(_forms(k_proj=_form(group_size=64, columns=64)), [], {})
    assert AWQ.settings(_forms(k_proj=_form(columns=128)), [], {})["group_size"] == 128


def test_awq_refuses_a_name_that_readers_would_find_in_another() -> None:
    forms = _forms()
    left = ["model.layers.0.mlp.gate.weight"]  # AutoAWQ and vLLM look for it anywhere in a path
    with pytest.raises(LayoutError, match=r"'model.layers.0.mlp.gate' .* leave out 'model.layers.0.mlp.gate_proj' too"):
        AWQ.settings(forms, left, {})


def test_what_one_reader_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quantpress"):
        GPTQ_V1.settings(_forms(), [], {})
        assert not caplog.messages
        GPTQ_V1.settings({name: _form(symmetric=False) for name in _forms()}, [], {})
        GPTQ_V2.settings({name: _form(group_size=96) for name in _forms()}, [], {})
    assert ["version 1" in caplog.messages[0], "groups of 96" in caplog.messages[1]] == [True, True]


@pytest.mark.parametrize("fmt", [GPTQ_V1, GPTQ_V2, AWQ], ids=lambda fmt: str(fmt.name))
def test_transformers_understands_the_settings(fmt: Any) -> None:
    configs = pytest.importorskip("transformers.utils.quantization_config")
    settings = fmt.settings(_forms(), ["lm_head.weight"], {"method": "rtn"})
    method = settings["quant_method"]
    found = {"gptq": configs.GPTQConfig, "awq": configs.AwqConfig}[method].from_dict(dict(settings))
    assert (found.bits, found.group_size, str(found.quant_method.value)) == (4, 128, method)
    assert found.format == {"gptq": "gptq", "gptq_v2": "gptq_v2", "awq": "gemm"}[fmt.name]
    if method == "gptq":
        assert (found.sym, found.desc_act) == (True, False)
    else:
        assert (found.zero_point, found.modules_to_not_convert) == (True, ["lm_head"])
