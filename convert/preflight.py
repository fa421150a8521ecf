"""Checks a checkpoint against its family's table before any weight is read, and binds the table's rows to tensors.

A wrong model that loads is worse than an error: everything that can be known from config.json, the weights' headers and
the tokenizer's files is compared here, and all that is wrong is told at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.head_rows import find_tensor
from quantpress.convert.pieces import Piece, is_piece, piece_codes, resolve, single_name
from quantpress.convert.recent import Recent
from quantpress.convert.token_count import count_tokens
from quantpress.quant.errors import InputError
from quantpress.quant.floats import to_float32

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["Binding", "Preflight", "bind", "check_tied_head", "preflight", "refuse_quantized"]

Binding = tuple[TensorSpec, int, LazyTensor]
"""A row of a family's table, its layer (-1 outside layers), and the tensor that a checkpoint has for it. Where that is
a piece of a stored one, both are those of the piece: (N, K) or (K, N), see `convert.pieces`."""

_Match = tuple[TensorSpec, TensorSpec, int, LazyTensor]  # row of the table, row by which it is stored, layer, tensor
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_SHOWN = 3  # names that a message gives of many
_CHUNK = 4 << 20  # bytes compared at a time
_LAYER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
# What GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and MXFP4 checkpoints store beside or instead of weights.
_QUANTIZED = re.compile(
    r"(.*\.)?(qweight|qzeros|scales|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale"
    r"|weight\.(absmax|quant_map|quant_state\..*|nested_absmax)|.*_blocks|.*_scales)"
)


@dataclass(frozen=True)
class Preflight:
    """A checkpoint that fits its family's table.

    Attributes:
        spec: the family.
        hyper: its sizes.
        bindings: every row the checkpoint must hold with its tensor, in the table's order. A head that is tied is left
            out, also where the checkpoint repeats it: `check_tied_head` compares the two.
        tied_head: the repeated head and the embedding, if the checkpoint holds both and says they are tied.
        dropped: names that nothing needs: buffers of old versions, and other parts of a larger model.
        tokens: ids that the tokenizer's files know, None if there are none.
        pieces: name of a tensor in `bindings` that is a piece of a stored one -> where it lies.
    """

    spec: ArchSpec
    hyper: Hyperparameters
    bindings: tuple[Binding, ...]
    tied_head: tuple[LazyTensor, LazyTensor] | None = None
    dropped: tuple[str, ...] = ()
    tokens: int | None = None
    pieces: Mapping[str, Piece] = field(default_factory=dict)

    def codes(self, checkpoint: Checkpoint) -> Mapping[str, LazyQuantized]:
        """Gives `Checkpoint.quantized` with the codes of pieces of quantized matrices, by the names in `bindings`."""
        return piece_codes(checkpoint.quantized, self.pieces)


def preflight(checkpoint: Checkpoint, spec: ArchSpec | None = None, hyper: Hyperparameters | None = None) -> Preflight:
    """Compares config, tensors and tokenizer; reads no weight.

    Args:
        checkpoint: what was opened.
        spec: its family; found by config.json if not given.
        hyper: its sizes; read from config.json if not given.

    Raises:
        InputError: an unknown family, a config that makes no sense, a quantized source, tensors that are missing,
            unexpected, twice there, of the wrong shape or type, a wrong number of layers, or fewer embedding rows than
            tokens.
    """
    try:
        spec = spec or find_arch(checkpoint.config)
        hyper = hyper or spec.read_config(checkpoint.config)
    except InputError as error:
        raise type(error)(f"{checkpoint.name}: {error}") from error
    if spec.own_head:
        names = [name for row in spec.tensors if row.role is Role.HEAD for name in spec.names(row, -1)]
        hyper = replace(hyper, tied=not any(name in checkpoint.tensors for name in names))
    refuse_quantized(checkpoint)
    if hyper.deepest > len(checkpoint.tensors):
        raise InputError(
            f"{checkpoint.name}: config.json says {hyper.deepest} layers, the checkpoint holds only"
            f" {len(checkpoint.tensors)} tensors"
        )
    matched, dropped = _match(checkpoint, spec, hyper)
    _refuse_wrong_tensors(checkpoint, matched, hyper)
    tokens = count_tokens(checkpoint)
    if tokens is not None and tokens > hyper.vocab:
        raise InputError(
            f"{checkpoint.name}: the tokenizer has {tokens} tokens, the embedding only {hyper.vocab} rows; resize the"
            " embedding of the model, or use the tokenizer that it was trained with"
        )
    stored, tied_head = _without_tied_head(matched, hyper)
    bindings, pieces = _resolved(stored, spec, hyper)
    return Preflight(spec, hyper, bindings, tied_head, dropped, tokens, pieces)


def bind(checkpoint: Checkpoint, checked: Preflight | None = None) -> tuple[Binding, ...]:
    """Gives the rows of a family's table with the tensors of a checkpoint, in the table's order.

    Raises:
        InputError: the checkpoint does not fit; see `preflight`.
    """
    return (checked or preflight(checkpoint)).bindings


def check_tied_head(checked: Preflight) -> None:
    """Compares a head that is stored although config.json says it is tied with the embedding; reads both.

    Raises:
        InputError: they differ, so that one of the two would be lost.
    """
    if checked.tied_head is None:
        return
    head, embedding = checked.tied_head
    step = max(1, _CHUNK * head.rows // max(head.nbytes, 1))
    for start in range(0, head.rows, step):
        stop = min(start + step, head.rows)
        one, other = head.read_rows(start, stop), embedding.read_rows(start, stop)
        if head.dtype != embedding.dtype:
            one, other = to_float32(one), to_float32(other)
        if one.tobytes() != other.tobytes() and not np.array_equal(one, other):
            raise InputError(
                f"{head.source}: {shown(head.name)} differs from {shown(embedding.name)} in rows {start} to {stop - 1},"
                " but config.json says tie_word_embeddings: true; set it to false to keep both, or remove the head"
            )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuses what a quantizer wrote, by its config and by the names of its tensors.

    Raises:
        InputError: the checkpoint is quantized already.
    """
    if checkpoint.format == "gguf":
        return
    configs = [checkpoint.config, checkpoint.config.get("text_config")]
    for config in configs:
        for key in ("quantization_config", "compression_config"):
            if isinstance(config, Mapping) and config.get(key):
                raise InputError(
                    f"{checkpoint.name}: already quantized: config.json has {key} {_method(config[key])};"
                    " give the unquantized model"
                )
    packed = [name for name in checkpoint.tensors if _QUANTIZED.fullmatch(name)]
    if packed:
        raise InputError(
            f"{checkpoint.name}: already quantized: {_list('tensor', packed)} as quantizers write them;"
            " give the unquantized model"
        )


