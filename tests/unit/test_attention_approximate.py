"""The approximate methods: what they promise about error, bias and budget."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.blocks import approxkmv as ours
from approxkmv.attention.blocks import light_keys, near_keys, reach
from approxkmv.attention.blocks.arrays import ScaledSums
from approxkmv.attention.blocks.expansion import (
    Clustering,
    expand,
    in_one_block,
    key_side,
    of_one_block,
    principal_axes,
)
from approxkmv.attention.blocks.grouping import make_blocks
from approxkmv.attention.blocks.k_means import k_means
from approxkmv.attention.blocks.near_keys import sums_of_keys
from approxkmv.attention.blocks.reach import stand_apart
from approxkmv.attention.hashed import approxkmv_paper
from approxkmv.attention.hashed.angular_hashing import sort_into_blocks
from approxkmv.attention.hashed.column_sampling import column_probabilities
from approxkmv.compute import loops as compute_loops
from approxkmv.compute.counting import counting
from approxkmv.compute.drawing import drawn
from approxkmv.compute.loops import has_bfloat16_instructions

pytestmark = pytest.mark.usefixtures("one_thread")


def clustered(n, d, d_v, seed=0, spread=0.35):
    """Queries and keys around shared centres, as in real heads: near keys matter, far ones do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(12, d, generator=generator)
    q, k = (
        centres[torch.randint(12, (n,), generator=generator)] + spread * torch.randn(n, d, generator=generator)
        for _ in range(2)
    )
    return q, k, torch.randn(n, d_v, generator=generator) + 0.3 * k[:, :1]


def exact(q, k, v, scale):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


def expanded(q, k, v, clustering, scale, low=torch.float32):
    side = key_side(k, v, stand_apart(q, k, scale), clustering, v.to(low))
    return expand(q, side, torch.Generator().manual_seed(0), clustering, scale=scale)


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_v", [1, 2, 5, 12])
def test_local_expansion_beats_the_mean_tenfold(products, d_v):
    q, k, v = clustered(1500, 21, d_v)
    right = exact(q, k, v, 0.5)
    out = get("local-expansion")(q[None], k[None], v[None], scale=0.5, block=32, near=128, products=products)[0]
    mean_gap = (v.double().mean(0) - right).norm()
    assert (out.double() - right).norm() < 0.1 * mean_gap


@pytest.mark.skipif(not has_bfloat16_instructions(), reason="no products of bfloat16 numbers in loops")
@pytest.mark.parametrize("d_v", [1, 12])
def test_an_odd_width_is_as_good_as_with_a_column_of_zeros(d_v):
    pytest.importorskip("numba")
    q, k, v = clustered(600, 7, d_v)
    wide = (torch.nn.functional.pad(points, (0, 1)) for points in (q, k))
    given = {"scale": 0.5, "block": 32, "near": 64, "products": "bfloat16"}
    odd, even = (get("local-expansion")(*pair, v, **given) for pair in ((q, k), wide))
    assert torch.allclose(odd, even, atol=1e-5)


def test_more_near_keys_less_error():
    q, k, v = clustered(1200, 16, 1)
    right = exact(q, k, v, 0.5)
    gaps = [
        float(
            (get("local-expansion")(q[None], k[None], v[None], scale=0.5, block=64, near=m)[0].double() - right).norm()
        )
        for m in (16, 64, 256, 1200)
    ]
    # Few keys in a block that holds two clusters are no better than fewer; then the error falls.
    assert max(gaps[:2]) > 5 * gaps[2] > 5 * gaps[3]
    # All keys near is the exact product.
    assert gaps[3] < 1e-5 * float(right.norm())


@pytest.mark.usefixtures("loops")
def test_the_own_key_is_exact_where_it_is_all_that_matters():
    """K = Q with rows far apart: a softmax of nearly one weight, which no block of many queries lists as near."""
    q = 3.0 * torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    v = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    right = exact(q, q, v, 1.0)
    for name in ("local-expansion", "approxkmv"):
        out = get(name)(q[None], q[None], v[None], scale=1.0, block=150, near=20)[0].double()
        assert float((out - right).norm() / right.norm()) < 0.02, name


