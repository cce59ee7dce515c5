"""Speed of the statistics, as ratios within one run: python benchmarks/statistics_speed.py

Head-to-tail ratios of every prefix against torch.topk of every prefix, interleaved, one thread each: one call per head
and all heads in one call, with the float64 product of queries and keys alone as a lower bound for any exact code; then
all heads of many contexts on all cores. Writes results/benchmarks/statistics.csv and .json; --out changes the
name.
"""

from __future__ import annotations

import statistics
import time

import pandas as pd
import torch
from writing import out_of, times, write

from approxkmv import head_to_tail_ratios, log_kernel
from approxkmv.corpora import read_corpus
from approxkmv.statistics import head_statistics

FIRST = 50
N_HEADS = 144
AT_ONCE = 24
# n and d
SIZES = ((512, 64), (155, 32))
ROUNDS = 9


def topk_of_every_prefix(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The obvious method: the kernel once, then for each prefix i the sum of all entries and of the i largest."""
    kernel = torch.exp(log_kernel(q, k)).to(dtype)
    out = []
    for i in range(FIRST, q.shape[0] + 1):
        entries = kernel[:i, :i].flatten()
        head = entries.topk(i).values.sum()
        out.append((entries.sum() - head) / head)
    return torch.stack(out)


def products(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> None:
    """The float64 products of some heads, one after another into the same memory."""
    for one, other in zip(q, k, strict=True):
        torch.mm(one, other.mT, out=out)


def heads(kind: str, n: int, d: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head; the spread of its logits makes it diffuse, ordinary or sharp."""
    spread = {"diffuse": 0.6, "ordinary": 1.2, "sharp": 2.0}[kind]
    return spread * torch.randn(n, d, generator=generator), spread * torch.randn(n, d, generator=generator)


def main() -> None:
    """Run everything, print a table and write it."""
    out, generator = out_of(__doc__, "statistics"), torch.Generator().manual_seed(0)
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for n, d in SIZES:
        for kind in ("diffuse", "ordinary", "sharp"):
            # As many as in a small model, so that a head has left the cache before it is used again.
            pairs = [heads(kind, n, d, generator) for _ in range(AT_ONCE)]
            q, k = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            wide = q.double(), k.double(), torch.empty(n, n, dtype=torch.float64)
            found = times(
                {
                    "a call each": lambda pairs=pairs: [head_to_tail_ratios(q, k, FIRST) for q, k in pairs],
                    "one call": lambda q=q, k=k: head_to_tail_ratios(q, k, FIRST),
                    "product": lambda wide=wide: products(*wide),
                    "float64": lambda q=q, k=k: topk_of_every_prefix(q[0], k[0], torch.float64),
                    "float32": lambda q=q, k=k: topk_of_every_prefix(q[0], k[0], torch.float32),
                },
                ROUNDS,
                time.perf_counter,
            )
            right = topk_of_every_prefix(q[0], k[0], torch.float64)
            difference = (head_to_tail_ratios(q[0], k[0], FIRST) / right - 1).abs().max()
            for how in ("a call each", "one call"):
                for dtype in ("float64", "float32"):
                    against = [AT_ONCE * b / a for a, b in zip(found[how], found[dtype], strict=True)]
                    rows.append(
                        {
                            "what": f"{kind} heads, {how}",
                            "n": n,
                            "d": d,
                            "against": f"topk {dtype}",
                            "ours_ms": 1e3 * statistics.median(found[how]) / AT_ONCE,
                            "other_ms": 1e3 * statistics.median(found[dtype]),
                            "product_ms": 1e3 * statistics.median(found["product"]) / AT_ONCE,
                            "times_faster": statistics.median(against),
                            "lowest": min(against),
                            "highest": max(against),
                            "relative_difference": float(difference) if dtype == "float64" else float("nan"),
                        }
                    )
    torch.set_num_threads(threads)
    rows.append(whole_dev_set(generator))
    table = pd.DataFrame(rows)
    write(out, table, {"rounds": ROUNDS, "heads": AT_ONCE, "threads_of_the_last_row": threads})
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))


def whole_dev_set(generator: torch.Generator) -> dict[str, object]:
    """Both experiments on all contexts of SQuAD's development set, 144 heads each, Q and K given (drawn at random).

    Lengths are those of the contexts, at 1.3 tokens a word, between 50 and 512.
    """
    documents = read_corpus("path:data/squad/dev-v1.1.jsonl.xz")
    lengths = [min(512, max(FIRST, round(1.3 * len(document.context.split())))) for document in documents]
    seconds = 0.0
    for n in lengths:
        q = torch.randn(N_HEADS, n, 64, generator=generator)
        k = torch.randn(N_HEADS, n, 64, generator=generator)
        start = time.perf_counter()
        head_statistics(q, k, FIRST)
        seconds += time.perf_counter() - start
    return {
        "what": f"{len(lengths)} contexts x {N_HEADS} heads, all cores",
        "n": round(statistics.median(lengths)),
        "d": 64,
        "against": "",
        "ours_ms": 1e3 * seconds,
    }


if __name__ == "__main__":
    main()
