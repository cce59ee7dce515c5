"""Every method keeps the contract: names, parameters, shapes, types, bad input."""

import numpy as np
import pytest
import torch

from approxkmv.attention import UnavailableError, get, methods
from approxkmv.attention.exact import naive as naive_module
from approxkmv.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n_q, n_k, d, d_v, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, w, generator=generator) for n, w in ((n_q, d), (n_k, d), (n_k, d_v)))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q, k, v, scale):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize(
    ("n_q", "n_k", "d", "d_v", "dtype"),
    [
        (97, 97, 13, 1, torch.float32),
        (50, 131, 16, 3, torch.float32),
        (83, 70, 7, 20, torch.bfloat16),
        (1, 5, 3, 1, torch.float32),
    ],
)
def test_shape_type_and_finite(name, n_q, n_k, d, d_v, dtype):
    q, k, v = inputs(n_q, n_k, d, d_v, dtype=dtype)
    if (name == "own-key" and n_q != n_k) or (name == "window" and n_q > n_k):
        with pytest.raises(UnavailableError, match=f"{n_q} and {n_k}"):
            get(name)(q, k, v)
        return
    out = get(name)(q, k, v, scale=d**-0.5, seed=3)
    assert out.shape == (2, n_q, d_v)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    if dtype == torch.bfloat16:
        # Rounding the answer to 8 bits moves it by 2^-9 of its size at most, and methods that multiply in bfloat16
        # round logits and weights alike; choices that depend on the seed must not change.
        same = get(name)(q.float(), k.float(), v.float(), scale=d**-0.5, seed=3)
        assert float((out.float() - same).norm()) < 2**-7 * float(same.norm())


