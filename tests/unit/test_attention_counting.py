"""Every method counts the kernel evaluations and inner products that it makes."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from approxkmv.attention import get, methods
from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.causal import causal_attention
from approxkmv.attention.hashed import hyperattention
from approxkmv.compute import loops as compute_loops
from approxkmv.compute.counting import count, counting

pytestmark = pytest.mark.usefixtures("one_thread")

N_Q, N_K, D = 203, 203, 8
# Pairs that a causal mask leaves
SEEN = N_Q * (N_Q + 1) // 2
# With these every pair is near; the other causal forms have triangles of at least 256 queries.
EVERY_PAIR = {
    "knn": {"top": 1000},
    "top-k": {"top": 1000},
    "vattention": {"top": 1000},
    "balancekv": {"window": 1000},
}


def inputs(batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, w, generator=generator) for n, w in ((N_Q, D), (N_K, D), (N_K, 1))]


def counts_of(name, batch=1, **parameters):
    with counting() as counts:
        get(name)(*inputs(batch), scale=0.3, **parameters)
    return counts


def test_a_thread_counts_its_own_work_alone():
    with ThreadPoolExecutor(1) as other, counting() as here:
        there = other.submit(counts_of, "exact-fused").result()
        count(kernel_evaluations=1)
    assert (here.kernel_evaluations, there.kernel_evaluations) == (1, N_Q * N_K)


@pytest.mark.parametrize("name", methods())
def test_every_method_counts_and_counts_each_batch_entry(name):
    one, two = counts_of(name), counts_of(name, batch=2)
    assert one.inner_products >= one.kernel_evaluations
    if name == "mean":
        assert one.inner_products == 0
    else:
        assert one.kernel_evaluations >= N_Q
        # Clusters and buckets of random sizes differ from entry to entry.
        assert 1.5 * one.inner_products < two.inner_products < 2.5 * one.inner_products


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("exact-naive", {}, N_Q * N_K),
        ("exact-sdpa", {}, N_Q * N_K),
        ("exact-sdpa-bf16", {}, N_Q * N_K),
        ("exact-tiles-bf16", {}, N_Q * N_K),
        ("exact-fused", {"tile": 50}, N_Q * N_K),
        ("uniform", {"samples": 10}, N_Q * 10),
        ("own-key", {"samples": 10}, N_Q * 11),
        # 11 blocks of 19 queries and 19 keys at most, and a sample for each place
        ("kdeformer", {"block": 20, "samples": 30}, 11 * 19 * (19 + 30)),
        ("hyperattention", {"block": 20, "samples": 30}, 11 * 19 * (19 + 30)),
        ("approxkmv-paper", {"block": 20, "samples": 30}, 11 * 19 * (19 + 45)),
        # Everything in one bucket
        ("vkde-lsh", {"bucket": 1000, "tables": 5}, N_Q * N_K),
        ("local-expansion", {"near": 1000}, N_Q * N_K),
        ("approxkmv", {"near": 1000}, N_Q * N_K),
        ("clustered", {"near": 1000}, N_Q * N_K),
        ("top-k", {"top": 10}, N_Q * 10),
        # The largest scores, the base sample, and all the others, which so small an error requires
        ("vattention", {"epsilon": 1e-9}, N_Q * N_K),
        # The head; tail keys are only compared with it.
        ("knn", {"top": 10, "samples": 3}, N_Q * 10),
        # Neighbours and the sample that all queries share
        ("hnsw", {"near": 10, "samples": 30}, N_Q * (10 + 30)),
        ("vamana", {"near": 10, "samples": 30}, N_Q * (10 + 30)),
    ],
)
def test_counts_by_hand(name, parameters, expected):
    assert counts_of(name, **parameters).kernel_evaluations == expected


@pytest.mark.parametrize("name", ["top-k", "vattention"])
def test_every_score_of_an_oracle_counts(name):
    assert counts_of(name, top=10).inner_products == N_Q * N_K


@pytest.mark.parametrize("loops", ["compiled", "torch"])
@pytest.mark.parametrize("name", ["local-expansion", "approxkmv", "clustered"])
def test_compiled_loops_and_torch_count_alike(name, loops, monkeypatch):
    if loops == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)
    counts = counts_of(name, block=16, near=3 if name == "clustered" else 20)
    # Some near keys and the far field for each query, and the ranking of the keys; far fewer than all pairs
    assert 3 * N_Q < counts.kernel_evaluations < 0.8 * N_Q * N_K
    assert counts.inner_products > counts.kernel_evaluations + N_Q


def test_near_keys_and_centres_of_the_expansion():
    """One block's centre ranks all keys and meets m of them; each query meets those m, its own key and the far key."""
    counts = counts_of("local-expansion", block=N_Q, near=64, products="float32")
    m = (counts.kernel_evaluations - N_K - 2 * N_Q) / (N_Q + 1)
    # One key in eight decides the bar, so that m is near 64 only.
    assert m == int(m)
    assert 40 <= m <= 90


