"""vAttention: sinks, a window and the largest scores exactly, and a sample of the rest as large as an error requires.

The sample's size comes from each query's own scores: if s is the standard deviation of the exponentials of the n keys
that are not summed exactly, a uniform sample of b = (z n s / (epsilon D))^2 of them estimates the row sum D to a factor
of 1 +- epsilon with probability 1 - delta, where z is the normal quantile of 1 - delta / 2 (the paper's bound on the
budget, for the row sum). s and D are estimated from a base sample.

Two choices are ours. The base sample then joins the keys that are summed exactly, and the sample is taken, without
replacement, from the others: its size does not depend on what it holds, so numerators and row sums are unbiased. And
the largest scores are the true ones, with every score computed, as in the paper's form with an oracle, since its
predictors of scores are learned for a model.

Source: Desai, Agrawal, Yang et al., "vAttention: Verified Sparse Attention", arXiv 2510.05688.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

from approxkmv.attention.causal import Sums
from approxkmv.attention.contract import Method
from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count
from approxkmv.errors import InputError

_ROWS = 128  # queries whose scores are held at a time


@dataclass(frozen=True)
class Parameters:
    """First keys, last keys up to a query's own, largest scores, base sample; error and probability of missing it."""

    sink: int = 16
    window: int = 16
    top: int = 64
    base: int = 64
    epsilon: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        if not self.delta < 1:
            raise InputError(f"method 'vattention': delta is {self.delta!r}: give a probability below 1")


def budgets(
    exponentials: torch.Tensor, is_light: torch.Tensor, known: torch.Tensor, rest: torch.Tensor, p: Parameters
) -> torch.Tensor:
    """(rows,) the number of keys to sample from the `rest` (rows,) of each row.

    Args:
        exponentials: (rows, m) of the base sample; is_light (rows, m): the entries that belong to it.
        known: (rows,) sum of the exponentials of all other keys that are summed exactly.
    """
    number = is_light.sum(1)
    sums = (exponentials * is_light).sum(1)
    mean = sums / number
    squares = ((exponentials - mean.unsqueeze(1)) * is_light).square().sum(1)
    deviation = (squares / (number - 1)).sqrt()
    row_sum = known + sums + rest * mean
    quantile = -NormalDist().inv_cdf(p.delta / 2)
    wanted = (quantile * rest * deviation / (p.epsilon * row_sum)).square().ceil().clamp_min(1)
    # One key says nothing of the deviation, which is NaN then.
    return torch.minimum(torch.where(number < 2, math.inf, wanted), rest).long()


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    at: torch.Tensor,
    p: Parameters,
    causal: bool,
) -> Sums:
    """The sums of some rows: their own positions `at`, and keys and values in the random `order` of their positions."""
    n_k = len(k)
    logits = q @ k.mT
    place = torch.empty_like(order)
    place[order] = torch.arange(n_k, device=q.device)
    if causal:
        future = order > at.unsqueeze(1)
        logits.masked_fill_(future, -torch.inf)
    first = place[: p.sink].expand(len(q), -1)
    recent = place[(at.unsqueeze(1) - torch.arange(p.window, device=q.device)).clamp_min(0)]
    ranks = logits.scatter(1, torch.cat([first, recent], 1), torch.inf)
    if causal:
        ranks.masked_fill_(future, -torch.inf)
    chosen = ranks.topk(min(n_k, p.sink + p.window + p.top), 1, sorted=False).indices
    heavy = logits.gather(1, chosen)
    shift = heavy.amax(1)
    seen = (heavy > -torch.inf).sum(1)
    rest = (at + 1 if causal else torch.full_like(at, n_k)) - seen
    heavy = exp_(heavy - shift.unsqueeze(1))
    logits.scatter_(1, chosen, -torch.inf)

    base = logits[:, : p.base]
    is_light = base > -torch.inf
    base = exp_(base - shift.unsqueeze(1))
    rest = rest - is_light.sum(1)
    wanted = budgets(base, is_light, heavy.sum(1), rest, p)
    # The columns after the base sample that hold about as many light keys as wanted, or up to the first one.
    columns = logits[:, p.base :]
    width = columns.shape[1]
    reach = (wanted * width / rest.clamp_min(1)).ceil()
    place = torch.arange(width, device=q.device)

    def drawn() -> torch.Tensor:
        longest = int(reach.max())
        return (place[:longest] < reach.unsqueeze(1)) & (columns[:, :longest] > -torch.inf)

    sampled = drawn()
    none = (rest > 0) & ~sampled.any(1)
    if bool(none.any()):
        reach[none] = 1.0 + (columns[none] > -torch.inf).byte().argmax(1)
        sampled = drawn()
    number = sampled.sum(1)
    # The sampled pairs alone: a few rows may need many keys.
    rows, drawn_keys = sampled.nonzero(as_tuple=True)
    light = exp_(columns[rows, drawn_keys] - shift[rows]).mul_((rest / number.clamp_min(1))[rows])
    evaluations = int(seen.sum()) + int(is_light.sum()) + len(light)
    count(kernel_evaluations=evaluations, other_products=logits.numel() - evaluations)

    bag = torch.nn.functional.embedding_bag
    numerators = bag(chosen, v, per_sample_weights=heavy, mode="sum").addmm_(base, v[: p.base])
    starts = number.cumsum(0) - number
    if len(light):
        numerators += bag(drawn_keys + p.base, v, starts, per_sample_weights=light, mode="sum")
    row_sums = heavy.sum(1) + base.sum(1)
    return numerators, row_sums.index_add_(0, rows, light), shift


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    *,
    is_causal: bool = False,
) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log).

    The last query is taken to be at the last key. If is_causal, query i sees keys 0 to i.
    """
    parts = []
    for first in range(0, len(q), _ROWS):
        some = q[first : first + _ROWS]
        if is_causal or not first:
            n_k = len(some) + first if is_causal else len(k)
            order = torch.randperm(n_k, generator=generator, device=q.device)
            keys, values = k[order], v[order]
        at = torch.arange(first, first + len(some), device=q.device) + len(k) - len(q)
        parts.append(_rows(some, keys, values, order, at, parameters, is_causal))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """The quotients (n_q, d_v) of these sums, for queries that are not scaled."""
    numerators, row_sums, _ = sums(q * scale, k, v, generator, parameters, is_causal=is_causal)
    return numerators / row_sums.unsqueeze(1)


method = Method.from_masked(
    "vattention",
    attend,
    Parameters,
    summary="largest scores exactly, and a sample of the rest as large as an error of the row sum requires",
    may_be_zero=frozenset({"sink", "window"}),
    grid=[
        {"sink": 4, "window": 4, "top": 8, "base": 16, "epsilon": 1.0},
        {"top": 16, "base": 32, "epsilon": 0.5},
        {"top": 32, "base": 32, "epsilon": 0.3},
        {"top": 64, "epsilon": 0.2},
        {"top": 64, "epsilon": 0.1},
        {"top": 128, "epsilon": 0.1},
        {"top": 128, "epsilon": 0.05},
        {"top": 256, "epsilon": 0.05},
        {"top": 512, "base": 128, "epsilon": 0.025},
        {"top": 1024, "base": 256, "epsilon": 0.0125},
        {"top": 2048, "base": 256, "epsilon": 0.005},
    ],
)
