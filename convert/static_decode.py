"""Greedy decoding with a cache of fixed size, a token at a time: each step does the same on the same memory.

That is what a CUDA graph asks for. A step reads its token and its position from tensors, writes keys and values at that
position, attends to the whole cache with a bias that hides what is not written yet, and leaves the next token where the
next step reads it: no value goes through the processor. Launching a step costs as much as launching one kernel.

A router's choice does go through the processor, which then launches the chosen experts only: models with experts run
their steps one kernel after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantpress.convert.attention import Cache
from quantpress.convert.fused_layers import fused
from quantpress.convert.layer import SLOPES, Layer, Linear, Turns
from quantpress.convert.model import Decoder
from quantpress.convert.rope import angles
from quantpress.quant.errors import InputError

__all__ = ["StaticDecoder"]

_WHOLE = 16  # positions: CUDA's attention reads a bias in such pieces, and copies one of another length first
_WARM_UPS = 3  # steps before a graph is captured, in which kernels are compiled and workspaces allocated


@dataclass(frozen=True, slots=True)
class _Slot:
    """Keys and values of one layer; a `Store` for one new token.

    Attributes:
        keys: (B, kv_heads, L, head_dim).
        values: (B, kv_heads, L, head_dim).
        position: (1,) int64, where the new token stands.
        bias: (1, L), what is added to scores.
    """

    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    bias: torch.Tensor

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Writes the newest token and gives the whole cache; see `Store`."""
        del layer
        self.keys[:, :, self.position] = keys
        self.values[:, :, self.position] = values
        return self.keys, self.values, self.bias


@dataclass(frozen=True, slots=True)
class _Sort:
    """What the positions of a layer do: whether a window slides over them, and whether they turn queries and keys."""

    slides: bool
    turned: bool

    @classmethod
    def of(cls, decoder: Decoder, layer: int) -> _Sort:
        sliding = decoder.hyper.sliding_layers
        return cls(bool(sliding) and sliding[layer], decoder.rope(layer) is not None)


