"""From a checkpoint to the folder of an ONNX model: the whole graph first, and then the weights, in bounded memory.

`plan_onnx` touches no weight: it builds the graph, whose size is then known to the byte, and so is that of the data.
`write_onnx` reads every weight once while the data file is written in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from quantpress.convert.atomic import atomic_folder, check_replaceable, new_file, require_space
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.folder_files import json_bytes, model_files, write_files
from quantpress.convert.hashed_output import Written, hashed_output
from quantpress.convert.onnx.data_file import Groups, write_data
from quantpress.convert.onnx.decoder import build_graph, check_graph, shares_cache
from quantpress.convert.onnx.genai import genai_config, has_genai
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder
from quantpress.convert.onnx.kinds import Ranges
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.seq2seq import DECODER_FILE, ENCODER_FILE, build_decoder, build_encoder
from quantpress.convert.onnx.shared_graph import SharedGraph
from quantpress.convert.onnx.weights import ModelWeights
from quantpress.convert.preflight import Preflight
from quantpress.quant.errors import UsageError

__all__ = ["MODEL_FILE", "OnnxPlan", "plan_onnx", "write_onnx"]

MODEL_FILE = "model.onnx"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """A folder as it would be written.

    Attributes:
        files: small files, the graph among them: name -> contents.
        groups: what the data file will hold, and where.
        data_bytes: size of the data file.
    """

    files: Mapping[str, bytes] = field(repr=False)
    groups: Groups = field(repr=False)
    data_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self.data_bytes + sum(map(len, self.files.values()))

    @property
    def held(self) -> int:
        """Bytes of the source that must be in memory at once, at most."""
        return max((group.held for group, _ in self.groups), default=0)


def plan_onnx(
    source: Checkpoint,
    checked: Preflight,
    options: OnnxOptions,
    *,
    version: str = "",
    ranges: Ranges | None = None,
    allow_nonfinite: bool = False,
) -> OnnxPlan:
    """Builds the graph of a checkpoint without reading a weight.

    Args:
        source: the model.
        checked: the model bound to its family's table.
        options: how graph and weights are to be written.
        version: of the program, for the model's producer.
        ranges: of the inputs of linear weights, which static int8 needs.
        allow_nonfinite: write NaN and infinities where floats are stored instead of refusing them.

    Raises:
        UsageError: options that the model cannot have.
        InputError: the model has something that no graph is built of.
        LayoutError: a weight that cannot be stored as asked; names it.
    """
    if checked.spec.kind == "encoder_decoder":
        return _plan_seq2seq(source, checked, options, version, allow_nonfinite)
    check_graph(checked.hyper, standard=options.standard_ops, opset=options.opset)
    builder = GraphBuilder(compute=options.compute, standard=options.standard_ops, opset=options.opset)
    weights = ModelWeights(builder, source, checked, options, ranges, allow_nonfinite=allow_nonfinite)
    build_graph(builder, weights, checked.spec, checked.hyper)
    if checked.hyper.causal:  # an encoder's head for masked tokens is no part of what it is exported for
        weights.refuse_unused()
    model = ir.to_proto(builder.model(name=checked.spec.family, producer_version=version))
    files = model_files(source) | {MODEL_FILE: model.SerializeToString(deterministic=True)}
    if has_genai(checked.hyper):
        share = shares_cache(checked.hyper, options)
        files["genai_config.json"] = json_bytes(
            genai_config(source, checked.hyper, filename=MODEL_FILE, share_buffer=share)
        )
    return OnnxPlan(files, builder.groups, builder.data_bytes)


def _plan_seq2seq(
    source: Checkpoint, checked: Preflight, options: OnnxOptions, version: str, allow_nonfinite: bool
) -> OnnxPlan:
    """Builds the two graphs of an encoder-decoder; see `plan_onnx`."""
    if options.int8 == "static":
        raise UsageError(f"--int8 static: not for {checked.spec.family}; use --int8 dynamic or weight-only")
    builder: SharedGraph | None = None
    files = dict(model_files(source))
    for name, build in ((ENCODER_FILE, build_encoder), (DECODER_FILE, build_decoder)):
        builder = SharedGraph(
            compute=options.compute, standard=options.standard_ops, opset=options.opset, before=builder
        )
        build(builder, ModelWeights(builder, source, checked, options, allow_nonfinite=allow_nonfinite), checked.hyper)
        model = ir.to_proto(builder.model(name=f"{checked.spec.family}_{name.split('_')[0]}", producer_version=version))
        files[name] = model.SerializeToString(deterministic=True)
    assert builder is not None, "there are two graphs"
    return OnnxPlan(files, builder.groups, builder.data_bytes)


def write_onnx(
    folder: Path | str,
    plan: OnnxPlan,
    *,
    threads: int,
    force: bool = False,
    held: bool = False,
    progress: Progress = lambda _phase, _done, _total: None,
) -> dict[Path, Written]:
    """Writes the folder atomically.

    Args:
        folder: the output.
        plan: what `plan_onnx` gave.
        threads: that read and encode; the bytes do not depend on it.
        force: replace an existing model folder.
        held: the caller has the output's lock already, see `held_output`.
        progress: told the bytes that are written.

    Returns:
        The files that were written, in the order of their names, each with its hash and its bytes.

    Raises:
        InputError: a tensor holds NaN or infinities, or values its type cannot hold; or it cannot be read.
        UsageError, BusyError, OutputError: see `atomic_folder`.
    """
    check_replaceable(folder, force=force)
    require_space(folder, plan.nbytes)
    with atomic_folder(folder, force=force, held=held) as new:
        written = write_files(new, plan.files)
        with new_file(new / DATA_FILE) as file, hashed_output(file) as output:
            write_data(output, plan.groups, threads=threads, progress=progress)
            written[DATA_FILE] = output.finish()
    return {Path(folder) / name: written[name] for name in sorted(written)}
