"""The window method against a dense mask, in both forms."""

import pytest
import torch
from fuzz import seen_by_window

from approxkmv.attention import UnavailableError, get
from approxkmv.compute.counting import counting
from approxkmv.compute.trial import forced


def head(n, d=16, d_v=5, batch=2):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, n, d, generator=generator) for _ in range(2))
    return q, k, torch.randn(batch, n, d_v, generator=generator) + 3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(7, 3), (7, 0), (7, 50), (16, 4), (24, 4), (25, 4), (30, 4), (100, 4), (150, 4), (1, 1)],
)
def test_it_is_attention_under_its_mask(window, sinks, causal):
    """float32 against float64: sums of up to 100 terms of size 4."""
    q, k, v = head(100)
    method = get("window")
    given = {"window": window, "sinks": sinks, "products": "float32"}
    with counting() as counts:
        out = (method.attend_causally if causal else method)(q, k, v, scale=0.7, **given)
    mask = seen_by_window(100, 100, window, sinks, causal)
    logits = (0.7 * q.double() @ k.double().mT).masked_fill(~mask, -torch.inf)
    assert float((out - logits.softmax(-1) @ v.double()).abs().max()) < 1e-5
    # Padding counts, since it is computed: a last block is filled up with queries.
    more = -100 % window if window < 100 else 0
    pairs = seen_by_window(100 + more, 100 + more, window, sinks, causal).sum() if causal else mask.sum()
    if not causal and 100 + more > 4 * window:
        pairs += more * mask[-1].sum()
    assert counts.kernel_evaluations == 2 * int(pairs)


@pytest.mark.parametrize("causal", [True, False])
def test_in_bfloat16_it_errs_by_rounding(causal):
    q, k, v = head(300)
    form = get("window").attend_causally if causal else get("window")
    right = form(q, k, v, window=40, products="float32")
    with forced({"attention.kernels.trials.flash_attention": "bfloat16"}):
        out = form(q, k, v, window=40)
    gap = float((out - right).norm() / right.norm())
    # Products round to 2^-9 of their size.
    assert 0 < gap < 2**-8


@pytest.mark.parametrize(("n_q", "seen"), [(1, 11), (30, 40), (60, 70), (88, 100), (90, 100)])
def test_few_queries_are_the_last_ones(n_q, seen):
    """They share their own keys, the 10 before them and the first 3."""
    q, k, v = head(100)
    with counting() as counts:
        out = get("window")(q[:, -n_q:], k, v, scale=0.7, window=10, sinks=3, products="float32")
    kept = torch.arange(100) >= 100 - seen
    kept[:3] = True
    logits = 0.7 * q[:, -n_q:].double() @ k[:, kept].double().mT
    assert float((out - logits.softmax(-1) @ v[:, kept].double()).abs().max()) < 1e-5
    assert counts.kernel_evaluations == 2 * n_q * int(kept.sum())


def test_it_needs_a_key_for_each_query():
    q, k, v = head(100)
    with pytest.raises(UnavailableError, match="a key for each query, but there are 100 and 40"):
        get("window")(q, k[:, :40], v[:, :40])
