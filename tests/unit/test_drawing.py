"""Draws in proportion to weights, also from more of them than torch.multinomial takes."""

import math

import pytest
import torch

from approxkmv.compute import drawing

NUMBER = 20_000


@pytest.mark.parametrize("most", [2, 1 << 24])
def test_each_index_is_drawn_as_often_as_its_weight_says(most, monkeypatch):
    monkeypatch.setattr(drawing, "_MOST", most)
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 6.0, 0.0, 2.0])
    drawn = drawing.drawn(weights, NUMBER, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    shares = weights / weights.sum()
    # Five standard deviations: a false alarm in a million.
    for share, seen in zip(shares.tolist(), (drawn.bincount(minlength=7) / NUMBER).tolist(), strict=True):
        assert abs(seen - share) <= 5 * math.sqrt(share * (1 - share) / NUMBER)


def test_more_weights_than_multinomial_takes():
    weights = torch.zeros((1 << 24) + 2)
    weights[-1] = 1.0
    assert drawing.drawn(weights, 3, torch.Generator().manual_seed(0)).tolist() == [len(weights) - 1] * 3


@pytest.mark.parametrize("most", [2, 1 << 24])
def test_many_small_weights_behind_a_large_one_keep_their_share(most, monkeypatch):
    """In float32 10^8 + 1 is 10^8: none of the million others would ever be drawn."""
    monkeypatch.setattr(drawing, "_MOST", most)
    weights = torch.ones(1_000_001)
    weights[0] = 1e8
    drawn = drawing.drawn(weights, NUMBER, torch.Generator().manual_seed(0))
    share = 1e6 / (1e8 + 1e6)
    assert abs(float((drawn > 0).double().mean()) - share) <= 5 * math.sqrt(share * (1 - share) / NUMBER)


def test_small_weights_beside_a_large_sum_keep_their_share(monkeypatch):
    """In float32 2^24 + 1 is 2^24: the second index would never be drawn, and the third twice as often."""
    monkeypatch.setattr(drawing, "_MOST", 2)
    large = 2.0**24
    monkeypatch.setattr(torch, "rand", lambda number, **_: (large + torch.arange(number).double() / 2) / (large + 2))
    drawn = drawing.drawn(torch.tensor([large, 1.0, 1.0]), 4, torch.Generator())
    assert drawn.tolist() == [1, 1, 2, 2]
