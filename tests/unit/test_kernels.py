"""Lemma 4.1 holds as an identity, in logs, for any shape and either kind of array."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from approxkmv import log_kernel, reduce_attention
from approxkmv.errors import InputError


def pair(seed: int, shape_q: tuple[int, ...], shape_k: tuple[int, ...], factor: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    q = factor * torch.randn(shape_q, generator=generator, dtype=torch.float64)
    k = factor * torch.randn(shape_k, generator=generator, dtype=torch.float64)
    return q, k


@pytest.mark.parametrize(("shape_q", "shape_k"), [((7, 5), (9, 5)), ((2, 3, 6, 8), (2, 3, 4, 8)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_the_reduction_is_an_identity_in_logs(shape_q, shape_k, scale, factor):
    q, k = pair(0, shape_q, shape_k, factor)
    r = reduce_attention(q, k, scale)
    s = scale if scale is not None else shape_q[-1] ** -0.5
    distances = (r.queries.unsqueeze(-2) - r.keys.unsqueeze(-3)).square().sum(-1)
    ours = r.log_row_scale.unsqueeze(-1) - distances / (2 * r.sigma**2)
    logits = s * (q @ k.mT)
    # float64 cancellation against the largest term that is subtracted.
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-13 * float(r.log_row_scale.max() + 1) * 10)
    torch.testing.assert_close(log_kernel(q, k, scale), -distances / (2 * r.sigma**2), rtol=1e-9, atol=1e-9)


def test_log_kernel_is_at_most_zero_and_finite_at_logits_of_ten_thousand():
    q, k = pair(1, (40, 16), (40, 16), factor=50.0)
    k[3] = q[3]
    values = log_kernel(q, k)
    assert float((q @ k.mT / 4).abs().max()) > 1e4
    assert torch.isfinite(values).all()
    assert float(values.max()) <= 0.0


def test_a_query_that_equals_the_longest_key_has_an_entry_of_1():
    """But for rounding, which never lifts it above."""
    q, _ = pair(3, (300, 1, 7), (1, 1))
    values = log_kernel(q, q)
    assert float(values.max()) <= 0.0
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-13)


def test_numpy_in_numpy_out():
    q, k = pair(2, (5, 3), (6, 3))
    ours = log_kernel(q.numpy(), k.numpy())
    assert isinstance(ours, np.ndarray)
    np.testing.assert_array_equal(ours, log_kernel(q, k).numpy())
    assert isinstance(reduce_attention(q.numpy(), k.numpy()).keys, np.ndarray)


@pytest.mark.parametrize(
    ("q", "k", "scale", "word"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), None, "width"),
        (torch.ones(2, 3, 2), torch.ones(3, 3, 2), None, "batch"),
        (torch.ones(3), torch.ones(3), None, r"\(\.\.\., n_q, d\)"),
        (torch.ones(0, 2), torch.ones(3, 2), None, "no rows"),
        (torch.full((3, 2), float("nan")), torch.ones(3, 2), None, "q holds a NaN"),
        (torch.ones(3, 2), torch.full((3, 2), float("inf")), None, "k holds a NaN or an infinity"),
        (torch.ones(3, 2), torch.ones(3, 2), 0.0, "scale"),
        (torch.ones(3, 2), torch.ones(3, 2), float("nan"), "scale"),
        (torch.ones(3, 2), np.ones((3, 2)), None, "different kinds"),
        (torch.full((3, 2), 1e160, dtype=torch.float64), torch.ones(3, 2), None, "so large"),
        ([[1.0]], [[1.0]], None, "torch tensor or a NumPy array"),
    ],
)
def test_bad_input_is_one_clear_line(q, k, scale, word):
    with pytest.raises(InputError, match=word) as caught:
        log_kernel(q, k, scale)
    assert "\n" not in str(caught.value)
