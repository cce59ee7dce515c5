"""vAttention: a sample of each row's small scores whose size is the smallest that keeps the row sum's error."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.searched import vattention
from approxkmv.attention.searched.vattention import Parameters, budgets, sums
from approxkmv.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def heads(n_q, n_k, d=8, d_v=1, spread=0.7):
    generator = torch.Generator().manual_seed(0)
    q, k = (spread * torch.randn(n, d, generator=generator) for n in (n_q, n_k))
    return q, k, torch.randn(n_k, d_v, generator=generator) + 0.3 * k[:, :1]


def exact(q, k, v, causal=False):
    logits = q.double() @ k.double().mT
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    return logits.logsumexp(1), logits.softmax(1) @ v.double()


def row_sums(found, log_sum):
    """Of sums, relative to the exact ones."""
    return found[1].double() * (found[2].double() - log_sum).exp()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("top", "base", "epsilon"), [pytest.param(4, 8, 0.3, marks=pytest.mark.slow), (20, 3, 0.5)])
def test_numerators_and_row_sums_are_unbiased(top, base, epsilon, causal):
    """30 combinations of the rows over 400 seeds, each within 4.5 standard errors.

    False alarms: 7e-6 for each, 2e-3 for all four cases together; the seeds are fixed. With base samples of 3 the size
    of the sample depends strongly on what they hold.
    """
    q, k, v = heads(150, 150)
    log_sum, answer = exact(q, k, v, causal)
    p = Parameters(sink=2, window=3, top=top, base=base, epsilon=epsilon)
    each = []
    for seed in range(400):
        numerators, ones, logs = sums(q, k, v, torch.Generator().manual_seed(seed), p, is_causal=causal)
        each.append(torch.cat([numerators, ones[:, None]], 1).double() * (logs.double() - log_sum).exp()[:, None])
    right = torch.cat([answer, torch.ones_like(answer)], 1)
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (15, 150)))
    signs[0] = 1.0
    combined = torch.einsum("cn,snw->scw", signs, torch.stack(each))
    error = combined.std(0) / 400**0.5
    assert bool(((combined.mean(0) - torch.einsum("cn,nw->cw", signs, right)).abs() < 4.5 * error).all())
    # A bias of 2 % of the row sums would be seen: more than a base sample that stays in the estimate would cause.
    assert 4.5 * float(error[0, 1]) < 0.02 * 150


@pytest.mark.parametrize("epsilon", [0.2, 0.05])
def test_the_row_sum_is_within_epsilon_as_often_as_promised(epsilon):
    """At delta = 0.2; normal quantiles and an estimated deviation are off by some of it, for exponentials of 64 keys.

    The sample is without replacement and its size rounded up, so fewer rows than delta may miss.
    """
    q, k, v = heads(300, 2000, spread=0.5)
    log_sum, _ = exact(q, k, v)
    p = Parameters(sink=0, window=0, top=32, base=128, epsilon=epsilon, delta=0.2)
    missed = [
        (row_sums(sums(q, k, v, torch.Generator().manual_seed(seed), p), log_sum) - 1).abs() > epsilon
        for seed in range(20)
    ]
    share = float(torch.stack(missed).double().mean())
    # And the rule does not ask for many more keys than that: at 0.05 most rows would be far within it with all keys.
    assert 0.02 < share < 0.25


def test_budgets_by_hand():
    exponentials = torch.tensor([[1.0, 3.0, 9.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
    is_light = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    rest = torch.tensor([100, 100, 100, 7])
    found = budgets(exponentials, is_light, torch.full((4,), 6.0), rest, Parameters(epsilon=0.2, delta=0.1))
    # Mean 2, deviation sqrt(2), of 100 keys; the row sum is 6 + 4 + 200.
    first = (NormalDist().inv_cdf(0.95) * 100 * 2**0.5 / (0.2 * 210)) ** 2
    # Equal exponentials need one key; one key has no deviation; no more keys than there are.
    assert found.tolist() == [int(np.ceil(first)), 1, 100, 7]


def test_a_larger_error_takes_fewer_keys_and_flat_rows_fewer_than_sharp_ones(monkeypatch):
    taken = []

    def counted(exponentials, is_light, known, rest, p):
        # Of each row's keys all but the first 16, the last 16, the 16 largest and the base sample
        assert bool((is_light.sum(1) + rest == 2000 - 48).all())
        found = budgets(exponentials, is_light, known, rest, p)
        taken.append(found.double().mean())
        return found

    monkeypatch.setattr(vattention, "budgets", counted)
    for spread, epsilon in ((0.4, 0.2), (0.4, 0.1), (0.8, 0.1)):
        q, k, v = heads(64, 2000, spread=spread)
        sums(q, k, v, torch.Generator().manual_seed(0), Parameters(top=16, epsilon=epsilon))
    # Half the error, four times the keys, to the rounding up of a few
    assert 3.5 * taken[0] < taken[1] < 4.1 * taken[0]
    assert taken[2] > 2 * taken[1]


@pytest.mark.parametrize("given", [{"top": 1000}, {"base": 1000}, {"window": 1000}, {"sink": 1000}, {"epsilon": 1e-9}])
@pytest.mark.parametrize(("n_q", "n_k"), [(97, 97), (40, 131), (131, 11), (1, 300)])
def test_a_budget_for_all_keys_is_exact(given, n_q, n_k):
    q, k, v = heads(n_q, n_k, d_v=3)
    out = get("vattention")(q[None], k[None], v[None], scale=1.0, **given)[0]
    assert (out.double() - exact(q, k, v)[1]).abs().max() < 1e-5


def test_the_error_falls_with_epsilon_and_with_the_largest_scores():
    q, k, v = heads(256, 1024, d_v=2)
    right = exact(q, k, v)[1]

    def gap(**given):
        given = {"top": 4, "base": 16, "epsilon": 0.5, **given}
        outs = [get("vattention")(q[None], k[None], v[None], scale=1.0, seed=s, **given)[0] for s in range(5)]
        return float((torch.stack(outs) - right).norm())

    assert gap(epsilon=0.05) < 0.3 * gap()
    # A sample of one key, whatever its error
    assert gap(epsilon=1e3, top=512) < 0.3 * gap(epsilon=1e3)


@pytest.mark.parametrize("causal", [False, True])
def test_sinks_and_the_window_are_summed_exactly(causal):
    """The values of all other keys are 0, so that a numerator is the sum over these few."""
    q, k, _ = heads(200, 200)
    i, j = torch.arange(200).unsqueeze(1), torch.arange(200)
    for kept, few in ((j < 3) & (j <= i), {"sink": 3, "window": 0}), ((j > i - 8) & (j <= i), {"sink": 0, "window": 8}):
        row = 150
        v = kept[row].float().unsqueeze(1)
        log_sum, right = exact(q, k, v, causal)
        for given, close in ((few, True), ({"sink": 0, "window": 0}, False)):
            p = Parameters(top=1, base=2, epsilon=9.0, **given)
            found = []
            for seed in range(5):
                numerators, _, logs = sums(q, k, v, torch.Generator().manual_seed(seed), p, is_causal=causal)
                found.append(numerators[row].double() * (logs[row].double() - log_sum[row]).exp())
            # Without them a sample finds them now and then.
            assert bool(torch.allclose(torch.stack(found), right[row], rtol=1e-4)) is close


def test_a_probability_of_one_or_more_is_refused():
    q, k, v = heads(5, 5)
    with pytest.raises(InputError, match=r"^method 'vattention': delta is 1.0: give a probability below 1$"):
        get("vattention")(q[None], k[None], v[None], delta=1.0)
