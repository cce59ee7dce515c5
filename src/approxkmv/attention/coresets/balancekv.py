"""BalanceKV: a stream of keys is halved again and again, by signs that balance the sums over both halves.

A block of keys is split by a self-balancing walk (Alweiss, Liu & Sawhney 2021) over the vectors phi(k) x [v, 1], whose
inner products are exp(<k, k'>) (<v, v'> + 1): the sums of exp(<q, k>) [v, 1] are linear in them for every query q,
known or not. Key i gets the sign + with probability 1/2 - gamma <w, x_i> / max |x|^2, where w is the signed sum so
far; the positive half is kept, each key for two. Kept keys form the blocks of the next level (merge and reduce), up to
`levels` halvings. The first keys (sinks) and the last (window) are exact, and so are those of blocks that are not full.

Each sign is + or - with equal probability, by symmetry, so numerators and row sums over the kept keys are unbiased.
(The paper keeps the smaller half.) Keys and values are taken less their means in the block, and values relative to
their size, since attention moves with an offset of the values and ignores one of the keys. A single walk for numerators
and row sums, instead of one for each magnitude of values, follows the authors' experiments.

Source: Han, Kapralov, Kochetkova, Sheth & Zandieh, "BalanceKV"/"Streaming Attention Approximation via Discrepancy
Theory", arXiv 2502.07861: SoftmaxBalance, and BalanceKV by merge and reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.attention.contract import Method
from approxkmv.attention.kernels.exponentials import exp_, softmax
from approxkmv.compute.counting import count

_ROWS = 256  # queries computed at a time; in the causal form they share the keys kept from before them
_ENTRIES = 1 << 22  # of the kernels of blocks that walk at the same time
# The square of the constant appended to values of mean square 1. An error of the row sum moves an answer by its
# distance from the values' mean only, whose square is a few hundredths on diffuse heads, which balancing helps most.
_ONE = 0.03


@dataclass(frozen=True)
class Parameters:
    """First and last keys that stay exact, keys of a block, halvings, and how strongly the walk steers."""

    sink: int = 32
    window: int = 32
    block: int = 256
    levels: int = 2
    gamma: float = 64.0


def positive_half(k: torch.Tensor, v: torch.Tensor, uniform: torch.Tensor, gamma: float) -> torch.Tensor:
    """(blocks, t) whether each key is kept, for keys (blocks, t, d) whose inner products are logits.

    v: (blocks, t, d_v). uniform: (blocks, t) random numbers from 0 to 1.
    """
    k, v = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    # In two steps: the squares of the smallest and the largest numbers leave float32.
    v = v / v.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    v = v / v.square().sum(2).mean(1).sqrt().clamp_min(1e-30).view(-1, 1, 1)
    logits = k @ k.mT
    count(other_products=logits.numel())
    products = exp_(logits.sub_(logits.amax((1, 2), keepdim=True))).mul_((v @ v.mT).add_(_ONE))
    limit = products.diagonal(dim1=1, dim2=2).amax(1) / gamma
    # Sums of the products of each vector with the signed vectors before it
    leaning = torch.zeros_like(uniform)
    kept = torch.empty_like(uniform, dtype=torch.bool)
    for i in range(k.shape[1]):
        kept[:, i] = (uniform[:, i] - 0.5) * limit < -leaning[:, i]
        leaning.addcmul_(products[:, i], 2.0 * kept[:, i : i + 1] - 1.0)
    return kept


@dataclass(frozen=True)
class Stream:
    """Which keys are kept after any number of a stream's keys was read."""

    block: int
    members: list[torch.Tensor]
    """Per level: the keys that reach it, in order; `levels` + 1 of them."""
    ends: list[list[int]]
    """Per level but the last: how many keys its first b blocks pass on, for b from 0."""

    def kept(self, read: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the stream (m,) of the keys kept after `read` of them, and the logs of their weights."""
        keys, logs = [], []
        for level, members in enumerate(self.members):
            full = 0 if level == len(self.ends) else read // self.block
            keys.append(members[full * self.block : read])
            logs.append(torch.full((len(keys[-1]),), level * math.log(2.0), device=members.device))
            read = self.ends[level][full] if level < len(self.ends) else 0
        return torch.cat(keys), torch.cat(logs)


def read_stream(k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Stream:
    """Halve the blocks of keys k (n, d) with values v (n, d_v) at every level; inner products of keys are logits.

    A block's signs depend on its keys and on random numbers drawn for its position only, never on later keys.
    """
    block = parameters.block
    uniforms = torch.rand(parameters.levels, len(k), generator=generator, device=k.device)
    members, ends = [torch.arange(len(k), device=k.device)], []
    for uniform in uniforms:
        whole = members[-1][: len(members[-1]) // block * block].view(-1, block)
        kept = torch.zeros_like(whole, dtype=torch.bool)
        step = max(1, _ENTRIES // block**2)
        for b in range(0, len(whole), step):
            some = whole[b : b + step]
            numbers = uniform[b * block :][: some.numel()].view_as(some)
            kept[b : b + step] = positive_half(k[some], v[some], numbers, parameters.gamma)
        members.append(whole[kept])
        ends.append([0, *kept.sum(1).cumsum(0).tolist()])
    return Stream(block, members, ends)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """Float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v); if is_causal, query i sees keys 0 to i."""
    n_k = len(k)
    sink = min(parameters.sink, n_k)
    stream = read_stream(math.sqrt(scale) * k[sink:], v[sink:], generator, parameters)
    parts = []
    for first in range(0, len(q), _ROWS):
        some = q[first : first + _ROWS] * scale
        if is_causal or not first:
            # Keys from the start of the window on, and keys before it that were read
            end = first + len(some) if is_causal else n_k
            recent = max(sink, (first if is_causal else n_k) - parameters.window)
            kept, weights = stream.kept(recent - sink)
            chosen = torch.cat([torch.arange(sink, device=k.device), kept + sink])
            chosen = torch.cat([chosen, torch.arange(recent, max(recent, end), device=k.device)])
            keys, values, logs = k[chosen], v[chosen], k.new_zeros(len(chosen))
            logs[sink : sink + len(kept)] = weights
        logits = torch.addmm(logs, some, keys.mT)
        later = 0
        if is_causal:
            at = torch.arange(first, end, device=k.device)
            logits.masked_fill_(chosen > at.unsqueeze(1), -torch.inf)
            # Among the rows' own keys, and among first keys that are kept for all rows
            later = len(some) * (len(some) - 1) // 2 + len(some) * max(0, sink - end)
        count(kernel_evaluations=logits.numel() - later, other_products=later)
        parts.append(softmax(logits) @ values)
    return torch.cat(parts)


method = Method.from_masked(
    "balancekv",
    attend,
    Parameters,
    summary="few keys for all queries: a stream halved by a self-balancing walk, first and last keys exactly",
    may_be_zero=frozenset({"sink", "window"}),
    grid=[
        {"levels": 5, "block": 64},
        {"levels": 4, "block": 128},
        {"levels": 3, "block": 128},
        {"levels": 3},
        {"levels": 2},
        {"levels": 1},
        {"levels": 1, "block": 512},
        {"levels": 1, "window": 1024},
        {"levels": 1, "window": 4096},
    ],
)
