"""Near keys exactly, far keys expanded around the centre of a block of queries; biased, but cheap for its error.

Cost: n d (near + n / block), up to constants. The expansion itself is in `expansion`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from approxkmv.attention.blocks.arrays import ScaledSums
from approxkmv.attention.blocks.chunks import EarlierKeys, chunk_length
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.expansion import Clustering, KeySide, expand, in_one_block, key_side, of_one_block
from approxkmv.attention.blocks.grouping import block_size
from approxkmv.attention.blocks.near_keys import sums_of_keys
from approxkmv.attention.blocks.reach import REACH, most_off, spreads, stand_apart, with_keys_apart
from approxkmv.attention.causal import Flash
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.attention.kernels.exponentials import LOWEST
from approxkmv.attention.kernels.flash import FLASH
from approxkmv.compute.counting import count
from approxkmv.compute.scratch import scratch
from approxkmv.compute.threads import over_threads
from approxkmv.compute.trial import fastest_dtype


@dataclass(frozen=True)
class Parameters(Clustering):
    """The parameters of the clustering, and the dtype of products: bfloat16, float32, or which a trial found faster."""

    near: int = 512
    products: str = "fastest"


def answers(
    q: torch.Tensor,
    side: KeySide,
    generator: torch.Generator,
    parameters: Parameters,
    *,
    scale: float,
    with_own_keys: bool,
    others: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (n_q, d_v) and logs of the row sums (n_q,) for keys less their `mean`.

    For float32 q (n_q, d) on a CPU; rows that are not finite, as lost ones are, must be computed exactly.
    with_own_keys: key i is query i's own (as many keys as queries), and is summed exactly. others: see
    `Expansion.lost`.
    """
    k, v, apart = side.k, side.v, side.apart
    if q.shape[1] < k.shape[1]:
        q = torch.nn.functional.pad(q, (0, 1))
    loops = block_loops()
    e = expand(q, side, generator, parameters, scale=scale)
    sums, scales = sums_of_keys(e.blocks, k, e.mean, v, e.chosen, e.ends, rounded=e.rounded)
    seen = e.seen(k if with_own_keys else None)
    lost = e.lost(sums[:, 0], scales, seen, others)
    if loops is not None and not len(apart):
        out, logs = torch.empty(len(q), v.shape[1]), torch.empty(len(q))
        near_keys = ScaledSums(sums.numpy(), scales.numpy())
        given = e.tilted, e.blocks.arrays, near_keys, seen.arrays, v.contiguous().numpy(), out.numpy(), logs.numpy()
        over_threads(lambda first, last: loops.expansion.expanded_answers(first, last, *given), len(e.blocks))
        out[lost] = torch.nan
        return out, logs
    scale_of_row = e.blocks.of_rows(scales)
    weight = (seen.log_weight - scale_of_row).exp_()
    # Exactly, instead of its share of the far key.
    added = (seen.own_log - scale_of_row).exp_()
    counted = added - weight * (seen.own_share_seen if e.tilted else seen.own_share)
    # What the own key's share leaves of the far value: the weights of a row sum to one.
    left = weight if e.tilted else weight * (1 - seen.own_share_seen + seen.own_share)
    value = seen.value if e.tilted else e.blocks.of_rows(seen.value)
    numerators = sums[:, 1:] + left.unsqueeze(1) * value
    if with_own_keys:
        numerators += counted.unsqueeze(1) * e.blocks.in_rows(v)
    row_sums = sums[:, 0] + weight + added - weight * seen.own_share_seen
    rest = (e.blocks.of_queries(t) for t in (numerators, row_sums, scale_of_row))
    numerators, row_sums, scale_of_row = with_keys_apart(tuple(rest), apart, q, k, v, e.mean, scale)  # type: ignore[arg-type]
    row_sums[lost] = torch.nan
    return numerators / row_sums.unsqueeze(1), scale_of_row + row_sums.log()