def test_the_baseline_of_the_own_key_gives_all_others_their_weight():
    q, v = torch.ones(1, 50, 4), torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(1))
    # Of equal keys any sample tells the sum over the 49 others.
    torch.testing.assert_close(get("own-key")(q, q, v, samples=8), v / 50 + 49 / 50 * v.mean(1))


def test_a_query_far_from_its_block_is_still_answered():
    q, k, v = clustered(400, 8, 1)
    q[5] *= 300
    out = get("local-expansion")(q[None], k[None], v[None], scale=1.0, block=64, near=32)[0]
    assert bool(out.isfinite().all())
    assert abs(float(out[5, 0]) - float(exact(q, k, v, 1.0)[5, 0])) < 0.5


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "d_v"), [(10, 3), (9, 8), (9, 20), (64, 64)])
def test_sums_of_keys_against_float64(d, d_v, low):
    """Widths that fill no tile and such that do; blocks of about 32 queries, some of which pass 64."""
    # Products of bfloat16 numbers take them by twos.
    q, k, v = clustered(300, d + d % 2 if low == torch.bfloat16 else d, d_v)
    q = 0.3 * q
    e = expanded(q, k, v, Clustering(block=32, near=40, directions=8, iterations=2, sampled=8), 1.0, low)  # fmt: skip
    assert e.far_keys == 300 - 40
    assert (e.rounded is None) == (low == torch.float32)
    in_sixteens = low == torch.bfloat16 and not compute_loops.numba_works()
    assert bool((e.blocks.sizes % 16 == 0).all()) == in_sixteens
    extra = torch.randn(len(e.chosen), generator=torch.Generator().manual_seed(1))
    sums, scales = sums_of_keys(e.blocks, k, e.mean, v, e.chosen, e.ends, extra, e.rounded)
    begin = 0
    # Relative to the sums of absolute values. Of numbers of 8 bits a logit of 10 is off by 10 / 2^8, or somewhat more.
    most = 1e-5 if low == torch.float32 else 0.1
    for b, (start, size, end) in enumerate(zip(e.blocks.starts, e.blocks.sizes, e.ends, strict=True)):
        keys = e.chosen[begin:end]
        queries = (e.blocks.centres[b] + e.blocks.deltas[start : start + size]).double()
        weights = (queries @ (k[keys] - e.mean).double().mT + extra[begin:end] - scales[b]).exp()
        right = weights @ torch.cat([torch.ones(len(keys), 1), v[keys]], 1).double()
        size_of_terms = weights @ torch.cat([torch.ones(len(keys), 1), v[keys].abs()], 1).double()
        gap = (sums[start : start + size].double() - right).abs() / size_of_terms.clamp_min(1e-30)
        assert float(gap.max()) < most
        begin = end


def test_k_means_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (600,), generator=generator)
    points = 20.0 * torch.eye(3)[truth] + torch.randn(600, 3, generator=generator)
    labels = k_means(points, 12, 4, 32, generator)
    # With four times as many clusters as needed none may hold points of two.
    for label in labels.unique():
        assert len(truth[labels == label].unique()) == 1


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 17, 64])
def test_the_compiled_loop_finds_the_nearest_centre(clusters):
    """To 12 bits of the squared distance, near centres that are far from the origin and others."""
    pytest.importorskip("numba")
    from approxkmv.attention.blocks.loops.clustering import nearest

    generator = torch.Generator().manual_seed(0)
    for far in (0.0, 5.0):
        centres, points = (far + torch.randn(n, 3, generator=generator) for n in (clusters, 500))
        labels = np.empty(500, np.int64)
        nearest((centres.square().sum(1) - 2 * points @ centres.mT).numpy(), points.numpy(), labels)
        squares = torch.cdist(points.double(), centres.double()).square()
        chosen = squares[torch.arange(500), torch.from_numpy(labels)]
        # float32 holds the squares that cancel to seven digits.
        assert bool((chosen <= squares.amin(1) * (1 + 2**-12) + 1e-6 * (1 + 3 * far**2) * 8).all())


