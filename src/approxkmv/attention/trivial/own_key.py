"""The query's own key exactly, the rest of the row as mean(v): shows when a test with K = Q is too easy."""

from __future__ import annotations

import torch

from approxkmv.attention.contract import Method, UnavailableError, per_batch
from approxkmv.compute.counting import count


def _own_key(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, samples: int
) -> torch.Tensor:
    if q.shape[1] != k.shape[1]:
        raise UnavailableError(f"own-key pairs query i with key i, but there are {q.shape[1]} and {k.shape[1]}")

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        n = len(k)
        chosen = torch.randint(n, (min(samples, n),), generator=generator, device=k.device)
        own = scale * (q * k).sum(-1)
        count(kernel_evaluations=n * (1 + len(chosen)))
        # log of the sum over the other n - 1 keys, estimated from the sample
        rest = torch.logsumexp(scale * (q @ k[chosen].mT), -1) + torch.log(own.new_tensor((n - 1) / len(chosen)))
        weight = torch.sigmoid(own - rest).unsqueeze(-1)
        return weight * v + (1 - weight) * v.mean(0)

    return per_batch(single, q, k, v, seed)


method = Method(
    name="own-key",
    compute=_own_key,
    summary="the query's own key exactly, its row sum from uniform keys, mean(v) for the rest",
    defaults={"samples": 64},
    grid=[{"samples": 2**i} for i in range(3, 11)],
    trivial=True,
)
