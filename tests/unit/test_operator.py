"""KernelOperator: the exact product, blocks against it in every form, the choice of settings, and the error bar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from approxkmv import KernelOperator, top_eigenvalue
from approxkmv.attention.blocks.expansion import principal_axes
from approxkmv.compute import scratch
from approxkmv.compute.counting import counting
from approxkmv.compute.drawing import drawn
from approxkmv.errors import InputError
from approxkmv.operator import eigenvalue, exact
from approxkmv.operator import kernel_operator as module
from approxkmv.operator.bar import ErrorBar, error_bar, proposal
from approxkmv.operator.blocks import _out_of_reach, _ranked, clusters_of, make_blocks
from approxkmv.operator.pilot import Pilot, _interpolated, cost_of_blocks, near_for, pilot_of, pilot_rows
from approxkmv.operator.points import Points, in_units, key_side, query_side


def clustered(n: int, d: int, seed: int, centres: int = 20, width: float = 0.7) -> torch.Tensor:
    """Points (n, d) around a few centres, float32."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(centres, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, centres, (n,), generator=generator)
    return middles[labels] + width * torch.randn(n, d, generator=generator)


def reference(queries: torch.Tensor, keys: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Kx in float64, a strip of queries at a time, which stays in the processor's cache."""
    q, k = queries.double() / sigma, keys.double() / sigma
    q_halves, k_halves = (0.5 * points.square().sum(1) for points in (q, k))
    strips = zip(q.split(64), q_halves.split(64), strict=True)
    logs = ((some @ k.mT).sub_(k_halves).sub_(halves.unsqueeze(1)) for some, halves in strips)
    return torch.cat([strip.exp_() @ x.double() for strip in logs])


def relative(y, truth: torch.Tensor) -> float:
    return float((torch.as_tensor(y).double() - truth).norm() / truth.norm())


def signs(n: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


Q, K_, SIGMA = clustered(1200, 10, 1), clustered(1500, 10, 2), 1.5
# bfloat16 rounds an exponent of size up to 16 by up to 1/32, in both directions.
LOW = [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.02)]


@pytest.mark.parametrize(("low", "tolerance"), LOW)
@pytest.mark.parametrize("columns", [1, 3, 12])
def test_the_exact_product_in_every_precision(low, tolerance, columns, monkeypatch):
    monkeypatch.setattr(scratch, "_POISONED", True)
    kept = torch.float64 if low == torch.float64 else torch.float32
    x = torch.randn(len(K_), columns, generator=torch.Generator().manual_seed(3)).to(kept)
    with counting() as counts:
        y = exact.product(in_units(Q, K_, SIGMA, kept), x, low)
    assert relative(y, reference(Q, K_, x, SIGMA)) < tolerance
    assert counts.kernel_evaluations == len(Q) * len(K_)


def test_sides_in_bfloat16_hold_halves_as_two_numbers_and_fill_groups_of_32_columns():
    points = in_units(Q, K_, SIGMA)
    of_queries, of_keys = query_side(points, slice(None), torch.bfloat16), key_side(points, torch.bfloat16)
    assert of_queries.shape[1] == of_keys.shape[1] == 32
    assert torch.allclose(of_queries[:, 12:14].double().sum(1), -points.query_halves.double(), rtol=2**-15)
    assert torch.allclose(of_keys[:, 10:12].double().sum(1), -points.key_halves.double(), rtol=2**-15)


def test_the_exact_product_without_compiled_loops(monkeypatch):
    monkeypatch.setattr(exact, "loops_for", lambda logs: None)
    x = signs(len(K_)).unsqueeze(1)
    for low, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        y = exact.product(in_units(Q, K_, SIGMA, torch.float32), x, low)
        assert relative(y, reference(Q, K_, x, SIGMA)) < tolerance


def of_blocks(low: torch.dtype, near: int, x: torch.Tensor, ranked: bool = False):
    kept = torch.float64 if low == torch.float64 else torch.float32
    blocks = make_blocks(in_units(Q, K_, SIGMA, kept), low, 0)[0]
    if ranked:
        blocks = blocks.ranked_by(x.to(kept))
    y = torch.zeros(len(Q), x.shape[1], dtype=kept)
    y[blocks.order] = blocks.products(blocks.plan(near), x.to(kept))[0]
    return y


@pytest.mark.parametrize("ranked", [False, True])
def test_blocks_have_an_error_that_falls_with_the_number_of_near_keys(ranked, monkeypatch):
    monkeypatch.setattr(scratch, "_POISONED", True)
    x = torch.stack([signs(len(K_)), torch.ones(len(K_)), K_[:, 0] ** 3], 1)
    truth = reference(Q, K_, x, SIGMA)
    errors = [
        [relative(y, t) for y, t in zip(of_blocks(torch.bfloat16, near, x, ranked).mT, truth.mT, strict=True)]
        for near in (16, 128, 600)
    ]
    assert (np.diff(errors, axis=0) < 0).all()
    # Dropping the far keys would leave nearly all of the answer to ones out.
    assert errors[0][1] < 0.2
    assert max(errors[-1]) < 0.035


def test_the_second_order_of_far_keys_makes_sums_of_rows_much_more_accurate():
    # In many dimensions no block is narrow: all queries lie about equally far from their block's centre.
    generator = torch.Generator().manual_seed(4)
    for d in (64, 200):
        q, k = torch.randn(2, 3000, d, generator=generator)
        points, x = in_units(q, k, d**0.5, torch.float32), torch.ones(3000, 1)
        truth = reference(q, k, x, d**0.5)
        blocks = make_blocks(points, torch.float32, 0)[0]
        without = replace(blocks, bends=torch.zeros_like(blocks.bends))
        errors = [relative(b.products(b.plan(64), x)[0], truth[b.order]) for b in (blocks, without)]
        assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("ranked", [False, True])
def test_blocks_are_the_same_in_every_form(ranked, monkeypatch):
    x = torch.stack([signs(len(K_)), K_[:, 0] ** 3], 1)
    expected = of_blocks(torch.float64, 100, x, ranked)
    # Near keys are chosen by rounded exponents: a few keys at the threshold are near in one form and far in another.
    assert relative(of_blocks(torch.float32, 100, x, ranked), expected) < 1e-3
    assert relative(of_blocks(torch.bfloat16, 100, x, ranked), expected) < 0.05
    compiled = of_blocks(torch.float32, 100, x, ranked)
    monkeypatch.setattr(exact, "loops_for", lambda logs: None)
    monkeypatch.setattr("approxkmv.operator.blocks.loops_for", lambda logs: None)
    assert relative(of_blocks(torch.float32, 100, x, ranked), compiled.double()) < 1e-4


@pytest.mark.parametrize("ranked", [False, True])
def test_the_transposed_product_of_blocks_is_the_transpose(ranked):
    blocks = make_blocks(in_units(Q, K_, SIGMA, torch.float64), torch.float64, 0)[0]
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (len(K_), len(Q)))
    blocks = blocks.ranked_by(x) if ranked else blocks
    plan = blocks.plan(100)
    forward, backward = blocks.products(plan, x, y)
    assert torch.allclose(y.mT @ forward, backward.mT @ x, rtol=1e-10)


