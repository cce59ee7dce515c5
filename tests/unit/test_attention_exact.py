"""The exact methods against float64, with logits at which a careless shift overflows or underflows."""

import pytest
import torch

from approxkmv.attention import get

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 logits of size L carry an error of about L 6e-8, which the weights inherit.
EPSILON = 6e-8


@pytest.mark.parametrize("name", ["exact-naive", "exact-sdpa", "exact-fused"])
@pytest.mark.parametrize("d_v", [1, 3, 40])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_against_float64(name, d_v, scale):
    generator = torch.Generator().manual_seed(1)
    # More than one tile, none of them full at the end
    q, k = torch.randn(1, 530, 24, generator=generator), torch.randn(1, 1100, 24, generator=generator)
    v = torch.randn(1, 1100, d_v, generator=generator)
    logits = scale * q.double() @ k.double().mT
    right = logits.softmax(-1) @ v.double()
    gap = (get(name)(q, k, v, scale=scale).double() - right).norm() / right.norm()
    assert gap < 30 * EPSILON * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("name", ["exact-naive", "exact-sdpa", "exact-fused"])
@pytest.mark.parametrize(("d_v", "scale"), [(1, 0.1), (40, 1.0), (3, 30.0)])
def test_causal_forms_against_float64(name, d_v, scale):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 1100, width, generator=generator) for width in (24, 24, d_v))
    logits = scale * q.double() @ k.double().mT
    future = torch.ones(1100, 1100, dtype=torch.bool).triu(1)
    right = logits.masked_fill(future, -torch.inf).softmax(-1) @ v.double()
    gap = (get(name).attend_causally(q, k, v, scale=scale).double() - right).norm() / right.norm()
    assert gap < 30 * EPSILON * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("name", ["exact-sdpa-bf16", "exact-tiles-bf16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d_v", [1, 40, 300])
def test_bfloat16_is_exact_up_to_its_rounding_and_casts_within_the_call(name, is_causal, d_v):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 530, width, generator=generator) for width in (24, 24, d_v))
    method = get(name)
    out = (method.attend_causally if is_causal else method)(q, k, v, scale=0.2)
    assert (out.dtype, out.shape) == (torch.float32, (2, 530, d_v))
    logits = 0.2 * q.double() @ k.double().mT
    if is_causal:
        logits.masked_fill_(torch.ones(530, 530, dtype=torch.bool).triu(1), -torch.inf)
    right = logits.softmax(-1) @ v.double()
    gap = float((out.double() - right).norm() / right.norm())
    # Inputs, weights and answer are rounded by up to 2^-9 each; an answer without any rounding was not in bfloat16.
    assert 2**-11 < gap < 2**-5
    assert torch.equal(out, out.bfloat16().float())


def test_fused_survives_a_bound_that_underflows():
    """One long key turned away from all queries makes the Cauchy-Schwarz shift useless."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 40, 8, generator=generator).abs(), torch.randn(1, 600, 8, generator=generator)
    k[0, 17] = -1000.0
    v = torch.randn(1, 600, 2, generator=generator)
    logits = q.double() @ k.double().mT
    out = get("exact-fused")(q, k, v, scale=1.0)
    # Centring keys of length 1,000 costs three digits.
    assert (out.double() - logits.softmax(-1) @ v.double()).abs().max() < 1e-3


def test_all_keys_moved_together_change_nothing():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 300, 8, generator=generator) for _ in range(3))
    moved = get("exact-fused")(q, k + 5.0, v, scale=1.0)
    assert torch.allclose(moved, get("exact-fused")(q, k, v, scale=1.0), atol=1e-4)
