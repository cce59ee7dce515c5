"""Samples of softmax rows in sublinear time: lazy Gumbel sampling (Mussmann, Levy & Ermon 2017).

This is the sampler of kNN attention (Haris, arXiv 2411.04013). A logit plus independent Gumbel noise is largest at key
j with the softmax probability of j. Given a row's head, which holds its largest logits, the noisy maximum M over the
head is known at once; a tail key, whose logit is at most the head's smallest S_min, can beat it only with noise above
B = M - S_min. So only these rare noises are drawn. The noise above a level is represented by the highest point of a
Poisson process of intensity exp(-g), which has the Gumbel distribution: all tail keys together have a Poisson number
of points with mean n exp(-B), each at a uniform key and at height B plus an exponential variable. In expectation there
are at most n / k per sample for a head of k keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count
from approxkmv.compute.loops import compiled_loops
from approxkmv.compute.threads import over_threads

_GAMES = 1 << 15  # samples over all rows at a time, each of which may draw as many tail keys as the root of n
_PAIRS = 1 << 20  # rows gathered at a time
_MARKS = 1 << 22  # bytes that mark the heads of some rows, few enough to stay in the cache


@dataclass(frozen=True)
class SampledRows:
    """A sparse random matrix whose expectation is the matrix of softmax rows; each row sums to one."""

    head_keys: torch.Tensor
    """(n_q, h)"""
    head_weights: torch.Tensor | None
    """(n_q, h), or None if the head is sampled like the tail."""
    rows: torch.Tensor
    keys: torch.Tensor
    """(t,) each: the sampled rows and keys, not shuffled: shuffle before taking a subset."""
    weight: float
    """The weight of each sampled pair: one over the number of samples of a row."""

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """The matrix times v (n_k, d_v): (n_q, d_v)."""
        if self.head_weights is None:
            out = v.new_zeros(len(self.head_keys), v.shape[1])
        else:
            out = torch.nn.functional.embedding_bag(self.head_keys, v, per_sample_weights=self.head_weights, mode="sum")
        for some, keys in zip(self.rows.split(_PAIRS), self.keys.split(_PAIRS), strict=True):
            out.index_add_(0, some, v[keys], alpha=self.weight)
        return out

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, keys and weights of all entries; pairs that occur twice count twice."""
        weights = torch.full((len(self.rows),), self.weight, device=self.rows.device)
        if self.head_weights is None:
            return self.rows, self.keys, weights
        n, h = self.head_keys.shape
        of_head = torch.arange(n, device=self.rows.device).repeat_interleave(h)
        return (
            torch.cat([of_head, self.rows]),
            torch.cat([self.head_keys.flatten(), self.keys]),
            torch.cat([self.head_weights.flatten(), weights]),
        )


def products_of_pairs(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """<q[rows], k[keys]> (t,) for t pairs."""
    loops = None
    if q.device.type == "cpu":
        loops = compiled_loops("attention.searched.loops", "attention.searched.trials.pairs")
    if loops is not None:
        out = torch.empty(len(rows))
        given = [t.contiguous().numpy() for t in (q, k, rows, keys, out)]
        over_threads(lambda first, last: loops.products(first, last, *given), len(rows))
        return out
    parts = zip(rows.split(_PAIRS // 16), keys.split(_PAIRS // 16), strict=True)
    return torch.cat([torch.linalg.vecdot(q[some], k[here]) for some, here in parts])


def sample_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    head_keys: torch.Tensor,
    head_logits: torch.Tensor,
    floor: torch.Tensor,
    population: int,
    samples: int,
    generator: torch.Generator,
    *,
    head: str = "exact",
) -> SampledRows:
    """Sample each row's softmax, over its head and tail, `samples` times.

    The tail of a row consists of the keys 0 to population - 1 that are not in its head. Unbiased if no tail key has a
    logit above the floor, which an exact search of the head guarantees.

    Args:
        q, k: (n_q, d) scaled, (n_k, d), float32.
        head_keys: (n_q, h) distinct keys for each row. head_logits: (n_q, h), -inf if there is no key.
        floor: (n_q,) the smallest logit that the search of the head admitted.
        population: as above. samples: per row.
        generator: on the device of q.
        head: "exact": the head's keys share the wins of the head in proportion to their softmax, and only the tail is
            sampled, which keeps the expectation and lowers the variance; "sampled": every sample is a single key.
    """
    n = len(q)
    heads, rows, keys = [], [], []
    step = min(n, max(1, min(_GAMES // samples, _MARKS // (population + 1))))
    # Each step sets the marks of its own heads and clears them again: neither memory nor work is n_q times n_k.
    marks = torch.zeros(step, population + 1, dtype=torch.bool, device=q.device)
    for i in range(0, n, step):
        here = slice(i, min(i + step, n))
        logits, members = head_logits[here], head_keys[here]
        # Relative to the largest: at a logit of 2e7 even the log of 2 in a sum of two is rounded to 0 or 2.
        largest = logits.amax(1)
        logits = logits - largest.unsqueeze(1)
        highest = logits.logsumexp(1)
        games = len(logits) * samples
        # exp(-G) of a Gumbel variable G is exponential: exp(-M) = exp(-highest) e, the level of the head's winner.
        e = torch.empty(len(logits), samples, device=q.device).exponential_(generator=generator)
        rates = population * (floor[here] - largest - highest).clamp_max(0).exp().unsqueeze(1) * e
        points = torch.poisson(rates, generator=generator).long().flatten()
        game = torch.repeat_interleave(torch.arange(games, device=q.device), points)
        where = torch.rand(len(game), generator=generator, device=q.device, dtype=torch.float64)
        drawn = (where * population).long().clamp_max(max(population - 1, 0))
        real = logits > -torch.inf
        column = torch.where(real, members, population).clamp_max(population)
        marks[: len(logits)].scatter_(1, column, True)
        is_tail = ~marks[game // samples, drawn]
        marks[: len(logits)].scatter_(1, column, False)
        game, drawn = game[is_tail], drawn[is_tail]
        row = game // samples
        # The height of a point above the head's winner, both measured from S_min: an exponential variable.
        height = torch.empty(len(game), device=q.device).exponential_(generator=generator)
        lead = products_of_pairs(q, k, row + i, drawn) - floor[here][row] + height
        count(kernel_evaluations=int(real.sum()), other_products=len(game))
        game, drawn, lead = (t[lead > 0] for t in (game, drawn, lead))
        best = torch.zeros(games, device=q.device).scatter_reduce_(0, game, lead, "amax")
        wins = lead == best[game]
        lost = torch.zeros(games, dtype=torch.bool, device=q.device)
        lost[game[wins]] = True
        rows.append(game[wins] // samples + i)
        keys.append(drawn[wins])
        share = exp_(logits - highest.unsqueeze(1))
        if head == "exact":
            heads.append(share * (1 - lost.view(len(logits), samples).float().mean(1, keepdim=True)))
        else:
            chosen = members.gather(1, torch.multinomial(share, samples, replacement=True, generator=generator))
            kept = (~lost).nonzero().squeeze(1)
            rows.append(kept // samples + i)
            keys.append(chosen.flatten()[kept])
    weights = torch.cat(heads) if heads else None
    return SampledRows(head_keys, weights, torch.cat(rows), torch.cat(keys), 1.0 / samples)