LOW_AND_ROUNDING = [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-5)]


def prepared(low: torch.dtype):
    kept = torch.float64 if low == torch.float64 else torch.float32
    x = torch.stack([K_[:, 0] ** 3, signs(len(K_))], 1).to(kept)
    return make_blocks(in_units(Q, K_, SIGMA, kept), low, 0)[0].ranked_by(x), x


@pytest.mark.parametrize(("low", "rounding"), LOW_AND_ROUNDING)
def test_kept_near_keys_give_the_product_of_those_that_are_found_again(low, rounding, monkeypatch):
    monkeypatch.setattr(scratch, "_POISONED", True)
    blocks, x = prepared(low)
    y = signs(len(Q), 6).unsqueeze(1).to(x)
    kept = blocks.plan(100)
    monkeypatch.setattr("approxkmv.operator.blocks.KEPT", 0)
    again = blocks.plan(100)
    assert kept.strips is not None
    assert again.strips is None
    with counting() as few:
        found = blocks.products(kept, x, y)
    with counting() as more:
        expected = blocks.products(again, x, y)
    assert more.kernel_evaluations - few.kernel_evaluations == len(blocks) * len(K_)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other.double()) < rounding


@pytest.mark.parametrize(("low", "rounding"), LOW_AND_ROUNDING)
def test_a_constant_x_is_like_any_other(low, rounding):
    blocks, x = prepared(low)
    constant = replace(blocks, sizes_of_x=None)
    plan, ones = constant.plan(100), torch.ones_like(x[:, :1])
    alone = constant.products(plan, 3 * ones)[0]
    beside = constant.products(plan, torch.cat([3 * ones, x], 1))[0]
    assert relative(alone, beside[:, :1].double()) < rounding
    assert relative(constant.products(plan, x)[0], beside[:, 1:].double()) < rounding


def in_float64(queries: torch.Tensor = Q, keys: torch.Tensor = K_, sigma: float = SIGMA, seed: int = 0):
    """Blocks and their first plan."""
    return make_blocks(in_units(queries, keys, sigma, torch.float64), torch.float64, seed)


def test_every_row_sees_a_key_that_stands_for_all_far_ones_as_it_is():
    blocks, _ = in_float64()
    logs = -0.5 * torch.cdist(blocks.points.queries[blocks.order], blocks.points.keys).square()
    straight = replace(blocks, bends=torch.zeros_like(blocks.bends))
    weights = blocks.ranks @ blocks.keys.features.mT
    for key in range(0, len(K_), 100):
        factors = straight._factors(weights[:, key], blocks.points.keys[key].expand(len(blocks), -1))
        assert torch.allclose(factors, logs[:, key].exp2(), rtol=1e-9)


@pytest.mark.parametrize("axes", [128, 4])
def test_the_second_order_is_that_of_the_far_keys_covariance(axes, monkeypatch):
    """In full along the leading axes, by the variances of all keys along others."""
    monkeypatch.setattr("approxkmv.operator.blocks._FULL_AXES", axes)
    blocks, plan = in_float64(sigma=2 * SIGMA)
    keys = blocks.points.keys
    full, spread = principal_axes(keys, keys.shape[1])
    deltas, along = blocks.deltas @ full, keys @ full
    found = torch.cat([weights for weights, _ in plan.strips])
    expected = (deltas[:, axes:].square() * spread[axes:]).sum(1)
    for rows, far, variances in zip(blocks.of_blocks, found, blocks.variances, strict=True):
        covariance = torch.cov(along.mT, aweights=far, correction=0)[:axes, :axes]
        expected[rows] += ((deltas[rows, :axes] @ covariance) * deltas[rows, :axes]).sum(1)
        expected[rows] -= variances[:axes] @ covariance.diagonal()
    # The covariance is estimated from 1,024 keys.
    expected = (0.5 * np.log(2) * expected).clamp(-2, 2)
    assert relative(blocks.bends, expected) < 0.05


def test_no_second_order_changes_a_far_sum_more_than_fourfold():
    blocks, _ = in_float64(sigma=0.3 * SIGMA)
    assert (float(blocks.bends.min()), float(blocks.bends.max())) == (-2, 2)


