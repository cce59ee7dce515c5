"""Light keys of a block: how many to draw, drawing them, and the sample's sums around the far key."""

from __future__ import annotations

import numpy as np
import torch

from approxkmv.attention.blocks.arrays import Sample, ScaledSums
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.expansion import Expansion
from approxkmv.compute.threads import over_threads

LEAST_SAMPLES = 4
# Above this variance of a query's logits around its block's, the far key is too inaccurate for a control variate.
CONTROLLED = 2.0
# A row's estimate is the difference of a sampled sum and the far key's share of it. If its parts exceed the result by
# more than this factor it is noise, and a quotient may lie far outside the values. At 8 these are 0.1 % of the rows of
# most heads of SmolLM2 at 2,048 keys, and 2 % of one whose far keys outweigh its near ones.
MOST_PARTS = 8.0


def budgets(e: Expansion, deviation: torch.Tensor, samples: int) -> np.ndarray:
    """Samples (blocks,) per block from its predicted deviation, `samples` on average over the queries."""
    sizes = e.blocks.sizes
    average = float(deviation.numpy() @ sizes) / float(sizes.sum())
    # Without axes nothing is known about the deviation: use the same for all.
    counts = samples * (deviation.numpy() / average if average > 1e-30 else np.ones(len(sizes)))
    return counts.clip(min(LEAST_SAMPLES, samples), 4 * samples).round().astype(np.int64)


def predicted_deviation(
    e: Expansion, heavy: torch.Tensor, scales: torch.Tensor, log_weight: torch.Tensor
) -> torch.Tensor:
    """Root mean square (blocks,), float64, over a block's rows, of the uncertainty left by one sample.

    Relative to the row's sum, this is its far part times the deviation of one sample of the difference from the control
    variate, which is about that of a lognormal beyond first order, exp(s) - 1 - s, where s is the variance of the
    query's logits around its block's.
    """
    loops = block_loops()
    if loops is not None:
        out = torch.empty(len(e.blocks), dtype=torch.float64)
        given = e.blocks.arrays, ScaledSums(heavy.numpy(), scales.numpy()), log_weight.numpy(), out.numpy()
        over_threads(lambda first, last: loops.sampling.far_deviations(first, last, *given), len(e.blocks))
        return out
    # A row whose sum is not a number counts as all light; it is recomputed exactly at the end.
    share = torch.sigmoid(log_weight - e.blocks.of_rows(scales) - heavy[:, 0].log()).nan_to_num(1.0)
    s = e.blocks.row_variances.clamp_max(10.0)
    # Padded rows have no variance.
    predicted = share.square() * (s.exp() - 1 - s)
    return torch.from_numpy(np.add.reduceat(predicted.double().numpy(), e.blocks.starts) / e.blocks.sizes).sqrt()


def draw(e: Expansion, counts: np.ndarray, generator: torch.Generator) -> Sample:
    """Draw counts[b] light keys for block b.

    Half of a key's probability is proportional to its expected weight w, the other half uniform: so no term can be more
    than twice as large as under uniform sampling, however far a query is from its block.
    """
    blocks, n_k = len(counts), e.weights.shape[2]
    ends = counts.cumsum()
    points = torch.rand(int(ends[-1]), generator=generator, dtype=torch.float64).numpy()
    keys = np.empty(len(points), np.int64)
    loops = block_loops()
    if loops is not None:
        sample = Sample(keys, ends, np.empty(len(keys), np.float32), np.empty(len(keys), np.float32))
        given = e.chosen, e.ends, e.weights.numpy(), e.total.numpy(), points, sample
        over_threads(lambda first, last: loops.sampling.draw_light(first, last, *given), blocks)
        return sample
    # Without light keys there is nothing to draw: take any key, with weight 0.
    with np.errstate(divide="ignore"):
        even = 1.0 / (n_k - np.diff(e.ends, prepend=0)).astype(np.float64)
    heights = e.weights[:, 0].double().cumsum(1).numpy()
    by_weight = heights[:, -1] > 0
    begin = first = 0
    for b, end in enumerate(ends):
        u = points[begin:end] * (2 if by_weight[b] else 1)
        near = e.chosen[first : e.ends[b]]
        # A number below one half is a position among the light keys, one above it a position in the running sum.
        place = (u * (n_k - len(near))).astype(np.int64).clip(max=max(n_k - len(near) - 1, 0))
        # The number of near keys before the light key at this place, by bisection.
        evenly = place + np.searchsorted(near - np.arange(len(near)), place, side="right")
        # right: a near key, whose interval is empty, is never drawn.
        weighed = np.searchsorted(heights[b], (u - 1) * heights[b, -1], side="right")
        keys[begin:end] = np.where(u < 1, evenly, weighed).clip(max=n_k - 1)
        begin, first = end, int(e.ends[b])
    of_draw = np.repeat(np.arange(blocks), counts)
    share = e.weights.numpy()[of_draw, 0, keys].astype(np.float64) / e.total.double().numpy()[of_draw]
    rate = counts[of_draw] * np.where(by_weight[of_draw], 0.5 * (share + even[of_draw]), even[of_draw])
    return Sample(keys, ends, -np.log(rate).astype(np.float32), (share / rate).astype(np.float32))


def sampled_moments(
    e: Expansion, sample: Sample, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each block's sample with the control variate's weights, to first order around its far key.

    For one and the values, (blocks, 1 + d_v); for the distances from the far key and, if the far values are tilted, for
    these times each value, (blocks, 1 or 1 + d_v, d).
    """
    number, keys, of_draw = len(e.blocks), torch.from_numpy(sample.keys), torch.from_numpy(sample.blocks())
    control, values = torch.from_numpy(sample.control).unsqueeze(1), v[keys]
    weighed = torch.cat([control, control * values], 1)
    means = torch.zeros(number, weighed.shape[1]).index_add_(0, of_draw, weighed)
    centred = k[keys] - e.mean - e.far_axes[of_draw, 0]
    tilts = torch.zeros_like(e.far_axes)
    for c in range(tilts.shape[1]):
        tilts[:, c].index_add_(0, of_draw, centred * weighed[:, c : c + 1])
    return means, tilts


def sampled_own(e: Expansion, sample: Sample) -> torch.Tensor:
    """Per row, the sum of 1 / (counts p) over its block's draws of the row's own key; its mean is one."""
    blocks, keys = e.blocks, torch.from_numpy(sample.keys)
    met = torch.from_numpy(blocks.labels)[keys] == torch.from_numpy(sample.blocks())
    rows = torch.from_numpy(blocks.rows)[keys[met]]
    return torch.zeros(len(blocks.deltas)).index_add_(0, rows, torch.from_numpy(sample.logs)[met].exp())


def trusted(numerators: torch.Tensor, row_sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators (..., d_v) and row sums from those of `approxkmv.sums`; row sums that are mostly noise become NaN."""
    return numerators[..., :-1], torch.where(numerators[..., -1] < MOST_PARTS * row_sums, row_sums, torch.nan)
