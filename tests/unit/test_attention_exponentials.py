"""No method multiplies subnormal numbers, which are many times slower, and avoiding them loses nothing visible."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from approxkmv.attention import get, methods
from approxkmv.attention.kernels.exponentials import LOWEST, exp_
from approxkmv.compute import loops as compute_loops

# Their near keys are summed relative to a block's centre, by loops of their own.
BLOCKS = {"local-expansion", "approxkmv", "clustered"}
TINY = torch.finfo(torch.float32).tiny
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "addmv_", "_embedding_bag_forward_only"}


def subnormals(tensor):
    return int(((tensor != 0) & (tensor.abs() < TINY)).sum())


class Watched(TorchDispatchMode):
    """Counts the subnormal numbers that go into products."""

    def __init__(self):
        super().__init__()
        self.products = self.subnormals = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            self.products += 1
            tensors = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
            # What a product is added to may be uninitialised where it is written over.
            self.subnormals += sum(subnormals(t) for t in tensors)
        return function(*args, **(kwargs or {}))


def sharp(n_q=300, n_k=530, d=16, d_v=20):
    """Queries and keys whose logits reach 100 and more apart in each row; values of 0.001 and more."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, n, w, generator=generator) for n, w in ((n_q, d), (n_k, d), (n_k, d_v)))
    return 6 * q, 6 * k, v.sign() * v.abs().clamp_min(1e-3)


def test_the_inputs_have_what_they_are_to_show():
    q, k, _ = sharp()
    logits = q @ k.mT
    assert subnormals((logits - logits.amax(2, keepdim=True)).exp()) > 500


# The instructions for products in bfloat16 take subnormal numbers as 0.
@pytest.mark.parametrize("name", sorted(set(methods()) - {"own-key", "window", "exact-tiles-bf16"} - BLOCKS))
@pytest.mark.parametrize("d_v", [1, 20])
def test_no_subnormal_number_in_a_product(name, d_v, monkeypatch):
    monkeypatch.setattr(compute_loops, "numba_works", lambda: False)
    with Watched() as watched:
        get(name)(*sharp(d_v=d_v), scale=1.0, seed=1)
    assert watched.products > 0 or name in ("mean", "exact-sdpa", "exact-sdpa-bf16")
    assert watched.subnormals == 0


@pytest.mark.parametrize("name", ["hyperattention", "kdeformer", "approxkmv-paper", "vkde-lsh", "knn"])
def test_no_subnormal_number_in_a_product_of_a_causal_form(name, monkeypatch):
    monkeypatch.setattr(compute_loops, "numba_works", lambda: False)
    with Watched() as watched:
        get(name).attend_causally(*sharp(n_q=530), scale=1.0, seed=1)
    assert watched.products > 0
    assert watched.subnormals == 0


def test_exponentials_in_torch():
    logits = torch.linspace(-200, 0, 4001)
    weights = exp_(logits.clone())
    right = logits.double().exp().where(logits > LOWEST + 0.1, 0.0)
    assert torch.allclose(weights.double(), right, rtol=1e-6, atol=0)
    assert exp_(torch.tensor([-torch.inf])) == 0
    assert exp_(torch.tensor([torch.nan])).isnan()


def test_exponentials_in_compiled_loops():
    """To 2e-7 over the range of normal numbers, beyond whose ends they stay, or are 0 below if they are to fade."""
    pytest.importorskip("numba")
    from approxkmv.attention.kernels.numbers import exp, fading

    logits = torch.linspace(-86.9, 88, 20001).numpy()
    right = np.exp(logits.astype(np.float64))
    for function in (exp, fading):
        np.testing.assert_allclose(np.array([function(x) for x in logits]), right, rtol=2e-7)
    ends = [exp(np.float32(x)) for x in (-1e30, 1e30)]
    np.testing.assert_allclose(ends, np.exp([-87.0, 88.0]), rtol=2e-7)
    assert [fading(np.float32(x)) for x in (-87.1, -1e30, -np.inf)] == [0, 0, 0]


def test_bfloat16_in_compiled_loops_is_that_of_torch():
    """Rounded to the nearest, ties to even: random numbers, and such as lie a quarter, a half and three between two."""
    pytest.importorskip("numba")
    from approxkmv.attention.kernels.numbers import bits, widened

    drawn = 100 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    steps = (torch.arange(0x3F800000, 0x3F880000, 0x4000, dtype=torch.int32)).view(torch.float32)
    numbers = torch.cat([drawn, steps, -steps, torch.tensor([0.0, torch.inf, -torch.inf])])
    right = numbers.to(torch.bfloat16)
    stored = [bits(x) for x in numbers.numpy()]
    assert stored == right.view(torch.uint16).tolist()
    assert [float(widened(x)) for x in stored] == right.tolist()


@pytest.mark.parametrize("d_v", [1, 20])
@pytest.mark.parametrize("distance", [30, 45, 52, 60, 200])
def test_rows_far_below_the_bound_are_right(distance, d_v):
    """A long key far from all queries lifts the bound `distance` above the logits: what is clamped is never seen.

    The other keys have equal logits, so that the answer is their mean; the long key has a value that would show.
    """
    n = 4000
    q, k = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, n, 2)
    # Half of them turned away and half of them far: the mean stays at 0.
    k[0, 0, 1], k[0, 1, 1] = distance, -distance
    k[0, 2:, 0] = 1e-3
    v = torch.randn(1, n, d_v, generator=torch.Generator().manual_seed(6))
    v[0, :2] = 1000.0
    right = (q.double() @ k.double().mT).softmax(2) @ v.double()
    out = get("exact-fused")(q, k, v, scale=1.0).double()
    # float32 sums of 4,000 terms
    assert torch.allclose(out, right, rtol=1e-5, atol=1e-5)