def _method(config: Any) -> str:
    return shown(config.get("quant_method", config) if isinstance(config, Mapping) else config)


def _match(checkpoint: Checkpoint, spec: ArchSpec, hyper: Hyperparameters) -> tuple[list[_Match], tuple[str, ...]]:
    """Finds a tensor for every row and a reason for every tensor."""
    problems: list[str] = []
    matched: list[_Match] = []
    missing: list[tuple[TensorSpec, int]] = []
    used: set[str] = set()
    for row, layer in spec.rows(hyper):
        held, tensor, found = find_tensor(spec, row, layer, hyper, checkpoint.tensors)
        used.update(found)
        if len(found) > 1 and not row.per_head:
            problems.append(f"{shown(found[0])} and {shown(found[1])} are the same tensor twice")
        if tensor is not None:
            matched.append((row, held, layer, tensor))
        elif not (row.tied_to and hyper.tied):
            missing.append((row, layer))
    ignored = spec.ignored_names(hyper.layers)
    rest = [name for name in checkpoint.tensors if name not in used]
    dropped = [name for name in rest if name in ignored or name.startswith(spec.foreign)]
    problems += _missing(spec, missing, hyper)
    problems += _unexpected(spec, sorted(set(rest) - set(dropped)), hyper)
    if problems:
        raise InputError(f"{checkpoint.name}: does not fit {spec.family}: {'; '.join(problems)}")
    return matched, tuple(dropped)


