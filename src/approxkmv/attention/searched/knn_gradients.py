"""Gradients of attention from sampled softmax rows: the Markov chain of Haris (arXiv 2411.04013), section 4.

The softmax matrix P is the transition matrix of a chain from queries to keys, sampled by `lazy_gumbel`. With D the
gradient of the output and dP = D V^T, the gradients are P^T D with respect to V and, with dS_ij = P_ij (dP_ij -
sum_l P_il dP_il), scale dS K with respect to Q and scale dS^T Q with respect to K.

There are two estimates, both unbiased (tested):

- `estimated_gradients` is used to train through `knn_attention`, for either head. Every row takes all of its steps: the
  sampled matrix replaces P, and a second, independent one is used for the inner sum, so that products of the two are
  unbiased. The same steps serve all columns and all three gradients.
- `random_walks` is the paper's own estimate of a product P^T x, such as P^T D, with its bound. It is not used for
  training here: its walks restart for each column, and x may not depend on the key as dS does.
"""

from __future__ import annotations

from typing import Any

import torch

from approxkmv.arrays import resolve_seed
from approxkmv.attention.contract import check_inputs
from approxkmv.attention.searched.knn import Parameters, method, sampled_attention
from approxkmv.attention.searched.lazy_gumbel import SampledRows, products_of_pairs
from approxkmv.compute.drawing import drawn
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError

_ENTRIES = 1 << 18  # entries gathered at a time


def random_walks(
    sampled: SampledRows, x: torch.Tensor, n_k: int, walks: int, generator: torch.Generator
) -> torch.Tensor:
    """Estimate P^T x by walks of one step, as the paper does: (n_k, w) from x (n_q, w).

    For each column, walks start at row i with probability |x_ij| / |x_j|_1 and carry the sign of x_ij; they count at
    the key where they arrive. Unbiased; with probability 1 - delta over independent steps every entry is within
    |x_j|_1 sqrt(2 log(2 n_k w / delta) / walks) (Hoeffding). |x_j|_1 is at most <x_j, 1> + 2 n M_j for
    M_j = -min(x_j, 0), which is the paper's bound by a shift.

    Args:
        sampled: rows of P with sampled heads, with at least as many samples per row as there are walks from it; a walk
            that finds no fresh sample of its row reuses one, which leaves it unbiased.
        x: (n_q, w). n_k: number of keys. walks: per column. generator: draws the starts.
    Raises:
        InputError: the rows' heads are exact, not sampled.
    """
    if sampled.head_weights is not None:
        raise InputError("a walk arrives at one key: use rows sampled with head='sampled'")
    n, width = x.shape
    # The samples of a row that left its head come first: in random order any few of them are independent steps.
    shuffled = torch.randperm(len(sampled.rows), generator=generator, device=x.device)
    order = shuffled[sampled.rows[shuffled].argsort(stable=True)]
    arrivals = sampled.keys[order]
    counts = torch.bincount(sampled.rows, minlength=n)
    firsts = counts.cumsum(0) - counts
    out = x.new_zeros(n_k, width)
    for j in range(width):
        total = x[:, j].abs().sum()
        if total == 0:
            continue
        starts = drawn(x[:, j].abs(), walks, generator).sort().values
        # The first walk from a row takes its first sample, the next one its second, and so on.
        turn = torch.arange(walks, device=x.device) - torch.searchsorted(starts, starts)
        at = arrivals[firsts[starts] + turn % counts[starts]]
        out[:, j].index_add_(0, at, x[starts, j].sign() * (total / walks))
    return out


def estimated_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    scale: float,
    first: SampledRows,
    second: SampledRows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to q (n_q, d), k (n_k, d), v (n_k, d_v), given the gradient of the output, (n_q, d_v).

    Each entry (row, key) of `first` contributes to all three, whether it is a key of an exact head or a sampled one.
    Unbiased if the expectation of both independent samples is the softmax of scale q k^T.
    """
    d_q, d_k, d_v = (torch.zeros_like(t) for t in (q, k, v))
    rows, keys, weights = second.entries()
    inner = torch.zeros(len(q), device=q.device)
    inner.index_add_(0, rows, weights * products_of_pairs(gradient, v, rows, keys))
    rows, keys, weights = first.entries()
    of_logits = scale * weights * (products_of_pairs(gradient, v, rows, keys) - inner[rows])
    parts = (t.split(_ENTRIES) for t in (rows, keys, weights, of_logits))
    for row, key, weight, of_logit in zip(*parts, strict=True):
        d_v.index_add_(0, key, weight.unsqueeze(1) * gradient[row])
        d_q.index_add_(0, row, of_logit.unsqueeze(1) * k[key])
        d_k.index_add_(0, key, of_logit.unsqueeze(1) * q[row])
    return d_q, d_k, d_v


class _KNNAttention(torch.autograd.Function):
    @staticmethod
    @plain_torch()
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seed: int, parameters: Parameters
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = scale, seed, parameters
        generator = torch.Generator(device=q.device).manual_seed(3 * seed)
        out = [_rows(q[b], k[b], scale, generator, parameters).product(v[b].float()) for b in range(len(q))]
        return torch.stack(out).to(v.dtype)

    @staticmethod
    @plain_torch()
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        scale, seed, parameters = ctx.settings
        # Independent random streams: reusing the samples of the answer would correlate the loss with its gradient.
        streams = [torch.Generator(device=q.device).manual_seed(3 * seed + i) for i in (1, 2)]
        each = []
        for b in range(len(q)):
            first, second = (_rows(q[b], k[b], scale, stream, parameters) for stream in streams)
            queries, keys, values, of_answer = (t[b].float().contiguous() for t in (q, k, v, gradients[0]))
            each.append(estimated_gradients(queries, keys, values, of_answer, scale, first, second))
        # Rounded by autograd to the types of q, k and v
        return (*map(torch.stack, zip(*each, strict=True)), None, None, None)


def _rows(
    q: torch.Tensor, k: torch.Tensor, scale: float, generator: torch.Generator, parameters: Parameters
) -> SampledRows:
    keys = k.float()
    return sampled_attention(q.float() * scale, keys - keys.mean(0), generator, parameters)


def knn_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    seed: int = 0,
    top: int = 0,
    samples: int = 16,
    index: str = "flat",
    head: str = "exact",
) -> torch.Tensor:
    """kNN attention of q (batch, n_q, d) on k, v (batch, n_k, ...), with sampled gradients: (batch, n_q, d_v).

    >>> q, k, v = (torch.randn(1, 40, 8, requires_grad=True) for _ in range(3))
    >>> knn_attention(q, k, v, seed=1).sum().backward()                              # doctest: +SKIP

    Args:
        scale: of the logits; None means 1/sqrt(d). seed: use a new one for each training step.
        top, samples, index, head: as for the method `knn`. With head="sampled" each row steps to single keys of the
            paper's chain; with "exact" the head's keys carry their weights, which is also unbiased and less noisy. The
            backward pass of both is `estimated_gradients`.
    Raises:
        InputError: inputs that do not match. UnavailableError: faiss is missing.
    """
    scale = check_inputs(q, k, v, scale)
    parameters = Parameters(**method.parameters({"top": top, "samples": samples, "index": index, "head": head}))
    # Three streams of random numbers for each seed
    seed = resolve_seed(seed) % 2**61
    answer: torch.Tensor = _KNNAttention.apply(q, k, v, scale, seed, parameters)
    return answer
