"""Hashing-based methods: what they promise about bias, budget and large logits."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.causal import causal_attention, causal_sums
from approxkmv.attention.hashed import hyperattention, kdeformer, vkde_lsh
from approxkmv.attention.hashed.angular_hashing import gray_rank, sort_into_blocks
from approxkmv.attention.hashed.column_sampling import column_probabilities
from approxkmv.compute.counting import counting
from approxkmv.kmv.hashing import PStableHash

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n_q, n_k, d, d_v, seed=0):
    """Queries and keys around shared centres, values that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.6 * torch.randn(12, d, generator=generator)
    q, k = (
        centres[torch.randint(12, (n,), generator=generator)] + 0.4 * torch.randn(n, d, generator=generator)
        for n in (n_q, n_k)
    )
    return q, k, torch.randn(n_k, d_v, generator=generator) + 0.5 * k[:, :1]


def exact(q, k, v, scale):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


def sums_of(module, **given):
    """f(q, k, v, generator, **budget): a method's numerators, row sums and logs."""

    def sums(q, k, v, generator, **budget):
        return module.sums(q, k, v, generator, module.Parameters(**given, **budget))

    return sums


kdeformer_sums = sums_of(kdeformer, projections=4)
hyperattention_sums = sums_of(hyperattention, projections=4)
vkde_sums = sums_of(vkde_lsh)


def causal_of(sums):
    """The same by recursion, with exact triangles of 30 queries."""
    return lambda q, k, v, generator, **budget: causal_sums(q, k, v, generator, partial(sums, **budget), 30)


def estimates(sums, q, k, v, budget, seeds, causal=False):
    """[Numerators, row sums] (seeds, n_q, d_v + 1) over the exact row sum, in float64, and what they estimate."""
    logits = q.double() @ k.double().mT
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    log_sum = logits.logsumexp(1)
    found = []
    for seed in range(seeds):
        numerators, row_sums, logs = sums(q, k, v, torch.Generator().manual_seed(seed), **budget)
        both = torch.cat([numerators, row_sums.unsqueeze(1)], 1)
        found.append(both.double() * (logs.double() - log_sum).exp().unsqueeze(1))
    ones = torch.ones(len(k), 1, dtype=torch.float64)
    return torch.stack(found), logits.softmax(1) @ torch.cat([v.double(), ones], 1)


UNBIASED = {
    "kdeformer": (kdeformer_sums, {"block": 20, "samples": 40}),
    # More samples than keys of a block: one at least lies outside.
    "hyperattention": (hyperattention_sums, {"block": 20, "samples": 40}),
    "causal hyperattention": (causal_of(hyperattention_sums), {"block": 20, "samples": 30}),
    "causal kdeformer": (causal_of(kdeformer_sums), {"block": 20, "samples": 30}),
    "causal vkde-lsh": (causal_of(vkde_sums), {"tables": 12, "bucket": 50}),
    "vkde-lsh": (vkde_sums, {"tables": 12, "bucket": 50}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_numerators_and_row_sums_are_unbiased(name):
    """40 fixed combinations of the rows, each within 4.5 standard errors over 300 seeds.

    False alarms: a normal variable passes 4.5 with probability 7e-6, 40 of them with less than 3e-4; the seeds are
    fixed, so that the test says the same each time.
    """
    sums, budget = UNBIASED[name]
    q, k, v = inputs(200, 200, 8, 1)
    found, right = estimates(sums, q, k, v, budget, 300, causal=name.startswith("causal"))
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (20, 200)))
    signs[0] = 1.0
    combined = torch.einsum("cn,snw->csw", signs, found).movedim(1, 0)
    gap = combined.mean(0) - torch.einsum("cn,nw->cw", signs, right)
    error = combined.std(0) / 300**0.5
    assert bool((gap.abs() < 4.5 * error).all()), (gap / error).abs().max()
    # The test could have seen a bias of three parts in a hundred of the row sums.
    assert float(error[0, -1]) * 4.5 < 0.03 * 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sums", "few", "many"),
    [
        (kdeformer_sums, {"block": 20, "samples": 30}, {"block": 20, "samples": 480}),
        (vkde_sums, {"tables": 3, "bucket": 50}, {"tables": 48, "bucket": 50}),
    ],
)
def test_error_falls_as_one_over_the_root_of_the_budget(sums, few, many):
    """Sixteen times the budget, a quarter of the deviation.

    It is known to about a fifth from 40 seeds: the rows of one seed share their samples.
    """
    q, k, v = inputs(200, 200, 8, 1)
    a, right = estimates(sums, q, k, v, few, 40)
    b, _ = estimates(sums, q, k, v, many, 40)
    assert 2.5 < float(((a - right).square().mean() / (b - right).square().mean()).sqrt()) < 6.5


