"""Causal forms: no query sees a later key, the exact ones are exact, the sampled ones unbiased."""

import numpy as np
import pytest
import torch

from approxkmv.attention import UnavailableError, get, methods
from approxkmv.attention.blocks import approxkmv as ours
from approxkmv.attention.blocks import chunks
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.causal import add_sums, causal_attention, exact_sums
from approxkmv.compute.counting import counting
from approxkmv.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

CAUSAL = [name for name in methods() if get(name).causal is not None]


def heads(n, d, d_v, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(n, d, generator=generator) for _ in range(2))
    return q, k, torch.randn(n, d_v, generator=generator) + 0.3 * k[:, :1]


def exact(q, k, v, scale=1.0):
    logits = scale * q.double() @ k.double().mT
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v.double()


# Settings that approximate at these lengths, with `small_chunks`
FEW = {name: {"block": 32, "near": 32} for name in ("approxkmv", "local-expansion")}
FEW["window"] = {"window": 64, "sinks": 4}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 queries, or 256 of more than 512, where a user has 2,048 or 4,096."""
    monkeypatch.setattr(chunks, "EXACT_BELOW", 128)


def form(name):
    if name in ("knn", "hnsw"):
        pytest.importorskip("faiss")
    if name == "vamana":
        pytest.importorskip("numba")
    return get(name)


CHOOSING = {"top-k", "vattention", "balancekv"}
OF_SUMS = {"approxkmv-paper", "kdeformer", "hyperattention", "vkde-lsh", "hnsw", "vamana"}


def test_the_wanted_methods_have_causal_forms():
    exact = {name for name in methods() if get(name).exact}
    assert exact | {"mean", "uniform", "window", "knn", "approxkmv", "local-expansion"} | CHOOSING | OF_SUMS == set(
        CAUSAL
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    ("n", "d", "d_v", "dtype"), [(1, 4, 2, torch.float32), (97, 13, 1, torch.float32), (300, 8, 12, torch.bfloat16)]
)
def test_shape_type_and_the_first_rows(name, n, d, d_v, dtype):
    q, k, v = (torch.stack([t, -t]).to(dtype) for t in heads(n, d, d_v))
    out = form(name).attend_causally(q, k, v, seed=2, **FEW.get(name, {}))
    assert out.shape == (2, n, d_v)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    # The first query has one key, whose value is its answer; bfloat16 has eight bits.
    assert torch.allclose(out[:, 0].float(), v[:, 0].float(), rtol=1e-2, atol=1e-5)
    assert torch.equal(out, form(name).attend_causally(q, k, v, seed=2, **FEW.get(name, {})))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CAUSAL)
def test_rows_do_not_see_later_values(name):
    """With values zero before a position and large from it on, earlier rows are zero, however keys are sampled."""
    q, k, v = (t[None] for t in heads(700, 8, 3))
    v[:, :300] = 0
    v[:, 300:] = 1e6
    out = form(name).attend_causally(q, k, v, seed=1, **FEW.get(name, {}))
    assert float(out[0, :300].abs().max()) == 0
    assert float(out[0, 300:].abs().max()) > 1e3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", sorted({*CAUSAL} - {"knn"}))
def test_rows_do_not_see_later_keys(name):
    """A last key that would take all of the attention changes no row but its own, given the same seeds.

    (In knn the rows of a block share their random numbers, of which the last row takes more or fewer.)
    """
    q, k, v = (t[None] for t in heads(700, 8, 3))
    given = {"seed": 1, **FEW.get(name, {})}
    before = form(name).attend_causally(q, k, v, **given)
    k[:, -1], v[:, -1] = 20 * q[:, -1] / q[:, -1].norm(), 1e3
    after = form(name).attend_causally(q, k, v, **given)
    # Rows in one product with another matrix are rounded otherwise.
    assert (before - after)[0, :-1].abs().max() < 1e-5
    assert (before - after)[0, -1].abs().max() > 1


# Their later squares raise an exception at a NaN: graphs, samples or eigenvalues of such keys do not exist. No square
# reads the keys of the last triangle, from 768 on.
REFUSE_NAN = {"approxkmv-paper", "kdeformer", "hnsw", "vamana"}
# Nor do the later chunks of these go on without compiled loops.
NEED_LOOPS = {"approxkmv", "local-expansion"}


# exact-naive multiplies later values by weights of 0; knn draws no samples at a NaN.
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", sorted({*CAUSAL} - {"exact-naive", "knn"}))
def test_later_keys_may_be_nan(name):
    """No row reads a later key or value: `causal`, which a sweep times, does not look for NaN first.

    Up to a position where rows that are computed together, and halves, end.
    """
    q, k, v = (t[None] for t in heads(1024, 8, 3))
    given = {"scale": 0.4, "seed": 1, **form(name).defaults, **FEW.get(name, {})}
    end = 768 if name in REFUSE_NAN or (name in NEED_LOOPS and block_loops() is None) else 512
    before = form(name).causal(q, k, v, **given)
    k[:, end:], v[:, end:] = torch.nan, torch.nan
    after = form(name).causal(q, k, v, **given)
    assert bool(after[0, :end].isfinite().all())
    assert torch.equal(before[0, :end], after[0, :end])


@pytest.mark.parametrize("name", ["exact-naive", "knn"])
def test_later_keys_may_be_anything_finite(name):
    q, k, v = (t[None] for t in heads(1024, 8, 3))
    given = {"scale": 0.4, "seed": 1, **form(name).defaults}
    before = form(name).causal(q, k, v, **given)
    k[:, 512:], v[:, 512:] = 5.0, 1e6
    assert torch.equal(before[0, :512], form(name).causal(q, k, v, **given)[0, :512])


@pytest.mark.parametrize("name", sorted(OF_SUMS | CHOOSING))
def test_the_error_of_the_squares_falls_with_the_budget(name):
    """Mean over three seeds; values far from 0, whose offset the methods that sample by their size must not see."""
    q, k, v = heads(700, 8, 2, spread=0.8)
    v += 5
    right = exact(q, k, v)
    method = form(name)
    gaps = [
        sum(
            float((method.attend_causally(q[None], k[None], v[None], scale=1.0, seed=s, **given)[0] - right).norm())
            for s in range(3)
        )
        for given in (method.grid[0], {}, method.grid[-1])
    ]
    assert gaps[0] > 1.3 * gaps[1] > 1.3 * 1.3 * gaps[2]
    # What the mean of the values up to each query misses by
    means = v.cumsum(0) / torch.arange(1, 701).unsqueeze(1)
    assert gaps[1] < 0.5 * 3 * float((means - right).norm())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("exact-sdpa", {}),
        ("window", {"window": 300, "products": "float32"}),
        *((name, {"near": 1000}) for name in ("approxkmv", "hnsw", "vamana")),
        *((name, {"block": 1000}) for name in ("kdeformer", "hyperattention", "balancekv")),
        ("vkde-lsh", {"bucket": 1000}),
        ("hyperattention", {"block": 8, "samples": 8, "exact_below": 600}),
        *((name, {"top": 1000}) for name in ("knn", "top-k", "vattention")),
    ],
)
def test_a_budget_for_all_keys_is_exact(name, given):
    q, k, v = heads(600, 8, 2)
    out = form(name).attend_causally(q[None], k[None], v[None], scale=1.0, **given)[0]
    assert (out.double() - exact(q, k, v)).abs().max() < 2e-5


def test_each_key_of_a_uniform_sample_stands_for_as_many_as_were_left_out():
    q, v = torch.zeros(1, 512, 4), torch.zeros(1, 512, 1)
    v[:, 256:] = 1
    # Any sample of equal keys tells their sum, and the values of the square are all 0.
    out = get("uniform").attend_causally(q, q, v)[0, 256:, 0]
    torch.testing.assert_close(out, torch.arange(1, 257) / torch.arange(257, 513))


def within(found, right):
    error = found.std(0) / len(found) ** 0.5
    return float(((found.mean(0) - right).abs() / error.clamp_min(1e-12)).max())


@pytest.mark.slow
@pytest.mark.parametrize("index", ["flat"])
def test_causal_knn_is_unbiased(index):
    """30 combinations of the rows after the first block over 120 seeds, within 4.5 standard errors (2e-4 by chance)."""
    q, k, v = heads(420, 6, 1)
    method = form("knn")
    right = exact(q, k, v)[256:]
    found = torch.stack(
        [
            method.attend_causally(
                q[None], k[None], v[None], scale=1.0, seed=seed, top=6, samples=2, index=index
            )[0, 256:].double()
            for seed in range(120)
        ]
    )  # fmt: skip
    assert float(found.std(0).mean()) > 0.01
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (30, len(right), 1)))
    assert within(*(torch.einsum("cnw,...nw->...c", signs, t) for t in (found, right))) < 4.5


@pytest.mark.slow
def test_causal_sums_of_approxkmv_are_unbiased():
    """Row sums and numerators of 30 combinations over 120 seeds, within 4.5 standard errors (2e-4 by chance).

    Keys far from the origin: the sums of chunks must be brought to a common origin before they are merged.
    """
    q, k, v = heads(256, 8, 1, spread=0.5)
    k = k + 0.7
    logits = (q.double() @ k.double().mT).masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf)
    log_sum = logits.logsumexp(1)
    right = torch.cat([torch.ones(256, 1).double(), logits.softmax(1) @ v.double()], 1)
    parameters = ours.Parameters(block=16, near=12, directions=8, iterations=2, sampled=16, samples=8)

    found = []
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        numerators, row_sums, logs = ours.chunked_sums(q, k, v, generator, parameters, 1.0, 64)
        both = torch.cat([row_sums.unsqueeze(1), numerators[:, :-1]], 1).double()
        found.append(both * (logs.double() - log_sum).exp().unsqueeze(1))
    found = torch.stack(found)[:, 64:]
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (30, 192, 2)))
    assert within(*(torch.einsum("cnw,...nw->...c", signs, t) for t in (found, right[64:]))) < 4.5


def test_recursion_by_exact_squares_is_exact_at_any_cut():
    q, k, v = heads(77, 5, 2)

    def square(q, k, v, generator):
        return exact_sums(q, k, v)

    for exact_below in (0, 1, 10, 100):
        out = causal_attention(q, k, v, torch.Generator(), square, exact_below)
        assert (out.double() - exact(q, k, v)).abs().max() < 1e-5


def test_rows_without_a_positive_sum_are_computed_exactly():
    """Of 600 rows all that are in no triangle, together with those near them, but not with later keys, which are NaN"""
    q, k, v = heads(600, 5, 2)
    right = exact(q, k, v)
    k[512:], v[512:] = torch.nan, torch.nan

    def square(q, k, v, generator):
        numerators, row_sums, logs = exact_sums(q, k, v)
        return numerators, -1e3 * row_sums, logs

    with counting() as counts:
        out = causal_attention(q, k, v, torch.Generator(), square, 20)
    assert (out[:512].double() - right[:512]).abs().max() < 1e-5
    # Triangles are of 600 / 32 rows, so the first has 18.
    assert counts.recomputed_rows == 600 - 18
    # Every pair that the mask leaves once, and again in those rows
    assert counts.kernel_evaluations == 2 * (600 * 601 // 2) - 18 * 19 // 2


def test_merging_does_not_overflow():
    """Two parts whose logs lie 500 apart, where the exponential of either difference overflows or vanishes."""
    q, k, v = heads(6, 4, 2)
    one, other = exact_sums(300 * q, k, v), exact_sums(300 * q, -k, v)
    add_sums(one, other)
    numerators, row_sums, _ = one
    right = (300 * q.double() @ torch.cat([k, -k]).double().mT).softmax(1) @ torch.cat([v, v]).double()
    # Logits of some hundreds in float32 are known to about 1e-4.
    assert (numerators / row_sums.unsqueeze(1) - right).abs().max() < 1e-2


def test_refusals_are_one_line():
    q, k, v = (t[None] for t in heads(20, 4, 1))
    with pytest.raises(UnavailableError, match=r"^method clustered has no causal form: query i would"):
        get("clustered").attend_causally(q, k, v)
    with pytest.raises(InputError, match="a key for each query: q has 10 rows, but k 20"):
        get("exact-sdpa").attend_causally(q[:, :10], k, v)
