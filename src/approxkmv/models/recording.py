"""The queries and keys of one forward pass, sorted by text and layer, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from approxkmv.errors import CaptureError, NonFiniteError
from approxkmv.models.masks import HIDDEN, plain_spans, spans_of


@dataclass(frozen=True)
class Layer:
    """What the softmax of a layer contains besides scale * q k^T."""

    window: int | None = None
    """The reach of its window (or chunk) in keys, including the query's own; None without one."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap)."""
    sinks: torch.Tensor | None = None
    """One more logit per row, belonging to no key: (heads,), or per query as in the model."""
    bias: torch.Tensor | None = None
    """Added to the logits, for example by relative position: (heads or 1, n, n)."""
    widths: tuple[int, int] | None = None
    """The layer's own d and d_v; None for those of the tensors."""


NOTHING_ELSE = Layer()


@dataclass(frozen=True)
class Captured:
    """What one text's attention multiplies: softmax(scale * queries keys^T) over visible keys; see also `layers`.

    d and d_v are those of the widest layer (Gemma 4 has two kinds). In narrower ones the other columns are zeros, which
    change no inner product and no norm; `widths` of a layer has its own.
    """

    queries: torch.Tensor
    """(layers, heads, n, d), after rotary embedding and any normalisation of queries."""
    keys: torch.Tensor
    """(layers, heads, n, d), likewise; a key head shared by several query heads is repeated for each."""
    scales: torch.Tensor
    """(layers,) float64 on the CPU: the model's factor of the logits."""
    values: torch.Tensor | None
    """(layers, heads, n, d_v), or None if not requested."""
    spans: torch.Tensor
    """(layers, n, 2) int32 on the CPU: query i sees the keys in [first number, second number)."""
    layers: tuple[Layer, ...]
    """What else each layer's softmax contains."""

    def softmax_of(self, layer: int) -> dict[str, Any]:
        """Arguments of attention_statistics, besides queries and keys, that describe a layer's softmax.

        >>> attention_statistics(one.queries[3], one.keys[3], **one.softmax_of(3)).entropy       # doctest: +SKIP
        """
        own = self.layers[layer]
        return {
            "scale": float(self.scales[layer]),
            "mask": self.spans[layer],
            "bias": own.bias,
            "softcap": own.softcap,
            "sinks": own.sinks,
        }


class NonFiniteActivation(NonFiniteError):
    """A query, key or value that is NaN or infinite, with the place where it first occurs, counted from 0."""

    def __init__(self, layer: int, head: int, index: int, what: str, dtype: torch.dtype) -> None:
        advice = "try dtype float32" if dtype != torch.float32 else "the weights or the text may be damaged"
        super().__init__(
            f"text {index} of the batch: layer {layer}, head {head} has a NaN or infinite {what}: {advice}"
        )
        self.layer = layer
        self.head = head
        self.index = index


