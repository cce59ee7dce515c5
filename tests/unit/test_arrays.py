"""Arrays of NumPy in any byte order and width give the answers of ordinary ones, or one line."""

import numpy as np
import pytest
import torch

from approxkmv import KernelOperator, attention_statistics, head_to_tail_ratios
from approxkmv.errors import InputError
from approxkmv.statistics import head_statistics
from approxkmv.statistics.gauge import gauge
from approxkmv.statistics.readings import readings
from approxkmv.statistics.streaming import length_statistics

RNG = np.random.default_rng(0)
Q, K = RNG.standard_normal((2, 60, 8))
BIAS = RNG.standard_normal((60, 60))
SPANS = np.stack([np.zeros(60, np.int64), np.arange(1, 61)], 1)
CALLS = {
    "ratios": lambda as_: head_to_tail_ratios(as_(Q), as_(K)),
    "operator": lambda as_: KernelOperator(as_(Q), as_(K), sigma=1.0, seed=0) @ as_(Q[:, 0]),
    "frozen operator": lambda as_: KernelOperator(Q, K, sigma=1.0, seed=0).as_linear_operator() @ as_(Q[:, 0]),
    "bias": lambda as_: attention_statistics(Q, K, bias=as_(BIAS)).entropy,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [np.dtype(">f8"), np.dtype(np.longdouble)])
def test_other_floats_than_the_machine_s_own(name, dtype):
    right = CALLS[name](lambda x: x)
    np.testing.assert_array_equal(np.asarray(CALLS[name](lambda x: x.astype(dtype))), np.asarray(right))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CALLS)
def test_arrays_that_may_not_be_written_are_read_without_a_warning(name):
    def read_only(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    torch.set_warn_always(True)
    try:
        CALLS[name](read_only)
    finally:
        torch.set_warn_always(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_factors_may_be_numbers_of_numpy(kind):
    assert head_to_tail_ratios(Q, K, scale=kind(0.25))[-1] == head_to_tail_ratios(Q, K, scale=0.25)[-1]
    found = attention_statistics(Q, K, softcap=kind(2)).entropy
    np.testing.assert_array_equal(found, attention_statistics(Q, K, softcap=2.0).entropy)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint64, torch.float8_e4m3fn])
def test_a_bias_of_any_type(dtype):
    bias = torch.from_numpy(np.abs(BIAS).round()).to(dtype)
    found = attention_statistics(Q, K, bias=bias).entropy
    np.testing.assert_array_equal(found, attention_statistics(Q, K, bias=np.abs(BIAS).round()).entropy)


def test_whole_numbers_in_another_byte_order():
    right = length_statistics(Q, K, spans=SPANS)[0][1]
    assert length_statistics(Q, K, spans=SPANS.astype(">i4"))[0][1] == right
    masked = [attention_statistics(Q, K, mask=spans).entropy for spans in (SPANS, SPANS.astype(">i8"))]
    assert torch.equal(*map(torch.as_tensor, masked))


Q3, K3 = (torch.from_numpy(x).expand(2, -1, -1) for x in (Q, K))
V3 = torch.ones(2, 60)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: length_statistics(Q, K, spans="abc"), "spans must be"),
        (lambda: length_statistics(Q, K, spans=SPANS + 0.9), "spans must be"),
        (lambda: length_statistics(Q, K, spans=torch.ones(60, 2, dtype=torch.bool)), "spans must be"),
        (lambda: head_to_tail_ratios(torch.ones(60, 8, dtype=torch.bool), torch.ones(60, 8)), "dtype torch.bool"),
        (lambda: head_to_tail_ratios(Q3, K3.to("meta")), "k is a meta tensor"),
        (lambda: gauge(Q3[0], K3[0], V3[0]), r"must both be \(heads, n, d\)"),
        (lambda: gauge(Q3, K3, V3, factors=[0.0]), "factors are"),
        (lambda: gauge(Q3, K3, V3, factors=[True]), "factors are"),
        (lambda: gauge(Q3, K3, V3, factors=["1"]), "factors are"),
        (lambda: gauge(Q3, K3, V3, mask=torch.ones(60, 60, dtype=torch.int64)), "mask must be a torch tensor of bool"),
        (lambda: gauge(Q3, K3, V3, mask=np.ones((60, 60), bool)), "mask must be a torch tensor of bool"),
        (lambda: head_statistics(Q, K, mask=torch.zeros(60, 60).bfloat16()), "mask must be a torch tensor or"),
        (lambda: head_statistics(Q, K, mask=np.ma.array(np.tri(60, dtype=bool), mask=False)), "a masked array's mask"),
        (lambda: readings(Q3[0], K3[0]), r"must both be \(heads, n, d\)"),
        (lambda: readings(Q3, K3, min_prefix=0), "min_prefix is 0"),
        (lambda: readings(Q3, K3, mask=torch.ones(60, 60, dtype=torch.bool)), "mask must be a NumPy array of bool"),
        (lambda: readings(Q3, K3, special=np.ones(59, bool)), "special must be a NumPy array of bool"),
    ],
)
def test_what_is_no_such_array_is_one_line(call, word):
    with pytest.raises(InputError, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)
