"""DEANN's estimator and the two rows that use it: unbiased given what the search found."""

import numpy as np
import pytest
import torch

from approxkmv.attention import UnavailableError, get
from approxkmv.attention.searched.deann import estimate

pytestmark = pytest.mark.usefixtures("one_thread")


def heads(n_q, n_k, d, d_v, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(n, d, generator=generator) for n in (n_q, n_k))
    return q, k, torch.randn(n_k, d_v, generator=generator) + 0.3 * k[:, :1]


def exact(q, k, v, scale=1.0):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


def neighbours(q, k, count, holes):
    """Some of the best keys of each query, as an imperfect search finds them, -1 where it found fewer."""
    logits, found = (q @ k.mT).topk(2 * count)
    kept = torch.rand(found.shape, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :count]
    found, logits = found.gather(1, kept), logits.gather(1, kept)
    found[:holes, -2:], logits[:holes, -2:] = -1, -torch.inf
    return found, logits


@pytest.mark.parametrize(("count", "samples"), [(6, 20), (30, 3)])
def test_sums_are_unbiased_given_the_neighbours(count, samples):
    """30 combinations of row sums and numerators over 400 seeds, each within 4.5 standard errors.

    False alarms: 7e-6 for each combination, 4e-4 for both cases together; the seeds are fixed. With 30 of 80 keys found
    and 3 samples, many queries find the whole sample among their neighbours.
    """
    q, k, v = heads(40, 80, 6, 2, spread=0.7)
    found, logits = neighbours(q, k, count, holes=10)
    all_logits = q.double() @ k.double().mT
    log_sum = all_logits.logsumexp(1)
    right = torch.cat([torch.ones(40, 1).double(), all_logits.softmax(1) @ v.double()], 1)
    each = []
    for seed in range(400):
        numerators, row_sums, logs = estimate(q, k, v, found, logits, samples, torch.Generator().manual_seed(seed))
        both = torch.cat([row_sums.unsqueeze(1), numerators], 1).double()
        each.append(both * (logs.double() - log_sum).exp().unsqueeze(1))
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (30, 40, 3)))
    signs[0] = torch.tensor([1.0, 0.0, 0.0])
    combined, wanted = (torch.einsum("cnw,...nw->...c", signs, t) for t in (torch.stack(each), right))
    error = combined.std(0) / 400**0.5
    assert bool(((combined.mean(0) - wanted).abs() < 4.5 * error).all())
    # The test sees double counting: the sum of the row sums would gain that of the neighbours' shares.
    shares = (logits.double().exp().sum(1) / log_sum.exp()).sum()
    assert float(shares) > 4.5 * float(error[0])


def test_a_query_that_found_the_whole_sample_draws_from_the_rest():
    """The rest are two equal keys, so that any three draws tell their sum."""
    q, k, v = heads(40, 80, 6, 2)
    drawn = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:3]
    rest = [j for j in range(1, 80) if j not in drawn.tolist()][:2]
    k[rest], v[rest] = 2 * q[0], v[rest[0]].clone()
    found = torch.tensor([*(j for j in range(80) if j not in rest), -1]).expand(40, -1)
    logits = torch.cat([(q @ k.mT)[:, found[0, :-1]], torch.full((40, 1), -torch.inf)], 1)
    numerators, row_sums, logs = estimate(q, k, v, found, logits, 3, torch.Generator().manual_seed(1))
    assert (numerators / row_sums.unsqueeze(1) - exact(q, k, v)).abs().max() < 1e-5
    assert (logs + row_sums.log() - (q.double() @ k.double().mT).logsumexp(1)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1, 100])
def test_a_sample_of_all_keys_makes_the_sums_exact(size):
    """Also where a logit of hundreds is in the sample, and no neighbour's is as large."""
    q, k, v = heads(40, 80, 6, 2)
    q *= size
    numerators, row_sums, _ = estimate(q, k, v, *neighbours(q, k, 6, 10), 80, torch.Generator().manual_seed(0))
    assert (numerators.double() / row_sums.double().unsqueeze(1) - exact(q, k, v)).abs().max() < 1e-5 * size


def test_no_samples_is_attention_to_the_neighbours():
    q, k, v = heads(40, 80, 6, 2)
    found, logits = neighbours(q, k, 6, 0)
    numerators, row_sums, _ = estimate(q, k, v, found, logits, 0, torch.Generator())
    wanted = torch.einsum("nh,nhw->nw", logits.double().softmax(1), v[found].double())
    assert (numerators / row_sums.unsqueeze(1) - wanted).abs().max() < 1e-5


def row(name):
    pytest.importorskip("numba" if name == "vamana" else "faiss")
    return get(name)


@pytest.mark.parametrize("name", ["hnsw", "vamana"])
def test_rows_beat_the_mean_tenfold_and_improve_with_their_budget(name):
    method = row(name)
    q, k, v = (t[None] for t in heads(300, 1200, 16, 2, spread=0.9))
    right = exact(q, k, v)
    mean_gap = float((v.double().mean(1, keepdim=True) - right).norm())
    gaps = [float((method(q, k, v, scale=1.0, **given).double() - right).norm()) for given in method.grid]
    assert gaps[-1] < 0.1 * mean_gap
    assert gaps[-1] < 0.2 * gaps[0]
    # A budget for all keys is exact.
    everything = method(q, k, v, scale=1.0, near=1200)
    assert (everything.double() - right).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "given"), [("hnsw", {}), ("vamana", {}), ("knn", {"index": "hnsw", "samples": 64})])
def test_keys_far_from_the_origin_are_searched_around_their_mean(name, given):
    q, k, v = heads(200, 600, 12, 2)
    method = row(name)
    here, there = (method(q[None], keys[None], v[None], scale=1.0, **given)[0].double() for keys in (k, k + 30))
    right = exact(q, k, v)
    # The shift takes two digits of the keys; what is left of the gap is the search, on the same graph up to rounding.
    assert float((there - right).norm()) < 1.5 * float((here - right).norm())


def test_without_numba_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    q, k, v = (t[None] for t in heads(90, 100, 4, 1))
    with pytest.raises(UnavailableError, match=r"needs numba: pip install 'approxkmv\[pipeline\]'$"):
        get("vamana")(q, k, v)
