"""`quantpress merge`, and adapters in `convert`, from the command line to the proved output; PEFT is the oracle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from tests.pipelines.commands.peft_adapters import make_adapter, merged_by_peft

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
Run = Callable[..., Any]
JUDGE = ("--chunks", 2, "--context", 64)
# B @ A in another order of sums and precision, then one rounding to float32: the values are below 1, and 2^-23 of 1
# for each of a few roundings
ATOL = 1e-6


def sidecar(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantpress.json").read_text())
    return found


def assert_equal_to_peft(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=ATOL, rtol=0, err_msg=name)


def test_a_merged_folder_holds_what_peft_merges_and_is_proved_against_the_unmerged_adapter(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "merged"
    ended = quantpress("merge", tiny_model, tiny_adapter, out, "--text", text_file, *JUDGE)
    assert ended.code == 0, ended.err
    assert_equal_to_peft(out, merged_by_peft(tiny_model, [(tiny_adapter, 1.0)]))
    assert "unmerged" in sidecar(out)["parity"]["baseline"]["runtime"]
    row = next(line.split() for line in ended.out.splitlines() if "self_attn.q_proj" in line)
    assert row[:6] == ["self_attn.q_proj", "lora", "4", "8", "2", "2"]
    assert "verified in torch" in ended.out


def test_every_tensor_of_the_adapter_is_in_the_json_and_in_the_sidecar(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    ended = quantpress("merge", tiny_model, tiny_adapter, out, "--no-verify", "--json")
    assert ended.code == 0, ended.err
    report, record = json.loads(ended.out), sidecar(out)
    file = tiny_adapter / "adapter_model.safetensors"
    names = set(load_file(file))
    assert sorted(entry["name"] for entry in report["adapters"]) == sorted(names)
    assert [entry["name"] for entry in record["adapters"]] == [entry["name"] for entry in report["adapters"]]
    keys = "adapter weight name shape dtype target kind rank alpha scale delta_norm"
    assert all(set(keys.split()) <= set(entry) for entry in record["adapters"])
    base, merged = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    for entry in record["adapters"]:
        before, after = (each[entry["target"]].astype(np.float64) for each in (base, merged))
        change = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert entry["delta_norm"] == pytest.approx(change, rel=1e-4)  # float32 rounding of values near 0.1
    assert [stage["name"] for stage in record["stages"]] == ["merge_lora", "safetensors"]
    assert record["stages"][0]["options"] == {"adapter": "tone", "weight": 1.0}
    inputs = {item["name"]: item["sha256"] for item in record["inputs"]}
    assert inputs["tone/adapter_model.safetensors"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {"model.safetensors", "config.json", "tone/adapter_config.json"} <= set(inputs)
    assert record["parity"] is None


def test_verbose_shows_every_tensor(quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    names = load_file(tiny_adapter / "adapter_model.safetensors")
    for number, line in enumerate((("merge", "-v"), ("-v", "merge"))):
        ended = quantpress(*line, tiny_model, tiny_adapter, tmp_path / str(number), "--no-verify")
        rows = [text for text in ended.out.splitlines() if "lora_A" in text or "lora_B" in text]
        assert len(rows) == len(names)


def test_weights_and_order_are_those_of_the_command_line(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    weights = ("--weight", 0.5, "--weight", -2)
    ended = quantpress("merge", tiny_model, tiny_adapter, other_adapter, out, *weights, "--no-verify")
    assert ended.code == 0, ended.err
    assert_equal_to_peft(out, merged_by_peft(tiny_model, [(tiny_adapter, 0.5), (other_adapter, -2.0)]))
    stages = sidecar(out)["stages"][:2]
    assert [stage["options"] for stage in stages] == [
        {"adapter": "tone", "weight": 0.5},
        {"adapter": "facts", "weight": -2.0},
    ]
    assert {(entry["adapter"], entry["weight"]) for entry in sidecar(out)["adapters"]} == {("tone", 0.5), ("facts", -2)}


def test_converting_to_safetensors_with_an_adapter_is_merging(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merged, converted = (tmp_path / command / "out" for command in ("merge", "convert"))
    assert quantpress("merge", tiny_model, tiny_adapter, merged, "--weight", 0.5, "--no-verify").code == 0
    flags = ("--to", "safetensors", "--adapter", f"{tiny_adapter}=0.5", "--no-verify")
    ended = quantpress("convert", tiny_model, converted, *flags)
    assert ended.code == 0, ended.err
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (converted / name).read_bytes()
    one, other = (
        {key: value for key, value in sidecar(each).items() if key != "timings"} for each in (merged, converted)
    )
    assert one == other


@needs_llama_cpp
def test_one_pass_from_base_and_adapter_to_gguf_is_proved_in_llama_cpp(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "tuned.gguf"
    flags = ("--adapter", tiny_adapter, "--outtype", "f32", "--text", text_file, *JUDGE)
    ended = quantpress("convert", tiny_model, out, *flags)
    assert ended.code == 0, ended.err
    wanted = merged_by_peft(tiny_model, [(tiny_adapter, 1.0)])["model.layers.1.mlp.down_proj.weight"]
    found = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_down.weight")
    np.testing.assert_allclose(found.data, wanted, atol=ATOL, rtol=0)
    assert len(json.loads(Path(f"{out}.quantpress.json").read_text())["adapters"]) == 12
    assert "merged tone" in ended.out
    passed = quantpress("verify", out, "--against", tiny_model, "--adapter", tiny_adapter, "--text", text_file, *JUDGE)
    assert passed.code == 0, passed.err
    for wrong in ((), ("--adapter", f"{tiny_adapter}=0.5")):
        failed = quantpress("verify", out, "--against", tiny_model, *wrong, "--text", text_file, *JUDGE)
        assert failed.code == 4, wrong


def test_the_library_leaves_the_sidecar_of_the_program(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert quantpress("merge", tiny_model, tiny_adapter, tmp_path / "program" / "out", "--no-verify").code == 0
    merged = qp.merge_lora(qp.open_checkpoint(tiny_model), tiny_adapter)
    pressed = qp.export_safetensors(merged, tmp_path / "library" / "out", threads=1)
    records = [sidecar(tmp_path / name / "out") for name in ("program", "library")]
    for record in records:
        del record["timings"]
    assert records[0] == records[1]
    assert len(pressed.ledger) == 12
    adapter = qp.open_adapter(tiny_adapter)
    assert isinstance(adapter, qp.Adapter)
    again = qp.merge_lora(qp.open_checkpoint(tiny_model), adapter)
    assert list(again.tensors) == list(merged.tensors)


def test_a_dry_run_shows_what_is_merged_and_reads_no_weight(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in tensors.items()}, model / "model.safetensors")
    ended = quantpress("merge", model, tiny_adapter, tmp_path / "out", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    merged = {tensor["name"] for tensor in json.loads(ended.out)["tensors"] if tensor["merged"]}
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert merged == {f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    table = quantpress("convert", model, tmp_path / "out.gguf", "--adapter", tiny_adapter, "--dry-run")
    rows = [line for line in table.out.splitlines() if "blk.0.attn_q" in line]
    assert len(rows) == 1
    assert "merged" in rows[0]
    assert "6 tensors merged" in table.out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_in_braces_are_filled_in(quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    ended = quantpress("merge", tiny_model, tiny_adapter, tmp_path / "{name}-tuned", "--no-verify")
    assert ended.code == 0, ended.err
    assert (tmp_path / "tiny-model-tuned" / "model.safetensors").is_file()


def test_an_existing_folder_is_replaced_only_with_force(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    assert quantpress("merge", tiny_model, tiny_adapter, out, "--no-verify").code == 0
    before = (out / "model.safetensors").read_bytes()
    ended = quantpress("merge", tiny_model, tiny_adapter, out, "--weight", 2, "--no-verify")
    assert ended.code == 2
    assert "--force" in ended.err
    assert (out / "model.safetensors").read_bytes() == before
    assert quantpress("merge", tiny_model, tiny_adapter, out, "--weight", 2, "--no-verify", "--force").code == 0
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, threads: int
) -> None:
    flags = ("--adapter", tiny_adapter, "--outtype", "q8_0", "--no-verify")
    outs = [tmp_path / str(number) / "out.gguf" for number in (2, threads)]
    for number, out in zip((2, threads), outs, strict=True):
        out.parent.mkdir()
        assert quantpress("convert", tiny_model, out, *flags, "--threads", number).code == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def broken(adapter: Path, folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _nan(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = np.nan


def _unknown(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.no_such_proj.lora_A.weight"] = np.ones((4, 64), np.float32)


def _misshaped(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].copy()


def _prompt(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["peft_type"] = "PROMPT_TUNING"


@pytest.mark.parametrize(
    ("change", "words"),
    [(_nan, "NaN"), (_unknown, "no_such_proj"), (_misshaped, "q_proj"), (_prompt, "PROMPT_TUNING")],
)
def test_a_bad_adapter_ends_with_3_and_one_line_before_anything_is_written(
    quantpress: Run,
    tiny_model: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
    words: str,
) -> None:
    adapter = broken(tiny_adapter, tmp_path / "broken", change)
    for line in (("merge", tiny_model, adapter, tmp_path / "out" / "merged"),):
        ended = quantpress(*line)
        assert ended.code == 3, ended.err
        assert [text for text in ended.err.splitlines() if text.startswith("error:")] == [ended.err.splitlines()[-1]]
        assert words in ended.err
    gguf_out = tmp_path / "out" / "out.gguf"
    assert quantpress("convert", tiny_model, gguf_out, "--adapter", adapter, "--no-verify").code == 3
    assert not (tmp_path / "out").exists()


def test_model_and_adapter_in_the_wrong_places_are_told_apart(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    swapped = quantpress("merge", tiny_adapter, tiny_model, tmp_path / "out", "--no-verify")
    assert swapped.code == 3
    assert "is an adapter, not a model" in swapped.err
    twice = quantpress("merge", tiny_model, tiny_model, tmp_path / "out", "--no-verify")
    assert twice.code == 3
    assert "model, not an adapter" in twice.err
    missing = quantpress("merge", tiny_model, tmp_path / "nowhere", tmp_path / "out", "--no-verify")
    assert missing.code == 3
    assert "nowhere" in missing.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weight", "nan"), "nan"),
        (("--weight", "1", "--weight", "2"), "one for each"),
        (("--weight", "much"), "much"),
        (("--dtype", "int4"), "int4"),
        (("--qlora-type", "nf4"), "--qlora-base"),
    ],
)
def test_a_wrong_flag_ends_with_2_one_line_and_no_folder(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    ended = quantpress("merge", tiny_model, tiny_adapter, tmp_path / "out", "--no-verify", *flags)
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_name_is_asked_for(quantpress: Run, tiny_model: Path, tiny_adapter: Path) -> None:
    ended = quantpress("merge", tiny_model, tiny_adapter)
    assert ended.code == 2
    assert "MODEL ADAPTER... OUT" in ended.err


@pytest.fixture
def unknown_family(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose tensors are named as everybody's and whose family has no table."""
    folder = tmp_path / "unknown"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_family_without_a_table_is_merged_by_names_and_said_to_be_unjudged(
    quantpress: Run, unknown_family: Path, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    ended = quantpress("merge", unknown_family, tiny_adapter, out, "--no-verify")
    assert ended.code == 0, ended.err
    assert "NoSuchForCausalLM" in ended.err
    assert_equal_to_peft(out, merged_by_peft(tiny_model, [(tiny_adapter, 1.0)]))
    judged = quantpress("merge", unknown_family, tiny_adapter, out, "--force")
    assert judged.code == 4
    assert "could not be judged" in judged.err
    parity = sidecar(out)["parity"]
    assert parity["passed"] is False
    assert "NoSuchForCausalLM" in parity["reason"]
    plain = quantpress("convert", unknown_family, tmp_path / "half", "--dtype", "f16", "--no-verify")
    assert plain.code == 0, plain.err
    assert quantpress("convert", unknown_family, tmp_path / "out.gguf", "--no-verify").code == 3


def test_a_quantized_model_of_an_unknown_family_is_refused(
    quantpress: Run, unknown_family: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((unknown_family / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quip", "bits": 4}
    (unknown_family / "config.json").write_text(json.dumps(config))
    for line in (("merge", unknown_family, tiny_adapter), ("convert", "--to", "safetensors", unknown_family)):
        ended = quantpress(*line, tmp_path / "out", "--no-verify")
        assert ended.code == 3
        assert "already quantized" in ended.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_parameters_is_run_beside_its_base(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        tiny_model, tmp_path / "adapter", target_modules=[], target_parameters=["mlp.down_proj.weight"]
    )
    out = tmp_path / "merged"
    ended = quantpress("merge", tiny_model, adapter, out, *JUDGE)
    assert ended.code == 0, ended.err
    assert sidecar(out)["parity"]["passed"]
    assert "unmerged" in sidecar(out)["parity"]["baseline"]["runtime"]
    assert_equal_to_peft(out, merged_by_peft(tiny_model, [(adapter, 1.0)]))