def test_a_shared_sample_without_replacement_errs_less_than_one_with():
    q, k, v = inputs(200, 200, 8, 1)
    deviations = []
    for samples in (40, 80, 160, 200):
        found, right = estimates(hyperattention_sums, q, k, v, {"block": 20, "samples": samples}, 40)
        deviations.append(float((found - right).square().mean().sqrt()))
    # Variance (1/m - 1/n): to the half of a tenth from 40 to 160 of 200, and nothing but rounding for all of them.
    assert deviations[0] > 1.3 * deviations[1] > 1.3 * 1.5 * deviations[2]
    assert deviations[3] < 1e-5


COVERING = [
    ("kdeformer", {"block": 1000, "samples": 8}),
    ("hyperattention", {"block": 1000, "samples": 8}),
    ("hyperattention", {"block": 7, "samples": 1000}),
    ("vkde-lsh", {"tables": 3, "bucket": 1000}),
    ("clustered", {"block": 16, "clusters": 2.0, "near": 1000}),
    # Every key a cluster of its own: the centroids are the keys.
    ("clustered", {"block": 16, "clusters": 100.0, "near": 3}),
]


@pytest.mark.parametrize(("name", "budget"), COVERING)
@pytest.mark.parametrize(("n_q", "n_k"), [(97, 97), (40, 131), (131, 11)])
def test_a_budget_that_covers_everything_is_exact(name, budget, n_q, n_k):
    q, k, v = inputs(n_q, n_k, 9, 3)
    out = get(name)(q[None], k[None], v[None], scale=0.7, **budget)[0]
    # Float32 sums of n terms and logits of a few units.
    assert (out.double() - exact(q, k, v, 0.7)).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["kdeformer", "hyperattention", "clustered", "vkde-lsh", "approxkmv-paper"])
@pytest.mark.parametrize("d_v", [1, 12])
def test_large_logits_stay_finite_and_inside_the_values(name, d_v):
    q, k, v = inputs(150, 130, 6, d_v)
    largest = float((q @ k.mT).abs().max())
    method = get(name)
    out = method(q[None], k[None], v[None], scale=1e4 / largest, **method.grid[0])[0]
    assert bool(out.isfinite().all())
    if name != "approxkmv-paper":
        # Weights are positive and sum to one, to rounding.
        assert bool((out <= v.amax(0) + 1e-4).all())
        assert bool((out >= v.amin(0) - 1e-4).all())


@pytest.mark.parametrize(("n_q", "n_k", "block"), [(100, 100, 16), (7, 100, 3), (100, 7, 10), (33, 34, 50)])
def test_blocks_hold_every_point_once_and_are_equal(n_q, n_k, block):
    q, k, _ = inputs(n_q, n_k, 5, 1)
    with counting() as counts:
        blocks = sort_into_blocks(q, k, torch.Generator().manual_seed(0), block=block, projections=4)
    assert counts.other_products == 4 * (n_q + n_k)
    # What fills a short block up is of that block.
    assert [sum(len(row.unique()) for row in rows) for rows in (blocks.queries, blocks.keys)] == [n_q, n_k]
    assert blocks.queries.shape[1] <= block or n_k < n_q / block
    assert blocks.queries.unique().tolist() == list(range(n_q))
    kept = blocks.keys[~blocks.padded]
    assert sorted(kept.tolist()) == list(range(n_k))
    sizes = blocks.keys_in_block()
    assert int(sizes.max() - sizes.min()) <= 1
    assert int(sizes.min()) >= 1
    block_of = torch.arange(len(sizes)).unsqueeze(1).expand_as(blocks.keys)[~blocks.padded]
    assert torch.equal(blocks.block_of_key[kept], block_of)
    rows = torch.arange(n_q)[blocks.queries]
    assert torch.equal(blocks.unsorted(rows, n_q), torch.arange(n_q))


def test_queries_and_keys_of_similar_signs_share_a_block():
    q, _, _ = inputs(100, 1, 5, 1)
    blocks = sort_into_blocks(q, q, torch.Generator().manual_seed(0), block=16, projections=4)
    assert torch.equal(blocks.queries, blocks.keys)
    signs = q @ torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) > 0
    ranks = gray_rank(signs)[blocks.queries].flatten()
    assert bool((ranks.diff() >= 0).all())
    assert len(ranks.unique()) > 4


