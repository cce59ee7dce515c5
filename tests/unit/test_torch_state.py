"""No output depends on torch's global state, and no call changes it or breaks a later one."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from public_calls import CALLS, METHODS, NUMERIC, inputs, numbers

from approxkmv.attention import get
from approxkmv.attention.searched.knn_gradients import knn_attention
from approxkmv.compute.torch_state import plain_torch

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def coarse_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def coarse_products_of_a_backend():
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    try:
        yield
        assert matmul.fp32_precision == "bf16"
    finally:
        # What both ways of asking agree on
        matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@contextmanager
def coarse_products_of_all_backends():
    for matmul in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
        matmul.fp32_precision = "none"
    # Unlike tf32, which few CPUs have, it changes products on any.
    torch.backends.fp32_precision = "bf16"
    try:
        yield
        # The setting for all still holds for each.
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


STATES = {
    "float32 products in fewer digits": coarse_products,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
}


@contextmanager
def tensor_cores():
    """As many programs do; products on a CPU stay as they are."""
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32 = True
    before = matmul.fp32_precision
    try:
        yield
        assert matmul.fp32_precision == before
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


if hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
    STATES["float32 products in fewer digits, of a backend"] = coarse_products_of_a_backend
    STATES["tensor cores for float32"] = tensor_cores
    STATES["float32 products in fewer digits, of all backends"] = coarse_products_of_all_backends


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_answer_is_the_same_in_any_state(name):
    tensors = inputs()
    plain = numbers(CALLS[name](*tensors))
    for state, enter in STATES.items():
        with enter():
            there = CALLS[name](*(t.clone() for t in tensors))
        assert torch.equal(numbers(there), plain), state
        # Memory that is kept from call to call was not spoiled.
        assert torch.equal(numbers(CALLS[name](*tensors)), plain), state


@pytest.mark.parametrize("name", CALLS)
def test_a_first_call_in_inference_mode_spoils_no_later_one(name):
    """Memory that is kept belongs to a thread: a new one has none yet."""

    def first_there_then_here():
        with torch.inference_mode():
            there = CALLS[name](*inputs())
        return numbers(there), numbers(CALLS[name](*inputs()))

    with ThreadPoolExecutor(1) as thread:
        there, here = thread.submit(first_there_then_here).result()
    assert torch.equal(there, here)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_does_not_wait_for_blocks_of_its_parent():
    with default_dtype(torch.float64), plain_torch():
        child = os.fork()
        if child == 0:
            with plain_torch():
                pass
            os._exit(torch.get_default_dtype() != torch.float64)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("state", ["float64 by default", "float32 products in fewer digits"])
def test_a_call_is_not_disturbed_by_the_end_of_another_threads(state):
    begun, goes_on = Event(), Event()

    def other():
        with plain_torch():
            begun.set()
            assert goes_on.wait(60)

    with STATES[state](), ThreadPoolExecutor(1) as thread:
        ends = thread.submit(other)
        assert begun.wait(60)
        with plain_torch():
            goes_on.set()
            ends.result()
            assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == (torch.float32, "highest")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hnsw", "vamana", "approxkmv"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_compile_leaves_a_method_as_it_is(name, causal):
    pytest.importorskip("faiss")
    call = get(name).attend_causally if causal else get(name)
    tensors = inputs(n=300)
    compiled = torch.compile(lambda q, k, v: call(2.0 * q, k, v), backend="eager")
    assert torch.equal(compiled(*tensors), call(2.0 * tensors[0], *tensors[1:]))


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_inputs_that_require_gradients_and_give_none(name):
    tensors = inputs()
    plain = METHODS[name](*tensors)
    out = METHODS[name](*(t.clone().requires_grad_() for t in tensors))
    assert not out.requires_grad
    assert torch.equal(out, plain)


@pytest.mark.parametrize("name", METHODS)
def test_answers_are_ordinary_tensors(name):
    with torch.inference_mode():
        out = METHODS[name](*inputs())
    assert not out.is_inference()
    out += 1


@pytest.mark.parametrize("name", NUMERIC)
def test_statistics_and_kernels_take_inputs_that_require_gradients(name):
    tensors = inputs()
    assert torch.equal(
        numbers(NUMERIC[name](*(t.clone().requires_grad_() for t in tensors))), numbers(NUMERIC[name](*tensors))
    )


@pytest.mark.parametrize("state", ["float64 by default", "bfloat16 by default", "autocast", "another default device"])
def test_sampled_gradients_are_the_same_in_any_state(state):
    def gradients():
        tensors = [t.requires_grad_() for t in inputs()]
        knn_attention(*tensors, seed=1).square().sum().backward()
        return [t.grad for t in tensors]

    plain = gradients()
    assert all(bool((g != 0).any()) for g in plain)
    tensors = [t.requires_grad_() for t in inputs()]
    with STATES[state]():
        loss = knn_attention(*tensors, seed=1).square()
    with STATES[state]():
        loss.backward(torch.ones(loss.shape, dtype=loss.dtype, device="cpu"))
    for tensor, right in zip(tensors, plain, strict=True):
        assert torch.equal(tensor.grad, right)