CLUSTERING = {"block": 12, "near": 24, "directions": 8, "iterations": 2, "sampled": 16}


def test_a_row_whose_far_key_is_at_the_end_of_float32_is_left_to_be_computed_exactly():
    """The inverse of a sum of 1e38 has lost digits, or is 0, though its answer is finite."""
    pytest.importorskip("numba")
    from approxkmv.attention.blocks.loops.expansion import expanded_answers

    q, k, v = clustered(60, 8, 1)
    e = expanded(q, k, v, Clustering(**CLUSTERING), 1.0)
    seen, rows = e.seen(None), len(e.blocks.deltas)
    seen.log_weight[:] = 70.0
    seen.log_weight[int(e.blocks.rows[7])] = 88.0
    near = ScaledSums(np.ones((rows, 2), np.float32), np.zeros(len(e.blocks), np.float32))
    out, logs = np.zeros((60, 1), np.float32), np.zeros(60, np.float32)
    expanded_answers(0, len(e.blocks), e.tilted, e.blocks.arrays, near, seen.arrays, v.numpy(), out, logs)
    assert np.flatnonzero(np.isnan(out)).tolist() == [7]


def estimates(q, k, v, samples, seeds):
    """Row sums and numerators (seeds, n, 1 + d_v) relative to the exact row sum, in float64."""
    logits = q.double() @ k.double().mT
    # sums() works with centred keys, which takes q.mean(k) off every logit.
    log_sum = (logits - q.double() @ k.double().mean(0).unsqueeze(1)).logsumexp(1)
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        parameters = ours.Parameters(samples=samples, **CLUSTERING)
        with pytest.MonkeyPatch.context() as patch:
            # Rows whose estimate deviates too far to be used are estimates all the same.
            patch.setattr(reach, "_OFF", 1e9)
            side = key_side(k, v, stand_apart(q, k, 1.0), parameters, v)
            numerators, row_sums, logs = ours.sums(
                q, side, generator, parameters, scale=1.0, with_own_keys=len(q) == len(k)
            )
        both = torch.cat([row_sums.unsqueeze(1), numerators[:, :-1]], 1).double()
        found.append(both * (logs.double() - log_sum).exp().unsqueeze(1))
    weights = logits.softmax(1)
    right = torch.cat([torch.ones(len(q), 1).double(), weights @ v.double()], 1)
    return torch.stack(found), right


@pytest.mark.slow
@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("d_v", [1, 5])
@pytest.mark.parametrize("keys", ["as many", "fewer", "the queries"])
def test_numerators_and_row_sums_are_unbiased(keys, d_v):
    """20 fixed combinations of the rows of each sum, within 4.5 standard errors over 200 seeds.

    False alarms: a normal variable passes 4.5 with probability 7e-6, 120 of them with less than 1e-3; the seeds are
    fixed, so that the test says the same each time.
    """
    q, k, v = clustered(240, 8, d_v, spread=0.6)
    # As many keys as queries have a key of the query's own, which is exact; queries as keys make it the nearest.
    q = 0.5 * q
    if keys == "fewer":
        k, v = k[:200], v[:200]
    elif keys == "the queries":
        k = q = 2 * q
    found, right = estimates(q, k, v, 16, 200)
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (20, 240)))
    signs[0] = 1.0
    combined = torch.einsum("cn,snw->scw", signs, found)
    gap = combined.mean(0) - torch.einsum("cn,nw->cw", signs, right)
    error = combined.std(0) / 200**0.5
    assert bool((gap.abs() < 4.5 * error).all()), (gap / error).abs().max()
    # The test could have seen a bias of one part in a hundred of the row sums.
    assert float(error[0, 0]) * 4.5 < 0.01 * 240


