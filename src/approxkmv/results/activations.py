"""The activations file, which carries a shard's queries and keys from the extract step to the statistics step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from approxkmv.errors import TableError
from approxkmv.files import written_whole
from approxkmv.results.shards import own_origin
from approxkmv.results.tables import MASKED

if TYPE_CHECKING:
    from approxkmv.models.recording import Captured, Layer


@dataclass(frozen=True)
class Activations:
    """Queries and keys of one text."""

    context: int
    """The passage's index."""
    queries: torch.Tensor
    """(layers, heads, n, d)"""
    keys: torch.Tensor
    """(layers, heads, n, d)"""
    spans: torch.Tensor | None
    """(layers, n, 2) for a model with masks of its own (see Captured); None if every layer or no layer is causal."""
    beside: tuple[dict[str, Any], ...]
    """Per layer, the softcap, sinks and bias of its softmax, each possibly None; arguments of attention_statistics."""
    special: torch.Tensor
    """(n,) bool: True for tokens that begin, end or separate texts (CLS, SEP, BOS, EOS)."""


@dataclass(frozen=True)
class Shard:
    """The contents of one activations file."""

    scales: torch.Tensor
    """(layers,) factors of the logits."""
    causal: bool
    """Whether the model is causal."""
    masked: bool
    """Whether some layer masks keys, so that masked statistics are also computed."""
    origin: str
    """Identifies the model, its weights and the texts (see locations.origin)."""
    numbers: tuple[int, ...]
    """The passages' indices, in order."""
    contexts: Iterator[Activations]
    """The contexts in this order, one in memory at a time."""

    @property
    def count(self) -> int:
        """Number of contexts."""
        return len(self.numbers)

    @property
    def masks(self) -> tuple[str, ...]:
        """The prefixes of the columns of its statistics, as in tables.masks_of."""
        return ("", MASKED) if self.masked else ("",)


def write_activations(
    path: Path,
    texts: Mapping[int, Captured],
    special: Mapping[int, torch.Tensor],
    origin: str,
    *,
    causal: bool,
    own_masks: bool,
) -> None:
    """Write a safetensors file: `scales` (layers,), `causal`, `masked`, and of each text, by its index, queries, keys,
    `special` (see Activations) and each layer's softcap, sinks and bias; for a model with masks of its own also spans.
    """
    from safetensors.torch import save_file

    scales = next((one.scales for one in texts.values()), torch.zeros(0, dtype=torch.float64))
    tensors = {"scales": scales, "causal": torch.tensor([int(causal)])}
    tensors["masked"] = torch.tensor([int(causal or own_masks)])
    for context, one in texts.items():
        own = {"queries": one.queries, "keys": one.keys, "special": special[context]}
        own |= {"spans": one.spans} if own_masks else {}
        for place in range(len(one.layers)):
            own |= {f"{place}.{name}": value for name, value in _beside(one.layers, place)}
        tensors |= {f"{context:07d}.{name}": value.contiguous() for name, value in own.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"origin": origin})


def _beside(layers: Sequence[Layer], place: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A layer's softcap, sinks and bias as named tensors; a bias shared with an earlier layer is that layer's index."""
    layer = layers[place]
    if layer.softcap is not None:
        yield "softcap", torch.tensor(layer.softcap, dtype=torch.float64)
    if layer.sinks is not None:
        yield "sinks", layer.sinks.detach().cpu().clone()
    if layer.bias is not None:
        earlier = [i for i in range(place) if _same(layers[i].bias, layer.bias)]
        yield "bias", torch.tensor(earlier[0]) if earlier else layer.bias.detach().cpu().clone()


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two biases share memory, as they do in layers that add the same one."""
    return one is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def read_activations(path: Path, model: str) -> Shard:
    """Read a file of write_activations, one context at a time.

    Raises TableError if it is missing, truncated, of another model or not as write_activations writes it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            scales = handle.get_tensor("scales")
            if scales.ndim != 1 or not bool(((scales > 0) & scales.isfinite()).all()):
                raise ValueError("scales are not a positive number per layer")
            causal, masked = (bool(handle.get_tensor(name).item()) for name in ("causal", "masked"))
            origin = (handle.metadata() or {})["origin"]
            names_of = _names_of_texts(handle, len(scales))
    except FileNotFoundError as error:
        raise TableError(f"{path} is missing: run extract for this model and shard first") from error
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise TableError(f"{path} cannot be read ({error}): delete it and run extract again") from error
    own_origin(path, origin, model)

    def each() -> Iterator[Activations]:
        with safe_open(path, framework="pt") as handle:
            for context, own in names_of.items():
                found = {name.partition(".")[2]: handle.get_tensor(name) for name in own}
                spans = found.get("spans")
                try:
                    if spans is not None and not bool(_inside(spans, found["queries"].shape[2]).all()):
                        raise ValueError("a query sees no key")
                    beside = _read_beside(found, len(scales))
                except (LookupError, TypeError, ValueError, RuntimeError) as error:
                    raise TableError(
                        f"{path} is damaged at text {context} ({error}): delete it and run extract again"
                    ) from error
                yield Activations(context, found["queries"], found["keys"], spans, beside, found["special"])

    return Shard(scales, causal, masked, origin, tuple(names_of), each())


_FLOATS = ("F16", "BF16", "F32", "F64")


def _names_of_texts(handle: Any, layers: int) -> dict[int, list[str]]:
    """The names of each text's tensors. Raises KeyError or ValueError unless they have the shapes of Activations."""
    names_of: dict[int, list[str]] = defaultdict(list)
    for name in sorted(handle.keys()):
        text, _, what = name.partition(".")
        if what:
            names_of[int(text)].append(name)
    for context, own in names_of.items():
        found = {name.partition(".")[2]: handle.get_slice(name) for name in own}
        shape = found["queries"].get_shape()
        if len(shape) != 4 or shape[0] != layers or 0 in shape:
            raise ValueError(f"text {context} has queries of the shape {shape}, and {layers} scales")
        n = shape[2]
        wanted = {"queries": (shape, _FLOATS), "keys": (shape, _FLOATS), "special": ([n], ("BOOL",))}
        wanted |= {"spans": ([layers, n, 2], ("I32",))} if "spans" in found else {}
        for what, (of_shape, kinds) in wanted.items():
            if found[what].get_shape() != of_shape or found[what].get_dtype() not in kinds:
                raise ValueError(f"text {context} has {what} of another shape or type than its queries ask for")
    return dict(sorted(names_of.items()))


def _inside(spans: torch.Tensor, n: int) -> torch.Tensor:
    """(layers, n) bool: whether a span holds at least one of n keys, and none besides."""
    return (spans[..., 0] >= 0) & (spans[..., 0] < spans[..., 1]) & (spans[..., 1] <= n)


def _read_beside(found: Mapping[str, torch.Tensor], layers: int) -> tuple[dict[str, Any], ...]:
    """What _beside wrote of each layer."""
    beside: list[dict[str, Any]] = []
    for place in range(layers):
        softcap, sinks, bias = (found.get(f"{place}.{what}") for what in ("softcap", "sinks", "bias"))
        if bias is not None and bias.ndim == 0:
            bias = {i: earlier["bias"] for i, earlier in enumerate(beside)}[int(bias)]
        cap = None if softcap is None else float(softcap)
        beside.append({"softcap": cap, "sinks": sinks, "bias": bias})
    return tuple(beside)
