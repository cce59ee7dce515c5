"""Near keys exactly, far keys expanded around the centre of a block of queries; biased, but cheap for its error.

Cost: n d (near + n / block), up to constants. The expansion itself is in `expansion`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.expansion import Clustering, expand, in_one_block, of_one_block
from approxkmv.attention.blocks.grouping import block_size
from approxkmv.attention.blocks.near_keys import sums_of_keys
from approxkmv.attention.blocks.reach import stand_apart, with_keys_apart
from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.attention.exact import fused as exact_fused
from approxkmv.compute.counting import count
from approxkmv.compute.threads import over_threads
from approxkmv.compute.trial import fastest


@dataclass(frozen=True)
class Parameters(Clustering):
    """The parameters of the clustering, and the dtype of products: bfloat16, float32, or which a trial found faster."""

    near: int = 512
    products: str = "fastest"


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    generator: torch.Generator,
    parameters: Parameters,
    *,
    scale: float,
) -> torch.Tensor:
    """The method for one batch entry on a CPU: float32 q (n_q, d), k (n_k, d), v (n_k, d_v) to (n_q, d_v)."""
    near = parameters.near
    parameters = replace(parameters, block=block_size(parameters.block, len(q), len(k)))
    if near >= len(k) or parameters.block == 1:
        return exact_fused.attend(q, k, v, scale)
    loops = block_loops()
    apart = stand_apart(q, k, scale)
    if loops is not None and parameters.directions == 0 and not len(apart) and in_one_block(q, k, scale, near):
        out = torch.empty(len(q), v.shape[1])
        inputs, room = of_one_block(q, k, v, generator.initial_seed(), scale, near)
        own = len(q) == len(k)
        number = loops.answers_of_one_block(own, *inputs, *room, out.numpy())
        count(kernel_evaluations=len(k) + (len(q) + 1) * number + len(q) * (1 + own))
        return exact_fused.exactly_where_lost(out, None, q, k, v, scale)
    low = torch.bfloat16 if parameters.products == "bfloat16" else torch.float32
    if low == torch.bfloat16 and q.shape[1] % 2:
        q, k = (torch.nn.functional.pad(t, (0, 1)) for t in (q, k))
    e = expand(q, k, v, generator, apart, parameters, scale=scale, low=low)
    sums, scales = sums_of_keys(e.blocks, k, e.mean, v, e.chosen, e.ends, None, low, e.rounded)
    with_own_keys = len(q) == len(k)
    seen = e.seen(k if with_own_keys else None)
    lost = e.lost(sums[:, 0], scales, seen)
    if loops is not None and not len(apart):
        out = torch.empty(len(q), v.shape[1])
        rows = sums, scales, seen.log_weight, seen.value, seen.own_log, seen.own_share, seen.own_share_seen
        given: list[Any] = [e.blocks.queries, e.blocks.starts, e.blocks.sizes, e.tilted]
        given += [t.numpy() for t in (*rows, v.contiguous(), out)]
        over_threads(lambda first, last: loops.expanded_answers(first, last, *given), len(e.blocks))
        return exact_fused.exactly_where_lost(out, lost, q, k, v, scale)
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
    numerators, row_sums, _ = with_keys_apart(tuple(rest), apart, q, k, v, e.mean, scale)  # type: ignore[arg-type]
    return exact_fused.exactly_where_lost(numerators / row_sums.unsqueeze(1), lost, q, k, v, scale)


def _local_expansion(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    seed: int,
    **given: Any,
) -> torch.Tensor:
    if q.device.type == "cuda":
        from approxkmv.attention.blocks.cuda import local_expansion as local_expansion_cuda

        return local_expansion_cuda.attend(q, k, v, scale=scale, seed=seed, **given)
    if q.device.type != "cpu":
        raise UnavailableError(f"local-expansion has no kernel for the device {q.device}")
    parameters = Parameters(**given)
    if parameters.products == "fastest":
        products = fastest("attention.blocks.trials.products", "float32", "bfloat16")
        parameters = replace(parameters, products=products)

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return attend(q, k, v, generator, parameters, scale=scale)

    return per_batch(single, q, k, v, seed, around_mean=True)


method = Method(
    name="local-expansion",
    compute=_local_expansion,
    summary="near keys exactly, far keys expanded around the centre of a block of queries",
    defaults=asdict(Parameters()),
    may_be_zero=frozenset({"directions"}),
    choices={"products": ("fastest", "bfloat16", "float32")},
    grid=[
        # One block, first order: for nearly uniform attention.
        {"block": 2**24, "near": 16, "directions": 0},
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