def test_error_falls_as_one_over_the_root_of_the_budget():
    """Sixteen times the samples, a quarter of the deviation; 60 seeds know it to about a tenth."""
    q, k, v = clustered(240, 8, 1, spread=0.6)
    q = 0.5 * q
    few, right = estimates(q, k, v, 8, 60)
    many, _ = estimates(q, k, v, 128, 60)
    ratio = ((few - right).square().mean() / (many - right).square().mean()).sqrt()
    assert 2.8 < float(ratio) < 5.7


@pytest.mark.usefixtures("loops")
def test_budgets_go_where_the_deviation_is():
    q, k, v = clustered(400, 8, 1)
    e = expanded(q, k, v, Clustering(**CLUSTERING), 1.0)
    heavy, log_weight = torch.ones(len(e.blocks.deltas), 2), torch.full((len(e.blocks.deltas),), -60.0)
    start, size = int(e.blocks.starts[0]), int(e.blocks.sizes[0])
    # The far key holds nine tenths of the sums of one block and nothing of the others'.
    log_weight[start : start + size] = np.log(9.0)
    deviation = light_keys.predicted_deviation(e, heavy, torch.zeros(len(e.blocks)), log_weight)
    s = e.blocks.row_variances[start : start + size].double().clamp_max(10)
    assert torch.allclose(deviation[0], 0.9 * (s.exp() - 1 - s).mean().sqrt(), rtol=1e-4)
    counts = light_keys.budgets(e, deviation, 32)
    assert int(counts[0]) == 128
    assert bool((counts[1:] == 4).all())


@pytest.mark.usefixtures("loops")
def test_row_variances_are_those_of_the_logits():
    """With all axes: delta.k over the keys, in the keys' own covariance, but for the metric's exponent."""
    q, k, v = clustered(400, 8, 1)
    e = expanded(q, k, v, Clustering(**CLUSTERING), 0.7)
    variance = (e.blocks.deltas.double() @ (k - k.mean(0)).double().mT).square().mean(1)
    assert torch.allclose(e.blocks.row_variances.double(), variance, rtol=1e-3, atol=1e-6)


def test_axes_are_those_of_keys_from_the_whole_text():
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros(4096, 3)
    keys[:1024, 0] = 1 + torch.randn(1024, generator=generator)
    keys[1024:, 1] = 5 + 3 * torch.randn(3072, generator=generator)
    axes, spread = principal_axes(keys, 2)
    values, vectors = torch.linalg.eigh(torch.cov(keys[:, :2].mT))
    # The least is known from 128 keys.
    assert torch.allclose(spread, values.flip(0), rtol=0.5)
    assert torch.allclose(axes[:2].abs(), vectors.flip(1).abs(), atol=0.05)


@pytest.mark.usefixtures("loops")
def test_rows_are_lost_from_the_variance_on_that_their_far_keys_allow():
    q, k, v = clustered(300, 8, 1)
    e = expanded(q, k, v, Clustering(**CLUSTERING), 1.0)
    seen, scales = e.seen(k), torch.zeros(len(e.blocks))
    nothing, everything = torch.zeros(len(e.blocks.deltas)), torch.full((len(e.blocks.deltas),), 1e30)
    seen.own_log[:] = -torch.inf
    variances = torch.full_like(e.logit_variances, reach.most_variance(e.far_keys))
    assert not replace(e, logit_variances=0.99 * variances).lost(nothing, scales, seen).any()
    above = replace(e, logit_variances=1.01 * variances)
    assert above.lost(nothing, scales, seen).all()
    # Unless far keys are little of what they see: their near keys, their own key or others
    assert not above.lost(everything, scales, seen).any()
    assert not above.lost(nothing, scales, seen, torch.full((300,), 60.0)).any()
    others = torch.where(torch.arange(300) < 100, 60.0, -torch.inf)
    assert above.lost(nothing, scales, seen, others).tolist() == [False] * 100 + [True] * 200
    seen.own_log[:] = 60.0
    assert not above.lost(nothing, scales, seen).any()