@pytest.mark.parametrize("loops", ["compiled", "torch"])
@pytest.mark.parametrize("n_q", [N_Q, 150])
@pytest.mark.parametrize("d_v", [1, 20])
@pytest.mark.parametrize(("name", "samples"), [("local-expansion", 0), ("approxkmv", 30)])
def test_one_block_of_first_order_counts_by_hand(name, samples, d_v, n_q, loops, monkeypatch):
    """The centre and each query meet the near keys and the samples; each query its own key, if there is one, too."""
    if loops == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)
    q, k, v = (t[0] for t in inputs())
    q, v = q[:n_q], v.expand(-1, d_v)
    logs = 0.3 * q.double().mean(0) @ (k - k.mean(0)).double().mT
    # Of every eighth key, from that of the seed on, 64 / 8 are near: the bar is the last of them.
    near = int((logs >= logs[5::8].sort(descending=True).values[7]).sum())
    given = {"samples": samples} if samples else {"products": "float32"}
    with counting() as counts:
        get(name)(q[None], k[None], v[None], scale=0.3, seed=5, block=2**24, near=64, directions=0, **given)
    of_rows = n_q * (2 if n_q == N_K else 1)
    assert counts.kernel_evaluations == N_K + (n_q + 1) * (near + samples) + of_rows
    assert counts.other_products == 0


def test_clusters_count_by_hand():
    generator = torch.Generator().manual_seed(0)
    with counting() as counts:
        k_means(torch.randn(100, 3, generator=generator), 5, 3, 4, generator)
    # Three iterations on four points a cluster, one on all
    assert (counts.kernel_evaluations, counts.other_products) == (0, 3 * 20 * 5 + 100 * 5)
    # Two blocks of queries and eight clusters of keys, far apart, of which each block takes the nearest one.
    q, k = (10.0 * torch.eye(8)[torch.arange(n) % m] for n, m in ((N_Q, 2), (200, 8)))
    k = k + 0.01 * torch.randn(200, 8, generator=generator)
    with counting() as counts:
        get("clustered")(q[None], k[None], k[None], scale=0.1, block=150, clusters=0.5, near=1)
    assert counts.kernel_evaluations == N_Q * 8 + (N_Q + 2) * 25
    assert counts.other_products == (3 * 16 * 8 + 200) * 8 + (3 * 16 * 2 + N_Q) * 2 + 2 * 8


@pytest.mark.parametrize("name", ["local-expansion", "approxkmv"])
def test_rows_made_again_are_counted(name):
    q, k, v = inputs()
    # So far from its block that exponentials leave float32
    q[0, 5] *= 3000
    with counting() as counts:
        get(name)(q, k, v, scale=0.4, block=64, near=30)
    assert 1 <= counts.recomputed_rows <= 64
    assert counts_of(name, block=64, near=30).recomputed_rows == 0


def test_causal_halves_what_is_seen():
    parameters = hyperattention.Parameters(block=10, samples=10)
    sums = partial(hyperattention.sums, parameters=parameters)
    q, k, v = (t[0] for t in inputs())
    with counting() as counts:
        causal_attention(0.4 * q, k, v, torch.Generator().manual_seed(0), sums, 1000)
    # One triangle, by flash attention, which skips what lies above the diagonal
    assert (counts.kernel_evaluations, counts.inner_products) == (SEEN, SEEN)
    with counting() as counts:
        causal_attention(0.4 * q, k, v, torch.Generator().manual_seed(0), sums, 51)
    assert counts.kernel_evaluations < 0.6 * SEEN


@pytest.mark.parametrize("name", [name for name in methods() if get(name).causal is not None and name != "mean"])
def test_pairs_that_a_mask_hides_are_no_evaluations(name):
    if name == "knn":
        pytest.importorskip("faiss")
    with counting() as counts:
        get(name).attend_causally(*inputs(batch=2), scale=0.3, **EVERY_PAIR.get(name, {}))
    assert counts.kernel_evaluations == 2 * SEEN
    assert SEEN <= counts.inner_products / 2 <= 1.05 * N_Q * N_K
    if name in ("knn", "top-k"):
        # They multiply what the mask hides too.
        assert counts.inner_products == 2 * N_Q * N_K


def test_who_listens_hears_everything_and_nobody_else_does():
    count(5, 5)
    with counting() as outer:
        count(1)
        with counting() as inner:
            count(2, 3)
        count(4)
    count(100)
    assert (outer.kernel_evaluations, outer.other_products, outer.inner_products) == (7, 3, 10)
    assert (inner.kernel_evaluations, inner.other_products) == (2, 3)
    with counting() as outer:
        with counting() as inner:
            count(1)
        # Both have heard the same so far.
        count(1)
    assert (outer.kernel_evaluations, inner.kernel_evaluations) == (2, 1)