def _missing(spec: ArchSpec, missing: Sequence[tuple[TensorSpec, int]], hyper: Hyperparameters) -> list[str]:
    if not missing:
        return []
    wanted = Counter(layer for _, layer in spec.rows(hyper))
    counts = Counter(layer for _, layer in missing if layer >= 0)
    gone = [layer for layer, count in counts.items() if count == wanted[layer]]
    problems = []
    if gone:
        problems.append(f"{_layers(gone)} missing, config.json says {hyper.layers} layers")
    single = [(row, layer) for row, layer in missing if layer not in gone]
    if heads := [row for row, _ in single if row.slot == "output.weight"]:
        problems.append(f"the head {shown(heads[0].hf)} is missing and config.json says tie_word_embeddings: false")
    names = [spec.names(row, layer)[0] for row, layer in single if row not in heads]
    if names:
        problems.append(f"{_list('tensor', names)} missing")
    return problems


def _unexpected(spec: ArchSpec, names: Sequence[str], hyper: Hyperparameters) -> list[str]:
    if not names:  # a mixture has tens of thousands of rows
        return []
    first = {name for row, layer in spec.rows(hyper) if layer >= 0 for name in spec.names(row, 0)}
    first |= set(spec.ignored_names(1))
    extra_layers: set[int] = set()
    others: list[str] = []
    for name in names:
        number = _LAYER.search(name)
        if number and int(number[0]) >= hyper.layers and _LAYER.sub("0", name, count=1) in first:
            extra_layers.add(int(number[0]))
        else:
            others.append(name)
    problems = []
    if extra_layers:
        problems.append(f"{_layers(sorted(extra_layers))} unexpected, config.json says {hyper.layers} layers")
    if others:
        problems.append(f"{_list('tensor', others)} unexpected")
    return problems


def _refuse_wrong_tensors(checkpoint: Checkpoint, matched: Iterable[_Match], hyper: Hyperparameters) -> None:
    dims = hyper.dims
    shapes, types, seen = list[str](), list[str](), set[str]()
    for _, row, _, tensor in matched:
        if tensor.name in seen:  # several rows are pieces of it
            continue
        seen.add(tensor.name)
        wanted = tuple(dims[dim] for dim in row.shape)
        if tensor.shape != wanted:
            symbols = " x ".join(row.shape)
            shapes.append(f"{shown(tensor.name)} is {tensor.shape}, wanted {wanted} ({symbols} by config.json)")
        kind = "codes" if row.layout is Layout.UNIT_ROWS and tensor.name in checkpoint.quantized else tensor.dtype
        if kind not in _FLOATS:
            types.append(f"{shown(tensor.name)} is {kind}, wanted a floating-point type")
    problems = [
        f"{len(found)} of wrong {what}: {', '.join(found[:_SHOWN])}"
        for what, found in (("shape", shapes), ("type", types))
        if found
    ]
    if problems:
        raise InputError(f"{checkpoint.name}: {'; '.join(problems)}")


def _without_tied_head(
    matched: list[_Match], hyper: Hyperparameters
) -> tuple[list[_Match], tuple[LazyTensor, LazyTensor] | None]:
    heads = [tensor for row, _, _, tensor in matched if row.tied_to]
    if not hyper.tied or not heads:
        return matched, None
    embedding = next(tensor for row, _, _, tensor in matched if row.role is Role.EMBEDDING)
    return [match for match in matched if not match[0].tied_to], (heads[0], embedding)


def _resolved(
    matched: Sequence[_Match], spec: ArchSpec, hyper: Hyperparameters
) -> tuple[tuple[Binding, ...], dict[str, Piece]]:
    """Gives each piece of a stored tensor a row and a tensor of its own."""
    recent: Recent[Array] = Recent(2)
    bindings: list[Binding] = []
    pieces: dict[str, Piece] = {}
    for row, held, layer, tensor in matched:
        name = single_name(spec, row, layer) if is_piece(held) else ""
        found, view, piece = resolve(held, tensor, hyper, recent=recent, name=name)
        if piece is not None:
            pieces[view.name] = piece
        bindings.append((found, layer, view))
    return tuple(bindings), pieces


def _list(what: str, names: Sequence[str]) -> str:
    some = ", ".join(shown(name) for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({some}{more})"


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]} is"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]} are"
    return f"{len(numbers)} layers, first {numbers[0]}, are"