@pytest.mark.usefixtures("loops")
def test_draws_have_the_probability_that_they_say():
    """Of each key, the mean of 1 / (counts p) over many draws is one: within 4.5 standard errors for 188 light keys.

    False alarms: 188 normal variables pass 4.5 with probability under 2e-3; the seed is fixed.
    """
    q, k, v = clustered(212, 8, 1)
    e = expanded(q, k, v, Clustering(**{**CLUSTERING, "block": 212}), 0.5)
    number = 400_000
    sample = light_keys.draw(e, np.array([number]), torch.Generator().manual_seed(1))
    keys = torch.from_numpy(sample.keys)
    rate = (-torch.from_numpy(sample.logs).double()).exp() / number
    drawn = torch.bincount(keys, minlength=212)
    probability = torch.zeros(212, dtype=torch.float64).index_copy_(0, keys, rate)
    light = torch.ones(212, dtype=torch.bool)
    light[torch.from_numpy(e.chosen)] = False
    assert int(drawn[~light].sum()) == 0
    assert abs(float(probability.sum()) - 1) < 1e-5
    deviation = (number * probability * (1 - probability)).sqrt()
    assert bool(((drawn - number * probability)[light].abs() < 4.5 * deviation[light]).all())
    share = e.weights[0, 0].double() / e.weights[0, 0].double().sum()
    assert torch.allclose(torch.from_numpy(sample.control).double(), share[keys] / (number * rate), rtol=1e-4)


@pytest.mark.usefixtures("loops")
def test_draws_are_uniform_where_no_light_key_has_a_weight():
    q, k, v = clustered(212, 8, 1)
    e = expanded(q, k, v, Clustering(**{**CLUSTERING, "block": 212}), 0.5)
    sample = light_keys.draw(
        replace(e, weights=torch.zeros_like(e.weights)), np.array([20_000]), torch.Generator().manual_seed(1)
    )
    light = np.setdiff1d(np.arange(212), e.chosen)
    np.testing.assert_allclose(sample.logs, np.log(len(light) / 20_000), rtol=1e-5)
    assert not sample.control.any()
    drawn = np.bincount(sample.keys, minlength=212)
    assert not drawn[e.chosen].any()
    # 4.5 standard deviations for each of about 188 keys
    mean = 20_000 / len(light)
    assert (np.abs(drawn[light] - mean) < 4.5 * mean**0.5).all()


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("name", ["local-expansion", "approxkmv"])
def test_keys_that_are_all_the_same_leave_nothing_light(name):
    q, k, v = clustered(300, 8, 1)
    with counting() as counts:
        out = get(name)(q[None], k[:1].expand(300, -1)[None], v[None], scale=1.0, block=30, near=20)
    assert torch.allclose(out, v.mean(0).expand(1, 300, 1), atol=1e-3)
    assert counts.recomputed_rows == 0


@pytest.mark.usefixtures("loops")
def test_keys_of_which_some_stand_apart_and_the_others_are_the_same_leave_nothing_light():
    q, k, v = clustered(300, 8, 1)
    k = k[:1].repeat(300, 1)
    k[17] *= 40
    assert stand_apart(q, k, 1.0).tolist() == [17]
    with counting() as counts:
        out = get("local-expansion")(q[None], k[None], v[None], scale=1.0, block=30, near=20)[0]
    assert torch.allclose(out.double(), exact(q, k, v, 1.0), atol=1e-3)
    assert counts.recomputed_rows == 0


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("n_k", [2, 5, 9])
def test_thresholds_are_those_of_keys_however_few_there_are(n_k):
    q, k, v = clustered(40, 8, 1)
    for seed in range(9):
        side = key_side(k[:n_k], v[:n_k], np.empty(0, np.int64), Clustering(**CLUSTERING), v[:n_k])
        generator = torch.Generator().manual_seed(seed)
        e = expand(q, side, generator, Clustering(**{**CLUSTERING, "near": 1}), scale=1.0)
        assert (e.logs == e.thresholds.unsqueeze(1)).any(1).all()
        one = of_one_block(q, k[:n_k], v[:n_k], seed, 1.0, 1)
        assert one.threshold.first < n_k
        for name in ("local-expansion", "approxkmv"):
            for settings in ({"block": 20}, {"block": 40, "directions": 0}):
                out = get(name)(q[None], k[None, :n_k], v[None, :n_k], scale=0.5, seed=seed, near=1, **settings)
                assert torch.isfinite(out).all()


