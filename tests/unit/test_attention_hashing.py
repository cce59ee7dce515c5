"""Methods built on sorted angular hashing and on hash tables: what they promise about bias, budget and large logits."""

import numpy as np
import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.angular_hashing import gray_rank, sort_into_blocks
from approxkmv.attention.column_sampling import column_probabilities


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