class Recording:
    """Collects the layers of one forward pass as they are computed, and returns them text by text.

    Args:
        architecture: its name in error messages.
        n_layers: the number of attention layers of the backbone.
        lengths: tokens of each text; rows beyond them are padding.
        values: whether to keep the values too.
        probing: whether to compare each layer's own attention weights, if it returns them, with those that follow from
            what is recorded.
    """

    def __init__(
        self,
        architecture: str,
        n_layers: int,
        lengths: Sequence[int],
        values: bool = False,
        *,
        probing: bool = False,
    ) -> None:
        self.architecture = architecture
        self.n_layers = n_layers
        self.lengths = list(lengths)
        self.layers: list[Layer] = []
        self.probing = probing
        self._keep_values = values
        self._scales: list[float] = []
        self._heads = 0
        # Per text the query, key and perhaps value, filled layer by layer: never more than the batch in memory.
        self._texts: list[dict[str, torch.Tensor]] = []
        self._spans: list[list[torch.Tensor]] = []
        # Layers share masks; the last two are kept, since windows often alternate with none.
        self._masks: list[tuple[torch.Tensor, tuple[list[torch.Tensor], bool]]] = []

    def record(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        *,
        causal: bool,
        mask: torch.Tensor | None = None,
        layer: Layer = NOTHING_ELSE,
    ) -> None:
        """Record the next layer.

        Args:
            queries: (batch, heads, n, d). keys: (batch, key heads, n, d). values: (batch, key heads, n, d_v).
            scale: the factor of the logits in this layer.
            causal: whether, without a mask, position i sees only positions up to i in this layer.
            mask: as in models/masks.py, or None.
            layer: what else its softmax contains; a bias covers the whole batch, (batch or 1, heads or 1, n, n).
        Raises:
            CaptureError: this is not self-attention with as many heads as in earlier layers, or its mask cannot be
                described.
        """
        batch, heads, n, d = queries.shape
        key_heads = keys.shape[1]
        if batch != len(self.lengths) or n != max(self.lengths) or keys.shape != (batch, key_heads, n, d):
            raise CaptureError(
                f"{self.architecture} attends from queries {tuple(queries.shape)} to keys {tuple(keys.shape)}: only "
                "self-attention over one sequence can be captured"
            )
        if heads % key_heads or len(self._scales) == self.n_layers:
            raise CaptureError(
                f"{self.architecture} has {heads} query heads on {key_heads} key heads, or more attention calls than "
                f"its {self.n_layers} layers: {ADVICE}"
            )
        given = {"query": queries, "key": keys} | ({"value": values} if self._keep_values else {})
        if not self._texts:
            self._heads = heads
            self._texts = [
                {what: queries.new_zeros((self.n_layers, heads, n, x.shape[-1])) for what, x in given.items()}
                for n in self.lengths
            ]
        elif heads != self._heads:
            raise CaptureError(
                f"{self.architecture}: layer {len(self._scales)} has {heads} heads and layer 0 has {self._heads}: "
                "layers with different numbers of heads cannot be captured together"
            )
        for index, (text, length) in enumerate(zip(self._texts, self.lengths, strict=True)):
            for what, x in given.items():
                text[what] = _widened(text[what], x.shape[-1])
                _repeat_into(text[what][len(self._scales), ..., : x.shape[-1]], x[index, :, :length])
        self._scales.append(float(scale))
        spans, biased = self._seen(mask, causal)
        self._spans.append(spans)
        if biased and mask is not None:
            added = mask.masked_fill(mask <= HIDDEN, 0.0)
            layer = replace(layer, bias=added if layer.bias is None else layer.bias + added)
        self.layers.append(replace(layer, widths=(d, values.shape[-1])))

    def _seen(self, mask: torch.Tensor | None, causal: bool) -> tuple[list[torch.Tensor], bool]:
        """Each text's spans in this layer, and whether the mask adds a bias."""
        if mask is None:
            return [plain_spans(length, causal) for length in self.lengths], False
        for known, found in self._masks:
            if known is mask:
                return found
        try:
            found = spans_of(mask, self.lengths)
        except CaptureError as error:
            raise CaptureError(f"{self.architecture}, layer {len(self._spans)}: {error}") from error
        self._masks = [*self._masks[-1:], (mask, found)]
        return found

    def texts(self, indices: Sequence[int] | None = None, *, require_finite: bool = True) -> list[Captured]:
        """One Captured per text, in order.

        Args:
            indices: the number of each text in errors; None means its place in the batch.
            require_finite: whether NaN or infinity is an error.
        Raises:
            CaptureError: fewer layers were recorded than the model has. NonFiniteActivation: NaN or infinity.
        """
        if len(self._scales) != self.n_layers:
            raise CaptureError(
                f"{self.architecture}: {len(self._scales)} of {self.n_layers} layers handed their queries and keys "
                f"over: {ADVICE}"
            )
        scales = torch.tensor(self._scales, dtype=torch.float64)
        captured = []
        for index, text in enumerate(self._texts):
            if require_finite:
                _require_finite(index if indices is None else indices[index], text)
            spans = torch.stack([layer[index] for layer in self._spans])
            layers = tuple(_of_text(layer, index, self.lengths[index]) for layer in self.layers)
            captured.append(Captured(text["query"], text["key"], scales, text.get("value"), spans, layers))
        return captured


def _of_text(layer: Layer, index: int, n: int) -> Layer:
    """A layer of a batch, reduced to one of its texts, of n tokens."""
    bias, sinks = layer.bias, layer.sinks
    if bias is not None:
        bias = bias[index if len(bias) > 1 else 0, :, :n, :n]
    if sinks is not None and sinks.ndim > 2:
        # (batch, heads, n), up to dimensions of size one.
        sinks = sinks[index if len(sinks) > 1 else 0].flatten(1)[:, :n]
    return replace(layer, bias=bias, sinks=sinks)


ADVICE = "write an adapter like models/openai_gpt.py, see docs/add-a-model.md"


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The tensor with zeros behind its columns, if it has fewer than `width`."""
    missing = width - tensor.shape[-1]
    return tensor if missing <= 0 else torch.nn.functional.pad(tensor, (0, missing))


def _repeat_into(target: torch.Tensor, grouped: torch.Tensor) -> None:
    """target (heads, n, d) <- grouped (groups, n, d), each for as many consecutive heads."""
    target.view(grouped.shape[0], -1, *grouped.shape[1:]).copy_(grouped.unsqueeze(1))


def _require_finite(index: int, named: dict[str, torch.Tensor]) -> None:
    found: list[tuple[int, int, str]] = []
    for what, tensor in named.items():
        # A sum is finite only if every term is; it reads the tensor once and needs no mask. In float64 it does not
        # overflow.
        if bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            continue
        broken = (~torch.isfinite(tensor)).flatten(2).any(-1).nonzero()
        layer, head = (int(x) for x in broken[0])
        found.append((layer, head, what))
    if found:
        layer, head, what = min(found, key=lambda place: place[:2])
        raise NonFiniteActivation(layer, head, index, what, next(iter(named.values())).dtype)