def test_the_rank_of_a_threshold_among_every_eighth_key():
    assert [near_keys.rank_of_bar(80, near, first) for near, first in ((16, 3), (1, 0), (1000, 0))] == [8, 9, 0]
    assert near_keys.rank_of_bar(81, 16, 0) == 9


@pytest.mark.usefixtures("loops")
def test_keys_of_weight_0_add_nothing():
    q, k, v = clustered(300, 8, 3)
    e = expanded(q, k, v, Clustering(**CLUSTERING), 1.0)
    extra = torch.full((len(e.chosen),), -torch.inf)
    sums, scales = sums_of_keys(e.blocks, k, e.mean, v, e.chosen, e.ends, extra)
    assert not sums.any()
    assert not scales.isnan().any()


def test_all_queries_are_in_one_block_while_their_logits_vary_little():
    pytest.importorskip("numba")
    q, k = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)), 2 * clustered(700, 9, 1)[1]
    most, variance = reach.most_variance(700 - 40), float(reach.spreads(q, k).max())
    for scale in (0.2, 5.0):
        at_most = q * (most / variance) ** 0.5 / scale
        assert in_one_block(0.99 * at_most, k, scale, 40)
        assert not in_one_block(1.01 * at_most, k, scale, 40)


@pytest.mark.parametrize("d_v", [1, 2, 5, 12])
@pytest.mark.parametrize("clustering", [{"directions": 0}, {"directions": 5, "iterations": 1}])
@pytest.mark.parametrize("keys", ["as many", "fewer", "the queries"])
def test_compiled_loops_and_torch_agree(d_v, clustering, keys, monkeypatch):
    """In one block, for which no clustering decides by a rounding who belongs to it; errors are those of float32.

    One draw in tens of thousands falls so near the border of two keys that a rounding, which depends on the CPU,
    decides which is drawn: of `approxkmv` one of two seeds must agree.
    """
    pytest.importorskip("numba")
    q, k, v = clustered(300, 9, d_v, spread=0.6)
    q = 0.5 * q
    if keys == "fewer":
        k, v = k[:250], v[:250]
    elif keys == "the queries":
        k = q = 2 * q
    given = {"scale": 0.5, "block": 300, "near": 40, **clustering}
    both = {"approxkmv": given, "local-expansion": {**given, "products": "float32"}}

    def answers(name: str) -> list[torch.Tensor]:
        return [get(name)(q[None], k[None], v[None], seed=seed, **both[name]) for seed in (3, 4)]

    compiled = {name: answers(name) for name in both}
    monkeypatch.setattr(compute_loops, "numba_works", lambda: False)
    for name in both:
        pairs = zip(compiled[name], answers(name), strict=True)
        agree = [torch.allclose(one, other, atol=1e-4) for one, other in pairs]
        assert (any if name == "approxkmv" else all)(agree), name


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("multiple", [1, 4])
def test_blocks_hold_every_query_once(multiple):
    generator = torch.Generator().manual_seed(0)
    q, points = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    labels = torch.randint(9, (50,), generator=generator)
    labels[labels == 4] = 8
    blocks = make_blocks(q, 2.0, points, torch.ones(3), labels, multiple)
    # A label that nobody has is no block.
    assert len(blocks) == len(labels.unique())
    assert (blocks.sizes % multiple == 0).all()
    assert sorted(blocks.queries[blocks.queries >= 0]) == list(range(50))
    assert (blocks.queries[blocks.rows] == np.arange(50)).all()
    assert torch.equal(blocks.of_queries(blocks.in_rows(q)), q)
    rows = blocks.deltas + blocks.of_rows(blocks.centres)
    assert torch.allclose(blocks.of_queries(rows), 2 * q, atol=1e-5)
    padded = torch.from_numpy(blocks.queries < 0)
    assert int(padded.sum()) == len(padded) - 50
    assert not blocks.deltas[padded].any()
    assert not blocks.row_variances[padded].any()
    for b, start in enumerate(blocks.starts):
        mine = labels[blocks.queries[start]] == labels
        assert set(np.flatnonzero(blocks.labels == b)) == set(mine.nonzero().squeeze(1).tolist())
        assert torch.allclose(blocks.centres[b], 2 * q[mine].mean(0), atol=1e-5)
        squares = (points[mine] - points[mine].mean(0)).square()
        assert torch.allclose(blocks.variances[b], squares.mean(0), atol=1e-5)
        assert torch.allclose(blocks.of_queries(blocks.row_variances)[mine], squares.sum(1), atol=1e-5)


