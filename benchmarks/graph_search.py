"""The assumptions of graph search, measured on kernels: python benchmarks/graph_search.py

For heads of SmolLM2 on a novel, and for word vectors: the doubling dimension and the aspect ratio of the keys of
Lemma 4.1, how close greedy search comes on the graph with the guarantee, and what share of the 32 heaviest keys the
practical graphs find. Writes results/benchmarks/graph_search.csv and .json; --out changes the name. The model must
have been fetched (approxkmv fetch --model smollm2-135m).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from writing import out_of, write

from approxkmv.config import corpus_entry, load_config, model_of
from approxkmv.corpora import read_corpus
from approxkmv.kernels import reduce_attention
from approxkmv.models import CapturableModel, fetch, parse_source
from approxkmv.search.doubling_dimension import doubling_dimension
from approxkmv.search.indexes import HNSWIndex
from approxkmv.search.vamana import VamanaGraph, build, build_exhaustively
from approxkmv.sweep.word_vectors import word_vectors

# From diffuse to sharp.
HEADS = [(0, 7), (20, 6), (17, 1), (13, 2), (27, 8)]
N = 2048
ALPHAS = [1.2, 1.5, 2.0]
NEAR, BREADTH = 32, 64


def kernels() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, queries and keys of each head, and of word vectors: even rows against odd ones.

    The keys of Lemma 4.1 do not depend on the scale.
    """
    config = load_config(Path("config.yaml"))
    entry, corpus = model_of(config, "smollm2-135m"), corpus_entry(config, "moby-dick")
    folder = Path(config.cache) / "models" / entry.name
    model = CapturableModel.load(fetch(parse_source(entry.source), folder, sha256=entry.sha256, files=entry.files))
    text = read_corpus(corpus.source, corpus.sha256)[0].context
    captured = model.capture([model.tokenize(text, N)])[0]
    for at, head in HEADS:
        yield f"{entry.name} {at}.{head}", captured.queries[at, head], captured.keys[at, head]
    words = torch.as_tensor(word_vectors(None))[: 2 * N]
    yield "glove-split", words[::2], words[1::2]


def recall(found: torch.Tensor, right: torch.Tensor) -> float:
    """Share of the right keys (n_q, h) among those found (n_q, h)."""
    return float((found.unsqueeze(2) == right.unsqueeze(1)).any(1).float().mean())


def greedy(graph: VamanaGraph, queries: torch.Tensor, nearest: torch.Tensor) -> dict[str, float]:
    """How close greedy search comes, as a ratio to the nearest distance, and its cost."""
    found = graph.search(queries, 1, 1)
    ratio = found.distances[:, 0].double() / nearest
    return {
        "largest_ratio": float(ratio.max()),
        "median_ratio": float(ratio.median()),
        "mean_degree": float(graph.degrees.mean()),
        "largest_degree": int(graph.degrees.max()),
        "mean_steps": float(found.steps.double().mean()),
        "largest_steps": int(found.steps.max()),
        "mean_evaluations": float(found.evaluations.double().mean()),
    }


def main() -> None:
    """Measure everything, print a table and write it."""
    out = out_of(__doc__, "graph_search")
    torch.set_num_threads(1)
    rows = []
    # Compiled before anything is timed.
    build(torch.randn(50, 4), alpha=1.2, degree=4, beam=4, generator=torch.Generator()).search(torch.randn(5, 4), 2, 4)
    for name, q, k in kernels():
        # As the methods do: shifting all keys together does not change attention.
        k = k - k.mean(0)
        reduced = reduce_attention(q, k)
        queries, keys = torch.as_tensor(reduced.queries), torch.as_tensor(reduced.keys)
        nearest = torch.cdist(queries.double(), keys.double()).amin(1)
        heaviest = (q @ k.mT).topk(NEAR).indices
        generator = torch.Generator().manual_seed(0)
        dimension = doubling_dimension(keys, generator=generator)
        facts = {
            "kernel": name,
            "n": len(k),
            "d": k.shape[1],
            "doubling_dimension_at_least": dimension.lower,
            "greedy_cover_log2": dimension.upper,
            "aspect_ratio": dimension.aspect_ratio,
        }
        for alpha in ALPHAS:
            start = time.perf_counter()
            graph = build_exhaustively(keys, alpha=alpha)
            seconds = time.perf_counter() - start
            bound = {"graph": "exhaustive", "alpha": alpha, "guarantee": (alpha + 1) / (alpha - 1)}
            rows.append(facts | bound | greedy(graph, queries, nearest) | {"build_seconds": seconds})
        for alpha in (1.05, 1.2):
            start = time.perf_counter()
            graph = build(keys, alpha=alpha, degree=24, beam=32, generator=generator)
            built = time.perf_counter()
            found = graph.search(queries, NEAR, BREADTH)
            done = time.perf_counter()
            rows.append(
                facts
                | {"graph": "vamana", "alpha": alpha, "mean_degree": float(graph.degrees.mean())}
                | {"mean_evaluations": float(found.evaluations.double().mean())}
                | {"recall": recall(found.keys, heaviest)}
                | {"build_seconds": built - start, "search_seconds": done - built}
            )
        start = time.perf_counter()
        index = HNSWIndex(k, 12, 32, BREADTH)
        index.add(0, len(k))
        built = time.perf_counter()
        found_keys, _ = index.search(q, NEAR)
        done = time.perf_counter()
        rows.append(
            facts
            | {"graph": "hnsw", "recall": recall(found_keys, heaviest)}
            | {"build_seconds": built - start, "search_seconds": done - built}
        )
    table = pd.DataFrame(rows)
    write(out, table, {"heads": HEADS, "n": N, "alphas": ALPHAS, "near": NEAR, "breadth": BREADTH})
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))


if __name__ == "__main__":
    main()
