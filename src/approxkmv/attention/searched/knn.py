"""kNN attention (Haris, arXiv 2411.04013): a head of nearest keys, a tail by lazy Gumbel sampling.

A row of attention is the expectation of a value under the row's softmax. The samples come from `lazy_gumbel`; with an
exact index they are exact, so the expectation of the answer is attention itself. With probability 1 - delta its error
is at most |V| sqrt(2 log(2 n d_v / delta) / samples) in every entry (Hoeffding), and relative to a non-negative entry
O_ij at most sqrt(3 |V| log(2 n d_v / delta) / (samples O_ij)) (Chernoff), for any head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.kernels.exponentials import softmax
from approxkmv.attention.searched.lazy_gumbel import SampledRows, sample_rows
from approxkmv.compute.counting import count
from approxkmv.search.indexes import Index, make_index

_CAUSAL_ROWS = 256  # causal queries that share exact sums over their own keys and one search of earlier ones


@dataclass(frozen=True)
class Parameters:
    """A row's head and samples, and how the head is searched."""

    top: int = 0
    """Keys of the head; 0 means the square root of the number of keys."""
    samples: int = 16
    index: str = "flat"
    """flat or hnsw; the last three parameters are for hnsw."""
    head: str = "exact"
    """exact or sampled, see `sample_rows`."""
    links: int = 12
    construction: int = 32
    breadth: int = 64

    def index_of(self, k: torch.Tensor) -> Index:
        """An empty index for keys k (n_k, d)."""
        return make_index(self.index, k, links=self.links, construction=self.construction, breadth=self.breadth)


def head_size(top: int, n_k: int) -> int:
    """`top` or, if it is 0, the paper's choice: the square root of the number of keys."""
    return min(n_k, top or math.ceil(math.sqrt(n_k)))


def _floor(found: torch.Tensor) -> torch.Tensor:
    """(n,) the smallest of the logits (n, h) that were found."""
    return found.masked_fill(found == -torch.inf, torch.inf).amin(1)


def sampled_attention(
    q: torch.Tensor, k: torch.Tensor, generator: torch.Generator, parameters: Parameters
) -> SampledRows:
    """A sparse matrix whose expectation is softmax(q k^T), for scaled float32 q (n_q, d) and k (n_k, d)."""
    searched = parameters.index_of(k)
    searched.add(0, len(k))
    keys, logits = searched.search(q, head_size(parameters.top, len(k)))
    return sample_rows(
        q, k, keys.clamp_min(0), logits, _floor(logits), len(k), parameters.samples, generator, head=parameters.head
    )


def _causal_block(
    index: Index,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: int,
    last: int,
    generator: torch.Generator,
    parameters: Parameters,
) -> torch.Tensor:
    """Rows first to last - 1 of causal attention: their own keys and the best of the earlier ones, then the tail."""
    some, own = q[first:last], torch.arange(first, last, device=q.device)
    logits = (some @ k[first:last].mT).masked_fill_(own > own.unsqueeze(1), -torch.inf)
    count(other_products=logits.numel() - pairs_seen(last - first))
    keys = own.expand(last - first, -1)
    floor = torch.full((last - first,), -torch.inf, device=q.device)
    if first:
        near = head_size(parameters.top, first)
        found, found_logits = index.search(some, near)
        keys = torch.cat([found.clamp_min(0), keys], 1)
        logits = torch.cat([found_logits, logits], 1)
        floor = floor if near == first else _floor(found_logits)
    return sample_rows(
        some, k, keys, logits, floor, first, parameters.samples, generator, head=parameters.head
    ).product(v)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """Float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v); if is_causal, query i sees keys 0 to i."""
    # Attention is invariant to a common shift of the keys; around their mean a graph has shorter distances.
    if not is_causal:
        if head_size(parameters.top, len(k)) < len(k) or parameters.head != "exact":
            return sampled_attention(q * scale, k - k.mean(0), generator, parameters).product(v)
        if q.device.type == "cpu":
            return exact_fused.attend(q, k, v, scale)
        count(kernel_evaluations=len(q) * len(k))
        return softmax((q * scale) @ k.mT) @ v
    # The mean of all keys would include later ones.
    q, k = q * scale, k - k[:_CAUSAL_ROWS].mean(0)
    searched = parameters.index_of(k)
    parts = []
    for first in range(0, len(q), _CAUSAL_ROWS):
        last = min(first + _CAUSAL_ROWS, len(q))
        parts.append(_causal_block(searched, q, k, v, first, last, generator, parameters))
        searched.add(first, last)
    return torch.cat(parts)


method = Method.from_masked(
    "knn",
    attend,
    Parameters,
    summary="nearest keys exactly, the tail by lazy Gumbel sampling; unbiased with an exact index",
    may_be_zero=frozenset({"top"}),
    choices={"head": ("exact", "sampled")},
    grid=[
        {"top": 16, "samples": 1, "index": "hnsw", "links": 6, "construction": 16, "breadth": 16},
        {"top": 32, "samples": 4, "index": "hnsw", "links": 8, "construction": 24, "breadth": 32},
        {"top": 32, "samples": 4},
        {"top": 0, "samples": 8},
        {"top": 0, "samples": 32},
        {"top": 256, "samples": 32},
        {"top": 512, "samples": 64},
        {"top": 1024, "samples": 128},
        {"top": 2048, "samples": 256},
    ],
)