def test_gray_order_changes_one_bit_at_a_time():
    codes = torch.tensor([[int(b) for b in f"{i:04b}"] for i in range(16)])
    ordered = codes[gray_rank(codes).argsort()]
    assert sorted(gray_rank(codes).tolist()) == list(range(16))
    assert bool(((ordered[1:] - ordered[:-1]).abs().sum(1) == 1).all())


def test_probabilities_follow_the_column_norms():
    v = torch.tensor([[0.0], [3.0], [0.0], [0.0]])
    p = column_probabilities(v)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    extended = np.array([[0, 1], [3, 1], [0, 1], [0, 1]], float)
    right = np.linalg.norm(extended, axis=1) / np.linalg.norm(extended, 2) + 0.25
    assert np.allclose(p.numpy(), right / right.sum(), atol=1e-6)


def masked(q, k, v, scale):
    logits = scale * q.double() @ k.double().mT
    later = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1) @ v.double()


def causal(q, k, v, exact_below, **budget):
    sums = partial(hyperattention_sums, **({"block": 16, "samples": 1000} | budget))
    return causal_attention(0.6 * q, k, v, torch.Generator().manual_seed(0), sums, exact_below)


@pytest.mark.parametrize("budget", [{"exact_below": 1000}, {"exact_below": 10, "block": 1000}, {"exact_below": 1}])
def test_causal_with_all_it_needs_is_masked_attention(budget):
    q, k, v = inputs(301, 301, 7, 2)
    assert (causal(q, k, v, **budget).double() - masked(q, k, v, 0.6)).abs().max() < 2e-5


def test_causal_rows_do_not_see_later_keys():
    q, k, v = inputs(200, 200, 7, 2)
    given = {"samples": 32, "exact_below": 25}
    before = causal(q, k, v, **given)
    # Row i < 25 is exact, and so is the part of every row in its own triangle.
    assert (before[:25].double() - masked(q, k, v, 0.6)[:25]).abs().max() < 2e-5
    v[150:] += 100
    after = causal(q, k, v, **given)
    assert torch.equal(before[:150], after[:150])
    assert not torch.equal(before[150:], after[150:])


def test_signs_agree_as_often_as_the_angle_says():
    """2,000 hash functions of 3 bits on the vectors of Lemma 4.1: 30 pairs, each within 4.5 standard errors."""
    q, k, _ = inputs(10, 3, 5, 1)
    norms = k.square().sum(1)
    lifted = torch.cat([k, (norms.max() - norms).clamp_min(0).sqrt().unsqueeze(1)], 1)
    directions = torch.randn(2000, 3, 6, generator=torch.Generator().manual_seed(0))
    same = ((directions[..., :5] @ q.mT > 0).unsqueeze(3) == (directions @ lifted.mT > 0).unsqueeze(2)).all(1)
    cosine = q @ k.mT / (q.norm(dim=1, keepdim=True) * norms.max().sqrt())
    p = vkde_lsh.log_collision_probability(cosine, 3).exp()
    assert bool(((same.double().mean(0) - p).abs() < 4.5 * (p * (1 - p) / 2000).sqrt()).all())
    # As the angle's definition has it, also where rounding puts a cosine beyond 1
    found = vkde_lsh.log_collision_probability(torch.tensor([0.0, -0.999, 1 + 1e-6, -1 - 1e-6]), 3).tolist()
    assert found[:3] == pytest.approx([3 * math.log(0.5), 3 * math.log(1 - math.acos(-0.999) / math.pi), 0], rel=1e-3)
    assert -30 < found[3] < 3 * math.log(1e-3)


def test_signs_tell_more_per_collision_than_shifted_grids_do():
    """Slope of log p in the cosine at a right angle, for one norm of all points, over -log p there."""
    step = 1e-3
    p = [float(vkde_lsh.log_collision_probability(torch.tensor(c), 1)) for c in (-step, 0.0, step)]
    signs = (p[2] - p[0]) / (2 * step) / -p[1]
    assert signs == pytest.approx(2 / (math.pi * math.log(2)), rel=1e-3)
    # Width 1 at all norms is all widths at one norm. The squared distance is 2 norm^2 (1 - cosine).
    norm = np.logspace(-3, 3, 2001)
    logs = [np.log(PStableHash(1.0).collision_probability(norm * math.sqrt(2 * (1 - c)))) for c in (-step, 0.0, step)]
    assert 0.5 < ((logs[2] - logs[0]) / (2 * step) / -logs[1]).max() < 0.6