def rearranged(t, how):
    """The same numbers, with rows that do not lie in order."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "stepped":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]
    return t[:, :1].expand_as(t)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", methods())
def test_the_order_of_numbers_in_memory_changes_nothing(name, causal):
    """Library calls that assume rows one after the other would read what lies beside them."""
    method = get(name)
    if causal and method.causal is None:
        pytest.skip("no causal form")
    run = method.attend_causally if causal else method
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(160, 160, 16, 16, dtype=dtype)
        right = run(*tensors, seed=3)
        for how in ("transposed", "stepped"):
            for place in range(3):
                strided = [rearranged(t, how) if i == place else t for i, t in enumerate(tensors)]
                assert torch.equal(run(*strided, seed=3), right), (how, place, dtype)
    q, k, v = inputs(40, 40, 16, 1)
    assert torch.equal(
        run(q, k, rearranged(v, "expanded"), seed=3), run(q, k, rearranged(v, "expanded").clone(), seed=3)
    )


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_hold_no_numbers_in_order_are_refused(kind):
    from approxkmv import attention_statistics, head_to_tail_ratios

    q, k, v = inputs(8, 8, 4, 4, batch=1)
    odd = q.to_sparse() if kind == "sparse" else q.to("meta")
    for call in (lambda: get("exact-sdpa")(odd, k, v), lambda: attention_statistics(odd[0], k[0])):
        with pytest.raises(InputError, match="give a dense tensor"):
            call()
    with pytest.raises(InputError, match="give a dense tensor"):
        head_to_tail_ratios(odd[0] if kind == "meta" else q[0].to_sparse(), k[0])
    assert torch.equal(get("approxkmv")(torch._neg_view(-q), k, v), get("approxkmv")(q, k, v))


def gap_to_the_means(method, **parameters):
    """Distance from exact attention, relative to the distance of the values' mean, where that is a fair rival.

    Values depend on the keys, so it matters which are attended to (logits have standard deviation 2), and their mean is
    4, so an output of zeros scores 6.7.
    """
    q, k, v = inputs(203, 203, 16, 3)
    q, v = 2 * q, 0.5 * v + k[..., :1] + 4
    right = exact(q, k, v, 0.25)
    out = method(q, k, v, scale=0.25, seed=3, **parameters)
    return float((out.double() - right).norm() / (v.double().mean(1, keepdim=True) - right).norm())


@pytest.mark.parametrize("name", methods())
def test_answers_beat_the_mean_of_the_values(name):
    """The seed is fixed. Of 20 others none gave a method more than 0.63 with its defaults or 0.01 at its grid's end.

    The cheapest setting may be worse than the mean (3.1 at most), not as bad as zeros.
    """
    method = get(name)
    if method.exact:
        assert gap_to_the_means(method) < (0.05 if method.dtype == torch.bfloat16 else 1e-4)
    elif method.trivial:
        # Rows that others should beat: nearly as good as the mean of the values, which is one of them.
        assert gap_to_the_means(method) < 1.5
    else:
        assert gap_to_the_means(method, **method.grid[0]) < 5
        assert gap_to_the_means(method) < 0.9
        assert gap_to_the_means(method, **method.grid[-1]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", methods())
def test_every_parameter_takes_its_least_value_and_more_than_a_strip_of_queries(name, causal):
    method, tensors = get(name), inputs(300, 300, 8, 2, batch=1)
    if causal and method.causal is None:
        pytest.skip("no causal form")
    for parameter, default in method.defaults.items():
        # One link of a graph is refused.
        least = 2 if parameter == "links" else int(parameter not in method.may_be_zero)
        for number in (least, 300) if type(default) is int else ():
            out = (method.attend_causally if causal else method)(*tensors, **{parameter: number})
            assert bool(out.isfinite().all())


@pytest.mark.parametrize("name", methods())
def test_same_seed_same_answer(name):
    q, k, v = inputs(90, 90, 8, 2)
    method = get(name)
    assert torch.equal(method(q, k, v, seed=5), method(q, k, v, seed=5))


@pytest.mark.parametrize("name", methods())
def test_grid_holds_known_parameters(name):
    method = get(name)
    assert method.name == name
    assert len(method.grid) >= 1
    for given in method.grid:
        assert set(method.parameters(given)) == set(method.defaults)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'local-expansion'"):
        get("local-expanson")
    with pytest.raises(InputError, match="no parameter 'blok'; it has: block"):
        get("local-expansion").parameters({"blok": 3})


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("approxkmv", {"block": 0}, "block is 0: give a whole number of at least 1"),
        ("approxkmv", {"near": -1}, "a whole number of at least 1"),
        ("approxkmv", {"samples": 1.5}, "a whole number of at least 1"),
        ("approxkmv", {"block": True}, "a whole number of at least 1"),
        ("approxkmv", {"directions": -1}, "a whole number of at least 0"),
        ("clustered", {"clusters": 0.0}, "a number above 0"),
        ("clustered", {"clusters": "2"}, "a number above 0"),
        ("approxkmv-paper", {"normalised": 1}, "true or false"),
        ("local-expansion", {"products": "bfloat17"}, "'fastest' or 'bfloat16' or 'float32'"),
        ("exact-sdpa", {"backend": 3}, "a word"),
    ],
)
def test_values_that_a_parameter_cannot_have_are_one_line(name, given, says):
    with pytest.raises(InputError, match=says) as caught:
        get(name).parameters(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("approxkmv", {"directions": 0}),
        ("local-expansion", {"directions": 0}),
        ("vattention", {"sink": 0, "window": 0}),
        ("window", {"sinks": 0}),
        ("knn", {"top": 0}),
    ],
)
def test_zero_where_it_has_a_meaning(name, given):
    assert get(name).parameters(given).items() >= given.items()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_input_is_named(which, bad):
    tensors = list(inputs(8, 8, 4, 1))
    tensors[which][1, 2, 0] = bad
    with pytest.raises(InputError, match=f"^{'qkv'[which]} holds a NaN or an infinity"):
        get("exact-fused")(*tensors)


def test_shapes_that_do_not_fit():
    q, k, v = inputs(8, 9, 4, 1)
    with pytest.raises(InputError, match="must be"):
        get("mean")(q, k, v[:, :8])
    with pytest.raises(InputError, match="float32 or float64"):
        get("mean")(q.long(), k.long(), v.long())
    with pytest.raises(InputError, match=r"repeat the key heads 3 times, as k.repeat_interleave\(3, -3\) does"):
        get("mean")(q.repeat(3, 1, 1), k, v)
    # Batch and heads the wrong way round: as many matrices, but of other heads
    with pytest.raises(InputError, match=r"k \(2, 3, 9, 4\) and v \(3, 2, 9, 1\) differ in their heads or batch"):
        get("mean")(torch.ones(2, 3, 8, 4), torch.ones(2, 3, 9, 4), torch.ones(3, 2, 9, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_every_usual_form_of_queries_keys_and_values_has_the_same_answer(dtype, causal):
    method = get("exact-naive")
    call = method.attend_causally if causal else method
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 4, generator=generator).to(dtype) for heads in (6, 3, 3))
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    expected = torch.stack([call(a, b, c) for a, b, c in zip(q, *repeated, strict=True)])
    assert expected.dtype == dtype
    assert torch.equal(call(q, k, v), expected)
    assert torch.equal(call(q[0, 0], k[0, 0], v[0, 0]), expected[0, 0])
    if dtype != torch.bfloat16:
        answer = call(q.numpy(), k.numpy(), v.numpy())
        assert answer.dtype == q.numpy().dtype
        assert np.array_equal(answer, expected.numpy())


@pytest.mark.parametrize("name", ["exact-sdpa-bf16", "exact-tiles-bf16", "window"])
def test_the_largest_numbers_of_float16_stay_finite(name):
    most = torch.finfo(torch.float16).max
    q, k, v = (torch.full((1, 5, 8), x, dtype=torch.float16) for x in (1.0, 1.0, -most))
    v[:, 4, 1] = most
    q[:, :, 0], k[:, 4, 0] = 100.0, 100.0
    given = {"products": "bfloat16"} if name == "window" else {}
    assert get(name)(q, k, v, **given)[0, 0, :2].tolist() == [-most, most]


@pytest.mark.parametrize("batch", [1, 2])
def test_naive_asks_nothing_beside_the_attention_of_few_queries(monkeypatch, batch):
    """To ask the system for free memory took longer than all the rest, as did a pass over the keys for their norms."""
    asked = []
    monkeypatch.setattr(naive_module, "free_bytes", lambda device: asked.append(device) or 2**40)
    monkeypatch.setattr(torch.Tensor, "norm", lambda tensor, dim: asked.append(dim) or tensor.square().sum(dim).sqrt())
    q, k, v = (torch.randn(batch, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 90, 91))
    # Of one query most weights are too small for a float32.
    q[0, 0] *= 100
    out = get("exact-naive")(q, k, v[:, :90], scale=1.0)
    torch.testing.assert_close(out, (q @ k.mT).softmax(-1) @ v[:, :90])
    assert asked == []
    get("exact-naive")(torch.cat([q, q[:, :1]], 1), k, v[:, :90], scale=1.0)
    assert len(asked) == 3


def test_naive_says_how_much_memory_it_lacks(monkeypatch):
    """It holds the logits and their softmax at once, 4 bytes a number."""
    free = 8 * 2 * 50 * 60
    monkeypatch.setattr(naive_module, "free_bytes", lambda device: free)
    assert get("exact-naive")(*inputs(50, 60, 4, 1)).isfinite().all()
    free -= 1
    with pytest.raises(UnavailableError, match=r"stores the 50 x 60 matrix"):
        get("exact-naive")(*inputs(50, 60, 4, 1))
