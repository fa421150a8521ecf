"""The one decoder: any family of the tables, run layer by layer from weights that are read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope
from quantpress.convert.attention import Cache, Store
from quantpress.convert.kept import KeptWeights, Linears, numbered, times_rows
from quantpress.convert.layer import Adapt, Layer, Observe, Traits, Turns, activate, normalize, traits_of
from quantpress.convert.rope import angles, depends_on_length
from quantpress.convert.weights import Weight
from quantpress.quant.errors import InputError

__all__ = ["Decoder", "Linears"]


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
        self.device, self.dtype = numbered(torch.device(device)), dtype
        norms = frozenset(row.slot for row in spec.tensors if row.role is Role.NORM)
        self.weights = KeptWeights(weight, linears, float32=norms, device=self.device, dtype=dtype, resident=resident)
        self._adapt = adapt
        self.learned = spec.learned(hyper)
        self._traits = {hyper.has_experts(layer): traits_of(spec, hyper, layer) for layer in range(hyper.layers)}
        present = {row.slot for row in spec.present(hyper)}
        self.embedding_norm = "token_embd_norm.weight" in present
        self.masked_head = "output_transform.weight" in present
        # norms without weights are in no table (OLMo); where the sums are normalized there is nothing left to do
        self.final_norm = "output_norm.weight" in present or "layer_output_norm.weight" not in present
        self.tied = hyper.tied and any(row.tied_to for row in spec.tensors if row.role is Role.HEAD)
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
        if self.learned and end > self.hyper.context:
            raise InputError(f"the text has {end} tokens, the model has {self.hyper.context} positions")
        return self.embed_at(tokens, torch.arange(start, end))

    def embed_at(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Does what `embed` does, for positions (T,) int64, without looking whether there are such; types are 0."""
        hidden = self._rows("token_embd.weight", tokens)
        if self.hyper.embedding_width:
            hidden = self._projected("token_embd_in", hidden)
        if self.hyper.embedding_scale != 1.0:
            # transformers rounds the scale to the type it computes in
            hidden = hidden * float(torch.tensor(self.hyper.embedding_scale).to(self.dtype))
        if self.learned:
            hidden = hidden + self._rows("position_embd.weight", positions + self.hyper.position_offset)
        if self.hyper.token_types:
            hidden = hidden + self._rows("token_types.weight", torch.zeros_like(positions))
        if self.embedding_norm:
            hidden = self._normal("token_embd_norm", hidden)
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

    def traits(self, layer: int) -> Traits:
        """Gives the kind of a layer."""
        return self._traits[self.hyper.has_experts(layer)]

    def layer(self, layer: int, observe: Observe | None = None) -> Layer:
        """Gives a layer with its weights."""
        traits = self.traits(layer)
        asked = {slot: self.weights.linear(slot, layer) for slot in traits.slots}
        linears = {slot: linear for slot, linear in asked.items() if linear is not None}
        found = {slot: self.weights.get(slot, layer) for slot in traits.slots if slot not in linears}
        weights = {slot: weight for slot, weight in found.items() if weight is not None}
        return Layer(layer, traits, self.hyper, weights, observe, self._adapt, linears=linears)

    def release(self, layer: int) -> None:
        """Forgets the weights of a layer; they are read again if the layer runs."""
        for slot in self.traits(layer).slots:
            self.weights.forget(slot, layer)

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
        hidden = self.final(hidden)
        if observe is not None and (seen := observe("output.weight", hidden)) is not None:
            hidden = seen
        packed = None if self.tied else self.weights.linear("output.weight", -1)
        if packed is None:
            rows = self.weights.stored("token_embd.weight" if self.tied else "output.weight", -1)
            logits = times_rows(hidden, rows)
        else:
            logits = packed.run(hidden, None).float()
        if (bias := self.weights.get("output.bias", -1)) is not None:
            logits = logits + bias.float()
        if self._adapt is not None:
            dense = rows if packed is None else packed.dense()
            logits = self._adapt.linear(("output.weight", -1), hidden, logits, dense, None)
        if self.hyper.logit_scale != 1.0:
            logits = logits * self.hyper.logit_scale
        cap = self.hyper.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives what the head reads from the last layer's output, (B, T, hidden)."""
        if self.final_norm:
            hidden = self._normal("output_norm", hidden)
        if self.masked_head:
            hidden = self._normal("output_transform_norm", self._transformed(hidden))
        return self._projected("output_in", hidden) if self.hyper.embedding_width else hidden

    def _normal(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights.get(f"{name}.weight", -1), self.weights.get(f"{name}.bias", -1)
        return normalize(hidden, weight, bias, kind=self.spec.norm, eps=self.hyper.norm_eps)

    def _transformed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives what the norm of a head for masked tokens reads."""
        bias = self.weights.get("output_transform.bias", -1)
        result = self._projected("output_transform", hidden, bias)
        if self._adapt is not None:
            dense = self.weights.get("output_transform.weight", -1)
            assert dense is not None, "it was just multiplied with"
            result = self._adapt.linear(("output_transform.weight", -1), hidden, result, dense, bias)
        return activate(result, self.hyper.activation)

    def _projected(self, name: str, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weights.get(f"{name}.weight", -1)
        assert weight is not None, "the table has projections outside layers together with what switches them on"
        return F.linear(values, weight, bias)

    def _rows(self, slot: str, index: torch.Tensor) -> torch.Tensor:
        stored = self.weights.stored(slot, -1)
        rows = stored[index.to(stored.device)].to(self.device, self.dtype)
        return rows if self._adapt is None else self._adapt.rows(slot, index, rows, stored)

    def rope(self, layer: int) -> Rope | None:
        """Gives the rotary positions of a layer, None where no positions turn it."""
        if self.hyper.rope_layers and not self.hyper.rope_layers[layer]:
            return None
        slides = bool(self.hyper.sliding_layers) and self.hyper.sliding_layers[layer]
        return self.hyper.rope_local if slides and self.hyper.rope_local is not None else self.hyper.rope

    def turns_otherwise(self, before: int, after: int) -> bool:
        """Whether keys in the cache would turn otherwise in a text of the new length."""
        if before == 0:
            return False
        ropes = (self.hyper.rope, self.hyper.rope_local)
        return any(depends_on_length(rope, self.hyper.context, (before, after)) for rope in ropes)
