"""The one decoder: any family of the tables, run layer by layer from weights that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope
from quantpress.convert.attention import Cache, Store
from quantpress.convert.layer import Adapt, Layer, Linear, Observe, Turns, normalize, traits_of
from quantpress.convert.rope import angles, depends_on_length
from quantpress.convert.weights import Weight
from quantpress.quant.errors import InputError

Linears = Callable[[str, int], "Linear | None"]
"""`(slot, layer)` -> what stands in the place of a weight, None where the weight itself is to be used."""

_HEAD_ROWS = 16384  # rows of the head that are converted at once, so that it never stands in memory twice


class Decoder:
    """A language model, from token ids to logits.

    Streaming, it holds the weights of one layer; resident, it keeps each weight after its first use, in `dtype` on
    `device`. Norms and their biases are kept and computed in float32 always.
    """

    def __init__(
        self,
        weight: Weight,
        spec: ArchSpec,
        hyper: Hyperparameters,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
        adapt: Adapt | None = None,
        linears: Linears | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            weight: gives a weight by slot and layer, e.g. `CheckpointWeights`.
            spec: the family.
            hyper: what config.json says.
            device: where to compute.
            dtype: what to compute in.
            resident: keep weights after their first use.
            adapt: adapters that run beside the weights.
            linears: asked for linears, and for a head of its own, before `weight` is; e.g. `PackedWeights`.
        """
        self.spec, self.hyper = spec, hyper
        self.device, self.dtype, self.resident = _numbered(torch.device(device)), dtype, resident
        self._weight, self._adapt, self._linears = weight, adapt, linears
        self.traits = traits_of(spec, hyper)
        self._float32 = frozenset(row.slot for row in spec.tensors if row.role is Role.NORM)
        self.tied = hyper.tied and any(row.tied_to for row in spec.tensors if row.role is Role.HEAD)
        self._kept: dict[tuple[str, int], torch.Tensor | None] = {}
        self._kept_linears: dict[tuple[str, int], Linear | None] = {}
        self._turns: dict[tuple[bool, int, int], Turns] = {}

    def logits(self, tokens: torch.Tensor, *, first: int = 0) -> torch.Tensor:
        """Gives the logits after each token from position `first` on.

        Args:
            tokens: (B, T) int64 token ids; all rows start at position 0.
            first: positions before it are computed but not given.

        Returns:
            (B, T - first, vocab) float32 on the decoder's device.

        Raises:
            InputError: a token has no embedding row, or a text outgrows learned positions; a weight is missing.
        """
        hidden = self.embed(tokens)
        for layer in range(self.hyper.layers):
            hidden = self.run_layer(layer, hidden)
        return self.head(hidden[:, first:])

    def generate(self, tokens: Sequence[int], count: int, *, stop: frozenset[int] = frozenset()) -> list[int]:
        """Continues a text with the most likely token each time.

        Args:
            tokens: ids of the text, at least one.
            count: tokens to add at most.
            stop: ids that end it; the one that did is the last in the result.

        Returns:
            Ids of the added tokens.
        """
        text, added = list(tokens), list[int]()
        cache = Cache()
        for _ in range(count):
            if self.turns_otherwise(cache.length, len(text)):
                cache = Cache()
            start = cache.length
            hidden = self.embed(torch.tensor([text[start:]]), start=start)
            for layer in range(self.hyper.layers):
                hidden = self.run_layer(layer, hidden, start=start, cache=cache)
            cache.length = len(text)
            added.append(int(self.head(hidden[:, -1:]).argmax()))
            text.append(added[-1])
            if added[-1] in stop:
                break
        return added

    def embed(self, tokens: torch.Tensor, *, start: int = 0) -> torch.Tensor:
        """Gives the first layer's input.

        Args:
            tokens: (B, T) int64 token ids.
            start: position of the first one.

        Returns:
            (B, T, hidden) in the decoder's type.

        Raises:
            InputError: a token has no embedding row, or a text outgrows learned positions.
        """
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if low < 0 or high >= self.hyper.vocab:
            raise InputError(f"token ids go from {low} to {high}, the model has {self.hyper.vocab} tokens")
        end = start + tokens.shape[1]
        if self.spec.positions == "learned" and end > self.hyper.context:
            raise InputError(f"the text has {end} tokens, the model has {self.hyper.context} positions")
        return self.embed_at(tokens, torch.arange(start, end))

    def embed_at(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Does what `embed` does, for positions (T,) int64, without looking whether there are such."""
        hidden = self._rows("token_embd.weight", tokens)
        if self.hyper.embedding_scale != 1.0:
            # transformers rounds the scale to the type it computes in
            hidden = hidden * float(torch.tensor(self.hyper.embedding_scale).to(self.dtype))
        if self.spec.positions == "learned":
            hidden = hidden + self._rows("position_embd.weight", positions)
        return hidden

    def run_layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        *,
        start: int = 0,
        cache: Store | None = None,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """Runs one layer.

        Args:
            layer: its number, from 0.
            hidden: (B, T, hidden) output of the layer before.
            start: position of the first token.
            cache: keys and values of the tokens before `start`; extended.
            observe: called with slot and input of each linear before it runs; see `Observe`.

        Returns:
            (B, T, hidden).
        """
        turns = self.turns(layer, start, hidden.shape[1])
        return self.layer(layer, observe).run(hidden, turns, cache)

    def layer(self, layer: int, observe: Observe | None = None) -> Layer:
        """Gives a layer with its weights."""
        asked = {slot: self._linear(slot, layer) for slot in self.traits.slots}
        linears = {slot: linear for slot, linear in asked.items() if linear is not None}
        found = {slot: self._get(slot, layer) for slot in self.traits.slots if slot not in linears}
        weights = {slot: weight for slot, weight in found.items() if weight is not None}
        return Layer(layer, self.traits, self.hyper, weights, observe, self._adapt, linears=linears)

    def release(self, layer: int) -> None:
        """Forgets the weights of a layer; they are read again if the layer runs."""
        for slot in self.traits.slots:
            self._kept.pop((slot, layer), None)
            self._kept_linears.pop((slot, layer), None)

    def turns(self, layer: int, start: int, count: int) -> Turns | None:
        """Gives cosine and sine of a layer's positions, as `Layer.run` wants them; keeps them for the next layer.

        Args:
            layer: its number.
            start: position of the first token.
            count: tokens from there on, up to the end of the text.
        """
        rope = self.rope(layer)
        if rope is None:
            return None
        key = (rope is self.hyper.rope_local, start, count)
        if key not in self._turns:
            if len(self._turns) > 1:  # global and local positions of the current tokens, no more
                self._turns.clear()
            positions = torch.arange(start, start + count, device=self.device)
            self._turns[key] = angles(rope, self.hyper.context, positions, start + count, self.dtype)
        return self._turns[key]

    def head(self, hidden: torch.Tensor, *, observe: Observe | None = None) -> torch.Tensor:
        """Gives logits from the last layer's output.

        Args:
            hidden: (B, T, hidden).
            observe: called with `output.weight` and the head's input; see `Observe`.

        Returns:
            (B, T, vocab) float32.
        """
        weight, bias = self._get("output_norm.weight", -1), self._get("output_norm.bias", -1)
        assert weight is not None, "every table has an output norm"
        hidden = normalize(hidden, weight, bias, kind=self.spec.norm, eps=self.hyper.norm_eps)
        if observe is not None and (seen := observe("output.weight", hidden)) is not None:
            hidden = seen
        packed = None if self.tied else self._linear("output.weight", -1)
        if packed is None:
            rows = self._stored("token_embd.weight" if self.tied else "output.weight", -1)
            logits = self._times_rows(hidden, rows)
        else:
            logits = packed.run(hidden, None).float()
        if self._adapt is not None:
            dense = rows if packed is None else packed.dense()
            logits = self._adapt.linear(("output.weight", -1), hidden, logits, dense, None)
        cap = self.hyper.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _times_rows(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Multiplies by a head that may be stored in another type or elsewhere; float32."""
        if rows.dtype == self.dtype and rows.device == self.device:
            return F.linear(hidden, rows).float()
        logits = hidden.new_empty((*hidden.shape[:-1], rows.shape[0]), dtype=torch.float32)
        for low in range(0, rows.shape[0], _HEAD_ROWS):
            part = rows[low : low + _HEAD_ROWS].to(self.device, self.dtype)
            logits[..., low : low + _HEAD_ROWS] = F.linear(hidden, part)
        return logits

    def _rows(self, slot: str, index: torch.Tensor) -> torch.Tensor:
        stored = self._stored(slot, -1)
        rows = stored[index.to(stored.device)].to(self.device, self.dtype)
        return rows if self._adapt is None else self._adapt.rows(slot, index, rows, stored)

    def _stored(self, slot: str, layer: int) -> torch.Tensor:
        """Gives an embedding or head: converted when it is kept, else as it is stored, to convert only what is used."""
        weight = self._get(slot, layer) if self.resident else self._weight(slot, layer)
        if weight is None:
            raise InputError(f"the model has no {slot}")
        return weight

    def _get(self, slot: str, layer: int) -> torch.Tensor | None:
        if (slot, layer) in self._kept:
            return self._kept[slot, layer]
        weight = self._weight(slot, layer)
        if weight is not None:
            weight = weight.to(self.device, torch.float32 if slot in self._float32 else self.dtype)
        if self.resident:
            self._kept[slot, layer] = weight
        return weight

    def _linear(self, slot: str, layer: int) -> Linear | None:
        if self._linears is None:
            return None
        if (slot, layer) in self._kept_linears:
            return self._kept_linears[slot, layer]
        found = self._linears(slot, layer)
        if self.resident:
            self._kept_linears[slot, layer] = found
        return found

    def rope(self, layer: int) -> Rope | None:
        """Gives the rotary positions of a layer, None where positions are learned."""
        slides = bool(self.hyper.sliding_layers) and self.hyper.sliding_layers[layer]
        return self.hyper.rope_local if slides and self.hyper.rope_local is not None else self.hyper.rope

    def turns_otherwise(self, before: int, after: int) -> bool:
        """Whether keys in the cache would turn otherwise in a text of the new length."""
        if before == 0:
            return False
        ropes = (self.hyper.rope, self.hyper.rope_local)
        return any(depends_on_length(rope, self.hyper.context, (before, after)) for rope in ropes)


def _numbered(device: torch.device) -> torch.device:
    """Gives "cuda" its number, as the tensors have it that are on it."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