class StaticDecoder:
    """Continues texts of the same length with their most likely tokens.

    Its layers are those of the decoder, with linears that read the same input side by side. The decoder forgets its
    own, and reads them again if it is used by itself.

    Attributes:
        token: (B, 1) int64, the token that comes next in each text.
        logits: (B, vocab) float32, what it is the greatest of.
        position: (1,) int64, where it will stand.
    """

    def __init__(
        self, decoder: Decoder, length: int, *, batch: int = 1, graph: bool | None = None, compiled: bool = False
    ) -> None:
        """Reads all weights; on a CUDA device captures the step.

        Args:
            decoder: a model without adapters or with them; one that keeps its weights (`resident`).
            length: tokens that a text may have at its end.
            batch: texts, B.
            graph: run steps as a CUDA graph; None for: on CUDA devices, unless the model has experts.
            compiled: let torch.compile fuse what stands between the linears of a step.

        Raises:
            InputError: the model has fewer learned positions, or experts and is to be compiled or run as a graph.
        """
        if decoder.hyper.experts is not None and (graph or compiled):
            raise InputError("which experts run depends on the tokens: no graph, and nothing compiled")
        if decoder.learned and length > decoder.hyper.context:
            raise InputError(f"a cache of {length} tokens, the model has {decoder.hyper.context} positions")
        self.decoder, self.length, self.batch = decoder, length, batch
        hyper, device = decoder.hyper, decoder.device
        self._layers = [_taken(decoder, number) for number in range(hyper.layers)]
        self._sorts = [_Sort.of(decoder, layer) for layer in range(hyper.layers)]
        self._kinds = self._shared_kinds()
        self._run = torch.compile(_run, fullgraph=True, dynamic=False) if compiled else _run
        size = -(-length // _WHOLE) * _WHOLE
        shape, latent = (hyper.layers, batch, hyper.kv_heads, size), hyper.latent
        self._keys = torch.zeros((*shape, hyper.head_dim), dtype=decoder.dtype, device=device)
        self._values = self._keys.new_zeros((*shape, latent.value if latent else hyper.head_dim))
        self._places = torch.arange(size, device=device)
        self._tables = {sort: self._table(sort, 1) for sort in set(self._sorts)}
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros((batch, hyper.vocab), dtype=torch.float32, device=device)
        self._reached = 0
        wanted = device.type == "cuda" and hyper.experts is None if graph is None else graph
        self._graph = self._captured() if wanted else None

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> None:
        """Begins with texts (B, T) int64; `logits` and `token` are then what comes after them.

        Raises:
            InputError: they do not fit the cache, or a token has no embedding row.
        """
        rows, count = tokens.shape
        if rows != self.batch or not 0 < count <= self.length:
            raise InputError(f"{rows} texts of {count} tokens, the cache is for {self.batch} of 1 to {self.length}")
        for sort, table in self._tables.items():
            for kept, values in zip(table or (), self._table(sort, count) or (), strict=True):
                kept.copy_(values)  # in place: a captured step reads it there
        cache, hidden = Cache(), self.decoder.embed(tokens)
        for layer in self._layers:
            hidden = layer.run(hidden, self.decoder.turns(layer.index, 0, count), cache)
            self._keys[layer.index, :, :, :count] = cache.keys.pop(layer.index)
            self._values[layer.index, :, :, :count] = cache.values.pop(layer.index)
        self._finish(hidden[:, -1:])
        self.position.fill_(count)
        self._reached = count

    @torch.no_grad()
    def step(self) -> None:
        """Adds `token` to each text; `logits` and `token` are then what comes after it.

        Raises:
            InputError: the cache is full.
        """
        if self._reached >= self.length:
            raise InputError(f"the cache is full: it is for {self.length} tokens")
        self._reached += 1
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def generate(self, tokens: Sequence[int], count: int, *, stop: frozenset[int] = frozenset()) -> list[int]:
        """Does what `Decoder.generate` does, with a cache for one text.

        Raises:
            InputError: the text outgrows the cache.
        """
        text, added = list(tokens), list[int]()
        for number in range(count):
            if number == 0 or self.decoder.turns_otherwise(len(text) - 1, len(text)):
                self.prefill(torch.tensor([text]))
            else:
                self.step()
            added.append(int(self.token))
            text.append(added[-1])
            if added[-1] in stop:
                break
        return added

    def _step(self) -> None:
        hidden = self.decoder.embed_at(self.token, self.position)
        turns = {sort: self._turns(table) for sort, table in self._tables.items()}
        biases = {slides: self._bias(slides) for slides in {sort.slides for sort in self._tables}}
        for layer, kind, sort in zip(self._layers, self._kinds, self._sorts, strict=True):
            slot = _Slot(self._keys[layer.index], self._values[layer.index], self.position, biases[sort.slides])
            hidden = self._run(kind, layer.weights, layer.linears, hidden, turns[sort], slot)
        self._finish(hidden)
        self.position.add_(1)

    def _finish(self, hidden: torch.Tensor) -> None:
        self.logits.copy_(self.decoder.head(hidden)[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def _table(self, sort: _Sort, length: int) -> Turns | None:
        """Gives the turns of all positions in texts of `length` tokens."""
        rope = self.decoder.rope(self._sorts.index(sort))
        if rope is None:
            return None
        return angles(rope, self.decoder.hyper.context, self._places, length, self.decoder.dtype)

    def _turns(self, table: Turns | None) -> Turns | None:
        if table is None:
            return None
        cosine, sine = table
        return cosine.index_select(0, self.position), sine.index_select(0, self.position)

    def _bias(self, slides: bool) -> torch.Tensor:
        seen = self._places <= self.position
        if slides and self.decoder.hyper.sliding_window is not None:
            seen &= self._places > self.position - self.decoder.hyper.sliding_window
        hidden = torch.zeros(1, len(seen), dtype=self.decoder.dtype, device=seen.device)
        return hidden.masked_fill_(~seen, float("-inf"))

    def _shared_kinds(self) -> list[Layer]:
        """Gives for each layer one without weights; the same object for all that compute the same.

        So a step that is compiled for one layer is right for the others.
        """
        numbered = self.decoder.hyper.inverse_layer_scale
        kinds: dict[object, Layer] = {}
        found = []
        for layer in self._layers:
            key = (layer.traits, layer.index if numbered or layer.adapt is not None else -1)
            found.append(kinds.setdefault(key, replace(layer, weights={}, linears={})))
        return found

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.decoder.device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self._step()
                    self.position.zero_()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        return graph


def _run(
    kind: Layer, weights: Mapping[str, torch.Tensor], linears: Mapping[str, Linear], hidden: torch.Tensor,
    turns: Turns | None, slot: _Slot,
) -> torch.Tensor:  # fmt: skip
    """Runs one layer on one token per text; a function of its arguments alone, so that it can be compiled."""
    layer = Layer(kind.index, kind.traits, kind.hyper, weights, None, kind.adapt, linears=linears)
    return layer.run(hidden, turns, slot)


def _taken(decoder: Decoder, number: int) -> Layer:
    layer = fused(decoder.layer(number))
    decoder.release(number)
    if not decoder.hyper.alibi:
        return layer
    # on the device beforehand: a graph that is captured can take nothing from the processor
    slopes = torch.tensor(decoder.hyper.alibi, dtype=torch.float32, device=decoder.device)
    return replace(layer, weights={**layer.weights, SLOPES: slopes})
