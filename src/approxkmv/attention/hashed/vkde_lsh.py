"""Attention as a kernel density with values, by hash tables: the keys of a query's bucket represent all keys.

With p_ij = Pr[h(q_i) = h(k_j)] the sum over the keys of q_i's bucket of exp(scale q_i.k_j) [v_j, 1] / p_ij is an
unbiased estimate of numerator and row sum, for each table and so for the mean over tables. With groups of tables, the
median of the groups' means is used instead, for which bounds with high probability are proved. It is not unbiased. Its
error is smaller than that of one group's mean, but on clustered keys the mean of all tables was still better, large
errors included, so groups are an option and not the default.

If p_ij were the kernel exp(-scale |q_i - k_j|^2 / 2) itself, the weights would be the same for all keys of a row and
the sums of the buckets alone would do. No hash function has that collision probability: 1 - p obeys the triangle
inequality, since h(x) != h(z) needs h(x) != h(y) or h(y) != h(z), but 1 - exp(-r^2/2) does not, at three points on a
short line. So the probability only resembles the kernel, and the weights correct for the rest. The family is the signs
of m projections of the vectors of Lemma 4.1, whose keys all have the same norm R: p = (1 - angle / pi)^m, exactly, with
log p = -m log 2 + (2 m / pi) cos(angle) + O(m cos^2), while log of the kernel is linear in cos(angle) with slope
scale |q| R. Signs are more efficient than shifted grids: per unit of -log p at a right angle, the cost in collisions,
their slope is 2 / (pi log 2), and that of p-stable grids at most 0.6.

Source: section 2.3 of A. Andoni's lecture on kernel density and attention (2025); importance weights as in
Charikar & Siminelakis (2017); angular hashing, Charikar (2002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from approxkmv.attention.causal import Sums, with_ones
from approxkmv.attention.contract import Method
from approxkmv.attention.kernels.exponentials import exp_
from approxkmv.compute.counting import count


def log_collision_probability(cosine: torch.Tensor, bits: int) -> torch.Tensor:
    """log Pr[all of `bits` signs agree] at this cosine of the angle."""
    # Opposite vectors never collide; only rounding gets here.
    angle = cosine.clamp(-1 + 1e-6, 1).acos_()
    return angle.mul_(-1 / math.pi).log1p_().mul_(bits)


@dataclass(frozen=True)
class Parameters:
    """tables; bucket: keys at a right angle in a query's bucket; groups: 1 for the mean, more for the median."""

    tables: int = 16
    bucket: int = 32
    groups: int = 1


def table_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """[Numerators, row sums] (groups, n_q, d_v + 1), each the mean over a group of tables, and their logs (n_q,).

    For scaled queries q (n_q, d). Zero and -inf for a query that collided with no key.
    """
    # As many signs as leave about that many keys at a right angle in a query's bucket
    bits = max(0, math.ceil(math.log2(len(k) / parameters.bucket)))
    # With no bits, each table has one bucket.
    tables = parameters.tables if bits else 1
    groups = min(parameters.groups, tables)
    extended = with_ones(v)
    squares = k.square().sum(1)
    norms = q.square().sum(1).sqrt() * squares.amax().sqrt()
    inverse_norms = 1 / norms.clamp_min(1e-30)
    lift = (squares.amax() - squares).sqrt()
    lifted = torch.cat([k, lift.unsqueeze(1)], 1)
    powers = 2 ** torch.arange(bits, device=q.device)
    out = q.new_zeros(groups, len(q), extended.shape[1])
    shifts = q.new_full((len(q),), -torch.inf)
    for table in range(tables):
        directions = torch.randn(lifted.shape[1], bits, generator=generator, device=q.device)
        count(other_products=(len(q) + len(k)) * bits)
        code_q = ((q @ directions[:-1] > 0) * powers).sum(1)
        code_k = ((lifted @ directions > 0) * powers).sum(1)
        order_q, order_k = code_q.argsort(stable=True), code_k.argsort(stable=True)
        # Gathered once, so that every bucket is a slice.
        sorted_q, sorted_k, sorted_e = q[order_q], k[order_k], extended[order_k]
        inverse, held, shift = inverse_norms[order_q], out[:, order_q], shifts[order_q]
        # Sizes and ends of the buckets of queries and of keys, as lists.
        sizes = [c.bincount(minlength=1 << bits) for c in (code_q, code_k)]
        buckets = [(c.tolist(), c.cumsum(0).tolist()) for c in sizes]
        for size_q, end_q, size_k, end_k in zip(*buckets[0], *buckets[1], strict=True):
            if not size_q or not size_k:
                continue
            rows, these = slice(end_q - size_q, end_q), slice(end_k - size_k, end_k)
            logits = sorted_q[rows] @ sorted_k[these].mT
            count(kernel_evaluations=logits.numel())
            if bits:
                logits -= log_collision_probability(logits * inverse[rows].unsqueeze(1), bits)
            highest = torch.maximum(shift[rows], logits.amax(1))
            # All groups share the row's shift.
            held[:, rows] *= exp_(shift[rows] - highest).unsqueeze(1)
            shift[rows] = highest
            held[table % groups, rows] += exp_(logits.sub_(highest.unsqueeze(1))) @ sorted_e[these]
        out[:, order_q], shifts[order_q] = held, shift
    in_group = torch.arange(tables, device=q.device).remainder(groups).bincount(minlength=groups)
    return out / in_group.view(-1, 1, 1), shifts


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, parameters: Parameters) -> Sums:
    """Numerators (n_q, d_v), row sums (n_q,) and logs (n_q,), for scaled queries; sums are divided by exp(log)."""
    # Attention is invariant to a common shift of the keys, and angles are more informative around their mean.
    centre = k.mean(0)
    both, logs = table_sums(q, k - centre, v, generator, parameters)
    ordered = both.sort(0).values
    mean, median = both.mean(0), 0.5 * (ordered[(len(both) - 1) // 2] + ordered[len(both) // 2])
    # Half of the groups may have found nothing.
    both = torch.where(median[:, -1:] > 0, median, mean)
    # A query that collided with no key gets the mean value, with a log that makes it negligible beside other sums.
    both = torch.where(both[:, -1:] > 0, both, with_ones(v.mean(0, keepdim=True)))
    return both[:, :-1], both[:, -1], logs + q @ centre


method = Method.from_sums(
    "vkde-lsh",
    sums,
    Parameters,
    summary="hash tables: the keys of a query's bucket, weighted by their chance to be there",
    grid=[
        {"tables": 4, "bucket": 16},
        {"tables": 8, "bucket": 32},
        {"tables": 16, "bucket": 32},
        {"tables": 16, "bucket": 64},
        {"tables": 16, "bucket": 128},
        {"tables": 24, "bucket": 128, "groups": 3},
        {"tables": 32, "bucket": 128},
        {"tables": 40, "bucket": 128, "groups": 5},
        {"tables": 32, "bucket": 256},
    ],
)
