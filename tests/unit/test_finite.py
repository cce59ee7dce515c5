"""Finite inputs of any size give finite outputs or an InputError, which names the argument."""

import math

import pytest
import torch
from public_calls import CALLS, METHODS, NUMERIC, inputs, numbers

from approxkmv.attention.contract import LARGEST
from approxkmv.attention.searched.knn_gradients import knn_attention
from approxkmv.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def one_long(tensor, size):
    """The tensor with one row that is `size` times as long."""
    longer = tensor.clone()
    longer[:, 5] *= size
    return longer


# Factors of q, k and v, the scale, and whether one row alone is that large.
SIZES = [1e-45, 1e-30, 1e-10, 1e4, 1e9, 1e13, 1e20, 3e37]
CASES = {f"{name} times {size:g}": (name, size, False) for name in ("q", "k", "v", "q and k") for size in SIZES}
CASES |= {f"one row of {name} times {size:g}": (name, size, True) for name in ("q", "k", "v") for size in SIZES[3:]}
# Those that have none, and those with a bandwidth, which their own tests give wrong values.
WITHOUT_SCALE = {"top_eigenvalue", "graph", "graph with a guarantee", "doubling_dimension"}
WITHOUT_SCALE |= {"approx_kmv", "find_heavy", "KernelOperator"} | {name for name in CALLS if "density" in name}
SCALES = [5e-324, 1e-100, 1e-20, 1e4, 1e10, 1e20, 1e100, 1e308]


def resized(name, size, alone):
    tensors = dict(zip("qkv", inputs(), strict=True))
    for which in name.split(" and "):
        tensors[which] = one_long(tensors[which], size) if alone else size * tensors[which]
    return list(tensors.values())


def is_finite_or_refused(call, tensors, scale):
    try:
        answer = call(*tensors, scale=scale)
    except InputError as error:
        return "\n" not in str(error)
    return bool(numbers(answer).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_finite_or_refused_at_any_size(name):
    failed = [case for case, given in CASES.items() if not is_finite_or_refused(CALLS[name], resized(*given), None)]
    assert failed == []


@pytest.mark.parametrize("name", METHODS)
def test_finite_or_refused_at_any_size_in_bfloat16(name):
    for case, given in CASES.items():
        tensors = [t.to(torch.bfloat16) for t in resized(*given)]
        assert is_finite_or_refused(METHODS[name], tensors, None), case


@pytest.mark.parametrize("name", CALLS)
def test_finite_or_refused_at_any_scale(name):
    failed = [scale for scale in SCALES if not is_finite_or_refused(CALLS[name], inputs(), scale)]
    assert failed == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e40, 1e60, 1e120, 1e160, 1e300])
def test_float64_of_any_size_is_finite_or_refused(name, size):
    q, k, v = (t.double() for t in inputs())
    for tensors in ([size * q, k, v], [q, size * k, v], [q, k, size * v], [size * q, size * k, v]):
        assert is_finite_or_refused(NUMERIC[name], tensors, None)


@pytest.mark.parametrize("name", sorted(set(CALLS) - WITHOUT_SCALE))
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_a_scale_that_is_no_positive_number_is_refused(name, scale):
    with pytest.raises(InputError, match="scale is"):
        CALLS[name](*inputs(), scale=scale)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_accepted_is_right_up_to_the_limit(name):
    """Equal values come back as they are, at the limit of values and with logits of 1,000."""
    q, k, v = inputs()
    q, k = 10 * q, 10 * k
    v = torch.full_like(v, LARGEST / math.sqrt(v.shape[2]) * 0.999)
    out = METHODS[name](q, k, v)
    if name in ("kdeformer", "approxkmv-paper", "approxkmv", "approxkmv, causal"):
        # Estimates of numerator and row sum; how far they may differ is tested elsewhere.
        assert float((out / v[:, :1] - 1).abs().median()) < 0.5
    else:
        # A row's weights add up to 1 to within the rounding of its logits, 1e-7 of 1,000.
        assert torch.allclose(out, v, rtol=2**-7 if "bf16" in name else 1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_refused_is_named(name):
    q, k, v = inputs()
    for large in (1e20, 1e30, 1e38):
        with pytest.raises(InputError, match="a row of v has norm"):
            METHODS[name](q, k, torch.full_like(v, large))
    for given in ((1e20 * q, k, v, None), (q, 1e20 * k, v, None), (1e7 * q, 1e7 * k, v, None), (q, k, v, 1e20)):
        with pytest.raises(InputError, match="logits may leave float32"):
            METHODS[name](*given[:3], scale=given[3])


def test_gradients_refuse_what_methods_refuse():
    q, k, v = (t.requires_grad_() for t in inputs())
    with pytest.raises(InputError, match="logits may leave float32"):
        knn_attention(q, k, v, scale=1e20)


def test_products_beyond_float64_are_refused():
    from approxkmv import approx_kmv

    q, k, _ = (t[0].double() for t in inputs())
    with pytest.raises(InputError, match="overflows float64"):
        approx_kmv(q, k, torch.full((96,), 1e308, dtype=torch.float64), sigma=100.0, epsilon=0.5, seed=1)


@pytest.mark.parametrize("name", METHODS)
def test_the_limit_is_far_from_what_models_make(name):
    q, k, v = inputs()
    assert bool(METHODS[name](1e5 * q, 1e5 * k, 1e10 * v).isfinite().all())
