"""The file of queries and keys that hands a shard from the extract step to the statistics step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from approxkmv.errors import TableError
from approxkmv.files import written_whole


@dataclass(frozen=True)
class Activations:
    """Queries and keys of one text."""

    context: int
    """The index of the passage."""
    queries: torch.Tensor
    """(layers, heads, n, d)"""
    keys: torch.Tensor
    """(layers, heads, n, d)"""
    spans: torch.Tensor | None
    """(layers, n, 2) of a model with masks of its own (see Captured); None where every layer is causal, or none is."""


@dataclass(frozen=True)
class Shard:
    """What one activations file says about its model, and its contexts."""

    scales: torch.Tensor
    """(layers,) the factor of the logits."""
    causal: bool
    """Whether the model attends only backwards."""
    masked: bool
    """Whether some layer hides some keys: then there are masked statistics."""
    origin: str
    """Of which weights and texts it is (see fetch.origin)."""
    count: int
    """How many contexts there are."""
    contexts: Iterator[Activations]
    """The contexts in order, one in memory at a time."""


def write_activations(
    path: Path,
    scales: torch.Tensor,
    causal: bool,
    contexts: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    origin: str,
    spans: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Write a safetensors file: `scales` (layers,), `causal`, `masked`, and queries and keys of each text.

    Of a model with masks of its own also the spans of each text (layers, n, 2), see Captured.
    """
    from safetensors.torch import save_file

    tensors = {"scales": scales.to(torch.float64).contiguous(), "causal": torch.tensor([int(causal)])}
    tensors["masked"] = torch.tensor([int(causal or spans is not None)])
    for context, (queries, keys) in contexts.items():
        tensors[f"{context:07d}.queries"] = queries.contiguous()
        tensors[f"{context:07d}.keys"] = keys.contiguous()
        if spans is not None:
            tensors[f"{context:07d}.spans"] = spans[context].contiguous()
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"origin": origin})


def read_activations(path: Path) -> Shard:
    """What write_activations wrote, one context at a time. Raises TableError when the file is missing or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            names = sorted(handle.keys())
            scales = handle.get_tensor("scales")
            causal, masked = (bool(handle.get_tensor(name)) for name in ("causal", "masked"))
            origin = (handle.metadata() or {})["origin"]
    except FileNotFoundError as error:
        raise TableError(f"{path} is missing: run extract for this model and shard first") from error
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise TableError(f"{path} cannot be read ({error}): delete it and run extract again") from error
    contexts = [int(name.partition(".")[0]) for name in names if name.endswith(".queries")]

    def each() -> Iterator[Activations]:
        with safe_open(path, framework="pt") as handle:
            for context in contexts:
                queries, keys = (handle.get_tensor(f"{context:07d}.{kind}") for kind in ("queries", "keys"))
                spans = f"{context:07d}.spans"
                yield Activations(context, queries, keys, handle.get_tensor(spans) if spans in names else None)

    return Shard(scales, causal, masked, origin, len(contexts), each())