def test_without_axes_every_block_has_its_samples():
    """There is one block, of whose deviation nothing is known: it takes the samples that were asked for."""
    q, k, v = clustered(240, 8, 1)
    without = Clustering(**{**CLUSTERING, "directions": 0})
    e = expanded(q, k, v, without, 1.0)
    assert light_keys.budgets(e, torch.zeros(1, dtype=torch.float64), 33).tolist() == [33]


def test_paper_with_one_block_is_exact():
    q, k, v = clustered(100, 8, 2)
    out = get("approxkmv-paper")(q[None], k[None], v[None], scale=0.5, block=100, samples=16)
    # Every pair is in the block, so that nothing is left to sample.
    assert (out[0].double() - exact(q, k, v, 0.5)).abs().max() < 1e-5


@pytest.mark.parametrize("normalised", [False, True])
def test_rows_of_the_paper_by_hand(normalised):
    """In float64: the own block, and the mean of the draws outside it, of more of them where they vary more."""
    q, k, v = clustered(120, 8, 2)
    q *= 0.4
    parameters = approxkmv_paper.Parameters(block=30, samples=20, projections=4, normalised=normalised)
    numerators, row_sums, logs = approxkmv_paper.sums(q, k, v, torch.Generator().manual_seed(0), parameters)
    generator = torch.Generator().manual_seed(0)
    blocks = sort_into_blocks(q, k, generator, block=30, projections=4)
    p = column_probabilities(v)
    chosen = drawn(p, 30, generator)
    block_of_query = torch.empty(120, dtype=torch.int64)
    block_of_query[blocks.queries] = torch.arange(len(blocks.queries)).unsqueeze(1)
    own = block_of_query.unsqueeze(1) == blocks.block_of_key
    weights = (q.double() @ k.double().mT).exp()
    extended = torch.cat([v, torch.ones(120, 1)], 1).double()
    heavy = (weights * own) @ extended
    draws = ((weights * ~own / p)[:, chosen]).unsqueeze(2) * extended[chosen]
    first = draws[:, :20].mean(1)
    variance = draws[:, :20].square().sum(2).mean(1) - first.square().sum(1)
    if normalised:
        variance /= (heavy + first)[:, -1].square()
    above = variance > variance.mean()
    assert 5 < int(above.sum()) < 60
    right = heavy + torch.where(above.unsqueeze(1), draws.mean(1), first)
    found = torch.cat([numerators, row_sums.unsqueeze(1)], 1).double() * logs.double().exp().unsqueeze(1)
    assert ((found - right).abs() / right[:, -1:]).max() < 1e-4


def test_paper_improves_with_its_budget():
    q, k, v = clustered(1000, 12, 1)
    right = exact(q, k, v, 0.5)
    gaps = []
    for block, samples in ((16, 16), (128, 512)):
        each = [
            float((get("approxkmv-paper")(
                q[None], k[None], v[None], scale=0.5, seed=s, block=block, samples=samples
            )[0].double() - right).norm())
            for s in range(5)
        ]  # fmt: skip
        gaps.append(np.median(each))
    assert gaps[1] < 0.5 * gaps[0]
