"""More of weights and settings: codes without scales, pickles in every wrapping, other files of a checkpoint."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.case import Case
from tests.hostile.checkpoint_cases import bad_weights
from tests.hostile.command_cases import COMMANDS, made
from tests.hostile.model import edit, spoilt

WRITTEN = ("out.gguf", "out.gguf.quantpress.json")
MARK = "import pathlib; pathlib.Path('ran').touch()"  # what must never run
_Q = "model.layers.0.self_attn.q_proj.weight"


class _Runs:
    def __reduce__(self) -> Any:
        return exec, (MARK,)


class _Calls:
    """What a pickle of weights may name, with a twist: a name beside those that are allowed."""

    def __init__(self, module: str, name: str) -> None:
        self.code = f"c{module}\n{name}\n".encode()

    def bytes(self) -> bytes:
        return b"\x80\x02" + self.code + b"X\x04\x00\x00\x00idid\x85R."


def _zip(data: bytes, name: str = "archive/data.pkl") -> bytes:
    made_of = io.BytesIO()
    with zipfile.ZipFile(made_of, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return made_of.getvalue()


_BIN = "pytorch_model.bin"
_PICKLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "in an archive of torch.save": (
        _zip(pickle.dumps({"x": _Runs()}, protocol=2)),
        ("Unsupported global: GLOBAL exec",),
    ),
    "of the newest protocol, in an archive": (_zip(pickle.dumps({"x": _Runs()})), ("Unsupported operand 149",)),
    "that calls os.system": (_zip(_Calls("posix", "system").bytes()), ("posix.system",)),
    "that calls a function of torch": (_zip(_Calls("torch.hub", "load").bytes()), ("torch.hub",)),
    "that calls by a path of attributes": (_zip(_Calls("torch._utils", "os.system").bytes()), ("os.system",)),
    "that builds a class of numpy": (_zip(_Calls("numpy.f2py.diagnose", "run").bytes()), ("numpy.f2py",)),
    "in the old form": (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(_Runs(), protocol=2), ()),
    "cut short": (_zip(b"\x80\x02}q\x00("), ()),
    "without an end, of marks": (_zip(b"\x80\x02" + b"(" * 10_000_000), ("lists",)),
    "that asks for a text of 4 GB": (_zip(b"\x80\x02X\xff\xff\xff\xff."), ()),
    "that doubles itself": (_zip(b"\x80\x02]" + b"2\x86" * 60 + b"."), ()),
    "in an archive that climbs": (_zip(pickle.dumps({}, protocol=2), "../data.pkl"), ()),
    "in an empty archive": (_zip(b"", "x/y"), ()),
}


def _bin(data: bytes) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / _BIN).write_bytes(data)

    return change


def _f8(model: Path) -> None:
    """A weight of eight bits, of which some are NaN."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    out, at = b"", 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        piece = body[begin:end]
        if name == _Q:
            entry["dtype"], piece = "F8_E4M3", piece[: len(piece) // 4]
        entry["data_offsets"] = [at, at + len(piece)]
        out, at = out + piece, at + len(piece)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + out)


def _nan(model: Path) -> None:
    def spoil(held: dict[str, np.ndarray]) -> None:
        held[_Q][1, 2] = held[_Q][3, 4] = np.nan

    bad_weights(model, spoil)


def _moved(model: Path) -> None:
    (model / "model.safetensors").rename(model / "Model.SafeTensors")


def _quantizer(**said: Any) -> Callable[[Path], object]:
    return lambda model: edit(model / "config.json", lambda config: config.update(quantization_config=said))


def _beside(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(data)


def _linked(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).symlink_to("/etc/passwd")


_MORE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "eight bits of garbage": (_f8, (_Q, "NaN")),
    "a file in other letters": (_moved, ("no weights: neither model.safetensors",)),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("no weights",)),
    "no config.json": (lambda m: (m / "config.json").unlink(), ("config.json",)),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ("tokenizer",)),
    "a generation_config.json that is a list": (_beside("generation_config.json", b"[]"), ("generation_config.json",)),
    "a generation_config.json that leads out": (_linked("generation_config.json"), ("generation_config.json",)),
    "an added_tokens.json that leads out": (_linked("added_tokens.json"), ("added_tokens.json",)),
    "a special_tokens_map.json with a key twice": (
        _beside("special_tokens_map.json", b'{"bos_token": "a", "bos_token": "b"}'),
        ("special_tokens_map.json", "twice"),
    ),
    "codes of GPTQ of 5.5 bits": (_quantizer(quant_method="gptq", bits=5.5, group_size=128), ("qweight",)),
    "codes of GPTQ in groups of zero": (_quantizer(quant_method="gptq", bits=4, group_size=0), ("qweight",)),
    "codes of AWQ that are not there": (_quantizer(quant_method="awq", bits=4, group_size=32), ("model",)),
    "codes of compressed-tensors of nothing": (
        _quantizer(quant_method="compressed-tensors", format="pack-quantized"),
        ("config_groups",),
    ),
    "a quantizer that is a number": (_quantizer(quant_method=4), ("quantization_config 4",)),
    "a quantizer that is not named": (_quantizer(bits=4), ("quantization_config", "bits")),
}
_NONFINITE = ("convert to ONNX", "quantize", "merge", "imatrix")


def _pickle_case(data: bytes) -> Callable[[Path], Sequence[str]]:
    return spoilt(_bin(data))


CASES: tuple[Case, ...] = (
    *(Case("pickle", name, _pickle_case(data), words=(_BIN, *words)) for name, (data, words) in _PICKLES.items()),
    Case("other files", "good, with files that nobody reads", spoilt(_linked("notes.txt")), code=0, writes=WRITTEN),
    *(Case("other files", name, spoilt(change), words=words) for name, (change, words) in _MORE.items()),
    *(
        Case("commands", f"{name}: NaN", made(_nan, COMMANDS[name]), words=(_Q, "2 "), megabytes=600)
        for name in _NONFINITE
    ),
    Case("commands", "perplexity: NaN", made(_nan, COMMANDS["perplexity"]), code=4, words=("not finite",)),
    Case(
        "other files",
        "good, settings of bitsandbytes that a merge has left",
        spoilt(_quantizer(quant_method="bitsandbytes", load_in_4bit=True)),
        code=0,
        writes=WRITTEN,
    ),
)
