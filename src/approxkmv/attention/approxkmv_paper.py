"""Appendix A.1.4 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025), to the letter.

Sorted angular hashing (KDEformer, Zandieh et al. 2023): signs of Gaussian projections give queries and keys a code,
the codes are put in Gray order, queries and keys sorted by it are cut into blocks, and a block of queries meets its
block of keys exactly. The residual is estimated from columns sampled by norm. Rows whose empirical variance is above
the average take 1.5 times the samples.
"""

from __future__ import annotations

import torch

from approxkmv.attention.contract import Method, per_batch

_MORE = 1.5


def gray_rank(bits: torch.Tensor) -> torch.Tensor:
    """Position (n,) in Gray order of each row of bits (n, p), so that neighbours differ in one bit."""
    rank = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    running = torch.zeros_like(rank)
    for i in range(bits.shape[1]):
        running = running ^ bits[:, i].long()
        rank = 2 * rank + running
    return rank


def column_probabilities(v: torch.Tensor) -> torch.Tensor:
    """Sampling probabilities (n_k,), proportional to |[v, 1]_j| / |[v, 1]|_op + 1/n_k."""
    extended = torch.cat([v, v.new_ones(len(v), 1)], 1)
    largest = torch.linalg.eigvalsh(extended.mT @ extended)[-1].clamp_min(1e-30).sqrt()
    share = extended.square().sum(1).sqrt() / largest + 1.0 / len(v)
    return share / share.sum()


def sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    *,
    block: int,
    samples: int,
    projections: int,
    normalised: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerators (n_q, d_v), row sums (n_q,) and the logs (n_q,) that both are divided by, for scaled queries."""
    n_q, n_k, d = len(q), len(k), q.shape[1]
    directions = torch.randn(d, projections, generator=generator, device=q.device)
    order_q = gray_rank(q @ directions > 0).argsort(stable=True)
    order_k = gray_rank(k @ directions > 0).argsort(stable=True)
    blocks = max(1, -(-n_q // block))
    # Equal blocks for any n: the last ones are padded, queries with rows that are dropped, keys with weight zero.
    rows, columns = -(-n_q // blocks), -(-n_k // blocks)
    place_q = torch.nn.functional.pad(order_q, (0, blocks * rows - n_q)).view(blocks, rows)
    place_k = torch.nn.functional.pad(order_k, (0, blocks * columns - n_k)).view(blocks, columns)
    padding = torch.arange(blocks * columns, device=q.device).view(blocks, 1, columns) >= n_k
    block_of_key = torch.empty_like(order_k)
    block_of_key[order_k] = torch.arange(n_k, device=q.device) // columns

    probabilities = column_probabilities(v)
    more = round(_MORE * samples)
    drawn = torch.multinomial(probabilities, more, replacement=True, generator=generator)
    drawn_k, drawn_p, drawn_block = k[drawn], probabilities[drawn], block_of_key[drawn]
    extended = torch.cat([v, v.new_ones(n_k, 1)], 1)
    drawn_v = extended[drawn] / drawn_p.unsqueeze(1)
    drawn_size = drawn_v.square().sum(1)

    heavy = q.new_empty(blocks, rows, extended.shape[1])
    first, all_of_them = torch.empty_like(heavy), torch.empty_like(heavy)
    variance, shifts = q.new_empty(blocks, rows), q.new_empty(blocks, rows)
    step = max(1, 1024 // rows)
    for b in range(0, blocks, step):
        here = slice(b, b + step)
        some = q[place_q[here]]
        logits = (some @ k[place_k[here]].mT).masked_fill_(padding[here], -torch.inf)
        light = some @ drawn_k.mT
        # One shift for both, so that neither overflows
        shift = torch.maximum(logits.amax(-1), light.amax(-1))
        shifts[here] = shift
        heavy[here] = logits.sub_(shift.unsqueeze(-1)).exp_() @ extended[place_k[here]]
        light.sub_(shift.unsqueeze(-1)).exp_()
        own = drawn_block == torch.arange(b, b + len(some), device=q.device).unsqueeze(1)
        light.masked_fill_(own.unsqueeze(1), 0)
        first[here] = light[..., :samples] @ drawn_v[:samples]
        all_of_them[here] = first[here] + light[..., samples:] @ drawn_v[samples:]
        variance[here] = light[..., :samples].square() @ drawn_size[:samples] / samples
        variance[here] -= (first[here] / samples).square().sum(-1)
    # The average is over the variances of the estimates, each with its row's own factor exp(shift) back in place.
    if normalised:
        size = (heavy + first / samples)[..., -1]
        log_variance = variance.clamp_min(1e-37).log() - 2 * size.clamp_min(1e-37).log()
    else:
        log_variance = variance.clamp_min(1e-37).log() + 2 * shifts
    counted = torch.arange(blocks * rows, device=q.device).view(blocks, rows) < n_q
    logs = log_variance[counted]
    average = torch.logsumexp(logs.double(), 0) - torch.log(logs.new_tensor(float(n_q), dtype=torch.float64))
    above = (log_variance.double() > average).unsqueeze(-1)
    answers = heavy + torch.where(above, all_of_them / more, first / samples)
    out, out_shift = q.new_empty(n_q, extended.shape[1]), q.new_empty(n_q)
    out[order_q] = answers.flatten(0, 1)[:n_q]
    out_shift[order_q] = shifts.flatten()[:n_q]
    return out[:, :-1], out[:, -1], out_shift


def _approxkmv_paper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    block: int,
    samples: int,
    projections: int,
    normalised: bool,
) -> torch.Tensor:
    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        numerators, row_sums, _ = sums(
            q * scale,
            k,
            v,
            generator,
            block=block,
            samples=samples,
            projections=projections,
            normalised=normalised,
        )
        # Where the logits are large a row's sampled terms may all vanish beside its shift; then nothing is known.
        return numerators / row_sums.clamp_min(torch.finfo(q.dtype).tiny).unsqueeze(1)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="approxkmv-paper",
    compute=_approxkmv_paper,
    summary="A.1.4 to the letter: sorted hashing, column-norm sampling, more samples where the variance is high",
    defaults={"block": 128, "samples": 128, "projections": 7, "normalised": False},
    grid=[
        {"block": 32, "samples": 32},
        {"block": 64, "samples": 64},
        {"block": 64, "samples": 128},
        {"block": 128, "samples": 128},
        {"block": 128, "samples": 256},
        {"block": 256, "samples": 256},
        {"block": 256, "samples": 512},
        {"block": 512, "samples": 512},
        {"block": 512, "samples": 1024},
        {"block": 1024, "samples": 2048},
    ],
)