def test_angles_do_not_depend_on_the_length_of_a_query():
    q, k, v = (t[None] for t in inputs(60, 60, 5, 1))
    short, shorter, none = (get("vkde-lsh")(by * q, k, v, scale=1.0, bucket=10) for by in (1e-4, 1e-20, 0))
    assert torch.allclose(short, shorter, atol=1e-3)
    assert bool(none.isfinite().all())


def test_groups_share_the_tables_out():
    q, k, v = inputs(60, 60, 5, 1)
    given = {"tables": 7, "bucket": 10}
    with counting() as counts:
        together, logs, apart, same = (
            part
            for groups in (1, 3)
            for part in vkde_lsh.table_sums(
                q, k, v, torch.Generator().manual_seed(0), vkde_lsh.Parameters(**given, groups=groups)
            )
        )
    # Three signs leave at most 10 of 60 keys at a right angle, in both sets of tables.
    assert counts.other_products == 2 * 7 * 3 * (60 + 60)
    assert torch.equal(logs, same)
    # Tables 0, 3, 6 make the first group, 1 and 4 the second, 2 and 5 the third.
    weights = torch.tensor([3.0, 2.0, 2.0]) / 7
    assert torch.allclose(together[0], torch.einsum("g,gnw->nw", weights, apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [3, 4, 9])
@pytest.mark.parametrize(("tables", "bucket"), [(12, 30), (4, 3)])
def test_the_answer_is_the_quotient_of_the_medians_or_means(groups, tables, bucket):
    q, k, v = inputs(60, 60, 5, 2)
    given = {"tables": tables, "bucket": bucket, "groups": groups}
    parameters = vkde_lsh.Parameters(**given)
    both, _ = vkde_lsh.table_sums(q, k - k.mean(0), v, torch.Generator().manual_seed(0), parameters)
    medians, means = np.median(both.numpy(), axis=0), both.numpy().mean(0)
    met, some = medians[:, -1:] > 0, means[:, -1:] > 0
    assert met.mean() > 0.9 if bucket == 30 else (met.sum() > 5 and (some & ~met).sum() > 5 and (~some).sum() > 1)
    # Of a query that met no key in half of the groups, and in all of them
    mean_value = np.append(v.numpy().mean(0), np.float32(1.0))
    right = np.where(met, medians, np.where(some, means, mean_value))
    out = get("vkde-lsh")(q[None], k[None], v[None], scale=1.0, seed=0, **given)[0].numpy()
    assert np.allclose(out, right[:, :-1] / right[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_median_of_three_means_misses_by_less_than_one_of_them():
    """The error that one row in a hundred exceeds, over 60 rows and 100 seeds.

    Over 16 sets of 100 other seeds the quotient was 0.57 with a deviation of 0.05: 0.8 is 4.5 of them away, a false
    alarm of 1e-5, and none with these seeds. An answer from one group alone had quotients of 0.89 to 1.09.
    """
    q, k, v = inputs(60, 60, 8, 1)
    right = exact(q, k, v, 1.0)

    def missed_by(**given):
        outs = [get("vkde-lsh")(q[None], k[None], v[None], scale=1.0, seed=s, bucket=12, **given) for s in range(100)]
        return float((torch.cat(outs).double() - right).abs().quantile(0.99))

    assert missed_by(tables=24, groups=3) < 0.8 * missed_by(tables=8)


def test_a_far_cluster_of_equal_keys_is_exact():
    """Six places that hold 5 to 105 keys each: every cluster is one place, so that centroids lose nothing."""
    q, places, _ = inputs(120, 6, 5, 1)
    k = places.repeat_interleave(torch.tensor([5, 25, 45, 65, 85, 105]), 0)
    v = torch.randn(len(k), 2, generator=torch.Generator().manual_seed(0))
    right = exact(q, k, v, 0.7)
    out = get("clustered")(q[None], k[None], v[None], scale=0.7, block=20, clusters=8.0, near=1)[0]
    assert (out.double() - right).abs().max() < 2e-5
    # The values' mean is far off, so that the weights of the places are what is tested.
    assert (v.double().mean(0) - right).abs().max() > 0.05


def test_near_clusters_are_worth_their_cost():
    q, k, v = inputs(600, 600, 16, 1)
    right = exact(q, k, v, 2.0)
    gaps = [
        float((get("clustered")(q[None], k[None], v[None], scale=2.0, block=32, near=m)[0].double() - right).norm())
        for m in (1, 4, 12)
    ]
    mean_gap = float((v.double().mean(0) - right).norm())
    assert 0.5 * mean_gap > gaps[0] > gaps[1] > gaps[2]
