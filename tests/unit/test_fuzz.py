"""Random calls of every kind, for about a minute: each is answered correctly or refused in one line.

benchmarks/reliability.py makes thousands of them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz import call, demand, kinds

CALLS = 60


@pytest.mark.parametrize("kind", kinds())
def test_random_calls(kind):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ends = [call(kind, seed) for seed in range(CALLS)]
    finally:
        torch.set_num_threads(before)
    assert not [f"seed {seed}: {why}" for seed, (end, why) in enumerate(ends) if end == "failed"]
    # Neither refuses all that comes nor answers what cannot be.
    assert {end for end, _ in ends} == {"answered", "refused"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rng: demand(False, "off by", 3), "Wrong: off by 3"),
        (lambda rng: np.ones(2)[5], "IndexError: index 5"),
    ],
)
def test_what_is_wrong_fails(monkeypatch, wrong, message):
    monkeypatch.setattr("fuzz.kinds", lambda: {"wrong": wrong})
    end, why = call("wrong", 0)
    assert end == "failed"
    assert why.startswith(message)


@pytest.mark.parametrize("answer", ["zeros", "the mean of all keys", "NaN", "one too many"])
def test_a_wrong_attention_is_found(monkeypatch, answer):
    """The checks can fail: an exact method is replaced by one that is not."""
    import fuzz

    from approxkmv.attention import get
    from approxkmv.attention.contract import Method

    def compute(q, k, v, *, scale, seed):
        out = v.mean(1, keepdim=True).expand(-1, q.shape[1], -1).clone()
        if answer == "one too many":
            return torch.cat([out, out], 1)
        return out.fill_(float("nan")) if answer == "NaN" else out * (answer != "zeros")

    wrong = Method(name="exact-sdpa", compute=compute, summary="", exact=True)
    monkeypatch.setattr(fuzz, "get", lambda name: wrong if name == "exact-sdpa" else get(name))
    assert sum(call("method exact-sdpa", seed)[0] == "failed" for seed in range(60)) > 6
