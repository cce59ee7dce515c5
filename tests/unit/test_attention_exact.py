"""The exact methods against float64, with logits at which a careless shift overflows or underflows."""

from types import SimpleNamespace

import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.exact import sdpa, tiles_bf16

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


@pytest.mark.parametrize(("n", "most"), [(1090, 6), (1024, 5), (530, 5), (300, 4)])
def test_under_a_mask_tiles_have_few_shapes_and_the_answer_of_many(monkeypatch, n, most):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, width, generator=generator) for width in (24, 24, 5))
    method = get("exact-tiles-bf16")
    right = method.attend_causally(q, k, v, scale=0.2)
    multiply, shapes = torch.mm, set()

    def seen(a, b, out):
        shapes.add(out.shape)
        return multiply(a, b, out=out)

    monkeypatch.setattr(tiles_bf16, "_SHAPES", 4)
    monkeypatch.setattr(torch, "mm", seen)
    out = method.attend_causally(q, k, v, scale=0.2)
    # Up to 4, one for the first queries and one for the last
    assert len(shapes) == most
    # Sums of weights that are 0 are added elsewhere; answers round to 8 bits.
    assert (out - right).abs().max() <= 2**-7 * right.abs().max()


def test_at_any_length_few_products_are_compiled_under_a_mask(monkeypatch):
    shapes = set()
    monkeypatch.setattr(torch, "mm", lambda a, b, out: shapes.add(out.shape))
    monkeypatch.setattr(torch, "softmax", lambda logits, dim, out: out.zero_())
    for n in (4096, 8200, 20_000):
        shapes.clear()
        tiles_bf16.method.causal(*torch.zeros(3, 1, n, 1), scale=1.0, seed=0)
        # 64, one for the first queries and one for the last; every 64 queries had had one of their own.
        assert len(shapes) <= 66


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


def test_the_fastest_backend_that_takes_the_inputs_is_found_once_for_each_kind(monkeypatch):
    """Kinds differ in the shape of each input, the type of number and the device."""
    timed = []

    def run(backend, q, k, v, scale):
        timed.append(backend)
        if backend == "cudnn":
            raise RuntimeError("no")
        return {"flash": 2.0, "efficient": 1.0 if len(timed) < 4 else 3.0}[backend]

    monkeypatch.setattr(sdpa, "_run", run)
    monkeypatch.setattr(sdpa, "_seconds", lambda run, device: run())
    monkeypatch.setattr(sdpa, "_fastest", {})

    def inputs(n_q=5, n_k=6, d_v=7, dtype=torch.float32, device=0):
        shapes = (n_q, 4), (n_k, 4), (n_k, d_v)
        return [SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda", device)) for shape in shapes]

    assert sdpa.choose_backend(*inputs(), 1.0) == "efficient"
    assert sdpa.choose_backend(*inputs(), 1.0) == "efficient"
    assert timed == ["cudnn", "flash", "efficient"]
    for other in ({"n_q": 6}, {"n_k": 7}, {"d_v": 8}, {"dtype": torch.bfloat16}, {"device": 1}):
        assert sdpa.choose_backend(*inputs(**other), 1.0) == "flash"
    assert len(timed) == 6 * 3


def test_of_several_times_the_shortest_counts(monkeypatch):
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(sdpa.time, "perf_counter", lambda: next(times))
    assert sdpa._seconds(lambda: None, torch.device("cpu")) == 1.0


def test_wide_values_are_taken_256_columns_at_a_time(monkeypatch):
    """The fused backends of a GPU take no more."""
    given = []

    def attention(q, k, v, **others):
        given.append({t.shape[-1] for t in (q, k, v)})
        return scaled_dot_product_attention(q, k, v, **others)

    scaled_dot_product_attention = sdpa.scaled_dot_product_attention
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", attention)
    q, k, v = (torch.randn(1, 9, width, generator=torch.Generator().manual_seed(1)) for width in (24, 24, 300))
    out = sdpa._run("math", q, k, v, 1.0)
    assert given == [{256}, {256}]
    assert torch.allclose(out, (q @ k.mT).softmax(2) @ v, atol=1e-5)
