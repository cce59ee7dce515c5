"""The Gaussian kernel to all digits, wherever the points lie, with every evaluation counted."""

from __future__ import annotations

import numpy as np
import pytest

from approxkmv.kmv.gaussian import GaussianKernel

ROWS, COLUMNS = np.array([4, 0, 7, 7]), np.array([11, 2, 3])


@pytest.mark.parametrize("apart", [0.0, 1e2, 1e4, 1e6, 1e10])
def test_entries_are_those_of_the_differences(apart):
    """Queries and keys in two groups this far apart: by |q|^2 + |k|^2 - 2 <q, k> alone, entries would be noise."""
    rng = np.random.default_rng(0)
    queries, keys = (rng.standard_normal((n, 5)) for n in (9, 12))
    queries[::2], keys[::2] = queries[::2] + apart, keys[::2] + apart
    kernel = GaussianKernel(queries, keys, 0.7)
    right = -((queries[:, None] - keys) ** 2).sum(2) / (2 * 0.7**2)
    close = {"rtol": 1e-9, "atol": 1e-8 if apart < 1e4 else 1e-12}
    for found, part in (
        (kernel.log_rows(slice(2, 6)), right[2:6]),
        (kernel.log_rows(ROWS), right[ROWS]),
        (kernel.log_rows(ROWS, COLUMNS), right[np.ix_(ROWS, COLUMNS)]),
        (kernel.log_pairs(ROWS[:3], COLUMNS, chunk=2), right[ROWS[:3], COLUMNS]),
    ):
        visible = part > -700
        assert visible.any()
        np.testing.assert_allclose(found[visible], part[visible], **close)
        assert (found <= 0).all()
        assert not np.exp(found[~visible]).any()
    assert kernel.computed == 4 * 12 + 4 * 12 + 4 * 3 + 3


@pytest.mark.parametrize("size", [1e6, 1e17, 1e100])
def test_one_far_key_costs_the_others_no_digits(size):
    rng = np.random.default_rng(1)
    queries, keys = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))
    keys[2] = size
    kernel = GaussianKernel(queries, keys, 1.3)
    right = -((queries[:, None] - keys) ** 2).sum(2) / (2 * 1.3**2)
    found, near = kernel.log_rows(slice(0, 4)), [0, 1, 3, 4]
    np.testing.assert_allclose(found[:, near], right[:, near], rtol=1e-12)
    assert (found[:, 2] < -1000).all()
    np.testing.assert_allclose(kernel.log_pairs(np.arange(4), np.array(near)), right[np.arange(4), near], rtol=1e-12)


@pytest.mark.parametrize("apart", [0.0, 1e9])
def test_no_entry_is_above_1_and_those_of_equal_points_are_1(apart):
    """300 x 300 pairs, more than are computed together."""
    points = np.random.default_rng(2).standard_normal((300, 5)) + apart * (np.arange(300) == 0)[:, None]
    found = GaussianKernel(points, points, 0.5).log_rows(slice(0, 300))
    assert found.max() <= 0.0
    assert found.diagonal() == pytest.approx(0.0, abs=1e-12)
    near = np.equal.outer(np.arange(300) == 0, np.arange(300) == 0)
    right = -2.0 * ((points[:, None] - points) ** 2).sum(2)
    np.testing.assert_allclose(found[near], right[near], rtol=1e-9, atol=1e-12)
