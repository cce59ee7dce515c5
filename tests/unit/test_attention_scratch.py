"""No memory is read before it is written: filling uninitialised memory with NaN changes no output."""

import numpy as np
import pytest
import torch

from approxkmv.attention import get, methods
from approxkmv.attention.blocks import chunks
from approxkmv.compute import loops as compute_loops
from approxkmv.compute import scratch as compute_scratch
from approxkmv.compute.counting import counting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)


def poison(monkeypatch):
    """NaN in every float that torch, NumPy or `scratch` hands out uninitialised."""

    def filled(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if isinstance(out, np.ndarray):
                if out.dtype.kind == "f":
                    out.fill(np.nan)
            elif out.is_floating_point():
                out.fill_(torch.nan)
            return out

        return made

    monkeypatch.setattr(compute_scratch, "_POISONED", True)
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
        (np, ("empty", "empty_like")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def attend(name, causal, inputs, **parameters):
    method = get(name)
    with counting() as counts:
        out = (method.attend_causally if causal else method)(*inputs, seed=3, **parameters)
    assert counts.recomputed_rows == 0
    return out


# Queries, keys, dimensions, columns of the values: widths that fill no tile of a product, and such that do.
SHAPES = [(400, 400, 100, 1), (300, 330, 12, 21), (330, 330, 64, 64)]
FORMS = [(name, causal) for name in methods() for causal in (False, True) if not causal or get(name).causal]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_nothing_is_read_before_it_is_written(name, causal, shape, dtype, monkeypatch):
    n_q, n_k, d, d_v = shape
    n_q = n_k if causal or name in ("own-key", "window") else n_q
    if name == "knn":
        pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n, w, generator=generator).to(dtype) for n, w in ((n_q, d), (n_k, d), (n_k, d_v))]
    monkeypatch.setattr(chunks, "EXACT_BELOW", 64)
    # Approximations that approximate: few near keys, and the number type of their products that has AMX kernels.
    few = {"local-expansion": {"block": 32, "near": 24}, "approxkmv": {"block": 32, "near": 24}}
    parameters = [few.get(name, {})]
    if name == "local-expansion":
        parameters = [{**few[name], "products": products} for products in ("float32", "bfloat16")]
        parameters.append({**few[name], "directions": 0})
    for given in parameters:
        right = attend(name, causal, inputs, **given)
        assert bool(right.isfinite().all())
        with monkeypatch.context() as poisoned:
            poison(poisoned)
            assert torch.equal(attend(name, causal, inputs, **given), right)


def test_scratch_is_kept_while_it_is_large_enough_and_apart_for_each_mode_and_type():
    from approxkmv.compute.scratch import scratch

    with torch.inference_mode():
        inside = scratch("a test", 2, 3)
    outside = scratch("a test", 2, 3)
    outside.fill_(1.0)  # torch refuses to write memory of inference mode outside it
    assert scratch("a test", 6).data_ptr() == scratch("a test", 5).data_ptr() == outside.data_ptr() != inside.data_ptr()
    assert scratch("a test", 6, dtype=torch.int64).dtype == torch.int64
    assert scratch("a test", 4, 2).shape == (4, 2)
