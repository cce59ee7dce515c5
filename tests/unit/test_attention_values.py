"""Attention is a weighted mean: adding an offset to all values adds it to the output."""

import pytest
import torch

from approxkmv.attention import get, methods
from approxkmv.compute import loops as compute_loops

pytestmark = pytest.mark.usefixtures("one_thread")

N, D = 200, 16
# Settings that approximate at this length: of their defaults some would take every key.
FEW = {
    "approxkmv": {"block": 40, "near": 24},
    "local-expansion": {"block": 40, "near": 24},
    "clustered": {"block": 30, "near": 3},
    "approxkmv-paper": {"block": 30, "samples": 24},
    "kdeformer": {"block": 30, "samples": 24},
    "hyperattention": {"block": 30, "samples": 24},
    "vkde-lsh": {"bucket": 20},
    "balancekv": {"sink": 8, "window": 8, "block": 16},
    "top-k": {"top": 20},
    "vattention": {"sink": 2, "window": 2, "top": 10, "base": 10, "epsilon": 0.5},
    "knn": {"top": 20},
    "hnsw": {"near": 20, "samples": 20},
    "vamana": {"near": 20, "samples": 20},
    "window": {"window": 20, "sinks": 4},
}
FORMS = [(name, causal) for name in methods() for causal in (False, True) if not causal or get(name).causal]
# In bfloat16 an offset of 1,000 leaves nothing of the values.
FORMS = [(name, causal) for name, causal in FORMS if get(name).dtype == torch.float32]


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)


def inputs(d_v):
    """Two heads of logits of deviation about 2."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, N, D, generator=generator) for _ in range(2))
    return 2 * q, k, torch.randn(2, N, d_v, generator=generator) + k[..., :1]


def attend(name, causal, q, k, v, **parameters):
    if name == "knn":
        pytest.importorskip("faiss")
    method = get(name)
    return (method.attend_causally if causal else method)(q, k, v, seed=3, **{**FEW.get(name, {}), **parameters})


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("d_v", [1, 12])
@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_an_offset_of_the_values_moves_the_answer_by_it(name, causal, d_v, offset):
    """To float32's rounding of sums of the offset: 2^-24 of it for a term, whose errors may add up to a hundredfold.

    Where values are rounded to bfloat16, one of up to 4 that was moved so little may round to its other neighbour, 2^-8
    of it away, and counts with its weight.
    """
    q, k, v = inputs(d_v)
    given = (
        [{}]
        if name not in ("local-expansion", "window")
        else [{"products": products} for products in ("float32", "bfloat16")]
    )
    for parameters in given:
        plain, moved = (attend(name, causal, q, k, v + by, **parameters) for by in (0.0, offset))
        most = offset * 100 * 2**-24 + (4 * 2**-8 if parameters.get("products") == "bfloat16" else 1e-5)
        assert float((moved - offset - plain).abs().max()) < most


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("directions", [0, 48])
@pytest.mark.parametrize("d_v", [1, 8])
@pytest.mark.parametrize("name", ["approxkmv", "local-expansion"])
def test_of_one_block_too(name, d_v, directions):
    q, k, v = inputs(d_v)
    one = {"block": 2**24, "directions": directions}
    plain, moved = (attend(name, False, q, k, v + by, **one) for by in (0.0, 1000.0))
    assert float((moved - 1000 - plain).abs().max()) < 0.01
