"""The oracle that keeps each query's largest scores."""

import pytest
import torch

from approxkmv.attention import get

pytestmark = pytest.mark.usefixtures("one_thread")


def heads(n_q, n_k, d, d_v):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(n_q, d, generator=generator), torch.randn(n_k, d, generator=generator)
    return q, k, torch.randn(n_k, d_v, generator=generator) + k[:, :1]


def by_hand(logits, v, top):
    """Softmax over each row's `top` largest logits, in float64; and the share of the row sum that this drops."""
    kept = logits.argsort(1).argsort(1) >= logits.shape[1] - top
    whole = logits.softmax(1)
    return logits.masked_fill(~kept, -torch.inf).softmax(1) @ v.double(), 1 - (whole * kept).sum(1)


@pytest.mark.parametrize(("n_q", "n_k", "d_v"), [(1, 700, 1), (300, 700, 12), (700, 41, 3)])
@pytest.mark.parametrize("top", [1, 20, 1000])
def test_it_is_softmax_over_the_largest_scores(n_q, n_k, d_v, top):
    q, k, v = heads(n_q, n_k, 8, d_v)
    logits = 0.5 * q.double() @ k.double().mT
    right, dropped = by_hand(logits, v, min(top, n_k))
    out = get("top-k")(q[None], k[None], v[None], scale=0.5, top=top)[0]
    assert (out.double() - right).abs().max() < 1e-5
    exact = logits.softmax(1) @ v.double()
    assert bool(((out - exact).norm(dim=1) <= 2 * dropped * v.double().norm(dim=1).max() + 1e-5).all())


def test_the_causal_form_chooses_among_the_keys_so_far():
    q, k, v = heads(600, 600, 8, 2)
    logits = 0.5 * q.double() @ k.double().mT
    out = get("top-k").attend_causally(q[None], k[None], v[None], scale=0.5, top=20)[0]
    for i in (0, 5, 19, 20, 255, 256, 300, 599):
        right, _ = by_hand(logits[i : i + 1, : i + 1], v[: i + 1], min(20, i + 1))
        assert (out[i].double() - right).abs().max() < 1e-5
