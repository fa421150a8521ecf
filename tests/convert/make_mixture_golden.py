"""Makes mixture_golden.json: the types that llama-quantize gives to models of many shapes and families.

    python -m tests.convert.make_mixture_golden LIBRARY > tests/convert/mixture_golden.json

LIBRARY is libllama.so of llama.cpp 0.5.0. The files have two rows in each matrix.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.plan import plan_tensors
from quantpress.convert.preflight import Preflight
from tests.llama_quantize import LlamaQuantize, Model, Options, packed, write
from tests.mixture_cases import FAMILY_CASES, MODEL_CASES, OPTION_CASES, named

MADE = "llama.cpp v0.5.0, dry runs of llama_model_quantize in the prebuilt linux-x64 library"
FTYPES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip
WITH_IMATRIX = ("Q4_0", "Q5_0", "Q2_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def family_file(path: Path, config: Mapping[str, Any], checked: Preflight) -> tuple[Path, dict[str, int]]:
    """Writes what our exporter makes of a config, with its own metadata and two rows in each matrix."""
    arch, layers = checked.spec, checked.hyper.layers
    writer = gguf.GGUFWriter(path, arch.gguf)
    for key, (kind, value) in arch.gguf_metadata(checked.hyper, config).items():
        if isinstance(value, list | tuple):
            writer.add_array(f"{arch.gguf}.{key}", list(value))
        else:
            writer.add_key_value(f"{arch.gguf}.{key}", value, gguf.GGUFValueType[kind.upper()])
    names = {}
    for tensor in plan_tensors(checked.bindings, arch, checked.hyper, TypeOptions(outtype="F16")).tensors:
        shape = tensor.shape if len(tensor.shape) == 1 else (min(2, tensor.shape[0]), *tensor.shape[1:])
        values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        writer.add_tensor(tensor.name, values.astype(np.float32 if tensor.type == "F32" else np.float16))
        parts = tensor.name.split(".")
        names[".".join(["blk", "{}", *parts[2:]]) if parts[0] == "blk" else tensor.name] = layers
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, names


class Maker:
    """A library and a place for its files."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library, self._folder = LlamaQuantize(library), folder

    def types(self, source: Path, names: Mapping[str, int], ftype: str, options: Options) -> dict[str, str] | None:
        """Quantizes and packs: `names` maps every name, `{}` for a layer, to its layers."""
        types = self._library.types(source, ftype, options)
        if types is None:
            return None
        matrices = {each.name for each in gguf.GGUFReader(source).tensors if len(each.shape) > 1}
        types = {name: kind for name, kind in types.items() if name in matrices and not name.endswith("_norm.weight")}
        rows = packed(types, names, max(names.values()))
        main = Counter(kind for kind in rows.values() if kind and "*" in kind and " " not in kind).most_common(1)
        usual = main[0][0].split("*")[0] if main else ""
        return {"*": usual} | {
            name: kind for name, kind in rows.items() if kind and (" " in kind or kind.split("*")[0] != usual)
        }

    def files(self, source: Path, names: Mapping[str, int]) -> dict[str, Any]:
        """Every type, with and without an importance matrix."""
        plain = {ftype: self.types(source, names, ftype, Options()) for ftype in FTYPES}
        with_one = {
            f"{ftype}+imatrix": self.types(source, names, ftype, Options(imatrix=True)) for ftype in WITH_IMATRIX
        }
        return plain | with_one

    def family(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of a config."""
        return {"files": self.files(*family_file(self._folder / "family.gguf", config, named(config)))}

    def model(self, model: Model) -> tuple[Path, dict[str, int]]:
        """Writes a model; gives its names and their layers."""
        return write(self._folder / "model.gguf", model), {name: model.layers for name, _, _ in model.tensors}


def main(library: Path) -> None:
    """Writes the JSON to stdout."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(library, Path(folder))
        families = {name: maker.family(config) for name, config in FAMILY_CASES.items()}
        models = {name: {"files": maker.files(*maker.model(model))} for name, model in MODEL_CASES.items()}
        asked = [maker.types(*maker.model(MODEL_CASES[name]), ftype, options) for name, ftype, options in OPTION_CASES]
    found = {"made": MADE, "families": families, "models": models, "asked": asked}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
