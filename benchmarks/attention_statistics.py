"""Speed of attention_statistics relative to exact attention: python benchmarks/attention_statistics.py

CPU time of one float32 head on one core, interleaved with torch's scaled_dot_product_attention on the same q and k with
as many value columns: entropy, support and masses (the first pass), the same with a causal mask in both, and each
further pass. Then the largest relative differences from float64 n x n attention at n = 4,096, for float32 products with
logits up to 30 and for float64 products with logits up to 10^4. Writes results/benchmarks/attention_statistics.csv and
.json; --out changes the name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch.nn.functional import scaled_dot_product_attention
from writing import out_of, times, write

from approxkmv import attention_statistics

ROUNDS = 7
LENGTHS = (2048, 8192)
# Of the n x n matrix
WHOLE = 4096


def head(n: int, d: int, largest: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random queries and keys with logits up to `largest`."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, d, generator=generator) for _ in range(2))
    found = max(float((d**-0.5 * part @ k.mT).abs().max()) for part in q.split(512))
    return q * (largest / found) ** 0.5, k * (largest / found) ** 0.5


def first_pass(q: torch.Tensor, k: torch.Tensor, mask: str) -> object:
    """Everything that needs no further pass."""
    found = attention_statistics(q, k, mask=mask)
    return found.support, found.entropy_quantiles, found.largest_weight, found.first_mass, found.sink_mass


def calls(n: int) -> dict[str, Callable[[], object]]:
    """What is timed at one length; sdpa first."""
    q, k = head(n, 64, 12.0)
    qkv = q[None, None], k[None, None], k[None, None]
    return {
        "sdpa": lambda: scaled_dot_product_attention(*qkv),
        "first pass": lambda: first_pass(q, k, "none"),
        "sdpa, causal": lambda: scaled_dot_product_attention(*qkv, is_causal=True),
        "first pass, causal": lambda: first_pass(q, k, "causal"),
        "with keys_per_share": lambda: attention_statistics(q, k).keys_per_share,
        "with c and order ratios": lambda: attention_statistics(q, k).log_double,
        "with stable_rank": lambda: attention_statistics(q, k).stable_rank,
        "first pass, float64": lambda: attention_statistics(q, k, dtype="float64"),
    }


def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    """(n,): sum - p log p, relative to itself also where one p rounds to 1."""
    top, place = log_p.max(-1, keepdim=True)
    below = top - log_p
    others = (-below).exp().scatter(-1, place, 0.0)
    return others.sum(-1).log1p() + (others * below).nan_to_num(nan=0.0).sum(-1) / (1.0 + others.sum(-1))


def accuracy() -> list[dict[str, object]]:
    """Largest relative differences from the n x n matrix in float64."""
    rows = []
    for dtype, largest in (("float32", 30.0), ("float64", 1e4)):
        q, k = head(WHOLE, 64, largest, seed=1)
        found = attention_statistics(q, k, dtype=dtype)
        log_p = (0.125 * q.double() @ k.double().mT).log_softmax(-1)
        p, entropy = log_p.exp(), entropy_of(log_p)
        for name, right in (("entropy", entropy), ("support", entropy.exp()), ("largest_weight", p.amax(-1))):
            # Entropies of sharp rows may lie below float64's normal numbers, where the reference has fewer digits.
            smallest = torch.finfo(torch.float64).tiny
            gap = float(((getattr(found, name) - right).abs() / right.clamp_min(smallest)).max())
            rows.append({"what": f"{name}, {dtype}, logits up to {largest:g}", "n": WHOLE, "relative_difference": gap})
    return rows


def main() -> None:
    """Run everything, print a table and write it."""
    out = out_of(__doc__, "attention_statistics")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for n in LENGTHS:
        seconds = times(calls(n), ROUNDS, time.process_time)
        for name, taken in seconds.items():
            other = seconds["sdpa, causal" if "causal" in name else "sdpa"]
            ratios = [a / b for a, b in zip(taken, other, strict=True)]
            rows.append(
                {
                    "what": name,
                    "n": n,
                    "median_ms": 1e3 * statistics.median(taken),
                    "least_ms": 1e3 * min(taken),
                    "times_sdpa": statistics.median(ratios),
                    "times_sdpa_least": min(taken) / min(other),
                }
            )
    table = pd.DataFrame(rows + accuracy())
    write(out, table, {"rounds": ROUNDS, "d": 64, "threads": 1, "clock": "cpu"})
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