def answers_in_one_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    *,
    scale: float,
    with_own_keys: bool,
    others: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one block of all queries without axes, by compiled loops."""
    out, logs = torch.empty(len(q), v.shape[1]), torch.empty(len(q))
    one = of_one_block(q, k, v, generator.initial_seed(), scale, parameters.near)
    variances = (scale**2 * spreads(q, k)).numpy()
    limits = most_off(len(k) - parameters.near), REACH
    loops = block_loops()
    assert loops is not None
    others = torch.full_like(logs, -torch.inf) if others is None else others
    of_rows = variances, others.numpy()
    number = loops.one_block.answers_of_one_block(with_own_keys, one, of_rows, limits, out.numpy(), logs.numpy())
    count(kernel_evaluations=len(k) + (len(q) + 1) * number + len(q) * (1 + with_own_keys))
    return out, logs


def _local_expansion(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **given: Any
) -> torch.Tensor:
    if q.device.type == "cuda":
        from approxkmv.attention.blocks.cuda import local_expansion as local_expansion_cuda

        return local_expansion_cuda.attend(q, k, v, scale=scale, seed=seed, **given)
    if q.device.type != "cpu":
        raise UnavailableError(f"local-expansion has no kernel for the device {q.device}")
    parameters = Parameters(**given)
    low = fastest_dtype("attention.blocks.trials.products", parameters.products)
    parameters = replace(parameters, block=block_size(parameters.block, q.shape[1], k.shape[1]))
    near, loops = parameters.near, block_loops()

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if near >= len(k) or parameters.block == 1:
            return exact_fused.attend(q, k, v, scale)
        own = len(q) == len(k)
        apart = stand_apart(q, k, scale)
        if loops is not None and parameters.directions == 0 and not len(apart) and in_one_block(q, k, scale, near):
            out, _ = answers_in_one_block(q, k, v, generator, parameters, scale=scale, with_own_keys=own)
        else:
            side = key_side(k, v, apart, parameters, v.to(low))
            out, _ = answers(q, side, generator, parameters, scale=scale, with_own_keys=own)
        return exact_fused.exactly_where_lost(out, q, k, v, scale)

    return per_batch(single, q, k, v, seed, around_mean=True)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, **given: Any
) -> torch.Tensor:
    if q.device.type != "cpu":
        raise UnavailableError(f"the causal form of local-expansion runs on a CPU only, not on {q.device.type}")
    parameters = Parameters(**given)
    low = fastest_dtype(FLASH, parameters.products)
    length = chunk_length(q.shape[1], parameters.near)
    one_block = parameters.directions == 0 and block_loops() is not None

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # Rounding must not depend on a common offset; the first value is seen by every row.
        values = torch.sub(v, v[0], out=scratch("values", *v.shape))
        first = Flash(q[:length], k[:length], values[:length], scale, length, low).triangles()
        if len(q) <= length:
            return first[0].add_(v[0])
        # Nor on one of the keys, or the parts of a row would not fit each other: that of the first chunk may be known.
        k = torch.sub(k, k[:length].mean(0), out=scratch("centred", *k.shape))
        flash = Flash(q, k, values, scale, length, low)
        out, logs = flash.triangles(1)
        out[:length] = first[0]
        earlier, given = EarlierKeys(q, k, values, flash, parameters), (generator, parameters)
        for here, apart in earlier:
            # Query i and key i of these belong to different tokens.
            if one_block and not len(apart):
                some, theirs = k[: here.start], values[: here.start]
                shift = q[here] @ (scale * some.mean(0))
                found, log = answers_in_one_block(
                    q[here], some, theirs, *given, scale=scale, with_own_keys=False, others=logs[here] - shift
                )
            else:
                side, shift = earlier.before(here, apart)
                found, log = answers(q[here], side, *given, scale=scale, with_own_keys=False, others=logs[here] - shift)
            log.add_(shift)
            lost = (~(found.sum(1) + log).isfinite()).nonzero().squeeze(1)
            if len(lost):
                found[lost], log[lost] = flash.rows(here.start + lost, here.start)
            out[here].lerp_(found, (log - logs[here]).clamp_(LOWEST, -LOWEST).sigmoid_().unsqueeze(1))
        return out.add_(v[0])

    return per_batch(single, q, k, v, seed)


method = Method(
    name="local-expansion",
    compute=_local_expansion,
    causal=_causal,
    summary="near keys exactly, far keys expanded around the centre of a block of queries",
    defaults=asdict(Parameters()),
    may_be_zero=frozenset({"directions"}),
    choices={"products": ("fastest", "bfloat16", "float32")},
    grid=[
        # One block, first order: for nearly uniform attention; with the causal mask, one block per chunk.
        {"block": 2**24, "near": 16, "directions": 0},
        {"block": 2**24, "near": 128, "directions": 0},
        {"block": 2**24, "near": 256, "directions": 0},
        {"block": 512, "near": 64},
        {"block": 256, "near": 64},
        {"block": 256, "near": 128},
        {"block": 256, "near": 192},
        {"block": 256, "near": 256},
        {"block": 192, "near": 256},
        {"block": 256, "near": 384},
        {"block": 192, "near": 384},
        {"block": 160, "near": 384},
        {"block": 128, "near": 384},
        {"block": 192, "near": 512},
        {"block": 128, "near": 512},
        {"block": 128, "near": 640},
        {"block": 128, "near": 768},
        {"block": 96, "near": 768},
        {"block": 64, "near": 1024},
        {"block": 32, "near": 1024},
        {"block": 32, "near": 2048},
    ],
)