@pytest.mark.parametrize("near", [40, 100])
def test_about_so_many_keys_are_near(near):
    blocks, _ = in_float64()
    lists = [listed for _, lists in blocks.plan(near).strips for listed in lists]
    # Of every eighth key, which tell the threshold, exactly an eighth of them
    assert {int((listed % 8 == 0).sum()) for listed in lists} == {near // 8}
    assert np.mean([len(listed) for listed in lists]) == pytest.approx(near, rel=0.1)


@pytest.mark.parametrize("compiled", [True, False])
def test_lists_of_bfloat16_have_lengths_that_repeat(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("approxkmv.operator.blocks.loops_for", lambda logs: None)
    _, plan = make_blocks(in_units(Q, K_, SIGMA), torch.bfloat16, 0)
    for weights, lists in plan.strips:
        for far, listed in zip(weights, lists, strict=True):
            number = int((listed < len(K_)).sum())
            assert len(listed) == -(-number // 128) * 128
            # The row of zeros stands behind the keys.
            assert set(listed[number:].tolist()) <= {len(K_)}
            assert not far[listed[:number]].any()


def test_queries_are_out_of_reach_beyond_thrice_the_median_and_one_in_32_at_most():
    nats = torch.full((64,), 0.1)
    nats[[5, 9, 20]] = torch.tensor([1.9, 2.1, 3.0])
    assert sorted(_out_of_reach(nats).tolist()) == [9, 20]
    assert sorted(_out_of_reach(nats + 1).tolist()) == [20]
    nats[[30, 40]] = 2.5
    assert sorted(_out_of_reach(nats).tolist()) in ([20, 30], [20, 40])


def test_the_number_of_a_rank_on_every_device():
    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    values = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    for rank in (0, 4, 6):
        for given in (values, values.as_subclass(Elsewhere)):
            assert _ranked(given, rank).tolist() == values.sort(1).values[:, rank].tolist()


def test_how_many_clusters_there_are():
    # Blocks of 1.1 times the root of 9,000, which are 104 queries, and smaller ones of fewer queries than keys
    assert [clusters_of(*numbers) for numbers in ((9000, 9000), (9000, 1000), (1000, 9000))] == [87, 87, 91]
    assert [clusters_of(number, 500, block=70) for number in (1, 70, 140, 141)] == [1, 1, 2, 3]


def test_blocks_depend_on_the_seed_and_not_on_columns_that_are_all_the_same():
    one, other = (in_float64(seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.order, other.order)
    wide = (torch.cat([points, torch.full((len(points), 3), 7.0)], 1) for points in (Q, K_))
    assert abs(len(in_float64(*wide)[0]) - len(one)) <= 3


def test_queries_that_are_far_from_their_clusters_are_blocks_of_their_own():
    queries = torch.cat([Q, 2 * Q[:20]])
    blocks, _ = in_float64(queries)
    assert len(blocks) > clusters_of(len(queries), len(K_), 0.5) + 10
    assert int((blocks.sizes == 1).sum()) > 10


@pytest.mark.parametrize("width", [0.3, 3.0])
def test_no_row_sees_a_far_entry_above_one(width):
    blocks = make_blocks(in_units(Q, K_, width * SIGMA, torch.float64), torch.float64, 0)[0]
    # It is 2^threshold as the row sees it, and far keys weigh less.
    assert float(blocks.plan(16).factors.max()) <= 1


def test_a_row_is_doubted_by_its_far_sum_and_how_much_its_exponents_vary():
    blocks = make_blocks(in_units(Q, K_, SIGMA, torch.float64), torch.float64, 0)[0]
    plan, ln2 = blocks.plan(100), np.log(2)
    points = blocks.points
    far = (-0.5 * torch.cdist(points.queries[blocks.order], points.keys).square()).exp2()
    lists = (listed for _, lists in plan.strips for listed in lists)
    for rows, listed in zip(blocks.of_blocks, lists, strict=True):
        far[rows, listed] = 0
    nats = (ln2 * blocks.deltas @ points.keys.mT).var(1)
    right = far.sum(1) * (nats + (2 * ln2 * blocks.bends.abs()).expm1())
    # Of the far sums only estimates are known.
    assert relative(blocks.doubts(plan)[blocks.order], right) < 0.2


def test_what_ranks_keys_by_x_is_all_that_is_made_for_an_x():
    blocks = make_blocks(in_units(Q, K_, SIGMA, torch.float64), torch.float64, 0)[0]
    x = (K_[:, :1] ** 3).double()
    ranked = blocks.ranked_by(x)
    for name in ("deltas", "side", "ranks", "bends"):
        assert getattr(ranked, name) is getattr(blocks, name)
    added = ranked.ranks @ (ranked.keys.features - blocks.keys.features).mT
    assert torch.allclose(added, ranked.sizes_of_x.log2().expand(len(blocks), -1))
    assert torch.allclose(ranked.sizes_of_x, (x[:, 0].abs() / x.square().mean().sqrt()).clamp_min(1e-3))


@pytest.mark.parametrize("number", [1500, 900])
def test_the_first_plan_is_made_with_the_blocks_and_only_once(number):
    with counting() as counts:
        blocks, plan = make_blocks(in_units(Q, K_[:number], SIGMA), torch.float32, 0)
    assert counts.kernel_evaluations == len(blocks) * number
    assert plan.near == min(256, number // 4)
    again = blocks.plan(plan.near)
    for name in ("thresholds", "totals", "means", "factors"):
        assert torch.equal(getattr(plan, name), getattr(again, name))
    for (weights, lists), (same, same_lists) in zip(plan.strips, again.strips, strict=True):
        assert torch.equal(weights, same)
        assert torch.equal(torch.cat(lists), torch.cat(same_lists))
    K = KernelOperator(Q, K_[:number], SIGMA, 0.1, method="blocks", seed=0)
    with counting() as counts:
        K._plan(K._blocks()[0], plan.near)
    assert counts.kernel_evaluations == len(K._blocks()[0]) * number


def test_the_plan_of_every_pilot_is_kept_beside_the_latest():
    K = KernelOperator(Q, K_, SIGMA, 0.1, method="blocks", seed=0)
    blocks, _ = K._blocks()
    plans = [K._plan(blocks, near) for near in (256, 64, 128)]
    assert K._plan(blocks, 256) is plans[0]
    assert K._plan(blocks, 128) is plans[2]
    assert list(K._plans) == [256, 128]
    ranked = blocks.ranked_by(K_[:, :1] ** 3)
    assert K._plan(ranked, 128) is not plans[2]
    assert K._plan(blocks, 128) is plans[2]


def test_pilots_that_differ_a_little_ask_for_the_same_plan():
    # Their errors halve as near keys are four times as many.
    found = {_interpolated([(256, 2 * error), (1024, error)], 1.0) for error in (0.78, 0.82, 0.85)}
    assert found == {768}
    assert [_interpolated([(256, 2.0), (1024, 1.0)], target) for target in (1.0, 0.5)] == [1024, 4096]
    assert _interpolated([(256, 1.0)], 1.0) == 256
    # Errors that hardly fall promise nothing; few near keys are rounded up most.
    assert _interpolated([(256, 1.0), (1024, 0.99)], 0.1) is None
    assert _interpolated([(16, 2.0), (64, 1.0)], 1.9) == 48
    assert _interpolated([(16, 2.0), (64, 0.0)], 1.0) == 64
    # Nor is a target of nothing ever met, and one close to it takes more keys than there are.
    assert _interpolated([(256, 2.0), (1024, 1.0)], 0.0) is None
    assert _interpolated([(256, 1.08), (1024, 1.0)], 1e-20) > 10**8


@pytest.mark.parametrize("method", ["auto", "blocks"])
def test_a_product_that_cancels_to_zero_is_zero(method, monkeypatch):
    """Each key is there twice, with opposite x, as where a sample is compared with itself."""
    monkeypatch.setattr(module, "may_be_worth", lambda n_q, n_k: True)
    monkeypatch.setattr(module, "WORTH", 1e9)
    q, k = clustered(3000, 10, 1), clustered(1500, 10, 2).repeat_interleave(2, 0)
    K = KernelOperator(q, k, SIGMA, seed=0, method=method)
    size = float((K @ torch.tensor([1.0, -1.0]).repeat(1500)).norm())
    assert size < (1e-3 if method == "blocks" else 1e-9) * float((K @ torch.ones(3000)).norm())


def kept_bytes(plan) -> int:
    return sum(weights.nbytes + sum(listed.nbytes for listed in lists) for weights, lists in plan.strips or [])


def test_memory_is_asked_for_all_plans_with_their_lists(monkeypatch):
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    K = KernelOperator(points, points, 1.0, 0.1, method="blocks", seed=0)
    largest = K._blocks()[0].plan(1499)
    monkeypatch.setattr(module, "STRIP", 0)
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    K._prepared = None
    with pytest.raises(InputError, match=r"keys need \d+ MiB") as caught:
        K._blocks()
    # Two are kept, and an x that ranks the keys has one of its own.
    asked = int(str(caught.value).split("need ")[1].split()[0]) << 20
    assert 0 < 3 * kept_bytes(largest) < asked < 10 * kept_bytes(largest)


def test_lists_of_near_keys_count_as_kept(monkeypatch):
    blocks, _ = prepared(torch.float32)
    size = kept_bytes(blocks.plan(700))
    monkeypatch.setattr("approxkmv.operator.blocks.KEPT", size)
    assert blocks.plan(700).strips is not None
    monkeypatch.setattr("approxkmv.operator.blocks.KEPT", size - 1)
    assert blocks.plan(700).strips is None


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_that_pad_a_block_add_nothing_though_their_exponents_overflow(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(exact, "loops_for", lambda logs: None)
        monkeypatch.setattr("approxkmv.operator.blocks.loops_for", lambda logs: None)
    monkeypatch.setattr("approxkmv.operator.blocks.ONE_IN", 1000)
    # In bfloat16 384 and 398 are exact and 399.1 becomes 400, which adds 345 to its exponents with 384.
    numbers = torch.tensor([384.0] * 70 + [399.1] * 10 + [398.1] * 60)
    keys = torch.tensor([384.0] * 70 + [398.0] * 70)
    blocks = make_blocks(Points(numbers.unsqueeze(1), keys.unsqueeze(1)), torch.bfloat16, 0, block=70)[0]
    assert blocks.order[0] == 0
    plan = blocks.plan(35)
    with counting() as counts:
        found = blocks.products(plan, None, torch.ones(140, 1))[1]
    lists = [len(listed) for _, lists in plan.strips for listed in lists]
    # They are multiplied and powers are taken, so they count.
    padded = [-(-size // 64) * 64 for size in blocks.sizes.tolist()]
    assert counts.kernel_evaluations == sum(a * b for a, b in zip(padded, lists, strict=True))
    with counting() as counts:
        blocks.products(plan, torch.ones(140, 1))
    assert counts.kernel_evaluations == sum(a * b for a, b in zip(blocks.sizes.tolist(), lists, strict=True))
    assert counts.inner_products == sum(a * b for a, b in zip(padded, lists, strict=True))
    assert torch.allclose(found[:70], torch.full((70, 1), 70.0), rtol=0.02)


def test_a_far_outlier_among_the_queries_neither_overflows_nor_hides_the_others():
    queries = torch.cat([Q, torch.full((1, 10), 1e3)])
    x = torch.ones(len(K_))
    K = KernelOperator(queries, K_, SIGMA, 0.05, method="blocks", seed=0)
    y = K @ x
    assert relative(y, reference(queries, K_, x, SIGMA)) < 0.05
    assert float(y[-1]) < 1e-6


@pytest.mark.parametrize("kind", ["torch32", "torch64", "numpy32", "numpy64"])
def test_products_come_back_in_the_callers_kind_and_shape(kind):
    dtype = torch.float64 if kind.endswith("64") else torch.float32
    # So small that in float32 the squares of x would vanish.
    signed = 1e-30 * signs(len(K_))
    q, k, x = (t.to(dtype) for t in (Q, K_, signed))
    if kind.startswith("numpy"):
        q, k, x = (t.numpy() for t in (q, k, x))
    K = KernelOperator(q, k, SIGMA, 1e-3, seed=0)
    one, two = K @ x, K @ x.reshape(-1, 1)
    assert type(one) is type(q)
    assert one.dtype == q.dtype
    assert tuple(one.shape) == (len(Q),)
    assert tuple(two.shape) == (len(Q), 1)
    assert K.last.method == "exact"
    assert relative(one, reference(Q, K_, signed, SIGMA)) < 1e-3
    assert K.last.met


@pytest.mark.parametrize(
    ("queries", "keys", "epsilon", "dtype"),
    [
        (Q, K_, 0.05, torch.float32),
        (0.01 * Q, 0.01 * K_, 2e-5, torch.float64),
        (1e3 * Q, K_, 0.05, torch.float64),
        (Q, 1e3 * K_, 0.05, torch.float64),
    ],
)
def test_float64_is_taken_where_the_rounding_of_float32_could_show(queries, keys, epsilon, dtype):
    assert KernelOperator(queries, keys, SIGMA, epsilon, seed=0)._points.keys.dtype == dtype


@pytest.mark.parametrize("method", ["auto", "blocks"])
def test_the_size_of_x_changes_nothing(method):
    x = signs(len(K_)).double() + 0.5
    K, small, large = (KernelOperator(Q.double(), K_.double(), SIGMA, 0.05, method=method, seed=0) for _ in range(3))
    # In float32 their squares would be 0, or the numbers themselves.
    y = K @ x
    for operator, size in ((small, 2.0**-80), (large, 2.0**-800)):
        assert torch.equal(operator @ (size * x), size * y)
        assert replace(operator.last, seconds={}) == replace(K.last, seconds={})


def test_what_is_too_large_is_refused():
    K = KernelOperator(Q, K_, SIGMA, seed=0)
    with pytest.raises(InputError, match="x has an entry of 1e30 or more"):
        K @ torch.full((len(K_),), 1e30)
    with pytest.raises(InputError, match="more than a million bandwidths apart"):
        KernelOperator(Q, K_, 1e-6)


def test_answers_are_in_float64_where_the_queries_or_the_keys_are():
    x = torch.ones(len(K_))
    for queries, keys in ((Q.double(), K_), (Q, K_.double())):
        assert (KernelOperator(queries, keys, SIGMA, seed=0) @ x).dtype == torch.float64


def test_a_tiny_epsilon_is_met_in_float64():
    K = KernelOperator(Q, K_, SIGMA, 1e-9, seed=0)
    x = signs(len(K_))
    assert relative((K @ x), reference(Q, K_, x, SIGMA)) < 1e-7  # the answer is returned in float32
    assert K.last.exponents == "float64"
    assert K.last.bound < 1e-9
    # With pilot and error bar
    assert (len(Q) + 4 + 150) * len(K_) < K.last.kernel_evaluations <= (len(Q) + 4 + 256) * len(K_)


def test_asymmetric_keys_of_an_attention_head_are_one_more_case():
    from approxkmv import reduce_attention

    q, k = 2 * clustered(2500, 16, 3), 2 * clustered(2600, 16, 4)
    reduced = reduce_attention(q, k)
    v = torch.randn(len(k), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K = KernelOperator(reduced.queries, reduced.keys, reduced.sigma, 0.05, method="blocks", seed=0)
    sums = K @ torch.cat([v, torch.ones_like(v[:, :1])], 1)
    attention = torch.softmax(q.double() @ k.double().mT / 4, 1) @ v
    assert relative(sums[:, :3] / sums[:, 3:], attention) < 0.15


def test_trivial_answers_are_tried_first():
    q, k = clustered(3000, 10, 1), clustered(3000, 10, 2)
    K = KernelOperator(q, k, 0.6, 0.5, relative_to="x", seed=0)
    y = K @ signs(3000)
    assert K.last.method == "zero"
    assert K.last.met
    assert 0 < int((y != 0).sum()) <= 96  # rows of the pilot are known
    wide = KernelOperator(q, k, 50.0, 0.05, seed=0)
    y = wide @ torch.ones(3000)
    assert wide.last.method == "constant"
    assert wide.last.met
    assert relative(y, reference(q, k, torch.ones(3000), 50.0)) < 0.05
    for method in ("blocks", "exact"):
        asked = KernelOperator(Q, K_, 50.0, 0.05, method=method, seed=0)
        asked @ torch.ones(len(K_))
        assert asked.last.method == method


def test_a_choice_is_made_for_four_fifths_of_the_error_that_is_asked():
    K, x = KernelOperator(Q, K_, SIGMA, seed=0), torch.ones(len(K_), 1)
    pilot = Pilot(torch.arange(2), torch.tensor([[0.9], [1.1]]), torch.ones(2, dtype=torch.float64))
    zero, constant = 2.02**0.5, 0.02**0.5
    targets = (zero / 0.79, zero / 0.81, constant / 0.79, constant / 0.81)
    chosen = [next(K._choices(pilot, None, x, target)).method for target in targets]
    assert chosen == ["zero", "constant", "constant", "exact"]


@pytest.mark.parametrize(("cost", "numbers"), [(1000, [300, 600]), (2000, [300])])
@pytest.mark.parametrize(
    ("error", "formats"), [(0.39, ["bfloat16", "float32", "float64"]), (0.41, ["float32", "float64"])]
)
def test_what_is_tried_in_which_order(cost, numbers, error, formats, monkeypatch):
    """More near keys, while they are below half of all keys and cost less than 0.6 of the product; at last exactly."""
    K, x = KernelOperator(Q, K_, SIGMA, seed=0), torch.ones(len(K_), 1)
    K._low = torch.bfloat16
    rows, made = torch.arange(0, len(Q), 100), torch.zeros(len(Q), 1)
    pilot = Pilot(rows, exact.product(K._points, x, torch.float32, rows), torch.ones(len(rows), dtype=torch.float64))
    coarse = pilot.norm(exact.product(K._points, x, torch.bfloat16, rows) - pilot.exact)
    monkeypatch.setattr(module, "near_for", lambda *given: (300, "why", made))
    monkeypatch.setattr(module, "cost_of_blocks", lambda blocks, near: cost * near)
    tried = list(K._choices(pilot, K._blocks()[0], x, coarse / error))
    assert [choice.near for choice in tried] == [*numbers, *(None for _ in formats)]
    assert [str(choice.low)[6:] for choice in tried] == [*("bfloat16" for _ in numbers), *formats]
    assert [choice.method for choice in tried] == [*("blocks" for _ in numbers), *("exact" for _ in formats)]
    # What the pilot has made serves once.
    assert [choice.made is made for choice in tried] == [True, *(False for _ in tried[1:])]


@pytest.mark.parametrize(("share", "most_tried"), [(0.0, 32), (10.0, 512)])
def test_the_pilot_tries_more_near_keys_while_its_budget_lasts(share, most_tried, monkeypatch):
    monkeypatch.setattr("approxkmv.operator.pilot.SHARE", share)
    monkeypatch.setattr("approxkmv.operator.pilot._FIRST", 32)
    blocks, _ = in_float64()
    rows, x = torch.arange(0, len(Q), 100), K_[:, :1].double() ** 3
    truth = exact.product(blocks.points, x, torch.float64, rows)
    pilot = Pilot(rows, truth, torch.ones(len(rows), dtype=torch.float64))
    products = {}
    for near in (32, 128, 512):
        products[near] = torch.zeros(len(Q), 1, dtype=torch.float64)
        products[near][blocks.order] = blocks.products(blocks.plan(near), x)[0]
    errors = {near: pilot.norm(product[rows] - pilot.exact) for near, product in products.items()}
    assert errors[32] > 2 * errors[128] > 4 * errors[512]

    def found(target: float, most: float = float("inf")):
        return near_for(pilot, blocks, lambda given, near: given.plan(near), x, target, 2.0, most)

    near, _, made = found(errors[32] / 1.1)
    if share:
        # Nearly, and already made
        assert near == 32
        assert torch.equal(made, products[32])
        assert found(errors[32] / 1.3)[2] is None
    else:
        assert (near, made) == (None, None)
    near, _, made = found(1.01 * errors[32])
    assert (near, made is not None) == (32, share > 0)
    near, reason, made = found(errors[512] / 1e3)
    # Relative to a norm of 2
    assert reason == f"in the pilot the error was {errors[most_tried] / 2:.2g} with {most_tried} near keys per block"
    assert (near, made) == (None, None)
    if share:
        near, reason, made = found(1.01 * errors[128])
        assert made is None
        assert 64 <= near <= 128
        assert reason.endswith("with 128 near keys per block")
        # More would be needed than may be paid for.
        assert found(errors[128] / 1.3, cost_of_blocks(blocks, 130))[0] is None
        assert 128 < found(errors[128] / 1.3)[0] <= 256


def test_the_rows_of_a_pilot_are_two_in_a_thousand_at_least_four_and_at_most_96():
    assert [pilot_rows(n_q) for n_q in (1, 2000, 2500, 40_000, 48_000, 10**6)] == [4, 4, 5, 80, 96, 96]


def test_what_blocks_cost():
    blocks, _ = in_float64()
    ranked = blocks.ranked_by((K_[:, :1] ** 3).double())
    of_rows, of_blocks = 2 * len(Q) * 100, len(blocks) * (4 * len(K_) + 100_000)
    assert cost_of_blocks(blocks, 100) == of_rows + of_blocks
    # For each such x there is a new plan.
    assert cost_of_blocks(ranked, 100) == of_rows + 2 * of_blocks


@pytest.mark.parametrize("queries", [Q[:1], Q])
def test_sums_that_cancel_are_made_in_float64(queries, monkeypatch):
    """In one row, whose error is known from the pilot, or in all rows of a wide kernel."""
    sigma = SIGMA if len(queries) == 1 else 5e3
    x, ones = signs(len(K_)).double(), torch.ones(len(K_))
    x -= (reference(Q[:1], K_, x, sigma) - 1e-9) / reference(Q[:1], K_, ones, sigma)
    truth = reference(queries, K_, x, sigma)
    # So that blocks are tried first
    monkeypatch.setattr(module, "may_be_worth", lambda n_q, n_k: True)
    K = KernelOperator(queries.double(), K_.double(), sigma, 0.05, seed=0)
    assert relative(K @ x, truth) < 0.05
    assert K.last.met
    assert K.last.exponents == "float64"
    assert "float32 misses epsilon" in K.last.reason
    # Sums of rows do not cancel, and are as fast as before.
    K @ ones.double()
    assert K.last.exponents != "float64"
    blocks = KernelOperator(queries, K_, sigma, 0.05, method="blocks", seed=0)
    # They never fall back, and say so.
    assert relative(blocks @ x, truth) > 1
    assert blocks.last.error > 1
    assert not blocks.last.met


def test_a_row_that_is_drawn_again_and_again_is_made_once():
    K = KernelOperator(Q[:1], K_, SIGMA, 0.05, seed=0)
    assert relative(K @ torch.ones(len(K_)), reference(Q[:1], K_, torch.ones(len(K_)), SIGMA)) < 1e-5
    # For the answer, and for the rounding of it
    assert K.last.kernel_evaluations == 2 * len(K_)


def test_an_error_relative_to_nothing_is_unknown():
    K = KernelOperator(Q, K_, SIGMA, seed=0)
    wrong, right = (K._report("", "", ErrorBar(size, size, 0.0, 0.0), (0.0, 0.0), {}) for size in (1.0, 0.0))
    assert (wrong.error, wrong.bound, wrong.met) == (float("inf"), None, None)
    assert (right.error, right.bound, right.met) == (0.0, 0.0, True)


def test_blocks_are_chosen_where_they_pay_and_exact_where_not():
    q, k = clustered(9000, 10, 1), clustered(9000, 10, 2)
    K = KernelOperator(q, k, SIGMA, 0.1, seed=0)
    y = K @ torch.ones(len(k))
    assert K.last.method == "blocks"
    assert K.last.met
    # The plan of 160 to 350 blocks, near keys, and 256 rows of the error bar
    assert K.last.kernel_evaluations < 0.2 * 9000**2
    assert K.last.pilot_evaluations < 0.02 * 9000**2
    assert relative(y, reference(q, k, torch.ones(len(k)), SIGMA)) < 0.1
    strict = KernelOperator(q, k, SIGMA, 1e-3, seed=0)
    y = strict @ signs(len(k))
    assert strict.last.method == "exact"
    assert strict.last.fell_back
    assert "blocks miss epsilon or cost more than 0.6 of the exact product" in strict.last.reason
    assert strict.last.pilot_evaluations < 0.02 * 9000**2


def test_no_blocks_are_made_for_few_queries_whose_centres_would_cost_most_of_the_product():
    q, k = clustered(300, 10, 1), clustered(12_000, 10, 2)
    K = KernelOperator(q, k, SIGMA, 0.1, seed=0)
    assert relative(K @ torch.ones(len(k)), reference(q, k, torch.ones(len(k)), SIGMA)) < 1e-2
    assert K.last.method == "exact"
    assert not K.last.fell_back
    # The product, and rows of the pilot and of the error bar
    assert K.last.kernel_evaluations <= (300 + 16 + 256) * len(k)


def test_answers_repeat_with_the_seed_and_preparation_is_made_once():
    q, k, x = clustered(6000, 10, 1), clustered(6000, 10, 2), torch.ones(6000)
    first, second = (KernelOperator(q, k, SIGMA, 0.1, seed=3) for _ in range(2))
    assert torch.equal(first @ x, second @ x)
    once = first.last.seconds["preparation"]
    first @ x
    assert first.last.seconds["preparation"] < 0.2 * once
    assert first._prepared is not None


def test_rows_are_drawn_anew_for_each_product_and_seed():
    one, same, other = (KernelOperator(Q, K_, SIGMA, 1e-4, method="exact", seed=seed) for seed in (3, 3, 4))

    def error(K: KernelOperator) -> float:
        K @ signs(len(K_))
        return K.last.error

    found = [[error(K) for _ in range(3)] for K in (one, same, other)]
    assert found[0] == found[1]
    assert len({*found[0], *found[2]}) == 6
    # The product, the pilot and, once, the rows of the error bar
    assert one.last.kernel_evaluations <= (len(Q) + 4 + 256) * len(K_)


def test_no_x_is_lost_where_it_is_zero():
    K = KernelOperator(Q, K_, SIGMA, 0.05, seed=0)
    assert not (K @ torch.zeros(len(K_))).any()
    assert K.last.method == "zero"
    assert K.last.met


@pytest.mark.parametrize("times", [1, 500])
@pytest.mark.parametrize("row", [1, 5])
def test_rounding_counts_where_the_error_of_all_rows_is_known(times, row):
    """They are in the pilot, or all alike, so that the bound has no room for the rounding of float32."""
    queries, x = Q[row].repeat(times, 1), torch.randn(len(K_), generator=torch.Generator().manual_seed(4))
    K = KernelOperator(queries, K_, SIGMA, 0.05, method="blocks", seed=0)
    error = relative(K @ x, reference(queries, K_, x, SIGMA))
    # Far above the tolerance; how much depends on the CPU's sums.
    assert error > 1e-6
    assert K.last.error == pytest.approx(error, abs=3e-7)
    assert K.last.bound > error - 3e-7


def test_the_rounding_of_all_rows_counts_with_few_queries():
    """Also of those in the pilot, which are most of them: else the error was up to 787 times what was said."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(5, 5, generator=generator), 0.1 * torch.randn(40, 5, generator=generator) + 9
        x = torch.randn(40, generator=generator).double()
        K = KernelOperator(q.double(), k.double(), 3.0, 1e-4, method="exact", seed=seed)
        error = relative(K @ x, reference(q, k, x, 3.0))
        # Some of the drawn rows are drawn more often than others.
        assert error / 3 < K.last.error < 3 * error


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_answers_too_small_for_float32_are_made_in_float64(method):
    far, keys, x = Q.double() + 10, K_.double(), torch.ones(len(K_))
    truth = reference(far, keys, x, SIGMA)
    assert 1e-70 < float(truth.max()) < 1e-45
    for kind in (torch.float32, torch.float64):
        K = KernelOperator(far.to(kind), keys.to(kind), SIGMA, 0.05, method=method, seed=0)
        # Scaled, since squares of such numbers vanish; those of float32 are rounded far from the keys.
        assert relative(1e50 * (K @ x), 1e50 * reference(far.to(kind), keys, x, SIGMA)) < 0.05
    assert K.last.exponents == "float64"
    less_far = KernelOperator(Q + 5, K_, SIGMA, 0.05, method=method, seed=0)
    assert 0 < float((less_far @ x).max()) < 1e-6
    assert less_far.last.exponents != "float64"


def test_entries_too_small_for_float32_are_0_in_every_form(monkeypatch):
    points, x = in_units(Q + 12, K_, SIGMA), torch.ones(len(K_), 2)
    for low in (torch.float32, torch.bfloat16):
        assert not exact.product(points, x, low).any()
        assert not exact.product(points, x[:, :1], low).any()
    monkeypatch.setattr(exact, "loops_for", lambda logs: None)
    assert not exact.product(points, x, torch.float32).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["auto", "blocks", "exact"])
def test_a_single_key_is_a_case_like_any_other(method):
    K = KernelOperator(Q, K_[:1], SIGMA, 0.05, method=method, seed=0)
    x = torch.tensor([-2.0])
    assert relative(K @ x, reference(Q, K_[:1], x, SIGMA)) < 0.05
    assert K.last.met


@pytest.mark.parametrize("method", ["blocks", "exact"])
def test_the_linear_operator_takes_complex_vectors(method):
    A = KernelOperator(Q.numpy(), K_.numpy(), SIGMA, 0.1, method=method, seed=0).as_linear_operator()
    one, other = K_[:, 0].numpy(), signs(len(K_)).numpy()
    assert np.array_equal(A @ (one + 1j * other), A @ one + 1j * (A @ other))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("method", ["blocks", "exact"])
def test_the_linear_operator_is_linear_and_has_its_transpose(dtype, same, method):
    points = K_.numpy().astype(dtype)
    queries = points if same else Q.numpy().astype(dtype)
    # So small an epsilon takes float64.
    epsilon = 0.1 if dtype == np.float32 else 1e-6
    K = KernelOperator(queries, points, SIGMA, epsilon, method=method, seed=0)
    A = K.as_linear_operator()
    assert A.dtype == dtype
    random = np.random.default_rng(0)
    x, z = (random.standard_normal(len(points)).astype(dtype) for _ in range(2))
    y = random.standard_normal(len(queries)).astype(dtype)
    size = np.linalg.norm(A @ np.abs(x)) + np.linalg.norm(A @ np.abs(z))
    assert np.linalg.norm(A @ (2 * x + z) - 2 * (A @ x) - A @ z) < 1e-6 * size
    forward, backward = float(y.astype(float) @ (A @ x)), float((A.T @ y).astype(float) @ x)
    assert abs(forward - backward) < 1e-6 * np.linalg.norm(y) * np.linalg.norm(A @ np.abs(x))
    if same:
        assert np.linalg.norm(A @ x - A.T @ x) < 1e-6 * np.linalg.norm(A @ np.abs(x))
    truth = reference(torch.from_numpy(queries), torch.from_numpy(points), torch.from_numpy(x), SIGMA)
    assert relative(A @ x, truth) < 0.3
    assert (A @ np.stack([x, z], 1)).shape == (len(queries), 2)


def test_eigenvalues_of_the_linear_operator():
    from scipy.sparse.linalg import eigsh

    points = clustered(3000, 10, 1).numpy()
    K = KernelOperator(points, points, SIGMA, 0.02, method="blocks", seed=0)
    found = eigsh(K.as_linear_operator(), k=5, return_eigenvectors=False)
    full = reference(torch.from_numpy(points), torch.from_numpy(points), torch.eye(3000), SIGMA).numpy()
    expected = np.linalg.eigvalsh(full)[-5:]
    assert np.abs(np.sort(found) / expected - 1).max() < 0.02


def test_kernel_ridge_regression_by_conjugate_gradients():
    from scipy.sparse.linalg import LinearOperator, cg

    points = clustered(3000, 10, 1).numpy()
    values = np.sin(points[:, 0]) + 0.1 * np.random.default_rng(0).standard_normal(3000)
    ridge = 30.0
    A = KernelOperator(points, points, SIGMA, 0.02, method="blocks", seed=0).as_linear_operator()
    shifted = LinearOperator(A.shape, matvec=lambda x: A @ x + ridge * x, dtype=np.float64)
    weights, failed = cg(shifted, values, rtol=1e-4)
    assert failed == 0
    full = reference(torch.from_numpy(points), torch.from_numpy(points), torch.eye(3000), SIGMA).numpy()
    exactly = np.linalg.solve(full + ridge * np.eye(3000), values)
    fit, expected = full @ weights, full @ exactly
    assert np.linalg.norm(fit - expected) < 0.1 * np.linalg.norm(expected)


def test_attempts_go_on_until_the_bound_meets_epsilon_of_the_least_answer_and_share_the_doubt(monkeypatch):
    doubts = []

    def bar(y, values, rows, by, doubt):
        doubts.append(doubt)
        size = float(y.norm())
        return ErrorBar(0.05 * size, 0.09 * size, size, 0.8 * size)

    monkeypatch.setattr(module, "error_bar", bar)
    K = KernelOperator(Q, K_, SIGMA, 0.1, method="blocks", seed=0)
    K @ torch.ones(len(K_))
    assert (K.last.error, K.last.bound) == (pytest.approx(0.05), pytest.approx(0.09 / 0.8))
    assert not K.last.met
    # Each may fail with half the probability of the one before, all of them together with 5 %.
    assert doubts == [doubts[0], doubts[0] / 2]
    assert sum(doubts) <= 0.05


def bar_case(case: int):
    """An operator's own report on a random problem, and the true error: (error, bound or None)."""
    random = torch.Generator().manual_seed(1000 + case)
    d, n = (4, 8, 16)[case % 3], 2000
    q, k = clustered(n, d, case, 5 + case % 20), clustered(n, d, case + 1, 5 + case % 20)
    if case % 5 == 0:  # norms with a heavy tail
        q *= 1 / torch.rand(n, 1, generator=random).clamp_min(0.05) ** 0.5
    sigma = (0.5, 0.7, 1.0)[case // 3 % 3] * d**0.5 / 2
    x = (torch.ones(n), signs(n, case), k[:, 0], torch.randn(n, generator=random) ** 3)[case // 2 % 4]
    K = KernelOperator(q, k, sigma, 0.1, method="blocks", seed=case)
    truth = reference(q, k, x, sigma)
    return K, K @ x, truth, x


@pytest.mark.slow
def test_the_error_is_below_its_bound_in_at_least_465_of_500_cases():
    """If the bound failed in 5 % of all cases, 500 would have fewer than 465 good ones with a probability of 2 %."""
    good, ratios, unknown = 0, [], 0
    for case in range(450):
        K, y, truth, _ = bar_case(case)
        error = relative(y, truth)
        good += K.last.bound is None or error <= K.last.bound
        unknown += K.last.bound is None
        if K.last.bound is not None:
            ratios.append(K.last.bound / error)
    # All of the error in 0.1 % of the rows, which no proposal knows.
    for case in range(450, 500):
        good += planted(case)
    assert good >= 465
    assert np.median(ratios) <= 1.5
    # Where a kernel is sharp a few rows hold most of the error.
    assert unknown <= 180


@pytest.mark.parametrize("n", [3, 5])
def test_blocks_of_very_few_keys_know_their_error(n):
    """Most of it lies in a few rows, which the sample misses; the rows' own products are cheap."""
    sigma = 3.0 / n
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        q, k, x = (torch.randn(shape, generator=random) for shape in ((2000, 4), (n, 4), (n, 1)))
        K = KernelOperator(q, k, sigma, 0.1, method="blocks", seed=seed)
        error = relative(K @ x, reference(q, k, x, sigma))
        assert K.last.error == K.last.bound == pytest.approx(error, rel=1e-4)


def planted(case: int) -> bool:
    generator = torch.Generator().manual_seed(case)
    n = 4000
    truth = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    y = truth.clone()
    wrong = torch.randperm(n, generator=generator)[: n // 1000]
    y[wrong] += torch.randn(len(wrong), 1, generator=generator, dtype=torch.float64)
    far = torch.rand(n, generator=generator)
    by = proposal(far, torch.empty(0, dtype=torch.int64))
    rows = drawn(by, 128, generator)
    bar = error_bar(y, truth[rows], rows, by, 0.025)
    return bar.bound is None or bar.bound >= float((y - truth).norm())


def test_norms_from_drawn_rows_by_hand():
    """Three rows drawn as often as their probabilities say, so that estimates are what they estimate."""
    by, z = torch.tensor([0.5, 0.25, 0.25]), 1.6448536
    rows, truth = torch.tensor([0, 0, 1, 2] * 16), torch.tensor([[3.0], [4.0], [12.0]], dtype=torch.float64)
    wrong = torch.tensor([[1.0], [-2.0], [0.0]])
    bar = error_bar(truth + wrong, truth[rows], rows, by, 0.05)
    assert (bar.error, bar.answer) == (pytest.approx(5**0.5), pytest.approx(13))
    # Of four rows 2, 2, 16 and 0, whose mean is 5, with second and third moments of 41 and 288 around it
    variance = 41 * 64 / 63
    limit = 5 + z * (variance / 64) ** 0.5 + 288 / variance * (1 + 2 * z**2) / (6 * 64)
    assert bar.bound == pytest.approx(limit**0.5)
    # |y| squared is 164, and of the answer's square less that, 5, the lower limit is 5 less z (649 / 63)^(1/2).
    assert bar.least_answer == pytest.approx((164 + 5 - z * (649 / 63) ** 0.5) ** 0.5)
    # What is rarely drawn, but much of the answer, tells less than the triangle inequality.
    often, seldom = torch.tensor([0.99, 0.01]), torch.tensor([0] * 990 + [1] * 10)
    large = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    told = error_bar(large + 1, large[seldom], seldom, often, 0.05)
    assert told.least_answer == pytest.approx((1 + 101**2) ** 0.5 - told.bound)
    # Half as many rows are as twelve that contribute alike; without an error there is nothing to tell one from.
    few = error_bar(truth + wrong, truth[rows[:32]], rows[:32], by, 0.05)
    assert (few.bound, few.least_answer) == (None, pytest.approx((169 - z * (649 / 31) ** 0.5) ** 0.5))
    assert error_bar(truth, truth[rows], rows, by, 0.05).bound is None
    # Less than nothing is nothing.
    assert error_bar(torch.tensor([[10.0], [0.0]]), torch.zeros(4, 1), rows[:1].repeat(4), by[1:] * 2, 0.05).answer == 0
    pilot = pilot_of(by, rows[:4], truth.__getitem__)
    assert (pilot.norm(pilot.exact), float(pilot.constant)) == (pytest.approx(13), pytest.approx(19 / 3))
    # A third each uniform, by doubts and by their squares; known rows are never drawn.
    mixed = proposal(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2]))
    assert mixed.tolist() == pytest.approx([(1 / 2 + 1 / 3 + 1 / 5) / 3, (1 / 2 + 2 / 3 + 4 / 5) / 3, 0])
    unknown = proposal(torch.tensor([float("nan"), float("inf"), 1.0]), torch.tensor([], dtype=torch.int64))
    assert unknown.tolist() == pytest.approx([1 / 9, 1 / 9, 7 / 9])


def test_the_practical_power_method_finds_the_top_eigenvalue():
    points = clustered(2500, 10, 1, centres=3)
    found = top_eigenvalue(points, SIGMA, 0.1, method="practical", seed=0)
    full = reference(points, points, torch.eye(2500), SIGMA).numpy()
    top = np.linalg.eigvalsh(full)[-1]
    assert abs(found.value / top - 1) < 0.1
    vector = found.vector.numpy()
    assert vector @ full @ vector > 0.9 * top
    # A quarter of epsilon each for the product and for where the steps end
    assert np.linalg.norm(full @ vector - found.value * vector) < 0.05 * found.value
    assert found.kernel_evaluations < 2 * found.iterations * 2500**2
    with pytest.raises(InputError, match="has no option 'alpha'"):
        top_eigenvalue(points, SIGMA, 0.1, method="practical", alpha=0.5)


def test_the_steps_of_the_practical_power_method(monkeypatch):
    given, products = [], iter([[3.0, -1.0], [0.5, 0.02], None, [0.0, -1.0]])

    class Scripted:
        last = SimpleNamespace(kernel_evaluations=7)

        def __init__(self, queries, keys, sigma, epsilon, seed):
            assert epsilon == 0.1 / 4

        def __matmul__(self, x: np.ndarray) -> np.ndarray:
            given.append(x)
            y = next(products)
            return 0.7 * x if y is None else np.array(y)

    monkeypatch.setattr(eigenvalue, "KernelOperator", Scripted)
    found = eigenvalue.top_eigenvalue(np.eye(2), 1.0, 0.1, method="practical", seed=0)
    # Noise below 0 is left out, and steps go on while what is left is more than a quarter of epsilon of the quotient.
    assert np.allclose(given, [[0.5**0.5, 0.5**0.5], [1, 0], np.array([0.5, 0.02]) / np.hypot(0.5, 0.02)])
    assert (found.iterations, found.kernel_evaluations) == (3, 21)
    # The largest quotient is the first.
    assert found.value == pytest.approx(2**0.5)
    assert np.allclose(found.vector, given[0])
    # Of a product without an entry above 0 there is no next step.
    found = eigenvalue.top_eigenvalue(np.eye(2), 1.0, 0.1, method="practical", seed=0)
    assert (found.iterations, found.value) == (1, 0.0)


@pytest.mark.parametrize(
    ("second", "value"),
    [([3.0, *[0.0] * 8], 3.0), ([0.9, *[0.01] * 8], (8 / 3 + 0.45) / 3), ([1.2, *[0.01] * 8], 1.2)],
)
def test_the_practical_power_method_begins_again_where_an_entry_grew_by_more(monkeypatch, second, value):
    given, products = [], iter([[0.45, *[1 / 3] * 8], second])

    class Scripted:
        last = SimpleNamespace(kernel_evaluations=7)

        def __init__(self, *_, **__): ...

        def __matmul__(self, x: np.ndarray) -> np.ndarray:
            given.append(x)
            return np.array(next(products))

    monkeypatch.setattr(eigenvalue, "KernelOperator", Scripted)
    found = eigenvalue.top_eigenvalue(np.eye(9), 1.0, 0.5, method="practical", seed=0)
    assert np.allclose(given, [[1 / 3] * 9, [1, *[0] * 8]])
    # It ends where nothing grows by more, or where the value rose by no more than a quarter.
    assert (found.iterations, found.value) == (2, pytest.approx(value))


def test_the_practical_power_method_finds_two_equal_points_among_many_far_ones():
    points = 1000 * np.random.default_rng(0).standard_normal((1000, 3))
    points[1] = points[0]
    # The vector of ones is an eigenvector with value 1, but for these two.
    assert top_eigenvalue(points, 1.0, 0.25, method="practical", seed=1).value == pytest.approx(2, rel=0.25)


def test_sums_of_rows_are_the_densities_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    queries, points = clustered(1000, 6, 1), clustered(20_000, 6, 2)
    K = KernelOperator(queries, points, 0.8, 0.05, seed=0)
    density = (K @ torch.ones(len(points))) / (len(points) * (2 * np.pi * 0.8**2) ** 3)
    exactly = neighbors.KernelDensity(bandwidth=0.8, rtol=1e-8).fit(points.numpy()).score_samples(queries.numpy())
    assert K.last.met
    assert relative(density, torch.from_numpy(np.exp(exactly))) < 0.05


def test_a_table_that_cannot_be_written_is_found_first(monkeypatch, tmp_path):
    from approxkmv.config import load_config, study_of
    from approxkmv.errors import TableError
    from approxkmv.steps import operator as step

    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "operator")
    (tmp_path / "file").touch()
    monkeypatch.setattr(step, "fetch_vectors", lambda *_: pytest.fail("fetched before the output was tried"))
    with pytest.raises(TableError, match="cannot"):
        step.write(study, tmp_path, tmp_path / "file" / "operator.csv", {})


def test_word_vectors_of_another_hash_are_refused(tmp_path):
    from approxkmv.config import load_config, study_of
    from approxkmv.errors import SourceError
    from approxkmv.steps.operator import write

    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "operator")
    for path in (None, str(tmp_path / "words.npy")):
        np.save(tmp_path / "words.npy", np.zeros((4, 2), np.float32))
        asked = study.operator.model_copy(update={"path": path, "sha256": "0" * 64})
        with pytest.raises(SourceError, match="has SHA-256"):
            write(study.model_copy(update={"operator": asked}), tmp_path, tmp_path / "operator.csv", {})
